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
from pseudo_label.selection import SelectionRules, select, to_annotate
from pseudo_label.selection_files import agreed_labels, ignore_value


def class_score(score=0.9, volume=100.0, z=0.0, components=1):
    return ClassScore(score, score, score, 0.1, 0.1, volume, z, components)


def case_score(case, score, **classes):
    return CaseScore(case, score, score, score, 0.1, 0.1, classes or {"liver": class_score(score)})


def scores_of(**scores):
    return {case: case_score(case, score) for case, score in scores.items()}


def accepted(scores, **rules):
    return [case for case, decision in select(scores, SelectionRules(**rules)).items() if decision.accepted]


# ---------------------------------------------------------------------------------------------------------------- rules


def test_a_score_that_equals_the_threshold_is_accepted():
    below, above = np.nextafter(0.8, 0), np.nextafter(0.8, 1)
    scores = scores_of(a=below, b=0.8, c=above)
    assert accepted(scores, threshold=0.8) == ["b", "c"]
    assert select(scores, SelectionRules(threshold=0.8))["a"].reasons == ("score 0.8000 is below 0.8",)
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
    (reason,) = select(scores, SelectionRules(max_volume_zscore=3))["unknown"].reasons
    assert reason == "the volume of liver cannot be compared: it is the same in all labeled cases"
    (reason,) = select(scores, SelectionRules(max_volume_zscore=2.5))["3.0"].reasons
    assert reason == f"volume of liver is {3 * sign:+.1f} standard deviations from the labeled cases', 2.5 are allowed"


def test_components_of_a_class():
    scores = {
        str(n): case_score(str(n), 0.9, liver=class_score(components=n), veins=class_score(components=9))
        for n in (1, 2)
    }
    assert accepted(scores, max_components={"liver": 1}) == ["1"]
    assert select(scores, SelectionRules(max_components={"liver": 1}))["2"].reasons == (
        "liver has 2 components, 1 are allowed",
    )


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
    assert select(scores, SelectionRules(top=2))["d"].reasons == ("number 4 by its score 0.8000, 2 are taken",)


def test_all_reasons_of_a_case_are_told():
    scores = {"a": case_score("a", 0.5, liver=class_score(0.4, z=4.0, components=3))}
    rules = SelectionRules(0.6, {"liver": 0.5}, 3.0, {"liver": 1}, top=1)
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
    assert select(scores, SelectionRules())["a"].reasons == ("no foreground in the consensus or in any member",)


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
        ({"presence": 1.1}, "presence of 1.1 is not between 0 and 1"),
        ({"presence": 0.0}, "presence of 0 would ask for every class"),
        ({"may_be_absent": ("spleen",)}, "There is no class spleen"),
    ],
)
def test_rules_that_cannot_be_applied(rules, message):
    with pytest.raises(ValueError, match=message):
        SelectionRules(**rules).check(["liver"])


# ------------------------------------------------------------------------------------------------------------- presence


ABSENT = replace(class_score(), score=None, volume_mm3=0.0)


def labeled_cases(having, number):
    """Of ``number`` labeled cases all have a liver, and ``having`` have a tumor."""
    return {f"lab_{i}": {"liver": 5.0, "tumor": float(i < having)} for i in range(number)}


def test_a_class_that_every_member_missed_is_no_agreement():
    """The members agree perfectly on what is left."""
    scores = {
        "both": case_score("both", 0.9, liver=class_score(), tumor=class_score()),
        "missed": case_score("missed", 1.0, liver=class_score(1.0), tumor=ABSENT),
    }
    rules, labeled = SelectionRules(0.8, {"tumor": 0.9}, presence=0.95), labeled_cases(3, 3)
    found = select(scores, rules, labeled)
    assert found["both"].accepted and not found["missed"].accepted
    assert found["missed"].reasons == ("tumor is absent, but 3 of 3 labeled cases have it",)
    assert found["missed"].lacking == ("tumor",)
    # It takes no place among the best.
    assert select(scores, SelectionRules(top=1, presence=0.95), labeled)["both"].accepted
    for off in (replace(rules, presence=None), replace(rules, may_be_absent=("tumor",))):
        assert select(scores, off, labeled)["missed"].accepted


