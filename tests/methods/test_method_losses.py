"""The methods' equations, read slowly: voxel by voxel, from the papers."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import DATASETS, SHORT, flat, short, train_steps
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from scipy import ndimage
from test_losses import SHAPES, adapter, voxels

from nnunet_semiseg.data.components import keep_largest_components
from nnunet_semiseg.labels import LabelAdapter
from nnunet_semiseg.losses.consistency import clamped_noise
from nnunet_semiseg.losses.distance import cross_task_error, distance_error, mask_of_distance
from nnunet_semiseg.losses.mixing import random_cuboid
from nnunet_semiseg.losses.prototypes import (
    PrototypeMemory,
    class_means,
    gather_features,
    prototype_contrast,
    sample_voxels,
)
from nnunet_semiseg.losses.pseudo_labels import DeeplySupervised, WeightedSegmentationLoss
from nnunet_semiseg.losses.regions import RegionLoss
from nnunet_semiseg.losses.uncertainty import above_percentile
from nnunet_semiseg.networks.second import PLAIN, RESIDUAL, second_plans
from nnunet_semiseg.trainers.frame import Unlabeled
from nnunet_semiseg.trainers.methods.urpc import nnUNetTrainerURPC, pyramid_consistency
from nnunet_semiseg.trainers.registry import TRAINERS

BOTH_SHAPES = pytest.mark.parametrize("shape", SHAPES)
CLASSES = pytest.mark.parametrize("classes", [2, 4])
KINDS = pytest.mark.parametrize("kind", ["labels", "regions"])
ALL_KINDS = pytest.mark.parametrize("kind", DATASETS)


def labels_of(kind, classes):
    """As of a data set of conftest's kinds with so many classes or regions."""
    return adapter(classes, "regions" in kind, classes if "ignore" in kind else None)


@pytest.fixture
def trainer_of(make_trainer):
    """``trainer_of(name, kind, classes)``: a trainer whose losses take tensors of such a data set, of any shape."""

    def start(name, kind, classes):
        trainer = make_trainer(name)
        trainer.labels = labels_of(kind, classes)
        trainer.initialize()
        return trainer

    return start


def terms_of(trainer, unlabeled, data=None, target=None):
    """The unsupervised terms of a step."""
    terms = {}
    for group in trainer.unsupervised_losses(unlabeled, data, target):
        terms |= group
    return terms


def random_hard(kind, classes, shape, samples=2):
    if "regions" in kind:
        return torch.rand(samples, classes, *shape) < 0.5
    return torch.randint(0, classes, (samples, 1, *shape))


def random_target(kind, classes, shape, samples=2):
    """As nnU-Net's, a fifth of it ignored where the kind has an ignore label."""
    hard, ignored = random_hard(kind, classes, shape, samples), torch.rand(samples, 1, *shape) < 0.2
    if "ignore" not in kind:
        return hard
    return torch.cat((hard, ignored), 1) if "regions" in kind else hard.masked_fill(ignored, classes)


def softmax(values):
    exponentials = [math.exp(v) for v in values]
    return [e / sum(exponentials) for e in exponentials]


def probabilities(logits, kind):
    return [1 / (1 + math.exp(-x)) for x in logits] if "regions" in kind else softmax(logits)


def entropy(p, kind):
    return -sum(q * math.log(q) for q in ([*p, *(1 - q for q in p)] if "regions" in kind else p))


def decision(p, kind):
    return [q > 0.5 for q in p] if "regions" in kind else p.index(max(p))


def foreground(kind, classes):
    return range(classes) if "regions" in kind else range(1, classes)


def at(tensor, b, v):
    """The channels of a (B, C, *) tensor in one voxel, as numbers."""
    return [float(x) for x in tensor[(b, slice(None), *v)]]


def is_class(hard, b, v, k, kind):
    return bool(hard[b, k][v]) if "regions" in kind else int(hard[b, 0][v]) == k


def is_ignored(target, b, v, classes, kind):
    return "ignore" in kind and at(target, b, v)[-1] == (1 if "regions" in kind else classes)


def everywhere(logits, kind):
    """The probabilities by sample and voxel."""
    return {(b, v): probabilities(at(logits, b, v), kind) for b in range(len(logits)) for v in voxels(logits.shape[2:])}


def literal_ce(p, hard, weight, kind):
    """Mean cross-entropy over weighted voxels, and over regions; ``p`` by sample and voxel."""
    loss = total = 0.0
    for (b, v), q in p.items():
        w = float(weight[b, 0][v])
        if "regions" in kind:
            right = [x if is_class(hard, b, v, k, kind) else 1 - x for k, x in enumerate(q)]
        else:
            right = [q[int(hard[b, 0][v])]]
        loss -= w * sum(map(math.log, right)) / len(right)
        total += w
    return loss / total


def literal_dice(p, hard, weight, kind):
    """Minus Dice of weighted voxels over the batch, mean over the foreground; ``p`` by sample and voxel."""
    dice = []
    for k in foreground(kind, len(next(iter(p.values())))):
        overlap = sizes = 0.0
        for (b, v), q in p.items():
            y, w = is_class(hard, b, v, k, kind), float(weight[b, 0][v])
            overlap, sizes = overlap + w * q[k] * y, sizes + w * (q[k] + y)
        dice.append((2 * overlap + 1e-5) / (sizes + 1e-5))
    return -sum(dice) / len(dice)


PARTS = pytest.mark.parametrize(
    "literal, part", [(literal_ce, dict(dice_weight=0.0)), (literal_dice, dict(ce_weight=0.0))], ids=["ce", "dice"]
)


# ------------------------------------------------------------------------------------------- entropy and percentiles


@BOTH_SHAPES
@CLASSES
def test_entropy_literally(shape, classes):
    logits = 3 * torch.randn(2, classes, *shape)
    for name in ("labels", "regions"):
        kind = labels_of(name, classes)
        for (b, v), p in everywhere(logits, name).items():
            assert float(kind.entropy(logits)[b, 0][v]) == pytest.approx(entropy(p, name), abs=1e-5)
        of_probabilities = kind.probability_entropy(kind.probabilities(logits))
        torch.testing.assert_close(of_probabilities, kind.entropy(logits), atol=1e-5, rtol=1e-4)
        assert float(kind.entropy(torch.zeros(1, classes, 1, 1))) == pytest.approx(kind.max_entropy)


def test_entropy_of_very_sure_predictions_is_finite_with_a_finite_gradient():
    for kind in (adapter(3), adapter(3, regions=True)):
        logits = torch.tensor([200.0, -200.0, 0.0]).view(1, 3, 1, 1).requires_grad_()
        entropy = kind.entropy(logits)
        (gradient,) = torch.autograd.grad(entropy.sum(), logits)
        assert torch.isfinite(entropy).all() and torch.isfinite(gradient).all()
        assert torch.isfinite(kind.probability_entropy(kind.probabilities(logits))).all()


@pytest.mark.parametrize("percentile", [0.0, 20.0, 50.0, 95.0, 99.0, 100.0])
def test_percentile_keeps_the_most_uncertain_voxels_of_each_sample(percentile):
    uncertainty = torch.rand(3, 1, 7, 9)
    uncertainty[1] *= 100
    valid = torch.rand(3, 1, 7, 9) < 0.8
    for mask in (None, valid):
        found = above_percentile(uncertainty, percentile, mask)
        for b in range(3):
            chosen = sorted(float(uncertainty[b, 0][v]) for v in voxels((7, 9)) if mask is None or bool(mask[b, 0][v]))
            expected = set(chosen[max(1, math.ceil(percentile / 100 * len(chosen))) :])
            for v in voxels((7, 9)):
                counts = mask is None or bool(mask[b, 0][v])
                assert bool(found[b, 0][v]) == (counts and float(uncertainty[b, 0][v]) in expected)


def test_percentile_of_ties_constants_and_nothing():
    sure = torch.zeros(1, 1, 10, 10)
    sure[0, 0, 0, :3] = torch.tensor([0.1, 0.2, 0.3])
    assert int(above_percentile(sure, 50.0).sum()) == 3
    assert int(above_percentile(sure, 98.0).sum()) == 2
    assert not above_percentile(torch.full((2, 1, 5, 5), 0.7), 95.0).any()
    assert not above_percentile(torch.rand(2, 1, 5, 5), 95.0, torch.zeros(2, 1, 5, 5, dtype=torch.bool)).any()


