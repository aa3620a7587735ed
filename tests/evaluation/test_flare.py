"""The presets of the FLARE challenges give what their scripts give, and FLARE22's ranking."""

import csv
import json

import nibabel
import numpy as np
import pytest
from conftest import write_image

from dataset_conversion import Dataset504_FLARE22
from nnunet_semiseg import cli
from nnunet_semiseg.evaluation import flare

SPACING = (0.8, 0.8, 2.5)
SHAPE = (14, 30, 28)  # z, y, x
TOLERANCES = (5, 3, 3, 5, 2, 2, 2, 2, 2, 3, 5, 7, 3)
PRESETS = ("flare22", "flare23", "flare24")


def organs(seed, number=13):
    """Boxes of random size in random places, one for each label."""
    random = np.random.RandomState(seed)
    labels = np.zeros(SHAPE, dtype=np.int16)
    for label in range(1, number + 1):
        low = [random.randint(0, s - 6) for s in SHAPE]
        labels[tuple(slice(a, a + random.randint(3, 9)) for a in low)] = label
    return labels


def moved(labels, seed):
    random = np.random.RandomState(seed)
    result = np.roll(labels, random.randint(-1, 2, 3), (0, 1, 2))
    noise = random.uniform(size=labels.shape) < 0.02
    result[noise] = random.randint(0, 14, noise.sum())
    return result


@pytest.fixture
def folders(tmp_path):
    """Ground truth and predictions with every kind of case that the scripts treat in a way of their own."""
    truth, prediction = tmp_path / "truth", tmp_path / "prediction"
    for seed, case in enumerate(("a", "b", "c")):
        reference = organs(seed)
        predicted = moved(reference, seed)
        if case == "b":
            # The spleen is in neither, the liver in the prediction alone, the pancreas in the truth alone, and the
            # stomach far from where it is; the aorta goes on where the truth has none.
            for labels in (reference, predicted):
                labels[np.isin(labels, (1, 3, 4, 5, 11))] = 0
            predicted[0, 0, :5] = 1
            reference[5:7, :4, :4] = 4
            reference[2:6, 20:26, 1:7] = 11
            predicted[5:9, 24:30, 5:11] = 11
            predicted[:, 12:15, 12:15] = 5
            reference[4:9, 12:15, 12:15] = 5
        if case == "c":
            # 269 and 270 are 13 and 14 in a byte.
            predicted[predicted == 13] = 269
            predicted[0, -4:, -4:] = 270
        write_image(reference, truth / f"{case}.nii.gz", SPACING)
        write_image(predicted.astype(np.float32) + 0.25 * (case == "a"), prediction / f"{case}.nii.gz", SPACING)
    return truth, prediction


def evaluate(folders, output, *options):
    truth, prediction = folders
    return cli.main(["evaluate", "-g", str(truth), "-p", str(prediction), "-o", str(output), "-np", "1", *options])


def table(output):
    with open(output / "DSC_NSD.csv") as file:
        return [
            {key: value if key == "Name" else float(value) for key, value in row.items()}
            for row in csv.DictReader(file)
        ]


def literal(truth_file, prediction_file, preset, drop_last=True, digits=4):
    """DSC and NSD of a case, rule by rule."""
    surface_distance = pytest.importorskip("surface_distance")
    image = nibabel.load(truth_file)
    spacing = image.header.get_zooms()
    kind = np.int8 if preset == "flare23" else np.uint8
    reference = image.get_fdata().astype(np.int64).astype(kind)
    predicted = nibabel.load(prediction_file).get_fdata().astype(np.int64).astype(kind)
    lowest = {"flare22": 0, "flare23": 0.2, "flare24": 0.2}[preset]
    dice, surface = [], []
    for label, tolerance in enumerate((*TOLERANCES, 2) if preset == "flare23" else TOLERANCES, 1):
        a, b = reference == label, predicted == label
        if not a.any() and not b.any():
            values = 1.0, 1.0
        elif not a.any() or not b.any():
            values = 0.0, 0.0
        else:
            if label in (5, 6, 10):
                slices = np.where(a)[2]
                a, b = (x[:, :, slices.min() : slices.max() + (not drop_last)] for x in (a, b))
            score = 2 * (a & b).sum() / (a.sum() + b.sum())
            if score < lowest or not b.any():
                values = score, 0.0
            else:
                distances = surface_distance.compute_surface_distances(a, b, spacing)
                values = score, surface_distance.compute_surface_dice_at_tolerance(distances, tolerance)
        dice.append(np.round(values[0], digits))
        surface.append(np.round(values[1], digits))
    return dice, surface


