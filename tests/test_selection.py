"""pseudo_label select: rules at their boundaries, ranking, voxels, and cases to annotate."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import write_image
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from nnunet_semiseg.segmentations import Classes
from pseudo_label import cli
from pseudo_label.scores import CaseScore, ClassScore
from pseudo_label.selection import Rules, select, to_annotate
from pseudo_label.selection_files import agreed_labels, ignore_value


def class_score(score=0.9, volume=100.0, z=0.0, components=1):
    return ClassScore(score, score, score, 0.1, 0.1, volume, z, components)


def case_score(case, score, **classes):
    return CaseScore(case, score, score, score, 0.1, 0.1, classes or {"liver": class_score(score)})


def scores_of(**scores):
    return {case: case_score(case, score) for case, score in scores.items()}


def accepted(scores, **rules):
    return [case for case, decision in select(scores, Rules(**rules)).items() if decision.accepted]


# ---------------------------------------------------------------------------------------------------------------- rules


def test_a_score_that_equals_the_threshold_is_accepted():
    below, above = np.nextafter(0.8, 0), np.nextafter(0.8, 1)
    scores = scores_of(a=below, b=0.8, c=above)
    assert accepted(scores, threshold=0.8) == ["b", "c"]
    assert select(scores, Rules(threshold=0.8))["a"].reasons == ("score 0.8000 is below 0.8",)
    assert accepted(scores) == ["a", "b", "c"]


def test_threshold_of_a_class_where_it_is_present():
    absent = replace(class_score(), score=None, volume_mm3=0.0)
    scores = {
        "a": case_score("a", 0.9, liver=class_score(0.7), tumor=class_score(0.5)),
        "b": case_score("b", 0.9, liver=class_score(0.7), tumor=class_score(0.499)),
        "c": case_score("c", 0.9, liver=class_score(0.7), tumor=absent),
    }
    assert accepted(scores, class_thresholds={"tumor": 0.5}) == ["a", "c"]
    assert accepted(scores, class_thresholds={"tumor": 0.4, "liver": 0.71}) == []


@pytest.mark.parametrize("sign", [1, -1])
def test_volumes_far_from_those_of_labeled_cases(sign):
    scores = {str(z): case_score(str(z), 0.9, liver=class_score(z=sign * z)) for z in (0.0, 3.0, 3.01)}
    scores["unknown"] = case_score("unknown", 0.9, liver=class_score(z=None))
    assert accepted(scores, max_volume_zscore=3) == ["0.0", "3.0"]
    (reason,) = select(scores, Rules(max_volume_zscore=3))["unknown"].reasons
    assert reason == "the volume of liver cannot be compared: it is the same in all labeled cases"
    (reason,) = select(scores, Rules(max_volume_zscore=2.5))["3.0"].reasons
    assert reason == f"volume of liver is {3 * sign:+.1f} standard deviations from the labeled cases', 2.5 are allowed"


def test_components_of_a_class():
    scores = {
        str(n): case_score(str(n), 0.9, liver=class_score(components=n), veins=class_score(components=9))
        for n in (1, 2)
    }
    assert accepted(scores, max_components={"liver": 1}) == ["1"]
    assert select(scores, Rules(max_components={"liver": 1}))["2"].reasons == ("liver has 2 components, 1 are allowed",)


def test_the_best_of_those_that_fulfill_the_other_rules():
    scores = scores_of(a=0.7, b=0.9, c=0.8, d=0.8, e=0.6)
    scores["f"] = case_score("f", 0.95, liver=class_score(components=5))
    assert accepted(scores, top=2) == ["b", "f"]
    assert accepted(scores, top=2, max_components={"liver": 1}) == ["b", "c"]  # c and d are equal: by name
    assert accepted(scores, top=9) == list("abcdef")
    # A share of all scored cases, rounded down.
    assert accepted(scores, fraction=0.5) == ["b", "c", "f"]
    assert accepted(scores, fraction=0.49) == ["b", "f"]
    assert accepted(scores, fraction=1.0) == list("abcdef")
    assert accepted(scores_of(**{f"c{i}": 0.5 for i in range(10)}), fraction=0.7) == [f"c{i}" for i in range(7)]
    assert accepted(scores, fraction=0.5, threshold=0.92) == ["f"]
    assert select(scores, Rules(top=2))["d"].reasons == ("number 4 by its score 0.8000, 2 are taken",)


def test_all_reasons_of_a_case_are_told():
    scores = {"a": case_score("a", 0.5, liver=class_score(0.4, z=4.0, components=3))}
    rules = Rules(0.6, {"liver": 0.5}, 3.0, {"liver": 1}, top=1)
    assert len(select(scores, rules)["a"].reasons) == 4


def test_balanced_classes_take_turns():
    """By score alone the cases in which the liver is good would be all."""
    scores = {
        "a": case_score("a", 0.90, liver=class_score(0.99), tumor=class_score(0.1)),
        "b": case_score("b", 0.89, liver=class_score(0.98), tumor=class_score(0.2)),
        "c": case_score("c", 0.50, liver=class_score(0.30), tumor=class_score(0.9)),
        "d": case_score("d", 0.40, liver=class_score(0.20), tumor=class_score(0.8)),
        "e": case_score("e", 0.95, liver=class_score(0.97), tumor=replace(class_score(), score=None)),
    }
    assert accepted(scores, top=2) == ["a", "e"]
    assert accepted(scores, top=2, balanced=True) == ["a", "c"]
    assert accepted(scores, top=4, balanced=True) == ["a", "b", "c", "d"]
    assert accepted(scores, top=5, balanced=True) == list("abcde")


def test_no_foreground_is_never_accepted():
    scores = {"a": replace(case_score("a", 0.9), score=None)}
    assert select(scores, Rules())["a"].reasons == ("no foreground in the consensus or in any member",)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"threshold": 1.1}, "threshold of 1.1 is not between 0 and 1"),
        ({"class_thresholds": {"liver": -0.1}}, "liver of -0.1"),
        ({"class_thresholds": {"spleen": 0.5}}, "There is no class spleen. Classes: liver"),
        ({"max_components": {"spleen": 1}}, "There is no class spleen"),
        ({"max_volume_zscore": 0.0}, "z-score of 0"),
        ({"top": 0}, "The best 0 cases are none"),
        ({"top": 1, "fraction": 0.5}, "Choose one"),
        ({"balanced": True}, "Balancing the classes needs"),
    ],
)
def test_rules_that_cannot_be_applied(rules, message):
    with pytest.raises(ValueError, match=message):
        Rules(**rules).check(["liver"])


# ------------------------------------------------------------------------------------------------------------- annotate


def test_the_lowest_first_and_then_unlike_it():
    """Six cases of one kind and two of another are in the pool: with two to choose, one is of each kind."""
    scores = scores_of(**{f"small{i}": 0.30 + 0.001 * i for i in range(4)}, good=0.9, better=0.95)
    for i in range(2):
        scores[f"large{i}"] = case_score(f"large{i}", 0.32 + i / 100, liver=class_score(0.32, volume=1e6))
    assert to_annotate(scores, 1) == ["small0"]
    assert set(to_annotate(scores, 2)) == {"small0", "large0"}
    assert to_annotate({}, 3) == []
    assert len(to_annotate(scores, 100)) == len(scores)


def test_cases_without_foreground_come_first():
    nothing = CaseScore("none", None, None, None, None, None, {"liver": class_score(None, volume=0.0)})
    scores = {**scores_of(a=0.1), "none": nothing}
    assert to_annotate(scores, 1) == ["none"]


def test_equal_cases_can_all_be_chosen():
    assert sorted(to_annotate(scores_of(a=0.5, b=0.5, c=0.5), 3)) == ["a", "b", "c"]


# --------------------------------------------------------------------------------------------------------------- voxels


@pytest.mark.parametrize("members", [3, 5, 7])
def test_agreement_of_exactly_the_share_is_kept(members):
    classes = Classes.from_dataset_json({"labels": {"background": 0, "a": 1, "b": 2}})
    labels = np.full((1, 1, members + 1), 2, dtype=np.uint8)
    disagreement = (np.arange(members + 1) / members).astype(np.float32)[None, None]
    for agreeing in range(1, members + 1):
        agreed = agreed_labels(labels, disagreement, agreeing / members, classes)
        assert agreed[0, 0].tolist() == [2] * (members - agreeing + 1) + [3] * agreeing


def test_ignore_value_is_the_datasets_or_the_next_free_one():
    plain = {"background": 0, "a": 1, "b": 2}
    assert ignore_value(Classes.from_dataset_json({"labels": plain})) == 3
    assert ignore_value(Classes.from_dataset_json({"labels": {**plain, "ignore": 3}})) == 3
    regions = {"labels": {"background": 0, "whole": [1, 2], "core": 2}, "regions_class_order": [1, 2]}
    assert ignore_value(Classes.from_dataset_json(regions)) == 3


# ---------------------------------------------------------------------------------------------------------- the command


CASES = ("c_0", "c_1", "c_2", "c_3")


@pytest.fixture
def scored(tmp_path, capsys):
    """Three members whose ball of label 1 shrinks in ever more voxels from case to case, scored; and images."""
    base = np.zeros((6, 12, 12), dtype=np.uint8)
    base[1:5, 2:10, 2:10] = 1
    for member in range(3):
        for i, case in enumerate(CASES):
            labels = base.copy()
            labels[1:5, 2 : 2 + i * member, 2:10] = 0
            labels[2, 5, 5:7] = 2
            if member == 0:
                labels[4, 9, 9] = 0
            write_image(labels, tmp_path / f"member{member}" / f"{case}.nii.gz")
    for i, case in enumerate(CASES):
        write_image(np.full((6, 12, 12), i, dtype=np.float32), tmp_path / "images" / f"{case}_0000.nii.gz")
    description = {"labels": {"background": 0, "ball": 1, "core": 2}, "file_ending": ".nii.gz", "channel_names": {}}
    (tmp_path / "dataset.json").write_text(json.dumps(description))
    members = [str(tmp_path / f"member{member}") for member in range(3)]
    out = str(tmp_path / "scores")
    assert cli.main(["score", "-i", *members, "-o", out, "--dataset-json", str(tmp_path / "dataset.json")]) == 0
    capsys.readouterr()
    return tmp_path


def run(folder, *more):
    return cli.main(["select", "-i", str(folder / "scores"), "-o", str(folder / "out"), *more])


def decisions(folder):
    with open(folder / "out" / "selection.csv", newline="") as stream:
        return {row["case"]: row for row in csv.DictReader(stream)}


def voxels(file):
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


def test_decisions_labels_and_cases_to_annotate(scored, capsys):
    flags = ["--threshold", "0.5", "--top", "2", "--annotate", "2", "--images", str(scored / "images")]
    assert run(scored, *flags) == 0
    printed = capsys.readouterr().out
    assert "2 of 4 cases are accepted" in printed and "To annotate next, most useful first: c_3" in printed
    rows = decisions(scored)
    assert [rows[case]["accepted"] for case in CASES] == ["yes", "yes", "no", "no"]
    assert rows["c_0"]["reasons"] == "" and rows["c_3"]["reasons"].startswith("number 4 by its score")
    assert sorted(f.name for f in (scored / "out" / "labels").iterdir()) == ["c_0.nii.gz", "c_1.nii.gz"]
    for case in ("c_0", "c_1"):
        made, consensus = (voxels(scored / k / f"{case}.nii.gz") for k in ("out/labels", "scores/consensus"))
        assert np.array_equal(made, consensus)
    folder = scored / "out" / "annotate"
    description = json.loads((folder / "dataset.json").read_text())
    cases = get_filenames_of_train_images_and_targets(str(folder), description)
    assert len(cases) == description["numTraining"] == 2 and "c_3" in cases
    for case, files in cases.items():
        assert voxels(files["images"][0]).max() == int(case[-1])
        assert np.array_equal(voxels(files["label"]), voxels(scored / "scores" / "consensus" / f"{case}.nii.gz"))
    with open(folder / "annotate.csv", newline="") as stream:
        assert [row["rank"] for row in csv.DictReader(stream)] == ["1", "2"]


def test_voxels_on_which_members_do_not_agree_are_ignored(scored):
    assert run(scored, "--min-agreement", "1") == 0
    for case in CASES:
        members = [voxels(scored / f"member{member}" / f"{case}.nii.gz") for member in range(3)]
        agree = (members[0] == members[1]) & (members[0] == members[2])
        made = voxels(scored / "out" / "labels" / f"{case}.nii.gz")
        assert np.array_equal(made, np.where(agree, members[0], 3)) and (made == 3).any()
    assert cli.main(["select", "-i", str(scored / "scores"), "-o", str(scored / "two"), "--min-agreement", "0.6"]) == 0
    # Two of three agree everywhere.
    assert voxels(scored / "two" / "labels" / "c_0.nii.gz").max() == 2


def test_accepted_cases_are_not_proposed_for_annotation(scored, capsys):
    images = str(scored / "images")
    assert run(scored, "--top", "3", "--annotate", "3", "--images", images) == 0
    assert "most useful first: c_3. Open" in capsys.readouterr().out
    assert run(scored, "--annotate", "3", "--images", images, "--overwrite", "--min-agreement", "0.9") == 0
    printed = capsys.readouterr().out
    assert "none, as all cases are accepted" in printed and '"ignore": 3' in printed
    assert not (scored / "out" / "annotate").exists()


def test_volumes_that_cannot_be_compared_are_no_rule(scored, capsys):
    assert run(scored, "--max-volume-zscore", "3") == 1
    assert "needs the volumes of two or more labeled cases" in capsys.readouterr().err
    assert not (scored / "out").exists()


def test_an_earlier_selection_is_not_mixed_in(scored, capsys):
    assert run(scored) == 0
    assert run(scored, "--top", "1") == 1
    assert "is not empty" in capsys.readouterr().err
    assert len(list((scored / "out" / "labels").iterdir())) == 4
    assert run(scored, "--top", "1", "--overwrite") == 0
    assert len(list((scored / "out" / "labels").iterdir())) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--threshold", "80"], "threshold of 80 is not between 0 and 1"),
        (["--class-threshold", "spleen=0.5"], "There is no class spleen. Classes: ball, core"),
        (["--min-agreement", "1.5"], "--min-agreement 1.5"),
        (["--annotate", "2"], "--annotate needs the images"),
        (["--annotate", "0", "--images", "."], "--annotate 0"),
        (["-i", "nowhere"], "nowhere has no score.json"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(scored, capsys, flags, message):
    assert run(scored, *flags) == 1
    error = capsys.readouterr().err
    assert error.startswith("Error: ") and message in error and error.count("\n") == 1
    assert not (scored / "out").exists()


def test_a_case_without_image_is_named(scored, capsys):
    (scored / "images" / "c_2_0000.nii.gz").unlink()
    assert run(scored, "--annotate", "1", "--images", str(scored / "images")) == 1
    assert "has no image c_2_0000" in capsys.readouterr().err
    assert not (scored / "out").exists()