# ------------------------------------------------------------------------------------------ weighted segmentation loss


def nnunet_loss(labels, batch_dice, ignore):
    dice = dict(batch_dice=batch_dice, smooth=1e-5, do_bg=labels.has_regions, ddp=False)
    if labels.has_regions:
        ignores = ignore is not None
        return DC_and_BCE_loss({}, dice, use_ignore_label=ignores, dice_class=MemoryEfficientSoftDiceLoss)
    return DC_and_CE_loss(dice, {}, ignore_label=ignore, dice_class=MemoryEfficientSoftDiceLoss)


@pytest.mark.parametrize("batch_dice", [True, False])
@pytest.mark.parametrize("ignore", [3, None])
@pytest.mark.parametrize("regions", [True, False])
def test_equal_weights_are_nnunets_loss(batch_dice, regions, ignore):
    labels = adapter(3, regions=regions, ignore=ignore)
    logits = torch.randn(2, 3, 8, 8)
    if regions:
        target = torch.rand(2, 3 if ignore is None else 4, 8, 8) < 0.4
    else:
        target = torch.randint(0, 3 if ignore is None else 4, (2, 1, 8, 8))
    hard, valid = labels.without_ignored(target)
    expected = nnunet_loss(labels, batch_dice, ignore)(logits, target)
    loss = WeightedSegmentationLoss(labels, batch_dice)
    torch.testing.assert_close(loss(logits, hard, valid), expected)
    torch.testing.assert_close(loss(logits, hard, 0.3 * valid), expected, atol=1e-4, rtol=1e-4)


def test_deep_supervision_is_nnunets():
    from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform

    labels = adapter(3, ignore=3)
    target = torch.randint(0, 4, (2, 1, 12, 16))
    scales = [[1, 1], [0.5, 0.5], [0.25, 0.25]]
    transform = DownsampleSegForDSTransform(scales)
    targets = [torch.stack(t) for t in zip(*(transform(segmentation=s)["segmentation"] for s in target))]
    outputs = [torch.randn(2, 3, *t.shape[2:]) for t in targets]
    factors = (4 / 7, 3 / 7, 0.0)
    expected = DeepSupervisionWrapper(nnunet_loss(labels, True, 3), factors)(outputs, targets)
    ours = DeeplySupervised(WeightedSegmentationLoss(labels, True), factors)
    torch.testing.assert_close(ours(outputs, *labels.without_ignored(target)), expected)


# ------------------------------------------------------------------------------------------------- regions


@BOTH_SHAPES
@CLASSES
@KINDS
@PARTS
@pytest.mark.parametrize("favored", ["url", "crl", "none"])
def test_equations_7_and_8_with_voxel_weights_literally(shape, classes, kind, literal, part, favored):
    logits, hard = torch.randn(2, classes, *shape), random_hard(kind, classes, shape)
    uncertain, valid = (torch.rand(2, 1, *shape) < p for p in (0.3, 0.8))
    alpha, p = 0.25, everywhere(logits, kind)
    weight = torch.zeros(2, 1, *shape)
    for b, v in p:
        m = bool(uncertain[b, 0][v])
        w = {"url": 1 if m else alpha, "crl": alpha if m else 1, "none": 1}[favored]
        weight[b, 0][v] = w * bool(valid[b, 0][v])
    loss = RegionLoss(WeightedSegmentationLoss(labels_of(kind, classes), True, **part), False)
    value = float(loss(logits, hard, uncertain, favored, alpha, valid))
    assert value == pytest.approx(literal(p, hard, weight, kind), rel=1e-4)


@BOTH_SHAPES
@CLASSES
@KINDS
@PARTS
def test_equations_7_and_8_region_by_region_literally(shape, classes, kind, literal, part):
    logits, hard = torch.randn(2, classes, *shape), random_hard(kind, classes, shape)
    uncertain, valid = (torch.rand(2, 1, *shape) < p for p in (0.3, 0.8))
    p = everywhere(logits, kind)
    of_uncertain, of_certain = (literal(p, hard, valid & region, kind) for region in (uncertain, ~uncertain))
    loss = RegionLoss(WeightedSegmentationLoss(labels_of(kind, classes), True, **part), True)
    url, crl = (float(loss(logits, hard, uncertain, favored, 0.5, valid)) for favored in ("url", "crl"))
    assert url == pytest.approx(of_uncertain + 0.5 * of_certain, rel=1e-4)
    assert crl == pytest.approx(of_certain + 0.5 * of_uncertain, rel=1e-4)


def test_the_two_readings_weigh_an_uncertain_voxel_contrarily():
    """CRL at the 99th percentile: half the weight of a certain voxel, or 49.5 times."""
    uncertain = torch.zeros(1, 1, 10, 10, dtype=torch.bool)
    uncertain[0, 0, 0, 0] = True
    ratios = []
    for normalized in (False, True):
        logits = torch.zeros(1, 2, 10, 10, requires_grad=True)
        loss = RegionLoss(WeightedSegmentationLoss(adapter(2), True, dice_weight=0), normalized)
        hard = torch.zeros(1, 1, 10, 10, dtype=torch.long)
        loss(logits, hard, uncertain, "crl", 0.5, torch.ones_like(uncertain)).backward()
        ratios.append(float(logits.grad[0, 0, 0, 0] / logits.grad[0, 0, 5, 5]))
    assert ratios == pytest.approx([0.5, 49.5])


def test_alpha_zero_removes_the_region():
    uncertain = torch.rand(1, 1, 6, 6) < 0.5
    for normalized in (False, True):
        logits = torch.randn(1, 2, 6, 6, requires_grad=True)
        loss = RegionLoss(WeightedSegmentationLoss(adapter(2), True), normalized)
        loss(logits, torch.randint(0, 2, (1, 1, 6, 6)), uncertain, "crl", 0.0, torch.ones_like(uncertain)).backward()
        assert not logits.grad[uncertain.expand_as(logits)].any()
        assert logits.grad[~uncertain.expand_as(logits)].any()


def test_burl_takes_each_halfs_own_entropy(started, monkeypatch):
    """URL's regions come from the student's prediction, CRL's from the teacher's."""
    trainer = started(short("nnUNetTrainerMeanTeacherBURL") + "_alpha_unlabeled=0.25")
    trainer.before_step()
    seen = []
    monkeypatch.setattr(trainer, "region_loss", lambda *arguments: seen.append(arguments) or arguments[0][0].sum())
    batch = next(trainer.dataloader_train)
    with torch.no_grad():
        for parameter in trainer.teacher.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        trainer.supervised_loss(batch["data"], batch["target"])
        student = trainer.labels.entropy(trainer.network(batch["data"])[0])
        unlabeled = trainer.next_unlabeled()
        trainer.options.__dict__["noise"] = 0.0
        terms_of(trainer, unlabeled)
        teacher = trainer.labels.entropy(trainer.teacher(unlabeled.weak)[0])
    (_, hard, uncertain, favored, alpha, _), (_, pseudo, distrusted, other, other_alpha, _) = seen
    assert (favored, other, alpha, other_alpha) == ("url", "crl", 0.5, 0.25)
    assert torch.equal(uncertain, above_percentile(student, 95.0))
    assert torch.equal(distrusted, above_percentile(teacher, 99.0))
    assert torch.equal(hard, batch["target"][0].long())
    with torch.no_grad():
        assert torch.equal(pseudo, trainer.labels.hard(trainer.teacher(unlabeled.weak)[0]))


# -------------------------------------------------------------------- Mean Teacher, Pi-model and entropy minimization


