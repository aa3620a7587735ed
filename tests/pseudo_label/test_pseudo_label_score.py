"""pseudo_label score: consensus, Eq. 2 and its companions, and the command."""

import csv
import json
import math
import re
import resource
import tracemalloc
import zipfile
from itertools import combinations

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import LABELS, make_case, write_image, write_raw_dataset
from nnunetv2.ensembling.ensemble import average_probabilities
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from scipy import ndimage

from nnunet_semiseg.datasets import CaseError
from nnunet_semiseg.segmentations import Classes
from pseudo_label import cli, consensus
from pseudo_label.score_files import read_scores
from pseudo_label.scores import score_labels
from pseudo_label.scoring import score_members

SPACING = (0.5, 1.5, 2.0)
THREE = Classes.from_labels([1, 2, 3])
REGIONS = {"labels": {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "rim": 3}, "regions_class_order": [1, 2, 3]}
IGNORE = Classes.from_dataset_json({"labels": {**LABELS, "ignore": 3}})


def noisy(members, shape=(5, 6, 7), labels=4, seed=0):
    """Label maps that agree in most voxels; the last slice is empty, and one before has a class of one member only."""
    random = np.random.RandomState(seed)
    truth = ndimage.zoom(random.randint(0, labels, [-(-s // 3) for s in shape]), 3, order=0)
    truth = truth[tuple(map(slice, shape))]
    maps = [np.where(random.rand(*shape) < 0.25, random.randint(0, labels, shape), truth) for _ in range(members)]
    for member in maps:
        member[-1] = 0
        member[-2][member[-2] == labels - 1] = 0
    maps[0][-2, 0, 0] = labels - 1
    return [member.astype(np.uint8) for member in maps]


# ------------------------------------------------------------------------------------------ literal, slow definitions


def count(mask):
    return sum(1 for voxel in mask.ravel().tolist() if voxel)


def slow_overlap(x, y, metric, both_empty):
    """Eq. 3 of two masks, None where it is left out."""
    both = count(x & y)
    if count(x) + count(y) == 0:
        return 1.0 if both_empty == "one" else None
    return 2 * both / (count(x) + count(y)) if metric == "dice" else both / count(x | y)


def mean(values):
    values = [value for value in values if value is not None]
    return sum(values) / len(values) if values else None


def slow_vote(members):
    """Each voxel's most frequent label, the lowest of equally frequent ones."""
    result = np.zeros(members[0].shape, int)
    for voxel in np.ndindex(result.shape):
        votes = [int(member[voxel]) for member in members]
        result[voxel] = min(label for label in votes if votes.count(label) == max(map(votes.count, votes)))
    return result


def slices(volume, per_slice):
    return list(volume) if per_slice else [volume]


def slow_scores(members, agreed, sets, per_slice, metric, both_empty):
    """Eq. 2 as printed, with DSC of several classes as their mean; and the same for each class (a list of labels)."""

    def dsc(x, y, of):
        return mean([slow_overlap(np.isin(x, s), np.isin(y, s), metric, both_empty) for s in of])

    def eq2(of):
        terms = []
        for k, y_avg in enumerate(slices(agreed, per_slice)):
            for y in members:
                terms.append(dsc(slices(y, per_slice)[k], y_avg, of))
        return mean(terms)

    def pairs(of):
        values = [
            mean([dsc(x, y, of) for x, y in zip(slices(a, per_slice), slices(b, per_slice))])
            for a, b in combinations(members, 2)
        ]
        return mean(values), min((value for value in values if value is not None), default=None)

    return {"case": (eq2(sets), *pairs(sets)), **{i: (eq2([s]), *pairs([s])) for i, s in enumerate(sets)}}


# ------------------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("block", [consensus.BLOCK, 16])
@pytest.mark.parametrize("both_empty", ["skip", "one"])
@pytest.mark.parametrize("metric", ["dice", "iou"])
@pytest.mark.parametrize("per_slice", [True, False])
def test_scores_are_a_literal_reading_of_eq_2(per_slice, metric, both_empty, block, monkeypatch):
    monkeypatch.setattr(consensus, "BLOCK", block)
    members = noisy(3)
    score, of_members, agreed, differing = score_labels(
        members, THREE, SPACING, per_slice=per_slice, metric=metric, both_empty=both_empty
    )
    assert np.array_equal(agreed, slow_vote(members)) and agreed.dtype == np.uint8
    assert np.array_equal(differing, sum((member != agreed).astype(int) for member in members))
    expected = slow_scores(members, agreed, [[1], [2], [3]], per_slice, metric, both_empty)
    found = {"case": score, **dict(enumerate(score.classes.values()))}
    for key, values in expected.items():
        own = found[key]
        assert (own.score, own.pairwise_mean, own.pairwise_min) == pytest.approx(values, abs=1e-12)
    if not per_slice:
        assert score.score == pytest.approx(np.mean(of_members))


def test_empty_slices_are_what_the_options_say():
    """Two members agree on a block in one slice of four, but for one voxel."""
    a = np.zeros((4, 3, 3), np.uint8)
    a[1] = 1
    b = a.copy()
    b[1, 0, 0] = 0
    one_class = Classes.from_labels([1])
    # The tie goes to the background: the consensus is b, and a has 9 voxels, 8 of them shared.
    dice = (16 / 17 + 1) / 2
    for options, expected in (
        ({}, dice),
        ({"per_slice": True}, dice),
        ({"per_slice": True, "both_empty": "one"}, (dice + 3) / 4),
        ({"metric": "iou"}, (8 / 9 + 1) / 2),
    ):
        assert score_labels([a, b], one_class, SPACING, **options)[0].score == pytest.approx(expected, abs=1e-12)


def test_disagreement_entropy_volume_and_components():
    members = noisy(4, seed=3)
    entropy = np.random.RandomState(1).rand(*members[0].shape).astype(np.float32)
    mean_volume, deviation = np.array([10.0, 20.0, 30.0]), np.array([2.0, 3.0, 0.0])
    score, _, agreed, _ = score_labels(members, THREE, SPACING, entropy=entropy, labeled=(mean_volume, deviation))
    for label in (1, 2, 3, None):
        own = score if label is None else score.classes[str(label)]
        disagreements, entropies = [], []
        for voxel in np.ndindex(agreed.shape):
            seen = [int(mask[voxel]) for mask in (*members, agreed)]
            if any(seen) if label is None else label in seen:
                disagreements.append(sum(m != seen[-1] for m in seen[:-1]) / 4)
                entropies.append(float(entropy[voxel]))
        assert own.disagreement == pytest.approx(mean(disagreements))
        assert own.entropy == pytest.approx(mean(entropies))
        if label:
            assert own.volume_mm3 == pytest.approx(count(agreed == label) * 0.5 * 1.5 * 2.0)
            assert own.components == ndimage.label(agreed == label, np.ones((3, 3, 3)))[1]
    zscores = [own.volume_zscore for own in score.classes.values()]
    volumes = [own.volume_mm3 for own in score.classes.values()]
    assert zscores == [pytest.approx((volumes[0] - 10) / 2), pytest.approx((volumes[1] - 20) / 3), None]


def test_regions_are_voted_one_by_one_and_painted():
    classes = Classes.from_dataset_json(REGIONS)
    members = noisy(4, seed=5)
    sets = [[1, 2, 3], [2, 3], [3]]
    score, _, agreed, _ = score_labels(members, classes, SPACING)
    for voxel in np.ndindex(agreed.shape):
        expected = 0
        for region, value in zip(sets, (1, 2, 3)):
            if sum(int(member[voxel]) in region for member in members) > 2:
                expected = value
        assert agreed[voxel] == expected
    expected = slow_scores(members, agreed, sets, False, "dice", "skip")
    for key, own in {"case": score, **dict(enumerate(score.classes.values()))}.items():
        assert (own.score, own.pairwise_mean, own.pairwise_min) == pytest.approx(expected[key])
    for region, own in zip(sets, score.classes.values()):
        assert own.components == ndimage.label(np.isin(agreed, region), np.ones((3, 3, 3)))[1]
        assert own.volume_mm3 == pytest.approx(count(np.isin(agreed, region)) * 1.5)


def test_voxels_that_a_member_ignores_are_left_out_of_every_count():
    members = noisy(3, labels=3)
    cut = [member[:, :, 2:].copy() for member in members]
    members[1][:, :, :2] = 3
    for agreed in (None, members[0]):
        score, _, labels, differing = score_labels(members, IGNORE, SPACING, agreed)
        expected, _, of_cut, _ = score_labels(cut, IGNORE, SPACING, None if agreed is None else cut[0])
        assert score == expected
        assert (labels[:, :, :2] == 3).all() and not differing[:, :, :2].any()
        assert np.array_equal(labels[:, :, 2:], of_cut)


def test_a_case_without_foreground_has_no_score():
    empty = np.zeros((2, 3, 3), np.uint8)
    for both_empty in ("skip", "one"):
        score = score_labels([empty, empty], THREE, SPACING, both_empty=both_empty)[0]
        assert (score.score, score.pairwise_mean, score.disagreement, score.classes["1"].score) == (None,) * 4
        assert (score.classes["1"].volume_mm3, score.classes["1"].components) == (0, 0)


def test_a_consensus_with_a_class_that_no_member_has_is_scored():
    """As the mean of probabilities can be."""
    members = [np.full((1, 2, 2), label, np.uint8) for label in (1, 2)]
    score = score_labels(members, THREE, SPACING, consensus=np.full((1, 2, 2), 3, np.uint8))[0]
    assert (score.score, score.classes["3"].score, score.disagreement) == (0, 0, 1)


def test_large_label_values_and_many_classes():
    classes = Classes.from_labels([7, 300, 65535])
    members = [np.array([0, 7, 300, 65535], np.uint16)[member] for member in noisy(3)]
    agreed = score_labels(members, classes, SPACING)[2]
    assert agreed.dtype == np.uint16 and np.array_equal(agreed, slow_vote(members))


# ---------------------------------------------------------------------------------------------------------- consensus


def test_majority_equals_label_voting_where_there_is_no_tie():
    members = noisy(5, shape=(6, 12, 12))
    voted = sitk.GetArrayFromImage(sitk.LabelVoting([sitk.GetImageFromArray(m) for m in members], 99))
    agreed = score_labels(members, THREE, SPACING)[2]
    assert (voted == 99).any() and np.array_equal(agreed[voted != 99], voted[voted != 99])


def test_staple_equals_simpleitk():
    members = noisy(4, shape=(6, 12, 12))
    images = [sitk.GetImageFromArray(member) for member in members]
    assert np.array_equal(consensus.staple(members, THREE), sitk.GetArrayFromImage(sitk.MultiLabelSTAPLE(images, 0)))
    classes = Classes.from_dataset_json(REGIONS)
    expected = np.zeros_like(members[0])
    for region, value in zip(([1, 2, 3], [2, 3], [3]), (1, 2, 3)):
        binary = [sitk.GetImageFromArray(np.isin(member, region).astype(np.uint8)) for member in members]
        expected[sitk.GetArrayFromImage(sitk.STAPLE(binary, 1)) > 0.5] = value
    assert np.array_equal(consensus.staple(members, classes), expected)


def test_staple_leaves_ignored_voxels_out():
    members = noisy(4, shape=(6, 12, 12), labels=3)
    cut = [member[:, :, 6:].copy() for member in members]
    members[1][:, :, :6] = 3
    regions = Classes.from_dataset_json(
        {"labels": {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}, "regions_class_order": [1, 2]}
    )
    for classes in (IGNORE, regions):
        assert np.array_equal(consensus.staple(members, classes)[:, :, 6:], consensus.staple(cut, classes))


@pytest.mark.parametrize("value", [0, 1])
def test_staple_of_nothing_and_of_everything(value):
    members = [np.full((2, 4, 4), value, np.uint8)] * 2
    for classes in (THREE, Classes.from_dataset_json(REGIONS)):
        assert np.array_equal(consensus.staple(members, classes), members[0])


def write_softmax(folder, case, probabilities, manager, dtype=np.float32):
    """What nnUNetv2_predict --save_probabilities leaves of a case; returns the label map."""
    labels = np.asarray(manager.convert_probabilities_to_segmentation(probabilities)).astype(np.uint8)
    write_image(labels, folder / f"{case}.nii.gz", SPACING)
    np.savez_compressed(folder / f"{case}.npz", probabilities=probabilities.astype(dtype))
    return labels


def softmax(seed, channels=3, shape=(4, 5, 6), regions=False):
    random = np.random.RandomState(seed)
    logits = 2 * random.normal(size=(channels, *shape)) + 2 * np.random.RandomState(99).normal(size=(channels, *shape))
    if regions:
        return (1 / (1 + np.exp(-logits))).astype(np.float32)
    return (np.exp(logits) / np.exp(logits).sum(0)).astype(np.float32)


@pytest.mark.parametrize("kind", ["labels", "regions", "ignore"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_mean_is_what_nnunet_ensembles_and_entropy_is_that_of_the_mean(tmp_path, kind, dtype):
    dataset_json = {
        "labels": {"labels": LABELS},
        "regions": {"labels": {"background": 0, "whole": [1, 2], "core": 2}, "regions_class_order": [1, 2]},
        "ignore": {"labels": {**LABELS, "ignore": 3}},
    }[kind]
    regions = kind == "regions"
    manager = LabelManager(dataset_json["labels"], dataset_json.get("regions_class_order"))
    labels = [
        write_softmax(tmp_path / str(m), "a", softmax(m, 2 if regions else 3, regions=regions), manager, dtype)
        for m in range(3)
    ]
    files = [tmp_path / str(m) / "a.npz" for m in range(3)]
    agreed, entropy = consensus.mean_probabilities(files, labels, Classes.from_dataset_json(dataset_json))
    average = average_probabilities([str(file) for file in files])
    assert np.array_equal(agreed, manager.convert_probabilities_to_segmentation(average))
    assert not np.array_equal(agreed, slow_vote(labels))
    for voxel in np.ndindex(agreed.shape):
        p = average[(slice(None), *voxel)].astype(float)
        if regions:
            expected = mean([-q * math.log2(q) - (1 - q) * math.log2(1 - q) for q in p])
        else:
            expected = -sum(q * math.log(q) for q in p) / math.log(3)
        assert entropy[voxel] == pytest.approx(expected, abs=2e-3 if dtype == np.float16 else 1e-5)
    assert entropy.dtype == np.float32 and entropy.min() >= 0 and entropy.max() <= 1


def test_equal_means_go_to_the_lowest_label_and_certainty_has_no_entropy(tmp_path):
    manager = LabelManager(LABELS, None)
    first = np.zeros((3, 1, 2, 2), np.float32)
    first[1] = 1
    second = np.zeros((3, 1, 2, 2), np.float32)
    second[2, :, 0] = 1
    second[1, :, 1] = 1
    labels = [write_softmax(tmp_path / name, "a", p, manager) for name, p in (("0", first), ("1", second))]
    agreed, entropy = consensus.mean_probabilities(
        [tmp_path / "0" / "a.npz", tmp_path / "1" / "a.npz"], labels, Classes.from_dataset_json({"labels": LABELS})
    )
    assert np.array_equal(agreed, np.ones((1, 2, 2)))
    assert np.allclose(entropy[0], [[math.log(2) / math.log(3)] * 2, [0, 0]])


def test_probabilities_are_never_all_in_memory(tmp_path):
    manager = LabelManager({"background": 0, **{str(c): c for c in range(1, 16)}}, None)
    shape = (24, 48, 48)
    labels = [write_softmax(tmp_path / str(m), "a", softmax(m, 16, shape), manager) for m in range(2)]
    files, classes = [tmp_path / str(m) / "a.npz" for m in range(2)], Classes.from_labels(range(16))
    tracemalloc.start()
    consensus.mean_probabilities(files, labels, classes)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # One of the two files has 16 channels of 4 bytes.
    assert peak < 6 * 4 * math.prod(shape)


# ------------------------------------------------------------------------------------------------------------ command


def run(*arguments):
    return cli.main(["score", *map(str, arguments), *([] if "-np" in arguments else ["-np", "1"])])


def maps_of(member, cases=3):
    """{case: label map}: balls, in each member with other errors."""
    result = {}
    for i in range(cases):
        random = np.random.RandomState(10 * i + member)
        labels = make_case(i)[1]
        result[f"case_{i}"] = np.where(random.rand(*labels.shape) < 0.02, random.randint(0, 3, labels.shape), labels)
    return result


@pytest.fixture
def members(tmp_path):
    """Three folders of three cases; the first has a dataset.json, as nnUNetv2_predict leaves one."""
    folders = [tmp_path / f"fold_{m}" for m in range(3)]
    for m, folder in enumerate(folders):
        for case, labels in maps_of(m).items():
            write_image(labels.astype(np.uint8), folder / f"{case}.nii.gz", SPACING)
    (folders[0] / "dataset.json").write_text(json.dumps({"labels": LABELS, "file_ending": ".nii.gz"}))
    return folders


def table(file):
    with open(file) as stream:
        return list(csv.DictReader(stream))


def read(file):
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


def test_volumes_are_compared_with_the_labeled_cases_given(members, tmp_path, capsys):
    for i in (1, 2):
        write_image(make_case(i)[1], tmp_path / "labeled" / f"real_{i}.nii.gz")
    assert run("-i", *members, "-o", tmp_path / "scores", "--labeled", tmp_path / "labeled") == 0
    volumes = [count(make_case(i)[1] == 1) for i in (1, 2)]
    for score in read_scores(tmp_path / "scores").values():
        own = score.classes["ball" if "ball" in score.classes else "1"]
        assert own.volume_zscore == pytest.approx((own.volume_mm3 - np.mean(volumes)) / np.std(volumes, ddof=1))
    assert run("-i", *members, "-o", tmp_path / "none", "--labeled", tmp_path / "nowhere") == 1
    assert "nowhere is not a folder" in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_command_writes_maps_tables_and_cases(members, tmp_path, work, capsys):
    name = "Dataset819_score"
    write_raw_dataset(work / "raw" / name, LABELS, num_labeled=4, num_unlabeled=0)
    out = tmp_path / "scores"
    assert run("-i", *members, "-o", out, "-d", "819") == 0
    assert "Mean score of 3 cases" in capsys.readouterr().out
    scores = read_scores(out)
    assert list(scores) == ["case_0", "case_1", "case_2"] and not (out / "entropy").exists()

    ground_truth = [make_case(i)[1] for i in range(4)]
    for case, score in scores.items():
        maps = [maps_of(m)[case] for m in range(3)]
        agreed, fraction = read(out / "consensus" / f"{case}.nii.gz"), read(out / "disagreement" / f"{case}.nii.gz")
        assert np.array_equal(agreed, slow_vote(maps)) and agreed.dtype == np.uint8
        assert np.allclose(fraction, np.mean([m != agreed for m in maps], 0)) and fraction.dtype == np.float32
        image = sitk.ReadImage(str(out / "consensus" / f"{case}.nii.gz"))
        assert image.GetSpacing() == SPACING
        expected = slow_scores(maps, agreed, [[1], [2]], False, "dice", "skip")["case"]
        assert (score.score, score.pairwise_mean, score.pairwise_min) == pytest.approx(expected)
        for label, own in zip((1, 2), score.classes.values()):
            # The labeled images have voxels of 1 mm3.
            volumes = [count(labels == label) for labels in ground_truth]
            assert own.volume_zscore == pytest.approx((own.volume_mm3 - np.mean(volumes)) / np.std(volumes, ddof=1))

    rows = table(out / "scores.csv")
    assert ",".join(rows[0]) == (
        "case,class,score,pairwise_mean,pairwise_min,entropy,disagreement,volume_mm3,volume_zscore,components"
    )
    assert [(row["case"], row["class"]) for row in rows] == [(c, k) for c in scores for k in ("ball", "core")]
    for row in rows:
        own = scores[row["case"]].classes[row["class"]]
        assert float(row["score"]) == own.score and int(row["components"]) == own.components and row["entropy"] == ""
    rows = table(out / "cases.csv")
    assert ",".join(rows[0]) == "case,score,pairwise_mean,pairwise_min,entropy,disagreement"
    assert [float(row["score"]) for row in rows] == [score.score for score in scores.values()]
    details = json.loads((out / "cases" / "case_0.json").read_text())
    assert mean(details["members"].values()) == pytest.approx(details["score"])


@pytest.mark.slow
def test_results_do_not_depend_on_the_number_of_processes(members, tmp_path):
    contents = []
    for processes in (1, 2):
        out = tmp_path / f"np_{processes}"
        assert run("-i", *members, "-o", out, "-np", processes) == 0
        files = sorted(file.relative_to(out) for file in out.rglob("*") if file.is_file())
        contents.append({file: (out / file).read_bytes() for file in files})
    assert len(contents[0]) == 3 + 3 + 3 + 3 and contents[0] == contents[1]


def test_softmax_members_are_averaged_by_default(tmp_path, capsys):
    manager = LabelManager(LABELS, None)
    folders, out = [tmp_path / "a", tmp_path / "b"], tmp_path / "mean"
    for m, folder in enumerate(folders):
        write_softmax(folder, "x", softmax(m), manager)
        (folder / "dataset.json").write_text(json.dumps({"labels": LABELS}))
    assert run("-i", *folders, "-o", out) == 0
    average = average_probabilities([str(folder / "x.npz") for folder in folders])
    agreed = read(out / "consensus" / "x.nii.gz")
    assert np.array_equal(agreed, average.argmax(0))
    entropy = read(out / "entropy" / "x.nii.gz")
    assert np.allclose(entropy, -(average * np.log(average)).sum(0) / np.log(3), atol=1e-5)
    score = read_scores(out)["x"]
    hard = [read(folder / "x.nii.gz") for folder in folders]
    seen = (np.stack([agreed, *hard]) > 0).any(0)
    assert score.score == pytest.approx(slow_scores(hard, agreed, [[1], [2]], False, "dice", "skip")["case"][0])
    assert score.entropy == pytest.approx(entropy[seen].mean())

    # The vote has entropy, too, and staple has its own consensus.
    assert run("-i", *folders, "-o", tmp_path / "vote", "--consensus", "majority") == 0
    assert np.array_equal(read(tmp_path / "vote" / "consensus" / "x.nii.gz"), slow_vote(hard))
    assert np.array_equal(read(tmp_path / "vote" / "entropy" / "x.nii.gz"), entropy)
    assert run("-i", *folders, "-o", tmp_path / "staple", "--consensus", "staple") == 0
    expected = sitk.MultiLabelSTAPLE([sitk.GetImageFromArray(labels) for labels in hard], 0)
    assert np.array_equal(read(tmp_path / "staple" / "consensus" / "x.nii.gz"), sitk.GetArrayFromImage(expected))

    # Without the probabilities of one member there is no mean.
    (folders[1] / "x.npz").unlink()
    capsys.readouterr()
    assert run("-i", *folders, "-o", tmp_path / "c", "--consensus", "mean") == 1
    assert f"{folders[1] / 'x.npz'} is missing. The mean needs probabilities" in capsys.readouterr().err
    assert run("-i", *folders, "-o", tmp_path / "c") == 0
    assert json.loads((tmp_path / "c" / "score.json").read_text())["consensus"] == "majority"
    assert not (tmp_path / "c" / "entropy").exists()


def test_continues_where_it_stopped(members, tmp_path, capsys):
    out = tmp_path / "scores"
    good = (members[1] / "case_1.nii.gz").read_bytes()
    (members[1] / "case_1.nii.gz").write_bytes(good[:200])
    assert run("-i", *members, "-o", out) == 1
    error = capsys.readouterr().err
    assert f"Error: {members[1] / 'case_1.nii.gz'} cannot be read" in error
    assert "1 of 3 cases could not be scored" in error
    with pytest.raises(FileNotFoundError, match="not all of its cases are scored"):
        read_scores(out)
    done = {file: file.stat().st_mtime_ns for file in out.rglob("case_[02]*")}
    assert len(done) == 6 and not list(out.rglob("*case_1*"))

    (members[1] / "case_1.nii.gz").write_bytes(good)
    assert run("-i", *members, "-o", out) == 0
    assert done == {file: file.stat().st_mtime_ns for file in out.rglob("case_[02]*")}
    assert list(read_scores(out)) == ["case_0", "case_1", "case_2"]
    # Another case joins; while it is not scored, the scores are not complete.
    for member in members:
        (member / "case_3.nii.gz").write_bytes(good[:200])
    assert run("-i", *members, "-o", out) == 1
    with pytest.raises(FileNotFoundError, match="not all of its cases are scored"):
        read_scores(out)
    for m, member in enumerate(members):
        write_image(maps_of(m, 4)["case_3"].astype(np.uint8), member / "case_3.nii.gz", SPACING)
    assert run("-i", *members, "-o", out) == 0 and len(read_scores(out)) == 4
    fresh = tmp_path / "fresh"
    assert run("-i", *members, "-o", fresh) == 0
    assert (fresh / "scores.csv").read_text() == (out / "scores.csv").read_text()


def test_other_settings_are_refused_and_overwritten(members, tmp_path, capsys):
    out = tmp_path / "scores"
    assert run("-i", *members, "-o", out) == 0
    before = read_scores(out)
    capsys.readouterr()
    other = tmp_path / "other.json"
    other.write_text(
        json.dumps({"labels": {"background": 0, "both": [1, 2], "core": 2}, "regions_class_order": [1, 2]})
    )
    (members[0] / "dataset.json").unlink()
    for arguments, message in (
        (["-i", *members, "--metric", "iou"], "was scored with metric dice, not iou"),
        (["-i", *members, "--per-slice"], "was scored with per_slice False, not True"),
        (["-i", *members[:2], "--dataset-json", other], "was scored with members"),
        (["-i", *members, "--dataset-json", other], "with classes ball 1, core 2, not both 1+2, core 2"),
    ):
        assert run(*arguments, "-o", out) == 1
        error = capsys.readouterr().err
        assert message in error and "Use --overwrite" in error and error.count("Error") == 1
    assert read_scores(out) == before
    for member in members:
        (member / "case_2.nii.gz").unlink()
    assert run("-i", *members, "-o", out, "--dataset-json", other, "--metric", "iou", "--overwrite") == 0
    assert list(read_scores(out)) == ["case_0", "case_1"] and not list(out.rglob("case_2*"))
    (members[2] / "case_1.nii.gz").rename(tmp_path / "gone.nii.gz")
    for member in members[:2]:
        (member / "case_1.nii.gz").unlink()
    assert run("-i", *members, "-o", out, "--dataset-json", other, "--metric", "iou") == 1
    assert "has the case case_1, which the members no longer have" in capsys.readouterr().err


def test_foreign_folder_is_not_written_into(members, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    assert run("-i", *members, "-o", tmp_path / "mine", "--overwrite") == 1
    assert "has other files and no score.json" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    with pytest.raises(FileNotFoundError, match="has no score.json"):
        read_scores(tmp_path / "mine")


def test_labels_are_found_where_no_dataset_json_tells(members, tmp_path, capsys):
    (members[0] / "dataset.json").unlink()
    assert run("-i", *members, "-o", tmp_path / "scores") == 0
    assert list(read_scores(tmp_path / "scores")["case_0"].classes) == ["1", "2"]
    for file in members[2].glob("*.nii.gz"):
        write_image(read(file) * 100, file, SPACING)
    assert run("-i", *members, "-o", tmp_path / "other") == 1
    assert f"has the labels 0, 1, 2, but {members[2]} has 0, 100, 200" in capsys.readouterr().err


def test_case_without_foreground_is_reported_and_no_error(members, tmp_path, capsys):
    for member in members:
        write_image(np.zeros((4, 5, 6), np.uint8), member / "case_1.nii.gz", SPACING)
    assert run("-i", *members, "-o", tmp_path / "scores") == 0
    assert "No member has any foreground in case_1" in capsys.readouterr().out
    assert read_scores(tmp_path / "scores")["case_1"].score is None
    assert [row["score"] == "" for row in table(tmp_path / "scores" / "cases.csv")] == [False, True, False]


def test_identical_members_are_refused_before_anything_is_written(members, tmp_path, capsys):
    for file in members[0].glob("*.nii.gz"):
        for member in members[1:]:
            # Other bytes, the same labels.
            write_image(read(file).astype(np.int16), member / file.name, SPACING)
    assert run("-i", *members, "-o", tmp_path / "scores") == 1
    assert "All members have the same label maps in all 3 cases" in capsys.readouterr().err
    assert not (tmp_path / "scores").exists()
    # One other voxel in the last case is enough.
    changed = read(members[2] / "case_2.nii.gz")
    changed[0, 0, 0] = 1
    write_image(changed, members[2] / "case_2.nii.gz", SPACING)
    assert run("-i", *members, "-o", tmp_path / "scores") == 0
    assert read_scores(tmp_path / "scores")["case_0"].score == 1


def change(new_labels=None, **kwargs):
    def apply(members):
        file = members[1] / "case_1.nii.gz"
        labels = read(file)
        write_image(labels if new_labels is None else new_labels(labels), file, **{"spacing": SPACING, **kwargs})

    return apply


def gone(members):
    (members[1] / "case_1.nii.gz").unlink()
    (members[1] / "case_1.nii.gz").symlink_to("/not/mounted")


def four_dimensional(members):
    file = str(members[0] / "case_1.nii.gz")
    sitk.WriteImage(sitk.JoinSeries([sitk.ReadImage(file)] * 2), file)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (change(lambda x: x + np.float32(0.25)), "fold_1/case_1.nii.gz has fractions"),
        (change(lambda x: x + 5), "fold_1/case_1.nii.gz has the label 5, but only 0, 1, 2 are known"),
        (
            change(lambda x: x[1:]),
            "case case_1: .*fold_0/case_1.nii.gz and .*fold_1/case_1.nii.gz have different sizes",
        ),
        (change(spacing=(0.5, 1.5, 2.5)), "case case_1: .* have different spacings"),
        (change(lambda x: np.stack([x, x])), "fold_1/case_1.nii.gz has several channels"),
        (gone, "fold_1/case_1.nii.gz cannot be read: it links to /not/mounted, which is gone"),
        (four_dimensional, "fold_0/case_1.nii.gz has 4 dimensions"),
    ],
)
def test_spoiled_case_is_named_and_the_others_are_done(members, tmp_path, capsys, spoil, message):
    spoil(members)
    assert run("-i", *members, "-o", tmp_path / "scores") == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Error")]
    assert len(lines) == 2 and re.search(message, lines[0])
    assert sorted(file.stem for file in (tmp_path / "scores" / "cases").iterdir()) == ["case_0", "case_2"]


def test_an_order_of_regions_that_swaps_labels_is_refused(members, tmp_path, capsys):
    regions = {"labels": {"background": 0, "whole": [1, 2], "core": 1}, "regions_class_order": [1, 2]}
    (members[0] / "dataset.json").write_text(json.dumps(regions))
    assert run("-i", *members, "-o", tmp_path / "scores") == 1
    error = capsys.readouterr().err
    assert f"{members[0] / 'dataset.json'}: regions_class_order [1, 2] does not reproduce the labels" in error
    assert error.count("\n") == 1 and not (tmp_path / "scores").exists()


def test_damaged_scores_are_named(members, tmp_path, capsys):
    assert run("-i", *members, "-o", tmp_path / "scores") == 0
    select = ["select", "-i", str(tmp_path / "scores"), "-o", str(tmp_path / "out"), "--threshold", "0"]
    whole = {}
    for name, content, message in (
        ("cases/case_1.json", '{"case": "ca', "case_1.json is cut off"),
        ("cases/case_1.json", "{}", "case_1.json has no key 'members'"),
        ("score.json", "[]", "score.json has no keys"),
        ("score.json", '{"classes": {}}', "score.json has no key 'regions_class_order'"),
    ):
        file = tmp_path / "scores" / name
        whole.setdefault(name, file.read_text())
        file.write_text(content)
        capsys.readouterr()
        assert cli.main(select) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
        file.write_text(whole[name])
    assert cli.main(select) == 0


def test_bad_folders_are_refused(members, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    link = tmp_path / "link"
    link.symlink_to(members[0])
    fewer = tmp_path / "fewer"
    write_image(maps_of(7)["case_0"].astype(np.uint8), fewer / "case_0.nii.gz", SPACING)
    other = tmp_path / "other"
    for case, labels in maps_of(7).items():
        write_image(labels.astype(np.uint8), other / f"{case}.nii.gz", SPACING)
    (other / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "core": 1, "ball": 2}}))
    for arguments, message in (
        ([members[0]], f"-i names one member, {members[0]}"),
        ([members[0], members[0]], "names a folder twice"),
        ([members[0], link], "names a folder twice"),
        ([members[0], tmp_path / "none"], f"There is no folder {tmp_path / 'none'}"),
        ([members[0], empty], f"{empty} has no files that end in"),
        ([members[0], fewer], f"{members[0]} has the case case_1 (and 1 more), but {fewer} has not"),
        ([members[0], other], f"{other / 'dataset.json'} has the classes core, ball with other names"),
        ([*members, "--dataset-json", tmp_path / "no.json"], f"{tmp_path / 'no.json'} is missing"),
        ([*members, "-d", "777"], "There is no dataset 777"),
    ):
        assert run("-i", *arguments, "-o", tmp_path / "scores") == 1
        error = capsys.readouterr().err
        assert message in error and error.startswith("Error: ") and error.count("\n") == 1
        assert not (tmp_path / "scores").exists()


def spoil_npz(change):
    def apply(file):
        with np.load(file) as content:
            np.savez_compressed(file, **change(content["probabilities"]))

    return apply


def flip_bit(file):
    """The lowest bit of a number, so that only the check sum tells."""
    with np.load(file) as content:
        np.savez(file, probabilities=content["probabilities"])
    with zipfile.ZipFile(file) as archive:
        last = archive.start_dir - 4
    content = bytearray(file.read_bytes())
    content[last] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda file: file.write_bytes(file.read_bytes()[:300]), "cannot be read"),
        (
            lambda file: file.write_bytes(file.read_bytes()[:300] + b"\0" * 40 + file.read_bytes()[340:]),
            "cannot be read",
        ),
        (flip_bit, "cannot be read .*CRC"),
        (spoil_npz(lambda p: {"softmax": p}), "cannot be read .*probabilities.npy"),
        (spoil_npz(lambda p: {"probabilities": p[:2]}), r"has probabilities of the shape \(2, 4, 5, 6\)"),
        (spoil_npz(lambda p: {"probabilities": (255 * p).astype(np.uint8)}), "no floating point numbers"),
        (spoil_npz(lambda p: {"probabilities": np.asfortranarray(p)}), "no floating point numbers in C order"),
        (spoil_npz(lambda p: {"probabilities": np.log(p)}), "Are these logits"),
        (spoil_npz(lambda p: {"probabilities": np.where(p > 0.9, np.nan, p)}), "not from 0 to 1"),
        (spoil_npz(lambda p: {"probabilities": p[:, :, ::-1]}), "does not belong to the label map next to it"),
    ],
)
def test_bad_probabilities_are_named(tmp_path, spoil, message):
    manager = LabelManager(LABELS, None)
    labels = [write_softmax(tmp_path / str(m), "x", softmax(m), manager) for m in range(2)]
    files = [tmp_path / str(m) / "x.npz" for m in range(2)]
    spoil(files[1])
    with pytest.raises(CaseError, match=f"{files[1]}.*{message}"):
        consensus.mean_probabilities(files, labels, Classes.from_dataset_json({"labels": LABELS}))