@pytest.mark.parametrize(
    ("having", "number", "presence", "rejected"),
    [
        (1, 1, 0.95, True),
        (2, 3, 0.95, False),
        (18, 19, 0.95, False),
        (19, 20, 0.95, True),
        (20, 20, 1.0, True),
        (19, 20, 1.0, False),
        (7, 10, 0.7, True),  # 0.7 * 10 is above 7 in floating point.
        (1, 10, 0.1, True),
        (0, 10, 0.1, False),
    ],
)
def test_the_share_of_labeled_cases_that_makes_a_class_required(having, number, presence, rejected):
    scores = {"a": case_score("a", 1.0, liver=class_score(1.0), tumor=ABSENT)}
    decision = select(scores, SelectionRules(presence=presence), labeled_cases(having, number))["a"]
    assert decision.accepted is not rejected


def test_presence_without_labeled_cases_is_no_rule():
    with pytest.raises(ValueError, match="--presence needs the volumes of labeled cases"):
        select(scores_of(a=0.9), SelectionRules(presence=0.95), {})


def test_cases_that_lack_a_class_are_proposed_for_annotation():
    """Their scores are higher than they deserve."""
    scores = scores_of(bad=0.2, worse=0.1) | {
        "missed": case_score("missed", 1.0, liver=ABSENT),
        "none": replace(case_score("none", 0.0), score=None),
    }
    assert to_annotate(scores, 1, {"missed"}) == ["none"]
    del scores["none"]
    assert to_annotate(scores, 1, {"missed"}) == ["missed"]
    assert to_annotate(scores, 1) == ["worse"]


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


@pytest.mark.parametrize("regions", [False, True])
def test_three_members_that_all_miss_a_class(tmp_path, capsys, regions):
    """Where a member has it, it is found; where none has it, the score is 1."""
    labels = {"background": 0, "heart": [1, 2], "RV": 2} if regions else {"background": 0, "LV": 1, "RV": 2}
    description = {"labels": labels, **({"regions_class_order": [1, 2]} if regions else {})}
    (tmp_path / "dataset.json").write_text(json.dumps(description))
    with_rv = np.ones((3, 6, 6), dtype=np.uint8)
    with_rv[:, 3:] = 2
    for i in range(3):
        write_image(with_rv, tmp_path / "labeled" / f"lab_{i}.nii.gz")
        write_image(np.roll(with_rv, i == 2, 1), tmp_path / str(i) / "found.nii.gz")
        write_image(np.minimum(with_rv, 1), tmp_path / str(i) / "missed.nii.gz")
    members = [str(tmp_path / str(i)) for i in range(3)]
    score = ["score", "-i", *members, "--dataset-json", str(tmp_path / "dataset.json"), "-np", "1"]
    known, unknown = str(tmp_path / "known"), str(tmp_path / "unknown")
    assert cli.main([*score, "-o", known, "--labeled", str(tmp_path / "labeled")]) == 0
    assert cli.main([*score, "-o", unknown]) == 0
    capsys.readouterr()
    reasons = {}

    def accepted(scored, *flags):
        flags = ["--class-threshold", "RV=0.5", *flags]
        assert cli.main(["select", "-i", scored, "-o", str(tmp_path / "out"), "--overwrite", *flags]) == 0
        rows = decisions(tmp_path)
        reasons.update({case: row["reasons"] for case, row in rows.items()})
        return [case for case, row in rows.items() if row["accepted"] == "yes"]

    assert accepted(known) == accepted(known, "--presence", "1") == ["found"]
    assert reasons["missed"] == "RV is absent, but 3 of 3 labeled cases have it"
    assert "goes unnoticed" not in capsys.readouterr().out
    assert accepted(known, "--presence", "off") == accepted(known, "--may-be-absent", "RV") == ["found", "missed"]
    assert accepted(unknown) == ["found", "missed"]
    assert "No labeled cases are known" in capsys.readouterr().out
    # What is there is not removed for a rule that cannot be applied.
    flags = ["--overwrite", "--presence", "0.9"]
    assert cli.main(["select", "-i", unknown, "-o", str(tmp_path / "out"), *flags]) == 1
    assert "--presence needs the volumes of labeled cases" in capsys.readouterr().err
    assert (tmp_path / "out" / "selection.csv").is_file()


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