@BOTH_SHAPES
@CLASSES
@KINDS
@pytest.mark.parametrize("method", ["MeanTeacher", "PiModel"])
def test_consistency_literally(trainer_of, monkeypatch, shape, classes, kind, method):
    """The mean squared difference of the student on one view and, on the other, the teacher or the student itself."""
    name = f"nnUNetTrainer{method}_warm_up=0_ramp_up=0.5_noise=0_consistency_weight=7{SHORT}"
    trainer = trainer_of(name, kind, classes)
    trainer.global_step = 1
    weak, strong = (torch.randn(2, 1, *shape) for _ in range(2))
    first, second = (torch.randn(2, classes, *shape, requires_grad=True) for _ in range(2))
    other = trainer.teacher if method == "MeanTeacher" else trainer.network
    looks = [(trainer.network, strong, first), (other, weak, second)]

    def logits(network, x):
        (output,) = (output for runs, view, output in looks if runs is network and torch.equal(view, x))
        return output

    monkeypatch.setattr(trainer, "logits", logits)
    term = terms_of(trainer, Unlabeled(weak, strong))["consistency"]
    p, q = (everywhere(output, kind) for output in (first, second))
    total = sum((x - y) ** 2 for place in p for x, y in zip(p[place], q[place]))
    assert float(term.value) == pytest.approx(total / first.numel(), rel=1e-4)
    # (1 / 6) / 0.5 of the ramp.
    assert term.weight == pytest.approx(7 * math.exp(-5 * (1 - 1 / 3) ** 2))
    gradients = torch.autograd.grad(term.value, (first, second), allow_unused=True)
    assert [g is not None and bool(g.any()) for g in gradients] == [True, method == "PiModel"]


@BOTH_SHAPES
@CLASSES
@KINDS
def test_entropy_minimization_literally(trainer_of, monkeypatch, shape, classes, kind):
    name = f"nnUNetTrainerEntropyMinimization_warm_up=0_ramp_up=0_entropy_weight=0.2{SHORT}"
    trainer = trainer_of(name, kind, classes)
    output, x = torch.randn(2, classes, *shape), torch.randn(2, 1, *shape)
    monkeypatch.setattr(trainer, "logits", lambda network, x: output)
    term = terms_of(trainer, Unlabeled(x, x))["entropy"]
    total = sum(entropy(p, kind) for p in everywhere(output, kind).values())
    u_max = classes * math.log(2) if kind == "regions" else math.log(classes)
    assert float(term.value) == pytest.approx(total / x.numel() / u_max, rel=1e-4) and term.weight == 0.2


# -------------------------------------------------------------------------------------------------------------- URPC


@BOTH_SHAPES
@CLASSES
@KINDS
def test_pyramid_consistency_literally(shape, classes, kind):
    """Squares and divergences from the mean over three resolutions, voxel by voxel; of each region in two channels."""
    logits = [2 * torch.randn(2, classes, *shape) for _ in range(3)]
    trainer = SimpleNamespace(labels=labels_of(kind, classes))
    log_p = torch.stack([nnUNetTrainerURPC.log_probabilities(trainer, x, shape) for x in logits])

    def channels(p):
        return [*p, *(1 - x for x in p)] if kind == "regions" else p

    scales = [{place: channels(p) for place, p in everywhere(x, kind).items()} for x in logits]
    total = 0.0
    for p in scales:
        numerator = denominator = divergences = 0.0
        for place in p:
            q = [sum(values) / 3 for values in zip(*(scale[place] for scale in scales))]
            d = sum(y * math.log(y / x) for x, y in zip(p[place], q))
            square = sum((x - y) ** 2 for x, y in zip(p[place], q)) / len(q)
            numerator, denominator = numerator + square * math.exp(-d), denominator + math.exp(-d)
            divergences += d
        total += (numerator / denominator + divergences / len(p)) / 3
    assert float(pyramid_consistency(log_p)) == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("kind", ["labels", "regions"])
def test_pyramid_consistency_of_equal_and_of_extreme_outputs(kind):
    trainer = SimpleNamespace(labels=labels_of(kind, 3))
    low = torch.randn(1, 3, 1, 1).expand(1, 3, 4, 4)
    equal = torch.stack([nnUNetTrainerURPC.log_probabilities(trainer, x, (8, 8)) for x in (low, low[..., :2, :2])])
    assert float(pyramid_consistency(equal)) == pytest.approx(0, abs=1e-6)
    logits = torch.tensor([100.0, -100.0]).view(2, 1, 1, 1, 1).expand(2, 1, 3, 8, 8).clone()
    logits[:, :, 1] *= -1
    logits.requires_grad_()
    value = pyramid_consistency(torch.stack([nnUNetTrainerURPC.log_probabilities(trainer, x, (8, 8)) for x in logits]))
    (gradient,) = torch.autograd.grad(value, logits)
    assert torch.isfinite(value) and torch.isfinite(gradient).all()


def test_urpc_needs_two_resolutions_that_are_trained(make_trainer):
    with pytest.raises(ValueError, match="nnUNetTrainerURPC needs 2 resolutions .* there are 1"):
        make_trainer("nnUNetTrainerURPC", fit=False).initialize()
    with pytest.raises(ValueError, match="Leave enable_deep_supervision on"):
        make_trainer("nnUNetTrainerURPC_enable_deep_supervision=false").initialize()


# ------------------------------------------------------------------------------------------------------------- UA-MT


@BOTH_SHAPES
@CLASSES
@KINDS
@pytest.mark.parametrize("option", ["", "_percentile=60", "_uncertainty=false"])
def test_uamt_loss_literally(trainer_of, monkeypatch, shape, classes, kind, option):
    name = f"nnUNetTrainerUAMT_warm_up=0_ramp_up=1_consistency_weight=2_passes=3{option}{SHORT}"
    trainer = trainer_of(name, kind, classes)
    trainer.global_step = 2
    base = 8 * torch.randn(2, classes, *shape)
    passes = [base + torch.randn(2, classes, *shape) for _ in range(3)]
    student = torch.randn(2, classes, *shape)
    answers = iter(passes)
    monkeypatch.setattr(trainer.teacher, "forward", lambda x: next(answers))
    monkeypatch.setattr(trainer.network, "forward", lambda x: student)

    progress = 2 / 6
    threshold = (0.75 + 0.25 * math.exp(-5 * (1 - progress) ** 2)) * math.log(2)
    several = [everywhere(output, kind) for output in (passes if "false" not in option else passes[:1])]
    total = count = 0.0
    for b in range(2):
        means = {v: [sum(values) / len(several) for values in zip(*(p[b, v] for p in several))] for v in voxels(shape)}
        entropies = {v: entropy(mean, kind) for v, mean in means.items()}
        if "percentile" in option:
            certain = sorted(entropies, key=entropies.get)[: math.ceil(0.6 * len(entropies))]
        else:
            certain = [v for v, u in entropies.items() if u < threshold or "false" in option]
        for v in certain:
            p = probabilities(at(student, b, v), kind)
            total += sum((x - y) ** 2 for x, y in zip(p, means[v])) / classes
            count += 1
    assert 0 < count < base[:, 0].numel() or "false" in option
    x = torch.randn(2, 1, *shape)
    term = terms_of(trainer, Unlabeled(x, x))["consistency"]
    assert float(term.value) == pytest.approx(total / count, rel=1e-4)
    assert term.weight == pytest.approx(2 * math.exp(-5 * (1 - progress) ** 2))


def test_noise_is_drawn_for_every_pass_and_clamped(started, monkeypatch):
    trainer = started(f"nnUNetTrainerUAMT_warm_up=0_passes=3_noise=0.2{SHORT}")
    inputs = []
    original = trainer.teacher.forward
    monkeypatch.setattr(trainer.teacher, "forward", lambda x: inputs.append(x) or original(x))
    x = torch.zeros(2, 1, *trainer.configuration_manager.patch_size)
    trainer.teacher_mean(x)
    assert len(inputs) == 3 and not torch.equal(inputs[0], inputs[1])
    assert max(float(i.abs().max()) for i in inputs) == pytest.approx(0.4)
    assert float(clamped_noise(torch.zeros(100000), 1.0).std()) == pytest.approx(0.96, abs=0.01)


