"""The student's view of unlabeled patches: strong intensities, boxes from other patches, and exact turns."""

import numpy as np
import pytest
import torch
from conftest import SHORT, from_start, slow_unless, train_steps

from nnunet_semiseg.losses.mixing import beta_side
from nnunet_semiseg.trainers.frame.mixing import BETA
from nnunet_semiseg.trainers.registry import TRAINERS

EVERY = slow_unless(
    [("labels", "2d"), ("regions", "3d_fullres"), ("ignore", "3d_fullres"), ("regions_ignore", "2d")],
    lambda kind, configuration: kind == "labels",
)


def patches(trainer, first, number=4):
    """Images whose voxels say which patch and which place they are of, with the same as target and weight."""
    shape = trainer.configuration_manager.patch_size
    places = torch.arange(float(np.prod(shape))).reshape(1, 1, *shape)
    image = places + 1e6 * torch.arange(first, first + number).view(-1, 1, *[1] * len(shape))
    return {"image": image, "target": image.clone().double(), "weight": (image % 2).bool()}


def slow_mix(own, labeled, inside, partner):
    """Voxel by voxel: inside the box the partner's, elsewhere the patch's own; partners count on into the labeled."""
    mixed = {name: x.clone() for name, x in own.items()}
    for name, mine in own.items():
        for b, _, *v in np.ndindex(mine.shape):
            if inside[(0, 0, *v)]:
                source = mine if partner[b] < len(mine) else labeled[name]
                mixed[name][(b, 0, *v)] = source[(partner[b] % len(mine), 0, *v)]
    return mixed


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
@pytest.mark.parametrize("mixing", ["unlabeled", "labeled", "both"])
def test_image_targets_and_weights_are_mixed_alike(started, mixing, configuration):
    trainer = started(f"nnUNetTrainerCutMix_mixing={mixing}{SHORT}", configuration=configuration)
    own, labeled = patches(trainer, 0), patches(trainer, 4)
    state = trainer.random_stream.state()
    mixed = trainer.perturbed(own, labeled)
    image = mixed["image"]
    # Where the box came from, read off the image.
    origin = (image // 1e6).long()
    inside = (origin != torch.arange(4).view(-1, 1, *[1] * (image.ndim - 2))).any(0, keepdim=True)
    partner = [int(next(o for o in origin[b][inside[0]].tolist())) for b in range(4)]
    for name, expected in slow_mix(own, labeled, inside, partner).items():
        assert torch.equal(mixed[name], expected) and mixed[name].dtype == expected.dtype
    allowed = {"unlabeled": range(4), "labeled": range(4, 8), "both": range(8)}[mixing]
    assert set(partner) <= set(allowed) and all(p != b for b, p in enumerate(partner))
    # The same random numbers give the same box.
    trainer.random_stream.set_state(state)
    assert torch.equal(trainer.perturbed(own, labeled)["image"], image)


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_copy_paste_goes_both_ways_in_turn(started, configuration):
    trainer = started(f"nnUNetTrainerCutMix_mixing=copypaste_box=0.5{SHORT}", configuration=configuration)
    own, labeled = patches(trainer, 0), patches(trainer, 4)
    # What labels cannot tell is 0 in their voxels.
    labeled.pop("target")
    shape = own["image"].shape[2:]
    for step in range(4):
        trainer.global_step = step
        mixed = trainer.perturbed(own, labeled)
        labeled_here = mixed["image"] >= 4e6
        assert (labeled_here == labeled_here[:1]).all(), "one box for all"
        box = int(np.prod([max(1, side // 2) for side in shape]))
        assert int(labeled_here[0].sum()) == (box if step % 2 else int(np.prod(shape)) - box)
        assert torch.equal(mixed["image"], torch.where(labeled_here, labeled["image"], own["image"]))
        assert torch.equal(mixed["target"], own["target"] * ~labeled_here)
        assert torch.equal(mixed["weight"], torch.where(labeled_here, labeled["weight"], own["weight"]))


def test_without_mixing_and_turns_nothing_is_drawn_and_nothing_changes(started):
    trainer = started(f"nnUNetTrainerCutMix_mixing=none{SHORT}")
    own, before = patches(trainer, 0), trainer.random_stream.state()
    assert trainer.perturbed(own, patches(trainer, 4)) is own
    assert torch.equal(trainer.random_stream.state()["torch"], before["torch"])


def test_a_box_covers_what_a_beta_distribution_says():
    torch.manual_seed(0)
    for dimensions in (2, 3):
        shares = torch.tensor([beta_side(dimensions, BETA) ** dimensions for _ in range(4000)])
        assert shares.mean() == pytest.approx(0.5, abs=0.01)
        assert shares.var() == pytest.approx(1 / (4 * (2 * BETA + 1)), rel=0.1)


def test_a_single_patch_without_others_is_left_alone(started):
    trainer = started(f"nnUNetTrainerCutMix_mixing=unlabeled{SHORT}")
    own = patches(trainer, 0, number=1)
    assert torch.equal(trainer.perturbed(own, patches(trainer, 4))["image"], own["image"])


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_turns_are_exact_and_the_same_for_all(started, configuration):
    trainer = started(f"nnUNetTrainerCutMix_mixing=none_turns=true{SHORT}", configuration=configuration)
    own, seen = patches(trainer, 0), set()
    for _ in range(40):
        image, target, weight = trainer.perturbed(own, own).values()
        assert image.shape == own["image"].shape and torch.equal(image.double(), target)
        assert torch.equal((image % 2).bool(), weight)
        assert torch.equal(image.flatten(1).sort(1).values, own["image"].flatten(1)), "no voxel is lost or interpolated"
        seen.add(tuple(image[0, 0].flatten()[:5].tolist()))
    assert len(seen) >= 4


def test_no_turn_where_mirroring_is_not_allowed(started):
    trainer = started(f"nnUNetTrainerCutMix_mixing=none_turns=true{SHORT}")
    trainer.inference_allowed_mirroring_axes = None
    own = patches(trainer, 0)
    assert all(torch.equal(trainer.perturbed(own, own)["image"], own["image"]) for _ in range(10))


@pytest.mark.parametrize("strength, share", [("none", 1.0), ("nnunet", None), ("strong", 0.0)])
def test_strong_views_are_as_strong_as_asked_for(started, strength, share):
    trainer = started(f"nnUNetTrainerMeanTeacher_strong_view={strength}_seed=3")
    equal, difference = [], []
    for _ in range(8):
        batch = trainer.draw_unlabeled()
        equal += [torch.equal(weak, strong) for weak, strong in zip(batch["weak"], batch["strong"])]
        difference.append((batch["weak"] - batch["strong"]).abs().mean())
    if share is not None:
        assert np.mean(equal) <= share + 0.02 and np.mean(equal) >= share - 0.02
    else:
        assert 0.1 < np.mean(equal) < 0.6
    if strength == "strong":
        assert torch.stack(difference).median() > 0.25


@pytest.mark.parametrize("kind, configuration", EVERY)
@pytest.mark.parametrize("mixing", ["both", "copypaste"])
@pytest.mark.parametrize("name", TRAINERS)
def test_methods_train_with_mixed_views(started, name, mixing, kind, configuration):
    trainer = started(f"{from_start(name)}_mixing={mixing}_turns=true_strong_view=strong{SHORT}", kind, configuration)
    train_steps(trainer, 2)
    assert trainer._non_finite_total == 0 and trainer._unlabeled_keys


@pytest.mark.parametrize("kind, configuration", EVERY)
@pytest.mark.parametrize("name", TRAINERS)
def test_targets_of_labels_are_those_of_a_perfect_network(started, name, kind, configuration):
    """Names, types and shapes fit, and in a patch with known labels they say just those."""
    trainer = started(f"{from_start(name)}_mixing=both{SHORT}", kind, configuration)
    trainer.before_step()
    trainer.labeler = 0
    batch, unlabeled = next(trainer.dataloader_train), trainer.next_unlabeled()
    target = batch["target"]
    if hasattr(trainer, "split_distance"):
        target, _ = trainer.split_distance(target)
    own, labeled = trainer.targets(unlabeled), trainer.labeled_voxels(batch["data"], target)
    hard, valid = trainer.labels.without_ignored(target[0])
    assert torch.equal(labeled.pop("image"), batch["data"])
    for key, value in labeled.items():
        if key not in own:
            continue
        assert value.shape == own[key].shape
        if value.shape[1] == 1 and value.dtype == torch.bool:
            assert torch.equal(value, valid), key
        elif torch.equal(value, hard):
            continue
        elif value.shape[1] == trainer.labels.num_outputs:
            assert torch.equal(trainer.labels.hard(value - 0.5 if trainer.labels.has_regions else value), hard), key
        else:
            assert torch.equal(value, trainer.labels.one_vs_rest(hard)[0]), key


@pytest.mark.parametrize("kind, configuration", EVERY)
def test_cutmix_literally(started, kind, configuration):
    """Labels, weights and loss of a step, voxel by voxel, without mixing."""
    trainer = started(
        f"nnUNetTrainerCutMix_mixing=none_pretraining=0_min_recall=0_ramp_up=0_confidence=0.55{SHORT}",
        kind,
        configuration,
    )
    trainer.before_step()
    batch = next(trainer.dataloader_train)
    unlabeled = trainer.next_unlabeled()
    with torch.no_grad():
        logits = trainer.teacher(unlabeled.weak)[0]
    p = trainer.labels.probabilities(logits)
    hard = torch.zeros_like(p if trainer.labels.has_regions else p[:, :1])
    weight = torch.zeros_like(p[:, :1])
    for b, *v in np.ndindex(p.shape[0], *p.shape[2:]):
        voxel = p[(b, slice(None), *v)].tolist()
        if trainer.labels.has_regions:
            sure = min(max(x, 1 - x) for x in voxel)
            hard[(b, slice(None), *v)] = torch.tensor([float(x > 0.5) for x in voxel])
        else:
            sure = max(voxel)
            hard[(b, 0, *v)] = voxel.index(sure)
        weight[(b, 0, *v)] = 1.0 if sure >= 0.55 else 0.3
    assert 0.3 < weight.mean() < 1
    outputs = trainer.network(unlabeled.strong)
    expected = trainer.segmentation_loss()(outputs, hard.bool() if trainer.labels.has_regions else hard.long(), weight)
    (terms,) = trainer.unsupervised_losses(unlabeled, batch["data"], batch["target"])
    term = terms["mixed"]
    assert term.weight == 1.0
    assert term.value.item() == pytest.approx(expected.item(), rel=1e-5)
