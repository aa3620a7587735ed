"""Every loss against a slow reading of its equation, voxel by voxel."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nnunet_semiseg.labels import LabelAdapter
from nnunet_semiseg.losses.consistency import masked_squared_distance
from nnunet_semiseg.losses.cost_sensitive import cost_sensitive_bce, cost_sensitive_dice
from nnunet_semiseg.losses.pseudo_labels import WeightedSegmentationLoss
from nnunet_semiseg.losses.ramps import gaussian_ramp_up, ramp_up_between
from nnunet_semiseg.losses.uncertainty import agreement, heteroscedastic_bce, small_deviation

SHAPES = [(5, 4), (3, 4, 2)]


def adapter(classes, regions=False, ignore=None):
    return LabelAdapter(
        SimpleNamespace(
            has_regions=regions,
            ignore_label=ignore,
            num_segmentation_heads=classes,
            foreground_regions=[(i + 1,) for i in range(classes)],
            foreground_labels=list(range(1, classes)),
        )
    )


def voxels(shape):
    return itertools.product(*map(range, shape))


def test_ramp_is_the_papers():
    assert gaussian_ramp_up(0) == pytest.approx(math.exp(-5))
    assert gaussian_ramp_up(0.5) == pytest.approx(math.exp(-1.25))
    assert gaussian_ramp_up(1) == gaussian_ramp_up(3) == 1
    values = [gaussian_ramp_up(x) for x in np.linspace(0, 1, 50)]
    assert values == sorted(values)
    assert ramp_up_between(0.19, 0.2, 0.3) == 0
    assert ramp_up_between(0.2, 0.2, 0.3) == pytest.approx(math.exp(-5))
    assert ramp_up_between(0.5, 0.2, 0.3) == 1
    assert ramp_up_between(0.2, 0.2, 0.0) == 1


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("classes", [2, 4])
def test_equation_8_literally(shape, classes):
    """|| M (F(x) - F'(x)) ||^2, per voxel of the mask."""
    p, q = (torch.rand(2, classes, *shape).softmax(1) for _ in range(2))
    mask = torch.rand(2, 1, *shape) < 0.5
    squared_norm = 0.0
    for b in range(2):
        for v in voxels(shape):
            if mask[b, 0][v]:
                squared_norm += sum(float(p[b, c][v] - q[b, c][v]) ** 2 for c in range(classes))
    assert float(masked_squared_distance(p, q, mask)) == pytest.approx(squared_norm / int(mask.sum()), rel=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("problems", [1, 3])
@pytest.mark.parametrize("costs", [(5.0, 1.0), (1.0, 5.0)])
def test_equation_1_cost_terms_literally(shape, problems, costs):
    """- sum_k sum_z w_k q_zk log p_zk with two classes k, per voxel, costs scaled to a mean of 1."""
    logits = torch.randn(2, problems, *shape)
    truth = (torch.rand(2, problems, *shape) < 0.3).float()
    valid = torch.rand(2, 1, *shape) < 0.8
    expected = []
    for problem in range(problems):
        loss = count = 0.0
        for b in range(2):
            for v in voxels(shape):
                if not valid[b, 0][v]:
                    continue
                foreground = 1 / (1 + math.exp(-float(logits[b, problem][v])))
                p = (1 - foreground, foreground)
                k = int(truth[b, problem][v])
                loss -= 2 * costs[k] / sum(costs) * math.log(p[k])
                count += 1
        expected.append(loss / count)
    value = cost_sensitive_bce(logits, truth, valid, *costs)
    assert float(value) == pytest.approx(sum(expected) / problems, rel=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("problems", [1, 3])
@pytest.mark.parametrize("costs", [(5.0, 1.0), (1.0, 5.0), (1.0, 1.0)])
def test_cost_sensitive_dice_literally(shape, problems, costs):
    logits = torch.randn(2, problems, *shape)
    truth = (torch.rand(2, problems, *shape) < 0.3).float()
    valid = torch.rand(2, 1, *shape) < 0.8
    losses = []
    for k in range(problems):
        hit = positive_errors = negative_errors = 0.0
        for b in range(2):
            for v in voxels(shape):
                if valid[b, 0][v]:
                    p, y = float(logits[b, k][v].sigmoid()), float(truth[b, k][v])
                    hit += p * y
                    positive_errors += p * (1 - y)
                    negative_errors += (1 - p) * y
        errors = (costs[0] * positive_errors + costs[1] * negative_errors) / sum(costs)
        losses.append(1 - hit / (hit + errors))
        if costs == (1.0, 1.0):
            dice = 2 * hit / (2 * hit + positive_errors + negative_errors)
            assert losses[-1] == pytest.approx(1 - dice)
    assert float(cost_sensitive_dice(logits, truth, valid, *costs)) == pytest.approx(sum(losses) / problems, abs=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("classes", [2, 4])
def test_equation_7_literally(shape, classes):
    """- sum_k sum_z M_z q_zk log p_zk, per voxel of the mask."""
    logits = torch.randn(2, classes, *shape)
    labels = adapter(classes)
    hard = labels.hard(torch.randn(2, classes, *shape))
    mask = torch.rand(2, 1, *shape) < 0.5
    p = logits.softmax(1)
    total = 0.0
    for b in range(2):
        for v in voxels(shape):
            if mask[b, 0][v]:
                total -= math.log(float(p[b, int(hard[b, 0][v])][v]))
    loss = WeightedSegmentationLoss(labels, batch_dice=True, dice_weight=0.0)
    assert float(loss(logits, hard, mask)) == pytest.approx(total / int(mask.sum()), rel=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("regions", [1, 3])
def test_masked_loss_of_regions_literally(shape, regions):
    logits = torch.randn(2, regions, *shape)
    labels = adapter(regions, regions=True)
    hard = torch.rand(2, regions, *shape) < 0.4
    mask = torch.rand(2, 1, *shape) < 0.5
    p = logits.sigmoid()
    cross_entropy = 0.0
    overlap, sizes = [0.0] * regions, [0.0] * regions
    for b in range(2):
        for v in voxels(shape):
            if not mask[b, 0][v]:
                continue
            for r in range(regions):
                inside = float(p[b, r][v])
                y = bool(hard[b, r][v])
                cross_entropy -= math.log(inside if y else 1 - inside)
                overlap[r] += inside * y
                sizes[r] += inside + y
    expected = cross_entropy / (regions * int(mask.sum()))
    dice = [(2 * o + 1e-5) / (s + 1e-5) for o, s in zip(overlap, sizes)]
    loss = WeightedSegmentationLoss(labels, batch_dice=True)
    assert float(loss(logits, hard, mask)) == pytest.approx(expected - sum(dice) / regions, rel=1e-4)


def test_voxels_outside_of_the_mask_do_not_matter():
    labels = adapter(3)
    loss = WeightedSegmentationLoss(labels, batch_dice=False)
    logits = torch.randn(2, 3, 6, 6, requires_grad=True)
    hard = torch.randint(0, 3, (2, 1, 6, 6))
    mask = torch.rand(2, 1, 6, 6) < 0.5
    other = torch.where(mask, hard, (hard + 1) % 3)
    value = loss(logits, hard, mask)
    assert torch.equal(value, loss(logits, other, mask))
    value.backward()
    assert not logits.grad[(~mask).expand_as(logits)].any()
    assert logits.grad[mask.expand_as(logits)].any()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("problems", [1, 3])
def test_certain_is_where_the_heads_agree_in_every_problem(shape, problems):
    conservative, radical = (torch.randn(2, problems, *shape) for _ in range(2))
    certain = agreement(conservative, radical)
    for b in range(2):
        for v in voxels(shape):
            xor = any(bool(conservative[b, k][v] > 0) != bool(radical[b, k][v] > 0) for k in range(problems))
            assert bool(certain[b, 0][v]) == (not xor)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("problems", [1, 3])
def test_heteroscedastic_loss_literally(shape, problems):
    mean, deviation = torch.randn(2, problems, *shape), torch.rand(2, problems, *shape)
    truth, valid = (torch.rand(2, problems, *shape) < 0.5).float(), torch.rand(2, 1, *shape) < 0.7
    noise = torch.randn(5, 2, problems, *shape)
    certain = small_deviation(deviation, 0.5)
    total = 0.0
    for b in range(2):
        for v in voxels(shape):
            assert bool(certain[b, 0][v]) == all(float(deviation[b, k][v]) < 0.5 for k in range(problems))
            for k in range(problems if valid[b, 0][v] else 0):
                draws = [1 / (1 + math.exp(-float(mean[b, k][v] + deviation[b, k][v] * e[b, k][v]))) for e in noise]
                p = sum(draws) / len(draws)
                total -= math.log(p if truth[b, k][v] else 1 - p)
    value = heteroscedastic_bce(mean, deviation, truth, valid, noise)
    assert float(value) == pytest.approx(total / (problems * int(valid.sum())), rel=1e-5)


def test_masks_of_no_voxels_give_a_finite_loss_with_a_graph():
    nothing = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    p = logits.softmax(1)
    hard = torch.zeros(2, 1, 4, 4, dtype=torch.long)
    values = [
        masked_squared_distance(p, torch.rand_like(p), nothing),
        cost_sensitive_bce(logits, torch.zeros_like(logits), nothing, 5.0, 1.0),
        cost_sensitive_dice(logits, torch.zeros_like(logits), nothing, 5.0, 1.0),
        WeightedSegmentationLoss(adapter(3), True)(logits, hard, nothing),
        heteroscedastic_bce(logits, logits.exp(), torch.zeros_like(logits), nothing, torch.randn(2, *logits.shape)),
    ]
    for value in values:
        assert value.item() == 0
        (gradient,) = torch.autograd.grad(value, logits, retain_graph=True)
        assert not gradient.any()


def test_the_teachers_side_gets_no_gradient():
    student, teacher = (torch.rand(1, 2, 4, 4, requires_grad=True) for _ in range(2))
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    masked_squared_distance(student, teacher, mask).backward()
    assert student.grad.any() and teacher.grad is None


class TestLabelAdapter:
    @pytest.mark.parametrize("regions", [True, False])
    def test_probabilities_of_a_hard_prediction_give_it_back(self, regions):
        kind = adapter(3, regions=regions)
        hard = torch.rand(2, 3, 4, 5) < 0.5 if regions else torch.randint(0, 3, (2, 1, 4, 5))
        p = kind.as_probabilities(hard)
        assert p.shape == (2, 3, 4, 5) and p.dtype == torch.float32 and set(p.unique().tolist()) == {0.0, 1.0}
        assert torch.equal(kind.hard(p - 0.5 if regions else p), hard)
        assert kind.confidence(p).min() == 1

    def test_one_vs_rest_of_labels_with_ignore(self):
        target = torch.tensor([[[0, 1, 2, 3]]])[:, :, None]
        foreground, valid = adapter(3, ignore=3).one_vs_rest(target)
        assert foreground[0, :, 0].tolist() == [[0, 1, 0, 0], [0, 0, 1, 0]]
        assert valid[0, 0, 0].tolist() == [True, True, True, False]

    def test_one_vs_rest_of_regions_with_ignore(self):
        target = torch.tensor([[[1, 0, 1]], [[0, 0, 1]], [[0, 1, 0]]], dtype=torch.bool)[None]
        foreground, valid = adapter(2, regions=True, ignore=3).one_vs_rest(target)
        assert torch.equal(foreground, target[:, :2].float())
        assert valid[0, 0, 0].tolist() == [True, False, True]

    def test_hard_is_in_the_form_of_targets_and_never_the_ignore_label(self):
        logits = torch.randn(2, 3, 4, 4)
        assert adapter(3, ignore=3).hard(logits).max() < 3
        assert torch.equal(adapter(3, regions=True).hard(logits), logits > 0)

    def test_confidence(self):
        p = torch.tensor([0.2, 0.7, 0.1]).view(1, 3, 1, 1)
        assert float(adapter(3).confidence(p)) == pytest.approx(0.7)
        assert float(adapter(3, regions=True).confidence(p)) == pytest.approx(0.7)