@pytest.mark.parametrize("preset", PRESETS)
def test_every_value_is_that_of_the_rules_read_literally(folders, tmp_path, preset):
    truth, prediction = folders
    assert evaluate(folders, tmp_path / "out", "--preset", preset) == 0
    names = [abbreviation for _, abbreviation, _ in flare.PRESETS[preset][0]]
    rows = table(tmp_path / "out")
    assert [row["Name"] for row in rows] == ["a.nii.gz", "b.nii.gz", "c.nii.gz"]
    assert list(rows[0]) == ["Name", *(f"{n}_DSC" for n in names), *(f"{n}_NSD" for n in names)]
    for row in rows:
        dice, surface = literal(truth / row["Name"], prediction / row["Name"], preset)
        assert [row[f"{name}_DSC"] for name in names] == dice
        assert [row[f"{name}_NSD"] for name in names] == surface
    b = rows[1]
    assert (b["Spleen_DSC"], b["Spleen_NSD"]) == (1, 1) and (b["Liver_DSC"], b["Pancreas_NSD"]) == (0, 0)
    # The prediction goes on above and below, where the truth has no aorta.
    assert b["Aorta_DSC"] == 1
    assert 0 < b["Stomach_DSC"] < 0.2 and (b["Stomach_NSD"] == 0) == (preset != "flare22")
    assert rows[2]["LK_DSC"] > 0
    if preset == "flare23":
        assert rows[2]["Lesion_DSC"] == 0 and b["Lesion_DSC"] == 1


@pytest.mark.parametrize("preset", PRESETS)
def test_the_means_are_rounded_where_the_script_rounds_them(folders, tmp_path, capsys, preset):
    assert evaluate(folders, tmp_path / "out", "--preset", preset) == 0
    rows = table(tmp_path / "out")
    scores = dict(line.split(": ") for line in (tmp_path / "out" / "scores.txt").read_text().splitlines())
    means = {key: np.mean([row[key] for row in rows]) for key in rows[0] if key != "Name"}
    if preset == "flare23":
        means = {key: np.round(mean, 4) for key, mean in means.items()}
    printed = capsys.readouterr().out
    for short in ("DSC", "NSD"):
        organ = np.mean([mean for key, mean in means.items() if key.endswith(short) and "Lesion" not in key])
        assert scores[f"Organ_{short}"] == f"{organ:.4f}"
        assert f"Organ_{short} {organ:.4f}" in printed
    assert {key: f"{mean:.4f}" for key, mean in means.items()} == {k: v for k, v in scores.items() if "Organ" not in k}


def test_only_flare23_rounds_the_means_of_classes(tmp_path):
    values = {name: 0.00012 for name, *_ in flare.ORGANS} | {"lesion": 1.0}
    records = [{"case": "a", "metrics": {name: {"Dice": v, "NSD": v} for name, v in values.items()}}]
    organ = {}
    for preset in PRESETS:
        challenge = flare.preset_rules(preset, corrected=False)[1].challenge
        organ[preset] = flare.write_scores(tmp_path, records, challenge)["Organ_DSC"]
    assert organ == {key: pytest.approx(0.0001 if key == "flare23" else 0.00012) for key in PRESETS}


@pytest.mark.parametrize("preset", PRESETS)
def test_corrected_keeps_the_last_slice_and_every_digit(folders, tmp_path, preset):
    truth, prediction = folders
    for case in "ac":
        labels = np.asarray(nibabel.load(truth / f"{case}.nii.gz").dataobj).T
        write_image(moved(labels, 7).astype(np.uint8), prediction / f"{case}.nii.gz", SPACING)
    assert evaluate(folders, tmp_path / "out", "--preset", preset, "--corrected") == 0
    names = [abbreviation for _, abbreviation, _ in flare.PRESETS[preset][0]]
    for row in table(tmp_path / "out"):
        dice, surface = literal(truth / row["Name"], prediction / row["Name"], preset, drop_last=False, digits=15)
        assert [row[f"{name}_DSC"] for name in names] == pytest.approx(dice, rel=1e-12)
        assert [row[f"{name}_NSD"] for name in names] == pytest.approx(surface, rel=1e-9)
    settings = json.loads((tmp_path / "out" / "evaluation.json").read_text())["settings"]["challenge"]
    assert settings["preset"] == preset and settings["slips"] is False


def test_the_tolerance_is_compared_without_room_for_rounding(tmp_path):
    """0.6 in single precision is a little more than 0.6: five voxels of it are not within 3 mm for the script."""
    truth, prediction = tmp_path / "truth", tmp_path / "prediction"
    labels = np.zeros((6, 20, 20), dtype=np.uint8)
    labels[2:4, 5:10, 5:10] = 3
    predicted = np.roll(labels, 5, 2)
    write_image(labels, truth / "a.nii.gz", (0.6, 0.6, 0.6))
    write_image(predicted, prediction / "a.nii.gz", (0.6, 0.6, 0.6))
    for file in (truth / "a.nii.gz", prediction / "a.nii.gz"):
        assert float(nibabel.load(file).header.get_zooms()[0]) > 0.6
    assert evaluate((truth, prediction), tmp_path / "out", "--preset", "flare22") == 0
    (row,) = table(tmp_path / "out")
    assert row["Spleen_NSD"] == literal(truth / "a.nii.gz", prediction / "a.nii.gz", "flare22")[1][2]