def test_full_disk_leaves_nothing_half_written(members, tmp_path, capsys):
    random = np.random.RandomState(0)
    for member in members:
        for file in member.glob("*.nii.gz"):
            write_image(random.randint(0, 3, (40, 40, 40)).astype(np.uint8), file, SPACING)
    out, limits = tmp_path / "scores", resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8000, limits[1]))
        assert run("-i", *members, "-o", out) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"Error: {out / 'consensus' / 'case_0.nii.gz'} could not be written" in capsys.readouterr().err
    assert [file.name for file in out.rglob("*") if file.is_file()] == ["score.json"]


def test_folder_that_cannot_be_written_is_named(members, capsys):
    assert run("-i", *members, "-o", "/proc/scores") == 1
    assert "/proc/scores" in capsys.readouterr().err


def test_png_members(tmp_path):
    for m in range(2):
        write_image(100 * noisy(2, labels=3)[m][0], tmp_path / str(m) / "x.png")
    out = tmp_path / "scores"
    scores = score_members([tmp_path / "0", tmp_path / "1"], out, Classes.from_labels([100, 200]), processes=1)
    maps = [read(tmp_path / str(m) / "x.png") for m in range(2)]
    agreed = read(out / "consensus" / "x.png")
    assert np.array_equal(agreed, slow_vote(maps))
    assert np.allclose(read(out / "disagreement" / "x.tif"), np.mean([m != agreed for m in maps], 0))
    assert scores["x"].classes["100"].components == ndimage.label(agreed == 100, np.ones((3, 3)))[1]


def test_background_in_a_region_is_refused(members, tmp_path):
    classes = Classes.from_dataset_json(
        {"labels": {"background": 0, "outside": [0, 1], "core": 2}, "regions_class_order": [1, 2]}
    )
    with pytest.raises(ValueError, match="The region outside contains the background"):
        score_members(members, tmp_path / "scores", classes, processes=1)
