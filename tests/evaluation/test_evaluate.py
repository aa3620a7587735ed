"""The commands evaluate and compare, on files."""

import csv
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import ASCII, LABELS, make_case, write_image
from test_statistics import slow_wilcoxon

from nnunet_semiseg import cli
from nnunet_semiseg.commands.compare import short_names
from nnunet_semiseg.commands.evaluate import parse_labels, tolerances
from nnunet_semiseg.evaluation import cases as evaluation_cases
from nnunet_semiseg.evaluation.cases import COUNTS
from nnunet_semiseg.evaluation.comparison import MEAN
from nnunet_semiseg.evaluation.metrics import DISTANCES, METRICS, Rules, case_metrics
from nnunet_semiseg.segmentations import Classes

SPACING = (0.8, 1.0, 3.0)
CASES = ("a", "b", "c", "d")


@pytest.fixture
def folders(tmp_path):
    """Ground truth as nnU-Net keeps it, beside dataset.json, and predictions as nnU-Net writes them."""
    truth, prediction = tmp_path / "dataset" / "labelsTr", tmp_path / "validation"
    for i, case in enumerate(CASES):
        labels = make_case(i)[1]
        write_image(labels, truth / f"{case}.nii.gz", SPACING)
        write_image(np.roll(labels, (i, 2, -1), (0, 1, 2)), prediction / f"{case}.nii.gz", SPACING)
    description = {"channel_names": {"0": "MRI"}, "labels": LABELS, "numTraining": 4, "file_ending": ".nii.gz"}
    (tmp_path / "dataset" / "dataset.json").write_text(json.dumps(description))
    (prediction / "summary.json").write_text("{}")
    (prediction / "progress.png").write_bytes(b"not a label map")
    return truth, prediction


def evaluate(folders, *options, np=1):
    truth, prediction = folders
    return cli.main(["evaluate", "-g", str(truth), "-p", str(prediction), "-np", str(np), *map(str, options)])


def read(folder):
    return json.loads((folder / "evaluation.json").read_text())


def array(file):
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


def test_every_case_and_class_is_in_the_files_with_its_metrics(folders, capsys):
    truth, prediction = folders
    assert evaluate(folders) == 0
    classes = Classes(("ball", "core"), ((1,), (2,)), known=frozenset({0, 1, 2}))
    expected = {
        case: case_metrics(
            array(truth / f"{case}.nii.gz"), array(prediction / f"{case}.nii.gz"), SPACING[::-1], classes, Rules((2, 2))
        )
        for case in CASES
    }
    content = read(prediction)
    assert [record["case"] for record in content["metric_per_case"]] == list(CASES)
    for record in content["metric_per_case"]:
        assert record["metrics"] == {
            name: pytest.approx(values, rel=1e-6) for name, values in expected[record["case"]].items()
        }
        assert record["spacing"] == pytest.approx(SPACING[::-1])
    with open(prediction / "evaluation.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"], row["class"]) for row in rows] == list(itertools.product(CASES, ("ball", "core")))
    for row in rows:
        values = expected[row["case"]][row["class"]]
        assert {m: float(row[m]) for m in (*COUNTS, *METRICS)} == pytest.approx(values, rel=1e-6)
        assert (row["NSD_tolerance_mm"], row["distance_unit"]) == ("2.0", "mm")
    dice = [expected[case]["core"]["Dice"] for case in CASES]
    statistics = content["summary"]["core"]["Dice"]
    assert statistics["mean"] == content["mean"]["core"]["Dice"] == pytest.approx(np.mean(dice))
    assert statistics["sd"] == pytest.approx(np.std(dice, ddof=1)) and statistics["cases"] == 4
    printed = capsys.readouterr().out
    low, high = statistics["ci95"]
    assert f"{np.mean(dice):.3f} ± {np.std(dice, ddof=1):.3f} [{low:.3f}, {high:.3f}]" in printed
    assert "HD95, mm" in printed and "2 mm" in printed and "3 x 1 x 0.8 mm" in printed
    # A second time, with the results of the first in the folder.
    assert evaluate(folders) == 0 and read(prediction) == content
    assert sorted(p.name for p in prediction.iterdir() if not p.name.endswith(".nii.gz")) == [
        "evaluation.csv",
        "evaluation.json",
        "progress.png",
        "summary.json",
    ]