def test_uamt_dropout_makes_the_passes_differ(started):
    trainer = started(f"nnUNetTrainerUAMT_warm_up=0_passes=2_noise=0_dropout=0.5{SHORT}")
    x = torch.randn(2, 1, *trainer.configuration_manager.patch_size)
    assert not torch.equal(trainer.teacher_mean(x), trainer.teacher_mean(x))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_uamt_student_learns_with_the_dropout_of_its_teacher(started, monkeypatch, dropout):
    trainer = started(f"nnUNetTrainerUAMT_warm_up=0_dropout={dropout}{SHORT}")
    batch = next(trainer.dataloader_train)
    answer = trainer.teacher_mean(batch["data"])
    monkeypatch.setattr(trainer, "teacher_mean", lambda weak: answer)
    for loss in (
        lambda: trainer.supervised_loss(batch["data"], batch["target"])["supervised"].value,
        lambda: terms_of(trainer, Unlabeled(batch["data"], batch["data"]))["consistency"].value,
    ):
        assert (float(loss()) == float(loss())) == (dropout == 0)


# --------------------------------------------------------------------------------------- copy-paste and its components


@pytest.mark.parametrize("shape", [(12, 9), (6, 9, 12), (2, 30, 30), (1, 4, 4)])
def test_cuboid_has_two_thirds_of_every_side(shape):
    for _ in range(20):
        mask = random_cuboid(shape, 2 / 3)
        assert mask.shape == (1, 1, *shape) and mask.dtype == torch.bool
        expected = np.prod([max(1, int(2 / 3 * side)) for side in shape])
        assert int(mask.sum()) == expected
        inside = mask[0, 0].nonzero()
        extent = inside.max(0).values - inside.min(0).values + 1
        assert int(extent.prod()) == expected


def test_cuboids_reach_every_corner():
    masks = torch.cat([random_cuboid((9, 9), 2 / 3) for _ in range(200)])
    assert masks.any(0).all()


@pytest.fixture
def copy_paste(trainer_of, monkeypatch):
    """``copy_paste(name, kind, classes, shape)``: a step of a trainer with both mixed batches, its networks' outputs
    given, and what is in it.

    ``terms()`` are those of the step; ``images`` are then the two mixed ones.
    """

    def start(name, kind, classes, shape):
        trainer = trainer_of(short(f"nnUNetTrainer{name}_unmixed=false_ramp_up=0"), kind, classes)
        trainer.before_step()
        data, weak, strong = (torch.randn(3, 1, *shape) for _ in range(3))
        target, teacher = random_target(kind, classes, shape, 3), torch.randn(3, classes, *shape)
        students = [torch.randn(3, classes, *shape, requires_grad=True) for _ in range(2)]
        images, inside = [], trainer.cuboid(data)
        monkeypatch.setattr(trainer, "next_unlabeled", lambda: Unlabeled(weak, strong))
        monkeypatch.setattr(trainer.teacher, "forward", {weak: teacher}.get)
        monkeypatch.setattr(trainer, "cuboid", lambda data: inside)
        monkeypatch.setattr(trainer.network, "forward", lambda x: images.append(x) or students[len(images) - 1])
        pseudo = trainer.targets(Unlabeled(weak, strong))["hard"]
        return SimpleNamespace(
            trainer=trainer,
            data=data,
            target=target,
            strong=strong,
            teacher=teacher,
            students=students,
            images=images,
            inside=inside,
            pseudo=pseudo,
            terms=lambda: list(trainer.losses(data, target)),
        )

    return start


def is_labeled(step, direction, v):
    """First what is outside the cuboid comes from labeled patches, then what is inside."""
    return bool(step.inside[0, 0][v]) == bool(direction)


@BOTH_SHAPES
@CLASSES
@ALL_KINDS
def test_copy_paste_literally(copy_paste, monkeypatch, shape, classes, kind):
    """Every voxel of the mixed images, labels and regions, from where it should come."""
    step = copy_paste("BCP_origin_normalized=true", kind, classes, shape)
    seen = []

    def labeled_loss(outputs, hard, valid):
        seen.append(dict(image=step.images[-1], hard=hard, labeled=valid))
        return outputs.sum()

    def pseudo_loss(outputs, hard, valid, labeling):
        assert hard is seen[-1]["hard"]
        seen[-1].update(pseudo=valid, labeling=labeling)
        return outputs.sum()

    monkeypatch.setattr(step.trainer, "labeled_loss", labeled_loss)
    monkeypatch.setattr(step.trainer, "pseudo_loss", pseudo_loss)
    terms = [set(group) for group in step.terms()]
    assert terms == [{"mixed_labels_out", "mixed_pseudo_out"}, {"mixed_labels_in", "mixed_pseudo_in"}]
    for direction, group in enumerate(seen):
        for i, v in everywhere(step.teacher, kind):
            # Another partner in each direction.
            partner = (i - direction) % 3
            labeled = is_labeled(step, direction, v)
            ignored = labeled and is_ignored(step.target, i, v, classes, kind)
            image, hard = (step.data, step.target) if labeled else (step.strong, step.pseudo)
            origin = i if labeled else partner
            assert at(group["image"], i, v) == at(image, origin, v)
            assert ignored or at(group["hard"], i, v) == at(hard, origin, v)[: step.pseudo.shape[1]]
            assert bool(group["labeled"][i, 0][v]) == (labeled and not ignored)
            assert bool(group["pseudo"][i, 0][v]) == (not labeled)
            assert labeled or at(group["labeling"], i, v) == at(step.teacher, partner, v)


@BOTH_SHAPES
@CLASSES
@ALL_KINDS
@pytest.mark.parametrize("method", ["BCP", "BCPBURL_percentile_labeled=60_percentile_unlabeled=40"])
def test_one_loss_weights_every_voxel_by_its_origin_and_region(copy_paste, monkeypatch, shape, classes, kind, method):
    """1 and pseudo_weight in the mean; with regions the part that is not favored, by percentiles in each origin, has
    half the weight of the other."""
    step = copy_paste(f"{method}_pseudo_weight=0.4", kind, classes, shape)
    weights, loss = [], step.trainer.host_loss
    monkeypatch.setattr(step.trainer, "host_loss", lambda o, h, w: weights.append(w[:, 0]) or loss(o, h, w))
    terms = [(name, *term) for group in step.terms() for name, term in group.items()]
    assert [(name, share) for name, _, share in terms] == [("mixed_out", 0.5), ("mixed_in", 0.5)]
    for direction, (found, student, (_, value, _)) in enumerate(zip(weights, step.students, terms)):
        expected = torch.zeros_like(found)
        for mean, labeled, percentage in ((1.0, True, 60), (0.4, False, 40)):
            unscaled = {}
            for i in range(3):
                of_origin = [v for v in voxels(shape) if is_labeled(step, direction, v) == labeled]
                if labeled:
                    of_origin = [v for v in of_origin if not is_ignored(step.target, i, v, classes, kind)]
                logits = student[i] if labeled else step.teacher[(i - direction) % 3]
                u = {v: entropy(probabilities(at(logits[None], 0, v), kind), kind) for v in of_origin}
                certain = sorted(u, key=u.get)[: math.ceil(percentage / 100 * len(u))]
                unscaled |= {(i, *v): 0.5 if "BURL" in method and (v in certain) == labeled else 1.0 for v in u}
            for place, w in unscaled.items():
                expected[place] = w * mean * len(unscaled) / sum(unscaled.values())
        torch.testing.assert_close(found, expected)
        # Labels and pseudo labels teach, ignored voxels do not.
        (gradient,) = torch.autograd.grad(value, student)
        assert torch.equal(gradient.abs().sum(1) > 0, expected > 0)