def test_organs_are_those_of_the_converted_data_set():
    assert tuple(name for name, *_ in flare.ORGANS) == Dataset504_FLARE22.ORGANS
    assert tuple(tolerance for *_, tolerance in flare.ORGANS) == TOLERANCES


# ------------------------------------------------------------------------------------------------------------ bad input


def error(capsys, folders, output, *options):
    assert evaluate(folders, output, *options) == 1
    assert not list(output.glob("*.csv")) and not (output / "scores.txt").exists()
    return [line for line in capsys.readouterr().err.splitlines() if line and "Evaluating:" not in line]


def test_a_missing_prediction_is_an_error(folders, tmp_path, capsys):
    (folders[1] / "b.nii.gz").unlink()
    (line,) = error(capsys, folders, tmp_path / "out", "--preset", "flare22")
    assert f"{folders[0] / 'b.nii.gz'} has no prediction" in line and line.endswith("Predict them")


@pytest.mark.parametrize(
    "options, complaint",
    [
        (["--corrected", "--labels", "1"], "--corrected is for a --preset"),
        (["--preset", "flare22", "--tolerance", "1"], "--preset flare22 has rules of its own. Leave --tolerance out"),
        (["--preset", "flare22", "--both-empty", "perfect"], "Leave --both-empty out"),
        (["--preset", "flare24", "--chill"], "Leave --chill out"),
    ],
)
def test_options_that_do_not_go_together(folders, tmp_path, capsys, options, complaint):
    (line,) = error(capsys, folders, tmp_path / "out", *options)
    assert complaint in line


def test_what_the_script_cannot_do_is_told_and_results_of_before_are_gone(folders, tmp_path, capsys):
    truth, prediction = folders
    out = tmp_path / "out"
    assert evaluate(folders, out, "--preset", "flare24") == 0
    labels = organs(0)
    labels[labels == 10] = 0
    labels[3, 2:5, 2:5] = 10
    for folder in folders:
        write_image(labels, folder / "a.nii.gz", SPACING)
    line, _ = error(capsys, folders, out, "--preset", "flare24")
    assert line.startswith(f"Error: {truth / 'a.nii.gz'}: esophagus is in a single slice") and "--corrected" in line
    write_image(np.zeros((5, 5), dtype=np.uint8), truth / "a.nii.gz", SPACING[:2])
    line, _ = error(capsys, folders, out, "--preset", "flare24")
    assert line == f"Error: {truth / 'a.nii.gz'} is 2D. The rules of flare24 are for 3D label maps"
    # Labels of another data set wrap around in the script, and are told by the corrected rules.
    for folder in folders:
        write_image(labels, folder / "a.nii.gz", SPACING)
    lines = error(capsys, folders, out, "--preset", "flare24", "--corrected")
    assert lines[0].startswith(f"Error: {prediction / 'c.nii.gz'} has the label 2")


def test_another_position_is_a_warning_as_the_script_takes_no_notice(folders, tmp_path, capsys):
    file = folders[1] / "b.nii.gz"
    image = nibabel.load(file)
    affine = image.affine.copy()
    affine[:3, 3] += 5
    nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj), affine), file)
    assert evaluate(folders, tmp_path / "out", "--preset", "flare22") == 0
    assert f"{file} have different origins" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------------- ranking


SHORT = [abbreviation for _, abbreviation, _ in flare.ORGANS]


@pytest.fixture
def teams(tmp_path):
    """Tables of three teams, two of them under the names of the challenge, and {team: {case: values}}."""
    random = np.random.RandomState(0)
    numbers = {}
    for team in ("x", "y", "z"):
        folder = tmp_path / "teams" / team
        folder.mkdir(parents=True)
        scores, efficiency, numbers[team] = [], [], {}
        for case in ("p", "q", "r", "s"):
            organs = random.randint(0, 3, (2, 13)) / 2
            cost = random.randint(1, 4, 3).astype(float)
            scores.append([f"{case}.nii.gz", *organs.ravel()])
            efficiency.append([f"{case}{'_0000' * (team == 'x')}.nii.gz", *cost])
            numbers[team][case] = [*organs.mean(1), *cost]
        official = team != "z"
        for file, header, rows in (
            (
                f"DSC_NSD_{team}.csv" if official else "DSC_NSD.csv",
                [f"{o}_{m}" for m in ("DSC", "NSD") for o in SHORT],
                scores,
            ),
            (
                f"{team}_Efficiency.csv" if official else "efficiency.csv",
                ["Time", "AUC_GPU_Time", "AUC_CPU_Time"],
                efficiency,
            ),
        ):
            with open(folder / file, "w", newline="") as stream:
                csv.writer(stream).writerows([["Name", *header], *rows])
    return tmp_path / "teams", numbers