def test_a_terminal_that_knows_ascii_alone(folders):
    truth, prediction = folders
    command = [sys.executable, "-m", "nnunet_semiseg.cli", "evaluate", "-g", truth, "-p", prediction, "-np", 1]
    result = subprocess.run(list(map(str, command)), env=os.environ | ASCII, capture_output=True, check=True)
    assert b"Mean ? standard deviation" in result.stdout and read(prediction)["summary"]


@pytest.mark.parametrize("kind", ["labels", "regions_ignore"])
def test_dice_equals_that_of_nnunet(folders, tmp_path, kind):
    from conftest import DATASETS
    from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    truth, prediction = folders
    _, labels, order = DATASETS[kind]
    if "ignore" in labels:
        for i, case in enumerate(CASES):
            write_image(make_case(i, ignore=True)[1], truth / f"{case}.nii.gz", SPACING)
    # A class that one map lacks, and one that both lack.
    write_image(np.minimum(array(prediction / "a.nii.gz"), 1), prediction / "a.nii.gz", SPACING)
    for folder in folders:
        both = array(folder / "b.nii.gz")
        both[both == 2] = 1
        write_image(both, folder / "b.nii.gz", SPACING)
    description = {"labels": labels, "file_ending": ".nii.gz", **({"regions_class_order": order} if order else {})}
    (tmp_path / "own.json").write_text(json.dumps(description))
    manager = LabelManager(labels, order)
    wanted = manager.foreground_regions if manager.has_regions else manager.foreground_labels
    expected = compute_metrics_on_folder(
        str(truth), str(prediction), None, SimpleITKIO(), ".nii.gz", wanted, manager.ignore_label, 1
    )
    assert evaluate(folders, "-djfile", tmp_path / "own.json", "-o", tmp_path / "out") == 0
    content = read(tmp_path / "out")
    for name, key in zip([n for n in labels if n not in ("background", "ignore")], wanted):
        theirs, mine = expected["mean"][key], content["mean"][name]
        assert (mine["Dice"], mine["Jaccard"]) == pytest.approx((theirs["Dice"], theirs["IoU"]))
        for record, their_record in zip(content["metric_per_case"], expected["metric_per_case"]):
            counts = {count: their_record["metrics"][key][count] for count in COUNTS}
            assert {count: record["metrics"][name][count] for count in COUNTS} == counts
    assert content["foreground_mean"]["Dice"] == pytest.approx(expected["foreground_mean"]["Dice"])