@pytest.mark.parametrize("method", ["BCP", "BCPBURL"])
def test_labeled_patches_as_they_are_and_the_mixed_batches_in_turn(started, monkeypatch, method):
    trainer = started(short(f"nnUNetTrainer{method}"))
    batch, unlabeled = next(trainer.dataloader_train), trainer.draw_unlabeled()
    inside = trainer.cuboid(batch["data"])
    forward, images = trainer.network.forward, []
    monkeypatch.setattr(trainer, "draw_unlabeled", lambda: unlabeled)
    monkeypatch.setattr(trainer, "cuboid", lambda data: inside)
    monkeypatch.setattr(trainer.network, "forward", lambda x: images.append(x) or forward(x))
    trainer.before_step()
    data, strong = batch["data"], unlabeled["strong"]
    for step, real in enumerate([~inside, inside] * 2):
        trainer.global_step = step
        groups = list(trainer.losses(data, batch["target"]))
        assert [{key: term.weight for key, term in group.items()} for group in groups] == [
            {"supervised": 0.5},
            {"mixed": 0.5},
        ]
        plain, mixed = images[-2:]
        assert torch.equal(plain, data) and torch.equal(mixed, torch.where(real, data, strong))


def test_pretraining_mixes_labeled_patches(started, monkeypatch):
    trainer = started(f"nnUNetTrainerBCP_pretraining=1_mix_pretraining=true{SHORT}")
    batch = next(trainer.dataloader_train)
    inside = trainer.cuboid(batch["data"])
    monkeypatch.setattr(trainer, "cuboid", lambda data: inside)
    seen = {}
    original = trainer.labeled_loss
    monkeypatch.setattr(trainer, "labeled_loss", lambda o, h, v: seen.update(hard=h) or original(o, h, v))
    (terms,) = trainer.losses(batch["data"], batch["target"])
    assert set(terms) == {"supervised"}
    target, n = batch["target"][0].long(), len(batch["data"])
    for i in range(n):
        partner = target[(i + n // 2) % n]
        assert torch.equal(seen["hard"][i], torch.where(inside[0], partner, target[i]))


@pytest.mark.parametrize("regions", [True, False])
@BOTH_SHAPES
def test_largest_component_of_each_class(regions, shape):
    random = np.random.RandomState(0)
    shape = tuple(4 * side for side in shape)
    for _ in range(5):
        labels = adapter(3, regions=regions)
        if regions:
            hard = torch.from_numpy(random.rand(2, 3, *shape) < 0.2)
        else:
            hard = torch.from_numpy(random.choice(3, (2, 1, *shape), p=(0.7, 0.2, 0.1)))
        kept = keep_largest_components(hard, labels)
        assert torch.equal(keep_largest_components(hard.mT.contiguous().mT, labels), kept)
        assert kept.dtype == hard.dtype and kept.shape == hard.shape
        for b in range(2):
            for k in range(labels.num_foreground):
                before, after = (labels.is_class(x, k)[b].numpy() for x in (hard, kept))
                components, count = ndimage.label(before, np.ones((3,) * len(shape)))
                sizes = np.bincount(components.ravel())[1:]
                assert after.sum() == sizes.max()
                one = np.unique(components[after])
                assert len(one) == 1 and one[0] > 0


@BOTH_SHAPES
def test_largest_components_of_nested_regions_stay_nested_literally(shape):
    """``whole`` and ``rest`` overlap, ``core`` is a part of both, ``inner`` of all three."""
    regions = {"whole": [1, 2, 3], "core": [2, 3], "inner": 3, "rest": [2, 3, 4]}
    labels = LabelAdapter(LabelManager({"background": 0, **regions}, [1, 2, 3, 4]))
    outer = {"whole": (), "rest": (), "core": ("whole", "rest"), "inner": ("whole", "core", "rest")}
    names = list(regions)
    assert [[names[p] for p in of] for of in labels.parents] == [sorted(outer[n], key=names.index) for n in names]
    random = np.random.RandomState(3)
    drawn = [ndimage.zoom(random.rand(*(s // 2 for s in shape)), 2, order=0) for _ in range(8)]
    hard = torch.from_numpy(np.stack(drawn).reshape(2, 4, *(s // 2 * 2 for s in shape)) < 0.75)
    kept = keep_largest_components(hard, labels).numpy()
    for b in range(2):
        expected = {}
        for name in ("whole", "rest", "core", "inner"):
            mask = hard[b, names.index(name)].numpy()
            for parent in outer[name]:
                mask = mask & expected[parent]
            components, count = ndimage.label(mask, np.ones((3,) * len(shape)))
            sizes = [(components == i).sum() for i in range(1, count + 1)]
            expected[name] = components == 1 + int(np.argmax(sizes)) if count else mask
            assert np.array_equal(kept[b, names.index(name)], expected[name]), name
    assert kept[:, names.index("core")].any()


@pytest.mark.parametrize("dimensions", [2, 3])
def test_a_core_in_a_piece_that_is_removed_is_removed(dimensions):
    labels = LabelAdapter(LabelManager({"background": 0, "whole": [1, 2], "core": 2}, [1, 2]))
    large, small = (slice(0, 6),) * dimensions, (slice(9, 12),) * dimensions
    hard = torch.zeros(1, 2, *(12,) * dimensions, dtype=torch.bool)
    hard[0, 0][large] = hard[0, 0][small] = hard[0, 1][small] = True
    kept = keep_largest_components(hard, labels)
    assert kept[0, 0].sum() == 6**dimensions and not kept[0, 1].any()
    # A smaller core in the piece that is kept counts.
    hard[0, 1][(slice(0, 2),) * dimensions] = True
    assert keep_largest_components(hard, labels)[0, 1].sum() == 2**dimensions


def test_largest_component_of_nothing_is_nothing():
    for regions in (True, False):
        hard = torch.zeros(2, 3 if regions else 1, 6, 6, dtype=torch.bool if regions else torch.long)
        assert not keep_largest_components(hard, adapter(3, regions=regions)).any()


# ---------------------------------------------------------------------------------------------------------- distances


@BOTH_SHAPES
@pytest.mark.parametrize("foreground", [1, 3])
def test_distance_losses_literally(shape, foreground):
    z, sdf, p = (torch.rand(2, foreground, *shape) * 2 - 1 for _ in range(3))
    z, p = z * 0.01, p.abs()
    valid = torch.rand(2, 1, *shape) < 0.8
    sdf[torch.rand(2, foreground, *shape) < 0.2] = torch.nan
    errors = consistency = known = 0.0
    for b in range(2):
        for v in voxels(shape):
            if not valid[b, 0][v]:
                continue
            for zv, sv, pv in zip(at(z, b, v), at(sdf, b, v), at(p, b, v)):
                if not math.isnan(sv):
                    errors += (zv - sv) ** 2
                    known += 1
                consistency += (pv - 1 / (1 + math.exp(1500 * zv))) ** 2
    assert float(distance_error(z, sdf, valid)) == pytest.approx(errors / known, rel=1e-4)
    masks = mask_of_distance(z, 1500)
    assert float(cross_task_error(masks, p, valid)) == pytest.approx(consistency / int(valid.sum()), rel=1e-4)


def all_terms(trainer, batch):
    """The terms of a step on a labeled batch and the next unlabeled one."""
    trainer._unlabeled_keys = []
    terms = {}
    for group in trainer.losses(batch["data"], batch["target"]):
        terms |= group
    return terms


def test_dtml_consistency_weights_are_equations_5_and_6(started):
    """Half of lambda for the mean over labeled, half for that over unlabeled patches: lambda for the mean over all."""
    trainer = started(f"nnUNetTrainerDTML_warm_up=0_ramp_up=0_consistency_weight=0.8{SHORT}")
    batch = next(trainer.dataloader_train)
    terms = all_terms(trainer, batch)
    assert terms["consistency_labeled"].weight == terms["consistency"].weight == pytest.approx(0.4)
    trainer = started(f"nnUNetTrainerDTML_setting=labeled_warm_up=0_ramp_up=0_consistency_weight=0.8{SHORT}")
    (group,) = trainer.losses(batch["data"], batch["target"])
    assert group["consistency_labeled"].weight == pytest.approx(0.8)


@BOTH_SHAPES
@CLASSES
@KINDS
@pytest.mark.parametrize("supervision", ["mask", "both"])
def test_dtml_mask_loss_literally(trainer_of, shape, classes, kind, supervision):
    """Dice of 1 / (1 + exp(k z)); z = tanh(o / k), or tanh(o) where distances are learned. The output is -o."""
    trainer = trainer_of(f"nnUNetTrainerDTML_warm_up=0_supervision={supervision}{SHORT}", kind, classes)
    k, scale = 1500, 1500 if supervision == "mask" else 1
    output = torch.randn(2, classes, *shape) * (3 if supervision == "mask" else 1e-3)
    hard, valid = random_hard(kind, classes, shape), torch.rand(2, 1, *shape) < 0.8
    p = {
        (b, v): [1 / (1 + math.exp(k * math.tanh(-x / scale))) for x in at(output, b, v)]
        for b in range(2)
        for v in voxels(shape)
    }
    value = float(trainer._mask_loss(output, hard, valid))
    assert value == pytest.approx(literal_dice(p, hard, valid, kind), rel=1e-4)


def test_dtml_the_distance_network_keeps_learning_the_mask(started):
    trainer = started(f"nnUNetTrainerDTML_setting=distance{SHORT}")
    second, batch = trainer.companions["second"], next(trainer.dataloader_train)
    losses = []
    for _ in range(40):
        trainer.train_step(batch)
        losses.append(trainer._epoch_sums["mask"][-1])
    with torch.no_grad():
        p = mask_of_distance(trainer.distances(second(batch["data"])), 1500)
    assert losses[-1] < losses[0] - 0.02
    # Voxels that still have a gradient: with z = tanh(o) it is less than one in a hundred.
    assert float((p * (1 - p) > 1e-3).float().mean()) > 0.3


def test_dtml_refuses_a_distance_network_that_does_not_fit_the_plans(make_trainer):
    with pytest.raises(ValueError, match="leave second_network out"):
        make_trainer("nnUNetTrainerDTML_setting=distance_second_network=resenc").initialize()


@BOTH_SHAPES
@CLASSES
@ALL_KINDS
@pytest.mark.parametrize("method", ["DTC_distance_weight=0.3", "DTML_supervision=both"])
def test_dual_tasks_literally(trainer_of, monkeypatch, shape, classes, kind, method):
    """Squared error of distances on labels, and of the two tasks on all patches; no task is a target for the other."""
    name = f"nnUNetTrainer{method}_warm_up=0_ramp_up=0_consistency_weight=0.8{SHORT}"
    trainer = trainer_of(name, kind, classes)
    channels = foreground(kind, classes)
    images = [torch.randn(2, 1, *shape) for _ in range(2)]
    logits = [torch.randn(2, classes, *shape, requires_grad=True) for _ in range(2)]
    # So small that the steep masks have a gradient.
    sdf, *distances = (1e-3 * torch.randn(2, len(channels), *shape, requires_grad=True) for _ in range(3))
    target = random_target(kind, classes, shape)

    def index(image):
        return [image is other for other in images].index(True)

    if "DTC" in method:
        monkeypatch.setattr(trainer, "both_tasks", lambda x: ([logits[index(x)]], distances[index(x)]))
    else:
        background = torch.zeros(2, classes - len(channels), *shape)
        monkeypatch.setattr(trainer.network, "forward", lambda x: [logits[index(x)]])
        monkeypatch.setattr(trainer, "second", lambda x: [torch.cat((background, -distances[index(x)].atanh()), 1)])
    monkeypatch.setattr(trainer, "loss", lambda outputs, target: outputs[0].mean())
    monkeypatch.setattr(trainer, "next_unlabeled", lambda: Unlabeled(torch.empty(0), images[1]))
    terms = all_terms(trainer, {"data": images[0], "target": [target, sdf]})
    weights = {"supervised": 1, "distance": 0.3, "consistency_labeled": 0.4, "consistency": 0.4}
    weights |= {} if "DTC" in method else {"distance": 1, "mask": 1}
    assert {name: term.weight for name, term in terms.items()} == pytest.approx(weights)

    errors, differences = [], ([], [])
    for i, (values, z) in enumerate(zip(logits, distances)):
        for (b, v), p in everywhere(values, kind).items():
            if i == 0 and is_ignored(target, b, v, classes, kind):
                continue
            if i == 0:
                errors += [(x - y) ** 2 for x, y in zip(at(z, b, v), at(sdf, b, v))]
            masks = [1 / (1 + math.exp(1500 * x)) for x in at(z, b, v)]
            differences[i].append(sum((p[c] - mask) ** 2 for c, mask in zip(channels, masks)))
    assert float(terms["distance"].value) == pytest.approx(np.mean(errors), rel=1e-4)
    for i, name in enumerate(("consistency_labeled", "consistency")):
        assert float(terms[name].value) == pytest.approx(np.mean(differences[i]), rel=1e-4)
        gradients = torch.autograd.grad(terms[name].value, (logits[i], distances[i]), retain_graph=True)
        assert all(g.any() for g in gradients)


@pytest.mark.parametrize("kind", ["labels", "regions"])
def test_the_distance_networks_prediction_is_the_mask_of_negative_distances(started, kind):
    trainer = started(f"nnUNetTrainerDTML_warm_up=0_supervision=both{SHORT}", kind)
    train_steps(trainer, 3)
    x = torch.randn(2, 1, *trainer.configuration_manager.patch_size)
    with torch.no_grad():
        outputs = trainer.companions["second"](x)
    z = trainer.distances(outputs)
    hard = trainer.labels.hard(outputs[0])
    if kind == "labels":
        assert not outputs[0][:, 0].any()
        assert torch.equal(hard[:, 0] > 0, (z < 0).any(1))
    else:
        assert torch.equal(hard, z < 0)
    assert 0.2 < float((z < 0).float().mean()) < 0.8


@pytest.mark.parametrize(
    "name, transforms",
    [("DTML", 0), ("DTML_supervision=distance", 1), ("DTC", 1), ("DTC_distance_weight=0", 0), ("MeanTeacher", 0)],
)
def test_distances_are_computed_only_where_a_loss_needs_them(started, name, transforms):
    from nnunet_semiseg.data.signed_distance import SignedDistanceTransform

    trainer = started(f"nnUNetTrainer{name}{SHORT}")
    found = trainer.dataloader_train.data_loader.transforms.transforms
    assert sum(isinstance(t, SignedDistanceTransform) for t in found) == transforms
    view = trainer.dataloader_unlabeled.data_loader.transforms
    kinds = [type(getattr(t, "transform", t)) for part in view.transforms for t in part.transforms]
    assert SignedDistanceTransform not in kinds


def test_without_deep_supervision_the_distance_is_split_off_too(started):
    trainer = started(f"nnUNetTrainerDTC_warm_up=0_enable_deep_supervision=false{SHORT}")
    target, distance = trainer.split_distance(next(trainer.dataloader_train)["target"])
    assert torch.is_tensor(target) and distance.shape == (len(target), 2, *target.shape[2:])
    train_steps(trainer, 2)
    assert trainer._non_finite_total == 0


# -------------------------------------------------------------------------------------------------- two networks, CPS


@pytest.mark.parametrize("view", ["weak", "strong"])
def test_cps_learns_the_other_networks_argmax(started, monkeypatch, view):
    trainer = started(f"{short('nnUNetTrainerCPS')}_pseudo_loss=ce_student_view={view}")
    trainer.before_step()
    x = trainer.next_unlabeled()
    with torch.no_grad():
        learned = {n: net(getattr(x, view))[0] for n, net in (("first", trainer.network), ("second", trainer.second))}
        labels = {n: net(x.weak)[0].argmax(1) for n, net in (("first", trainer.network), ("second", trainer.second))}
    terms = terms_of(trainer, x)
    for name, other in (("first", "second"), ("second", "first")):
        expected = torch.nn.functional.cross_entropy(learned[name], labels[other])
        torch.testing.assert_close(terms[f"cross_{name}"].value, expected)


@pytest.mark.parametrize("option", ["", "_second_network=resenc"])
def test_the_networks_start_apart(started, option):
    trainer = started(f"nnUNetTrainerCPS{option}{SHORT}")
    kinds = [type(n).__name__ for n in (trainer.network, trainer.companions["second"])]
    assert kinds == ["PlainConvUNet", "ResidualEncoderUNet" if option else "PlainConvUNet"]
    first, second = (n.decoder.seg_layers[-1].weight for n in (trainer.network, trainer.companions["second"]))
    assert not torch.equal(first, second)


@BOTH_SHAPES
@CLASSES
@KINDS
@pytest.mark.parametrize("part", ["ce", "dice", "both"])
def test_cps_losses_literally(trainer_of, shape, classes, kind, part):
    trainer = trainer_of(short("nnUNetTrainerCPS") + f"_pseudo_loss={part}", kind, classes)
    logits, hard = torch.randn(2, classes, *shape), random_hard(kind, classes, shape)
    ones = torch.ones(2, 1, *shape, dtype=torch.bool)
    literal = dict(ce=literal_ce, dice=literal_dice)
    expected = sum(
        literal[name](everywhere(logits, kind), hard, ones, kind) for name in literal if part in (name, "both")
    )
    assert float(trainer.pseudo_label_loss(logits, hard, ones)) == pytest.approx(expected, rel=1e-4)


def test_second_plans_go_there_and_back():
    arguments = dict(n_stages=3, features_per_stage=[8, 16, 32], n_conv_per_stage=[2] * 3)
    arguments["n_conv_per_stage_decoder"] = [2, 2]
    description = {"network_class_name": PLAIN, "arch_kwargs": arguments}
    plans = {"configurations": {"2d": {"architecture": description}, "2d_big": {"inherits_from": "2d"}}}
    residual = second_plans(plans, "2d_big", "resenc")
    changed = residual["configurations"]["2d_big"]["architecture"]
    assert changed["network_class_name"] == RESIDUAL
    assert changed["arch_kwargs"]["n_blocks_per_stage"] == [1, 3, 4]
    assert "n_conv_per_stage" not in changed["arch_kwargs"]
    # The parent and the original are untouched.
    assert residual["configurations"]["2d"] == plans["configurations"]["2d"]
    back = second_plans(residual, "2d_big", "plain")["configurations"]["2d_big"]["architecture"]
    assert back == description
    assert second_plans(plans, "2d", "same") == plans
    assert second_plans(plans, "2d_big", "other") == residual
    assert second_plans(residual, "2d_big", "other")["configurations"]["2d_big"]["architecture"] == description
    description["network_class_name"] = "other.Net"
    with pytest.raises(NotImplementedError, match="other.Net.*second_network=same"):
        second_plans(plans, "2d", "resenc")


# --------------------------------------------------------------------------------------------- prototypes


def literal_prototypes(features, labels, reliable):
    """Eq. 7's vectors of length 1 by sample and voxel, and its prototype of each class."""
    unit = {}
    for b in range(2):
        for v in voxels(features.shape[2:]):
            vector = at(features, b, v)
            length = math.sqrt(sum(x * x for x in vector))
            unit[b, v] = [x / length for x in vector]
    prototypes = {}
    for k in sorted(set(labels[reliable].tolist())):
        members = [unit[b, v] for b, v in unit if bool(reliable[b][v]) and int(labels[b][v]) == k]
        prototypes[k] = [sum(values) / len(members) for values in zip(*members)]
    return unit, prototypes


def literal_contrast(unit, prototypes, labels, reliable):
    losses = []
    for b, v in unit:
        if not reliable[b][v] and int(labels[b][v]) in prototypes:
            distances = [math.dist(unit[b, v], prototypes[k]) for k in sorted(prototypes)]
            p = softmax([-d for d in distances])
            losses.append(-math.log(p[sorted(prototypes).index(int(labels[b][v]))]))
    return sum(losses) / len(losses)


@BOTH_SHAPES
@CLASSES
def test_prototypes_literally(shape, classes):
    features = torch.randn(2, 5, *shape)
    # The last class is absent.
    labels = torch.randint(0, classes, (2, *shape))
    reliable = torch.rand(2, *shape) < 0.6
    chosen = sample_voxels(labels, reliable, classes + 1, 10**6)
    assert sorted(chosen.tolist()) == reliable.flatten().nonzero()[:, 0].tolist()
    means, present = class_means(gather_features(features, chosen), labels.flatten()[chosen], classes + 1)
    unit, prototypes = literal_prototypes(features, labels, reliable)
    assert [k for k in range(classes + 1) if present[k]] == sorted(prototypes)
    for k, prototype in prototypes.items():
        torch.testing.assert_close(means[k], torch.tensor(prototype))

    uncertain = sample_voxels(labels, ~reliable, classes + 1, 10**6)
    value = prototype_contrast(gather_features(features, uncertain), labels.flatten()[uncertain], means, present)
    assert float(value) == pytest.approx(literal_contrast(unit, prototypes, labels, reliable), rel=1e-4)


@BOTH_SHAPES
@CLASSES
@KINDS
def test_contrast_of_labels_and_of_each_region(trainer_of, shape, classes, kind):
    """Prototypes of the winner's labels, vectors drawn to the network's own; regions are problems of two classes."""
    trainer = trainer_of(f"nnUNetTrainerDualStream{SHORT}", kind, classes)
    width = trainer.companions["prototypes_second"].means.shape[-1]
    features, reliable = torch.randn(2, width, *shape), torch.rand(2, 1, *shape) < 0.6
    pseudo, own = (random_hard(kind, classes, shape) for _ in range(2))
    losses = []
    for taught, guessed in zip(pseudo.long().unbind(1), own.long().unbind(1)):
        unit, prototypes = literal_prototypes(features, taught, reliable[:, 0])
        losses.append(literal_contrast(unit, prototypes, guessed, reliable[:, 0]))
    value = trainer.contrast("second", features, pseudo, reliable, ~reliable, own)
    assert float(value) == pytest.approx(np.mean(losses), rel=1e-4)


def test_samples_are_limited_per_class():
    labels = torch.tensor([0] * 50 + [1] * 3 + [2] * 20)[None]
    chosen = sample_voxels(labels, torch.ones_like(labels, dtype=torch.bool), 3, 10)
    assert torch.bincount(labels.flatten()[chosen]).tolist() == [10, 3, 10]
    assert len(set(chosen.tolist())) == 23


def test_prototype_gradients_are_live_on_both_sides_and_finite_at_distance_zero():
    vectors = torch.nn.functional.normalize(torch.randn(6, 4), dim=1).requires_grad_()
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    means, present = class_means(vectors[::2], labels[::2], 3)
    # Each prototype is one of the vectors.
    value = prototype_contrast(vectors, labels, means, present)
    (gradient,) = torch.autograd.grad(value, vectors)
    assert torch.isfinite(gradient).all() and gradient.abs().sum(1).min() > 0
    means = means.detach().requires_grad_()
    assert torch.autograd.grad(prototype_contrast(vectors, labels, means, present), means)[0].abs().sum() > 0


@pytest.mark.parametrize("present", [[False] * 3, [True, False, False], [False, True, False]])
def test_contrast_without_two_prototypes_is_zero_with_a_graph(present):
    vectors, means = torch.randn(4, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    value = prototype_contrast(vectors, torch.zeros(4, dtype=torch.long), means, torch.tensor(present))
    assert value.item() == 0 and value.requires_grad
    nothing = torch.zeros(0, dtype=torch.long)
    assert prototype_contrast(vectors[:0], nothing, means, torch.ones(3, dtype=torch.bool)).item() == 0


def test_vectors_of_an_absent_class_do_not_count():
    vectors, means = torch.randn(4, 5), torch.randn(3, 5)
    present = torch.tensor([True, True, False])
    whole = prototype_contrast(vectors, torch.tensor([0, 1, 2, 2]), means, present)
    torch.testing.assert_close(whole, prototype_contrast(vectors[:2], torch.tensor([0, 1]), means, present))


def test_prototype_memory_is_a_moving_average_that_knows_absent_classes():
    memory = PrototypeMemory(1, 3, 2, momentum=0.9)
    first = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    prototypes, known = memory(0, first, torch.tensor([True, True, False]))
    assert torch.equal(prototypes[:2], first[:2]) and known.tolist() == [True, True, False]
    second = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 0.5]], requires_grad=True)
    prototypes, known = memory(0, second, torch.tensor([False, True, True]))
    torch.testing.assert_close(prototypes, torch.tensor([[1.0, 0.0], [0.1, 0.9], [0.5, 0.5]]))
    assert known.all()
    (gradient,) = torch.autograd.grad(prototypes.sum(), second)
    torch.testing.assert_close(gradient, torch.tensor([[0.0, 0.0], [0.1, 0.1], [1.0, 1.0]]))
    assert not memory.means.requires_grad
    # A step that overflows is not remembered.
    before = memory.means.clone()
    memory(0, torch.full((3, 2), torch.nan), torch.tensor([True, True, True]))
    assert torch.equal(memory.means, before)
    plain, known = PrototypeMemory(1, 3, 2, momentum=0.0)(0, first, torch.tensor([True, True, False]))
    assert plain is first and known.tolist() == [True, True, False]


@BOTH_SHAPES
@CLASSES
@KINDS
def test_equations_4_and_5_literally(trainer_of, shape, classes, kind):
    trainer = trainer_of(f"nnUNetTrainerDualStream_confidence=0.6{SHORT}", kind, classes)
    logits = [2 * torch.randn(2, classes, *shape) for _ in range(2)]
    first, second = (everywhere(x, kind) for x in logits)
    total = count = 0.0
    for place, p in first.items():
        q = second[place]
        sure = [max(x, 1 - x) for x in p + q] if kind == "regions" else [max(p), max(q)]
        if decision(p, kind) != decision(q, kind) and min(sure) > 0.6:
            total += sum(abs(x - y) for x, y in zip(p, q)) / classes
            count += 1
    assert count > 0
    value = trainer.disagreement(logits, [trainer.labels.hard(x) for x in logits])
    assert float(value) == pytest.approx(total / count, rel=1e-4)


@BOTH_SHAPES
@CLASSES
@ALL_KINDS
def test_mistake_terms_literally(trainer_of, shape, classes, kind):
    """Squared error of a foreground class's probabilities where one network alone is at least 0.6 sure of it."""
    trainer = trainer_of(f"{short('nnUNetTrainerDualStream')}_mistake_weight=0.5", kind, classes)
    logits = [2 * torch.randn(2, classes, *shape) for _ in range(2)]
    target = random_target(kind, classes, shape)
    first, second = (everywhere(x, kind) for x in logits)
    sums, count = np.zeros(2), 0
    for (b, v), p in first.items():
        q = second[b, v]
        for k in foreground(kind, classes):
            if (p[k] >= 0.6) != (q[k] >= 0.6) and not is_ignored(target, b, v, classes, kind):
                count += 1
                sums += [(x[k] - is_class(target, b, v, k, kind)) ** 2 for x in (p, q)]
    terms = trainer.mistake_terms(logits, target)
    assert count > 0 and [term.weight for term in terms.values()] == [0.5, 0.5]
    assert [float(term.value) for term in terms.values()] == pytest.approx(list(sums / count), rel=1e-4)


@pytest.mark.parametrize("taught", ["both", "loser"])
def test_the_winner_labels_in_its_reliable_region(started, monkeypatch, taught):
    trainer = started(short("nnUNetTrainerDualStream") + f"_unreliable=30_taught={taught}")
    trainer.before_step()
    assert trainer.winner([torch.tensor(0.2), torch.tensor(0.1)]) == 1
    assert trainer.winner([torch.tensor(-0.2), torch.tensor(0.1)]) == 0
    unlabeled = trainer.next_unlabeled()
    seen = []
    original = trainer.pseudo_loss
    monkeypatch.setattr(trainer, "pseudo_loss", lambda *arguments: seen.append(arguments) or original(*arguments))
    for winner, network in enumerate((trainer.network, trainer.second)):
        seen.clear()
        trainer.labeler = winner
        terms = terms_of(trainer, unlabeled)
        learning = {"pseudo_first", "pseudo_second"}
        if taught == "loser":
            learning.remove(("pseudo_first", "pseudo_second")[winner])
        assert set(terms) & {"pseudo_first", "pseudo_second"} == learning
        with torch.no_grad():
            labeling = network(unlabeled.weak)[0]
        for _, pseudo, reliable in seen:
            assert torch.equal(pseudo, labeling.argmax(1, keepdim=True))
            assert float(reliable.float().mean()) == pytest.approx(0.7, abs=0.01)
        assert len(seen) == len(learning)


# -------------------------------------------------------------------------------------------------- degenerate batches


def filled(target, fill, labels):
    """One of a batch's targets with background alone, all ignored, or with the first class in place of the second."""
    target, one_class = target.clone(), fill == "one class"
    if not one_class:
        target.zero_()
    if target.is_floating_point():
        # Signed distances: 1 without an object, not known where the label is not.
        target[:, int(one_class) :] = torch.nan if fill == "ignored" else 1.0
    elif fill == "ignored":
        target[:, -1] = True if labels.has_regions else labels.ignore_label
    elif one_class and labels.has_regions:
        target[:, 1] = False
    elif one_class:
        target[target == 2] = 1
    return target


SETTINGS = [
    *("DTML_supervision=both", "BCP_origin_normalized=true_unmixed=false", "BCPBURL_alpha_labeled=0_alpha_unlabeled=0"),
    *("BCPBURL_region_normalized=true", "MeanTeacherBURL_region_normalized=true", "DualStream_mistake_weight=0.5"),
    *("DualStream_unreliable=0", "DualStream_unreliable=100", "UAMT_percentile=100"),
]


@pytest.mark.parametrize("kind", ["labels", "ignore", "regions_ignore"])
@pytest.mark.parametrize("name", [*TRAINERS, *(f"nnUNetTrainer{setting}" for setting in SETTINGS)])
def test_degenerate_batches_stay_finite(started, monkeypatch, name, kind):
    """Labels without foreground, without one class or all ignored, each also in constant images; a single sample."""
    trainer = started(short(name), kind)
    batch, draw = next(trainer.dataloader_train), trainer.draw_unlabeled
    fills = ["background", "one class", *(["ignored"] if "ignore" in kind else [])]
    cases = [(fill, contrast, len(batch["data"])) for fill in fills for contrast in (0, 1)] + [("one class", 1, 1)]
    for fill, contrast, n in cases:

        def draw_some(contrast=contrast, n=n):
            return {name: value[:n] if name == "keys" else contrast * value[:n] for name, value in draw().items()}

        monkeypatch.setattr(trainer, "draw_unlabeled", draw_some)
        target = [filled(t, fill, trainer.labels)[:n] for t in batch["target"]]
        assert trainer.labels.without_ignored(target[0])[1].any() == (fill != "ignored")
        # CoraNet draws new patches in the first step.
        trainer.global_step = 0
        trainer.train_step({"data": contrast * batch["data"][:n], "target": target, "keys": batch["keys"][:n]})
        assert trainer._non_finite_total == 0, (fill, contrast, n)
        assert len(trainer._unlabeled_keys) == n
    assert torch.isfinite(flat(trainer.network)).all()


def test_uamt_without_a_certain_voxel(started, monkeypatch):
    trainer = started(short("nnUNetTrainerUAMT"))
    original = trainer.certain
    monkeypatch.setattr(trainer, "certain", lambda teacher: torch.zeros_like(original(teacher)))
    train_steps(trainer, 1)
    assert trainer._non_finite_total == 0 and trainer._epoch_sums["consistency"] == [0.0]


@pytest.mark.parametrize("favored", ["url", "crl"])
@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("share", ["all", "none"])
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_all_uncertain_and_all_certain_are_finite(favored, normalized, share, alpha):
    logits = torch.randn(2, 3, 5, 5, requires_grad=True)
    uncertain = torch.full((2, 1, 5, 5), share == "all")
    loss = RegionLoss(WeightedSegmentationLoss(adapter(3), True), normalized)
    value = loss(
        logits, torch.zeros(2, 1, 5, 5, dtype=torch.long), uncertain, favored, alpha, torch.ones_like(uncertain)
    )
    (gradient,) = torch.autograd.grad(value, logits)
    assert torch.isfinite(value) and torch.isfinite(gradient).all()
    favors_all = (favored == "url") == (share == "all")
    assert bool(gradient.any()) == (favors_all or alpha > 0)