def rank(teams, *options):
    folder, _ = teams
    return cli.main(["rank", *(str(folder / team) for team in "xyz"), "-o", str(folder), *map(str, options)])


def literal_ranks(numbers, weights):
    """{team: weighted mean of its ranks}, counted: how many are better, plus one."""
    result = {}
    for team, own in numbers.items():
        ranks = []
        for case, values in own.items():
            for measure, value in enumerate(values):
                others = [numbers[other][case][measure] for other in numbers]
                better = [o > value if measure < 2 else o < value for o in others]
                ranks.append((1 + sum(better), weights[measure]))
        result[team] = sum(r * w for r, w in ranks) / sum(w for _, w in ranks)
    return result


@pytest.mark.parametrize(
    "options, weights", [([], (1, 1, 1, 0.5, 0.5)), (["--weights", 1, 1, 0.5, 0.5, 0.5], (1, 1, 0.5, 0.5, 0.5))]
)
def test_ranks_are_counted_for_each_case_and_averaged(teams, capsys, options, weights):
    folder, numbers = teams
    assert rank(teams, *options) == 0
    expected = literal_ranks(numbers, weights)
    with open(folder / "ranking.csv") as file:
        rows = list(csv.DictReader(file))
    assert {row["team"]: float(row["rank"]) for row in rows} == pytest.approx(expected)
    assert [expected[row["team"]] for row in rows] == sorted(expected.values())
    places = {team: 1 + sum(other < score for other in expected.values()) for team, score in expected.items()}
    assert [row["place"] for row in rows] == [str(places[row["team"]]) for row in rows]
    assert float(rows[0]["mean_Time"]) == pytest.approx(np.mean([v[2] for v in numbers[rows[0]["team"]].values()]))
    assert f"Weights: DSC 1, NSD 1, Time {weights[2]:g}, AUC_GPU_Time 0.5, AUC_CPU_Time 0.5" in capsys.readouterr().out


def without_gpu(file):
    rows = list(csv.DictReader(file.read_text().splitlines()))
    with open(file, "w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(row | {"AUC_GPU_Time": "nan"} for row in rows)


def test_a_measure_that_nobody_has_is_left_out_and_one_that_some_have_is_an_error(teams, capsys):
    folder, numbers = teams
    without_gpu(folder / "z" / "efficiency.csv")
    assert rank(teams) == 1
    assert f"{folder / 'z'} has no AUC_GPU_Time of some cases, but {folder / 'x'} has" in capsys.readouterr().err
    for team in "xy":
        without_gpu(folder / team / f"{team}_Efficiency.csv")
    assert rank(teams) == 0
    assert "AUC_GPU_Time was measured for no team and is left out." in capsys.readouterr().out
    with open(folder / "ranking.csv") as file:
        ranks = {row["team"]: float(row["rank"]) for row in csv.DictReader(file)}
    assert ranks == pytest.approx(literal_ranks(numbers, (1, 1, 1, 0, 0.5)))


def drop_last_case(file):
    file.write_text("\n".join(file.read_text().splitlines()[:-1]) + "\n")


@pytest.mark.parametrize(
    "spoil, complaint",
    [
        (lambda f: (f / "z" / "DSC_NSD.csv").unlink(), "z has no table with DSC_NSD in its name. Write it with"),
        (
            lambda f: (f / "z" / "b_efficiency.csv").write_text("Name\n"),
            "z has b_efficiency.csv and efficiency.csv. Keep",
        ),
        (lambda f: drop_last_case(f / "z" / "efficiency.csv"), "efficiency.csv has no case s, which"),
        (
            lambda f: [drop_last_case(f / "z" / name) for name in ("efficiency.csv", "DSC_NSD.csv")],
            "z has no case s, which",
        ),
        (lambda f: (f / "z" / "efficiency.csv").write_text("Name\n"), "efficiency.csv has no case. Write it again"),
    ],
)
def test_tables_that_cannot_be_ranked(teams, capsys, spoil, complaint):
    spoil(teams[0])
    assert rank(teams) == 1
    assert complaint in capsys.readouterr().err and not (teams[0] / "ranking.csv").exists()


def test_wrong_weights_and_names(teams, capsys):
    assert rank(teams, "--weights", 0, 0, 0, 0, 0) == 1
    assert rank(teams, "--names", "a", "b") == 1
    printed = capsys.readouterr().err
    assert "--weights are numbers of 0 or more" in printed and "--names has 2 names for 3 TEAMs" in printed