@pytest.mark.slow
def test_the_result_does_not_depend_on_the_number_of_processes(folders, tmp_path):
    for processes in (1, 2):
        assert evaluate(folders, "-o", tmp_path / str(processes), np=processes) == 0
    for name in ("evaluation.csv", "evaluation.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_labels_come_from_the_command_line_or_a_dataset(folders, work, tmp_path):
    truth, prediction = folders
    shutil.copytree(truth.parent, work / "raw" / "Dataset870_labels")
    assert evaluate(folders, "-d", 870, "-o", tmp_path / "dataset") == 0
    # With the ending of dataset.json unknown, other images are in the way.
    (prediction / "progress.png").unlink()
    (truth.parent / "dataset.json").unlink()
    assert evaluate(folders, "--labels", 1, 2, "-o", tmp_path / "numbers") == 0
    assert evaluate(folders, "--labels", "core=2", "whole=1,2", "-o", tmp_path / "names") == 0
    dataset, numbers, names = (read(tmp_path / name)["mean"] for name in ("dataset", "numbers", "names"))
    assert list(dataset) == ["ball", "core"] and list(numbers) == ["1", "2"] and list(names) == ["core", "whole"]
    assert dataset["core"] == numbers["2"] == names["core"] and names["whole"] not in (dataset["ball"], dataset["core"])


def test_options_are_those_of_the_metrics(folders, tmp_path, capsys):
    truth, prediction = folders
    write_image(np.minimum(array(prediction / "a.nii.gz"), 1), prediction / "a.nii.gz", SPACING)
    for folder in folders:
        write_image(np.minimum(array(folder / "b.nii.gz"), 1), folder / "b.nii.gz", SPACING)
    assert evaluate(folders) == 0
    printed = capsys.readouterr().out
    assert "core: in 1 case(s) neither map has it (left out)." in printed
    assert "core: in 1 case(s) the prediction misses it (overlap 0, distances the diagonal of the image)." in printed
    content = read(prediction)
    assert content["summary"]["core"]["HD"]["cases"] == 3
    diagonal = math.hypot(*np.multiply(array(truth / "a.nii.gz").shape, SPACING[::-1]))
    assert content["metric_per_case"][0]["metrics"]["core"]["HD95"] == pytest.approx(diagonal)
    assert content["metric_per_case"][1]["metrics"]["core"]["Dice"] is None

    options = ["--both-empty", "perfect", "--one-empty", "leave-out", "--unit", "voxel", "--tolerance", "core=0.5", "1"]
    assert evaluate(folders, *options, "-o", tmp_path) == 0
    printed = capsys.readouterr().out
    assert "HD95_pooled, voxel" in printed and "0.5 mm" in printed
    content = read(tmp_path)
    cases = content["summary"]["core"]
    assert (cases["HD"]["cases"], cases["Dice"]["cases"]) == (3, 4)
    classes = Classes(("ball", "core"), ((1,), (2,)), known=frozenset({0, 1, 2}))
    maps = [array(folder / "c.nii.gz") for folder in folders]
    expected = case_metrics(*maps, SPACING[::-1], classes, Rules((1, 0.5), unit="voxel"))
    record = content["metric_per_case"][2]["metrics"]
    assert record == {name: pytest.approx(values, rel=1e-6) for name, values in expected.items()}


def test_2d_images(tmp_path):
    for name, shift in (("truth", 0), ("prediction", 3)):
        for i in range(2):
            labels = np.roll(make_case(i)[1][8], shift, 1)
            write_image(labels, tmp_path / name / f"{i}.png")
    assert evaluate((tmp_path / "truth", tmp_path / "prediction"), "--labels", 1, 2) == 0
    assert read(tmp_path / "prediction")["metric_per_case"][0]["metrics"]["2"]["HD"] == 3


def test_whole_numbers_in_floating_point_are_labels(folders, tmp_path):
    truth, prediction = folders
    assert evaluate(folders, "-o", tmp_path / "integers") == 0
    for case in CASES:
        file = prediction / f"{case}.nii.gz"
        write_image(array(file).astype(np.float32), file, SPACING)
    assert evaluate(folders, "-o", tmp_path / "floats") == 0
    assert read(tmp_path / "floats") == read(tmp_path / "integers")


# ------------------------------------------------------------------------------------------------------------ bad input


def fails(capsys, folders, *options):
    """The lines that a failing call prints, without the progress bar; nothing is written."""
    assert evaluate(folders, *options) == 1
    assert not list(folders[1].glob("evaluation.*[!d]"))
    return [line for line in capsys.readouterr().err.splitlines() if line and "Evaluating:" not in line]


def test_ground_truth_has_to_be_there_for_every_prediction(folders, capsys):
    (folders[0] / "b.nii.gz").unlink()
    (line,) = fails(capsys, folders)
    assert line.startswith(f"Error: {folders[1] / 'b.nii.gz'} has no ground truth in {folders[0]} (1 of 4")


def test_predictions_of_some_cases_are_evaluated_only_with_chill(folders, capsys):
    for case in "bc":
        (folders[1] / f"{case}.nii.gz").unlink()
    (line,) = fails(capsys, folders)
    assert f"{folders[0] / 'b.nii.gz'} has no prediction" in line and "2 of 4" in line and "--chill" in line
    assert evaluate(folders, "--chill") == 0
    assert [record["case"] for record in read(folders[1])["metric_per_case"]] == ["a", "d"]


def shifted(file):
    image = sitk.ReadImage(str(file))
    image.SetOrigin((1.0, 0.0, 0.0))
    sitk.WriteImage(image, str(file))


@pytest.mark.parametrize(
    "spoil, complaint",
    [
        (lambda f: f.write_bytes(f.read_bytes()[:200]), "b.nii.gz cannot be read"),
        (lambda f: write_image(array(f) * 0.5, f, SPACING), "b.nii.gz has fractions, such as 0.5"),
        (lambda f: write_image(array(f) * 3, f, SPACING), "b.nii.gz has the label 3, but only 0, 1, 2 are known"),
        (lambda f: write_image(array(f)[1:], f, SPACING), "different geometry: sizes 24 x 26 x 16 and 24 x 26 x 15"),
        (lambda f: write_image(array(f), f, (1.0, 1.0, 3.0)), "different geometry: spacings"),
        (shifted, "different geometry: origins"),
        (lambda f: (f.unlink(), f.symlink_to("/not/mounted")), "b.nii.gz cannot be read: it links to /not/mounted"),
    ],
)
def test_a_case_that_cannot_be_used_is_named_and_the_others_are_kept(folders, capsys, spoil, complaint):
    truth, prediction = folders
    good = (prediction / "b.nii.gz").read_bytes()
    # macOS leaves such files, which are no cases.
    (prediction / "._a.nii.gz").write_bytes(b"macOS")
    spoil(prediction / "b.nii.gz")
    # The results of an earlier call are not those of these files any more.
    for name in ("evaluation.csv", "evaluation.json"):
        (prediction / name).write_text("old")
    error, cure = fails(capsys, folders)
    assert error.startswith("Error: ") and complaint in error and str(prediction / "b.nii.gz") in error
    assert cure.startswith("1 of 4 cases could not be evaluated")
    # What is there for the others is used again: a value that no evaluation gives shows it.
    kept = prediction / "evaluation.unfinished"
    assert sorted(p.name for p in kept.iterdir()) == ["a.json", "c.json", "d.json"]
    for case in "ac":
        part = json.loads((kept / f"{case}.json").read_text())
        part["record"]["metrics"]["core"]["Dice"] = 7.0
        (kept / f"{case}.json").write_text(json.dumps(part))
    (prediction / "b.nii.gz").unlink()
    (prediction / "b.nii.gz").write_bytes(good)
    # A prediction that has changed since is evaluated again, and so is one whose result is damaged.
    write_image(array(truth / "c.nii.gz"), prediction / "c.nii.gz", SPACING)
    (kept / "d.json").write_text('{"key"')
    assert evaluate(folders) == 0
    dice = [record["metrics"]["core"]["Dice"] for record in read(prediction)["metric_per_case"]]
    assert dice[0] == 7 and dice[2] == 1 and 0 <= dice[1] < 1 and 0 <= dice[3] < 1
    assert not kept.exists()


def test_other_options_do_not_continue_an_unfinished_evaluation(folders, capsys):
    good = (folders[1] / "b.nii.gz").read_bytes()
    (folders[1] / "b.nii.gz").write_bytes(b"")
    fails(capsys, folders)
    (folders[1] / "b.nii.gz").write_bytes(good)
    assert evaluate(folders, "--unit", "voxel") == 0
    mixed = read(folders[1])
    assert evaluate(folders, "--unit", "voxel") == 0 and read(folders[1]) == mixed


def test_a_version_with_other_metrics_does_not_continue_an_unfinished_evaluation(folders, capsys, monkeypatch):
    good = (folders[1] / "b.nii.gz").read_bytes()
    (folders[1] / "b.nii.gz").write_bytes(b"")
    with monkeypatch.context() as other_version:
        other_version.setattr(evaluation_cases, "METRICS", (*METRICS, "CSI"))
        fails(capsys, folders)
    (part,) = (folders[1] / "evaluation.unfinished").glob("a.json")
    content = json.loads(part.read_text())
    content["record"]["metrics"]["ball"]["CSI"] = 0.5
    part.write_text(json.dumps(content))
    (folders[1] / "b.nii.gz").write_bytes(good)
    assert evaluate(folders) == 0
    assert "CSI" not in (folders[1] / "evaluation.json").read_text()


def test_4d_label_maps_are_refused(tmp_path, capsys):
    series = sitk.JoinSeries([sitk.GetImageFromArray(make_case(i)[1]) for i in range(2)])
    for name in ("truth", "prediction"):
        (tmp_path / name).mkdir()
        sitk.WriteImage(series, str(tmp_path / name / "x.nii.gz"))
    error, _ = fails(capsys, (tmp_path / "truth", tmp_path / "prediction"), "--labels", 1, 2)
    assert f"{tmp_path / 'truth' / 'x.nii.gz'} is 4D. Split it" in error


@pytest.mark.parametrize(
    "options, complaint",
    [
        (["--labels", "liver"], "--labels liver is not a label or NAME=LABEL"),
        (["--labels", "liver=0"], "--labels liver=0 is not a label"),
        (["--labels", "a=1", "a=2"], "--labels has a twice"),
        (["--labels", "ignore=2"], "--labels has no class"),
        (["--labels", "a=1", "ignore=254,255"], "--labels ignore=254,255: only one label can be ignored"),
        (["--tolerance", "spleen=1"], "there is no class spleen, but ball, core"),
        (["--tolerance", "-1"], "--tolerance -1 is not a number of mm"),
        (["--tolerance", "core=x"], "--tolerance core=x is not a number of mm"),
        (["-djfile", "nowhere.json"], "nowhere.json is missing"),
        (["-d", "999"], "There is no dataset 999"),
        (["-np", "0"], "-np 0 is not a number of processes"),
    ],
)
def test_wrong_options_are_told_in_one_line(folders, work, capsys, options, complaint):
    (folders[1] / "progress.png").unlink()
    (line,) = fails(capsys, folders, *options)
    assert complaint in line


@pytest.mark.parametrize("content", ['["ball"]', "{}", '{"labels": ["ball"]}', '{"labels": 3}', "{"])
def test_a_file_that_is_no_dataset_json_is_named_in_one_line(folders, tmp_path, capsys, content):
    (tmp_path / "own.json").write_text(content)
    (line,) = fails(capsys, folders, "-djfile", tmp_path / "own.json")
    assert line.startswith(f"Error: {tmp_path / 'own.json'}")


def test_intervals_are_for_patients_if_these_are_known(folders, tmp_path):
    assert evaluate(folders, "-o", tmp_path / "cases") == 0
    # a and b are one patient, c and d another: means stay the same.
    for case, name in zip(CASES, ("p1_x", "p1_y", "p2_x", "p2_y")):
        for folder in folders:
            (folder / f"{case}.nii.gz").rename(folder / f"{name}.nii.gz")
    assert evaluate(folders, "-o", tmp_path / "patients", "--patient", r"p\d") == 0
    of_cases, of_patients = (read(tmp_path / kind)["summary"]["core"]["Dice"] for kind in ("cases", "patients"))
    dice = [record["metrics"]["core"]["Dice"] for record in read(tmp_path / "patients")["metric_per_case"]]
    assert of_patients["mean"] == of_cases["mean"] and of_patients["ci95"] != of_cases["ci95"]
    assert of_patients["ci95"] == pytest.approx(sorted([np.mean(dice[:2]), np.mean(dice[2:])]))
    assert evaluate(folders, "-o", tmp_path / "one", "--patient", "p") == 0
    assert read(tmp_path / "one")["summary"]["core"]["Dice"]["ci95"] == [None, None]


def test_labels_have_to_come_from_somewhere(folders, capsys):
    (folders[0].parent / "dataset.json").unlink()
    (line,) = fails(capsys, folders)
    assert "There is no dataset.json in" in line and "--labels" in line


def test_parsing_of_labels_and_tolerances():
    classes = parse_labels(["liver=1", "kidneys=2,3", "7", "ignore=255"])
    assert classes.names == ("liver", "kidneys", "7") and classes.values == ((1,), (2, 3), (7,))
    assert classes.ignore == 255 and classes.known == {0, 1, 2, 3, 7, 255}
    assert tolerances([], classes) == (2, 2, 2)
    assert tolerances(["7=0.5", "1"], classes) == (1, 1, 0.5)
    assert tolerances(["kidneys=3"], classes) == (2, 3, 2)


# -------------------------------------------------------------------------------------------------------------- compare


@pytest.fixture
def models(tmp_path):
    """``models(shifts, cases)``: outputs of evaluate of models whose predictions are shifted by so many voxels."""

    def make(shifts, cases=8, classes=("ball", "core"), **settings):
        folders = []
        for model, shift in enumerate(shifts):
            random = np.random.RandomState(model)
            metrics_per_case = []
            for i in range(cases):
                by_class = {}
                for name in classes:
                    dice = 0.8 - 0.05 * shift + 0.01 * random.rand()
                    metrics = {m: 10 * (1 - dice) if m in DISTANCES else dice for m in METRICS}
                    by_class[name] = {**metrics, "n_ref": 100 + i, "n_pred": 90}
                metrics_per_case.append({"case": f"case{i}", "metrics": by_class})
            content = {
                "settings": {"prediction": str(model), "labels": dict.fromkeys(classes, [1]), "unit": "mm", **settings},
                "metric_per_case": metrics_per_case,
            }
            folder = tmp_path / "results" / f"model{len(list(tmp_path.glob('results/*')))}" / "fold_0"
            folder.mkdir(parents=True)
            (folder / "evaluation.json").write_text(json.dumps(content))
            folders.append(folder)
        return folders

    return make


def compare(folders, output, *options):
    return cli.main(["compare", *map(str, folders), "-o", str(output), *options])


def rows_of(output):
    with open(output / "comparison.csv") as file:
        return list(csv.DictReader(file))


def test_comparison_of_real_evaluations(folders, tmp_path, capsys):
    truth, prediction = folders
    better = tmp_path / "better"
    shutil.copytree(truth, better)
    for folder in (better, prediction):
        assert evaluate((truth, folder)) == 0
    # A file of it stands for the folder.
    assert compare([prediction / "evaluation.csv", better], tmp_path / "out") == 0
    rows = rows_of(tmp_path / "out")
    assert [(row["metric"], row["class_name"]) for row in rows] == list(
        itertools.product(("Dice", "HD95"), ("ball", "core", MEAN))
    )
    dice = [[record["metrics"]["core"]["Dice"] for record in read(f)["metric_per_case"]] for f in (prediction, better)]
    row = rows[1]
    assert (row["first"], row["other"], row["pairs"], row["left_out"]) == ("validation", "better", "4", "0")
    assert float(row["difference"]) == pytest.approx(np.mean(dice[1]) - np.mean(dice[0]))
    # Four cases: the best that can be is 2 / 2^4.
    assert float(row["p"]) == 0.125 and float(row["p_holm"]) == 0.75 and row["verdict"] == "too few cases"
    printed = capsys.readouterr().out
    assert "Too few cases to tell: with 6 tests the smallest p can be significant from 8 cases on" in printed
    image = sitk.ReadImage(str(tmp_path / "out" / "comparison.png"))
    pixels = sitk.GetArrayFromImage(image)
    assert min(pixels.shape[:2]) > 300 and pixels.std() > 0


def test_evaluations_of_the_version_that_had_csi_beside_jaccard_are_compared(models, tmp_path):
    folders = models([1, 2])

    def with_csi(content):
        for record in content["metric_per_case"]:
            for values in record["metrics"].values():
                values["CSI"] = values["Jaccard"]

    spoiled(folders[0], with_csi)
    assert compare(folders, tmp_path, "--metrics", "Jaccard", "Dice") == 0
    assert [row["metric"] for row in rows_of(tmp_path)[::3]] == ["Jaccard", "Dice"]


def test_verdicts(models, tmp_path, capsys):
    # As few cases as 18 tests need.
    folders = models([2, 1, 2.001, 4], cases=10)
    assert compare(folders, tmp_path, "--names", "base", "better", "same", "worse") == 0
    verdicts = {(row["other"], row["metric"], row["class_name"]): row["verdict"] for row in rows_of(tmp_path)}
    for metric, name in itertools.product(("Dice", "HD95"), ("ball", "core", MEAN)):
        assert verdicts["better", metric, name] == "better" and verdicts["worse", metric, name] == "worse"
        assert verdicts["same", metric, name] == "no difference shown"
    printed = capsys.readouterr().out
    assert "Too few" not in printed and "First: base\nSecond: same" in printed


def test_a_class_that_one_model_misses_is_not_in_the_mean_of_either(models, tmp_path):
    folders = models([1, 1], cases=12)
    hard = iter(range(12))

    def miss(content):
        for record in content["metric_per_case"][:9]:
            record["metrics"]["core"]["HD95"] = None

    def are_hard(content):
        for record in content["metric_per_case"]:
            record["metrics"]["core"]["HD95"] = 50 + next(hard)

    spoiled(folders[0], are_hard)
    spoiled(folders[1], miss)
    assert compare(folders, tmp_path, "--metrics", "HD95") == 0
    ball, core, mean = rows_of(tmp_path)
    assert (core["pairs"], core["left_out"]) == ("3", "9") and (mean["pairs"], mean["left_out"]) == ("12", "0")
    hd95 = [[r["metrics"] for r in read(folder)["metric_per_case"]] for folder in folders]
    for column, of_model in zip(("first_mean", "other_mean"), hd95):
        means = [m["ball"]["HD95"] for m in of_model[:9]]
        means += [(m["ball"]["HD95"] + m["core"]["HD95"]) / 2 for m in of_model[9:]]
        assert float(mean[column]) == pytest.approx(np.mean(means))


def test_patients_are_compared_by_the_means_of_their_cases(models, tmp_path, capsys):
    folders = models([1, 2], cases=10)
    # case0 to case9: the patients 0 to 4 have two cases each.
    for folder in folders:
        spoiled(folder, lambda c: [r.update(case=f"p{i // 2}_{i % 2}") for i, r in enumerate(c["metric_per_case"])])
    assert compare(folders, tmp_path, "--patient", r"p\d", "--metrics", "Dice") == 0
    printed = capsys.readouterr().out
    assert "| patients |" in printed and "of its own" not in printed
    dice = [np.array([r["metrics"]["ball"]["Dice"] for r in read(f)["metric_per_case"]]) for f in folders]
    first, other = (values.reshape(5, 2).mean(1) for values in dice)
    row = rows_of(tmp_path)[0]
    assert row["pairs"] == "5" and float(row["p"]) == pytest.approx(slow_wilcoxon(other - first)) == 2 / 2**5
    assert float(row["difference"]) == pytest.approx((other - first).mean())
    assert compare(folders, tmp_path) == 0 and "Each case counts as a patient of its own" in capsys.readouterr().out
    assert compare(folders, tmp_path, "--patient", "x") == 1
    assert "--patient x matches nothing in case p0_0" in capsys.readouterr().err


def test_names_are_what_differs_in_the_paths():
    start = Path("/results/Dataset1")
    assert short_names([start / "A__p__2d/fold_0/validation", start / "B__p__2d/fold_0/validation"]) == [
        "A__p__2d",
        "B__p__2d",
    ]
    assert short_names([start / "A/fold_0", start / "A/fold_1", start / "B/fold_0"]) == [
        "A/fold_0",
        "A/fold_1",
        "B/fold_0",
    ]


def spoiled(folder, change):
    content = read(folder)
    change(content)
    (folder / "evaluation.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    "change, complaint",
    [
        (lambda c: c["metric_per_case"].pop(), "has no case case7, which"),
        (lambda c: c["metric_per_case"].append({**c["metric_per_case"][0], "case": "new"}), "has no case new, which"),
        (lambda c: c["settings"].update(unit="voxel"), "was evaluated with unit voxel, but"),
        (
            lambda c: c["metric_per_case"][3]["metrics"]["core"].update(n_ref=5),
            "different ground truth of case case3: core",
        ),
        (lambda c: c.pop("metric_per_case"), "is no output of nnunet_semiseg evaluate"),
        (lambda c: c["metric_per_case"][3]["metrics"]["core"].pop("HD95"), "or lacks Dice, HD95. Write it again"),
        (lambda c: c["metric_per_case"][3]["metrics"].pop("core"), "or lacks Dice, HD95. Write it again"),
        (lambda c: c["metric_per_case"].clear(), "is no output of nnunet_semiseg evaluate"),
    ],
)
def test_evaluations_that_do_not_fit_are_told_in_one_line(models, tmp_path, capsys, change, complaint):
    folders = models([1, 2])
    spoiled(folders[1], change)
    assert compare(folders, tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert error.startswith("Error: ") and error.count("\n") == 1
    assert complaint in error and str(folders[1]) in error and not (tmp_path / "out").exists()


def test_wrong_folders_are_told_in_one_line(models, tmp_path, capsys):
    folders = models([1, 2])
    for given, options, complaint in (
        (folders[:1], [], "One FOLDER is given"),
        ([folders[0], folders[0]], [], "fold_0 is given twice"),
        (folders, ["--names", "one"], "--names has 1 names for 2 FOLDERs"),
        (
            [folders[0], tmp_path],
            [],
            f"{tmp_path / 'evaluation.json'} is missing. Write it with nnunet_semiseg evaluate",
        ),
    ):
        assert compare(given, tmp_path / "out", *options) == 1
        error = capsys.readouterr().err
        assert complaint in error and error.count("\n") == 1 and not (tmp_path / "out").exists()
