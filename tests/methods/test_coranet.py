"""CoraNet: phases, settings, masks and labels; its losses are tested in test_losses.py."""

import numpy as np
import pytest
import torch
from conftest import SHORT, five_stages, perturb, train_steps

from nnunet_semiseg.losses.cost_sensitive import cost_sensitive_bce
from nnunet_semiseg.networks.features import check_is_unet, forward_with_features, full_resolution
from nnunet_semiseg.trainers.certainty import by_test_time_augmentation, zoomed
from nnunet_semiseg.trainers.methods.coranet import SETTINGS

NAME = "nnUNetTrainerCoraNet"
# With a pool of labels, as published.
NOW = "_pretraining=0_min_recall=0_relabel_every=2_mixing=none_uncertain_weight=0_consistency_weight=0.3"


def unlabeled_batch(trainer, certain=0.5):
    trainer.before_step()
    batch = trainer.next_unlabeled()
    return batch._replace(certain=torch.rand(batch.certain.shape) < certain)


def terms_of(trainer, batch):
    (terms,) = trainer.unsupervised_losses(batch, None, None)
    return terms


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_features_forward_is_the_networks_own(started, configuration):
    network = started(NAME + NOW + SHORT, "labels", configuration).network
    x = torch.randn(2, 1, *([24] * (2 if configuration == "2d" else 3)))
    for deep_supervision in (True, False):
        network.decoder.deep_supervision = deep_supervision
        outputs, features = forward_with_features(network, x)
        expected = network(x)
        if deep_supervision:
            assert all(torch.equal(a, b) for a, b in zip(outputs, expected)) and len(outputs) == len(expected)
        else:
            assert torch.equal(outputs, expected)
        torch.testing.assert_close(network.decoder.seg_layers[-1](features), full_resolution(expected))


def test_features_of_lower_stages_and_dropped_channels(started):
    network = started(NAME + NOW + SHORT, configuration=five_stages("2d")).network
    x, seen = torch.randn(2, 1, 32, 32), []
    for layer in network.decoder.seg_layers:
        layer.register_forward_hook(lambda _, given, __: seen.append(given[0]))
    for stage in range(4):
        seen.clear()
        _, features = forward_with_features(network, x, stage=stage)
        assert features is seen[stage] and features.shape[2] == 4 * 2**stage
    seen.clear()
    assert forward_with_features(network, x)[1] is seen[-1]

    skips, given = network.encoder(x), []
    network.decoder.transpconvs[0].register_forward_hook(lambda _, inputs, __: given.append(inputs[0]))
    forward_with_features(network, x, channel_dropout=0.5)
    (bottleneck,) = given
    kept = bottleneck.flatten(2).abs().sum(2) > 0
    assert 0 < kept.float().mean() < 1
    torch.testing.assert_close(bottleneck[kept], 2 * skips[-1][kept])


def test_other_networks_are_refused_with_the_way_out():
    with pytest.raises(NotImplementedError, match="Linear has no encoder.*nnUNetTrainerMeanTeacher"):
        check_is_unet(torch.nn.Linear(1, 1))


def test_phases_and_the_teachers_start(started):
    trainer = started(f"{NAME}_pretraining=0.5_min_recall=0_num_iterations_per_epoch=4_2epochs_seed=1")
    for step in range(4):
        assert not trainer.uses_unlabeled()
        train_steps(trainer, 1)
        assert "certain" not in trainer._epoch_sums
        assert trainer.global_step == step + 1
    trainer.current_epoch = 1
    trainer.on_train_epoch_start()
    assert trainer.uses_unlabeled()
    trainer.before_step()
    assert trainer.schedule.phase_2_start == 0.5
    for student, teacher in zip(trainer.network.parameters(), trainer.teacher.module.parameters()):
        assert torch.equal(student, teacher)
    train_steps(trainer, 1)
    assert "certain" in trainer._epoch_sums


def test_relabeling_fills_a_pool_that_each_epoch_starts_anew(started):
    trainer = started(
        f"{NAME}_pretraining=0_min_recall=0_mixing=none_relabel_every=4_label_reuse=2_num_iterations_per_epoch=6_seed=1_2epochs"
    )
    drawn = []
    original = trainer.draw_unlabeled
    trainer.draw_unlabeled = lambda: drawn.append(trainer.global_step) or original()
    train_steps(trainer, 6)
    # 4 steps on 2 labeled batches, then the epoch's last 2 steps on 1.
    assert drawn == [0, 0, 4]
    trainer.current_epoch = 1
    trainer.on_train_epoch_start()
    train_steps(trainer, 1)
    assert drawn == [0, 0, 4, 6, 6]


def test_labels_are_of_the_student_at_relabeling_and_stay(started):
    trainer = started(
        f"{NAME}_pretraining=0_min_recall=0_mixing=none_relabel_every=4_label_reuse=4_num_iterations_per_epoch=4_seed=1_2epochs"
    )
    first = trainer.next_unlabeled()
    with torch.no_grad():
        outputs, features = forward_with_features(trainer.network, first.weak)
        heads = trainer._run_heads(features)
        expected = full_resolution(outputs).argmax(1, keepdim=True)
        certain = ((heads["conservative"] > 0) == (heads["radical"] > 0)).all(1, keepdim=True)
    assert torch.equal(first.hard.long(), expected)
    assert torch.equal(first.certain, certain)
    train_steps(trainer, 1)
    (kept,) = trainer._pool
    hard, certain = kept["hard"].clone(), kept["certain"].clone()
    train_steps(trainer, 3)
    assert trainer._pool == [kept]
    assert torch.equal(kept["hard"], hard) and torch.equal(kept["certain"], certain)


@pytest.mark.parametrize("kind", ["labels", "regions"])
def test_the_teacher_and_its_heads_label_each_steps_patches(started, kind):
    trainer = started(f"{NAME}_pretraining=0_min_recall=0_consistency_weight=0.3_seed=1", kind)
    train_steps(trainer, 1)
    unlabeled = trainer.next_unlabeled()
    assert not torch.equal(unlabeled.weak, trainer.next_unlabeled().weak) and not trainer._pool
    # Apart from student and heads, from which the labels must not come.
    for name in ("teacher", "teacher_heads"):
        perturb(trainer.companions[name], 0.2)
    targets = trainer.targets(unlabeled)
    with torch.no_grad():
        logits = full_resolution(trainer.teacher(unlabeled.weak))
        _, features = forward_with_features(trainer.teacher.module, unlabeled.weak)
        heads = {name: head(features) for name, head in trainer.companions["teacher_heads"].module.items()}
    certain = ((heads["conservative"] > 0) == (heads["radical"] > 0)).all(1, keepdim=True)
    assert torch.equal(targets["certain"], certain) and 0 < certain.float().mean() < 1
    assert torch.equal(targets["hard"], logits > 0 if kind == "regions" else logits.argmax(1, keepdim=True))
    torch.testing.assert_close(targets["main"], logits.sigmoid() if kind == "regions" else logits.softmax(1))


def test_boxes_carry_labels_certainty_and_probabilities(started):
    """In a box from a labeled patch, the label is certain; its surroundings keep what the teacher says."""
    trainer = started(f"{NAME}_pretraining=0_min_recall=0_consistency_weight=0.3_mixing=labeled_seed=1")
    batch, unlabeled, seen = next(trainer.dataloader_train), trainer.next_unlabeled(), {}
    trainer.student_losses = lambda **given: seen.update(given) or iter(())
    own = trainer.targets(unlabeled)
    list(trainer.unsupervised_losses(unlabeled, batch["data"], batch["target"]))
    box = (seen["image"] != unlabeled.strong).all(0, keepdim=True)
    assert 0 < box.float().mean() < 1 and seen["certain"][box.expand_as(seen["certain"])].all()
    for name, before in own.items():
        outside = ~box.expand_as(before)
        assert torch.equal(seen[name][outside], before[outside]), name
    one_hot = torch.zeros_like(seen["main"]).scatter_(1, seen["hard"], 1.0)
    inside = box.expand_as(one_hot)
    assert torch.equal(seen["main"][inside], one_hot[inside])


def test_uncertain_voxels_weigh_less(started):
    trainer = started(f"{NAME}{NOW}_uncertain_weight=0.4_deep_pseudo=false{SHORT}".replace("_uncertain_weight=0_", "_"))
    batch = unlabeled_batch(trainer)
    loss = terms_of(trainer, batch)["certain"].value
    with torch.no_grad():
        logits = full_resolution(trainer.network(batch.strong))
    weight = torch.where(batch.certain, 1.0, 0.4)
    ce = -logits.log_softmax(1).gather(1, batch.hard)
    expected = (weight * ce).sum() / weight.sum()
    p, of = logits.softmax(1), torch.zeros_like(logits).scatter_(1, batch.hard, 1.0)
    axes = (0, 2, 3) if trainer.configuration_manager.batch_dice else (2, 3)
    overlap, sizes = ((weight * x).sum(axes)[..., 1:] for x in (p * of, p + of))
    expected = expected - ((2 * overlap + 1e-5) / (sizes + 1e-5)).mean()
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_of_table_4(started, setting):
    trainer = started(f"{NAME}{NOW}_setting={setting}{SHORT}")
    self_training, mean_teacher = SETTINGS[setting]
    assert trainer.uses_unlabeled() == (setting != "seg")
    train_steps(trainer, 1)
    assert ("certain" in trainer._epoch_sums) == (self_training is not None)
    assert ("consistency" in trainer._epoch_sums) == (mean_teacher is not None)
    if setting == "seg":
        return
    # The terms see exactly their region: labels and teacher elsewhere do not matter.
    with torch.no_grad():
        for parameter in trainer.teacher.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    trainer.global_step = 0
    batch = unlabeled_batch(trainer)
    regions = {"certain": batch.certain, "uncertain": ~batch.certain, "all": torch.ones_like(batch.certain)}
    base = terms_of(trainer, batch)
    if self_training is not None:
        outside = batch._replace(hard=torch.where(regions[self_training], batch.hard, (batch.hard + 1) % 3))
        assert torch.equal(terms_of(trainer, outside)["certain"].value, base["certain"].value)
    if mean_teacher is not None:
        with torch.no_grad():
            student = full_resolution(trainer.network(batch.strong)).softmax(1)
            teacher = full_resolution(trainer.teacher(batch.weak)).softmax(1)
        distance = ((student - teacher) ** 2).sum(1, keepdim=True)[regions[mean_teacher]].mean()
        torch.testing.assert_close(base["consistency"].value.detach(), distance)


@pytest.mark.parametrize("uncertainty", ["tta", "mcdropout", "aleatoric"])
@pytest.mark.parametrize("kind, configuration", [("labels", "2d"), ("regions", "3d_fullres")])
def test_other_uncertainty_estimators_of_table_6(started, uncertainty, kind, configuration):
    now = NOW.removesuffix("_consistency_weight=0.3")
    trainer = started(f"{NAME}{now}_uncertainty={uncertainty}_passes=2{SHORT}", kind, configuration)
    train_steps(trainer, 2)
    assert trainer._non_finite_total == 0
    batch = trainer._pool[0]
    assert batch["certain"].shape == (*batch["weak"].shape[:1], 1, *batch["weak"].shape[2:])
    heads = set(trainer.companions["heads"]) if "heads" in trainer.companions else set()
    assert heads == ({"mean", "deviation"} if uncertainty == "aleatoric" else set())


def test_test_time_augmentation_undoes_flips_and_zooms(started):
    image = torch.rand(1, 1, 32, 32)
    image = torch.nn.functional.avg_pool2d(image, 5, 1, 2)
    back = zoomed(zoomed(image, 0.8), 1 / 0.8)
    torch.testing.assert_close(back[..., 4:-4, 4:-4], image[..., 4:-4, 4:-4], atol=0.1, rtol=0)
    assert torch.equal(zoomed(image, 1.0), image)
    trainer = started(f"{NAME}{NOW}_uncertainty=tta_passes=8{SHORT}")
    # A "network" that passes its input on: the mean over augmentations is then the image again.
    trainer.logits = lambda network, data: torch.cat((-20 * (data - 0.5), torch.zeros_like(data), 20 * (data - 0.5)), 1)
    data = torch.zeros(1, 1, 32, 32)
    data[..., :16] = 1.0
    probabilities, certain = by_test_time_augmentation(trainer, data)
    hard = probabilities.argmax(1, keepdim=True)
    assert (hard[..., 2:12] == 2).all() and (hard[..., 20:30] == 0).all()
    assert certain[..., 2:10].all() and certain[..., 22:30].all()


def test_alpha_one_tells_heads_apart_by_initialization(started):
    trainer = started(f"{NAME}{NOW}_alpha=1{SHORT}")
    heads = trainer.companions["heads"]
    assert not torch.equal(heads["conservative"][2].weight, heads["radical"][2].weight)
    train_steps(trainer, 1)


def test_cost_heads_reach_the_shared_decoder_and_the_other_heads_do_not_mix(started):
    trainer = started(f"{NAME}{NOW}_head_gradient=1{SHORT}")
    batch = next(trainer.dataloader_train)
    terms = trainer.supervised_loss(batch["data"], batch["target"])
    terms["conservative"].value.backward()
    heads = trainer.companions["heads"]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in heads["conservative"][2].parameters())
    assert all(p.grad is None for p in heads["radical"].parameters())
    assert trainer.network.decoder.stages[-1].convs[0].conv.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in trainer.network.decoder.seg_layers.parameters())


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_a_share_of_the_heads_gradient_reaches_the_shared_network(started, share):
    trainer = started(f"{NAME}{NOW}_head_gradient={share}_cost_dice=0{SHORT}")
    shared = trainer.network.decoder.stages[-1].convs[0].conv.weight
    own = trainer.companions["heads"]["radical"][0].conv.weight
    batch = next(trainer.dataloader_train)
    _, features = trainer._forward(trainer.network, batch["data"])
    foreground, valid = trainer.labels.one_vs_rest(batch["target"][0])
    losses = {
        "whole": cost_sensitive_bce(trainer.companions["heads"]["radical"](features), foreground, valid, 1.0, 5.0),
        "share": trainer.supervised_loss(batch["data"], batch["target"])["radical"].value,
    }
    gradients = {
        name: torch.autograd.grad(loss, (shared, own), materialize_grads=True) for name, loss in losses.items()
    }
    torch.testing.assert_close(losses["share"], losses["whole"], rtol=1e-5, atol=0)
    torch.testing.assert_close(gradients["share"][0], share * gradients["whole"][0], rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(gradients["share"][1], gradients["whole"][1], rtol=1e-3, atol=1e-7)


def test_unlabeled_data_does_not_train_the_heads_unless_all_heads(started):
    for settings, trained in (("", False), ("_all_heads=true", True)):
        trainer = started(NAME + NOW + settings + SHORT)
        terms = terms_of(trainer, unlabeled_batch(trainer))
        sum(term.value for term in terms.values()).backward()
        gradients = [p.grad for p in trainer.companions["heads"].parameters()]
        assert all((g is not None) == trained for g in gradients)
        assert ("conservative_certain" in terms) == trained


@pytest.mark.parametrize("certain", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["labels", "regions"])
def test_all_certain_and_all_uncertain_batches_are_finite(started, certain, kind):
    trainer = started(NAME + NOW + SHORT, kind)
    batch = unlabeled_batch(trainer, certain)
    terms = terms_of(trainer, batch._replace(hard=torch.zeros_like(batch.hard)))
    for term in terms.values():
        assert torch.isfinite(term.value) and term.value.requires_grad


@pytest.mark.slow
def test_conservative_foreground_lies_inside_of_radical_foreground_after_training(started):
    trainer = started(f"{NAME}_setting=seg_num_iterations_per_epoch=200_1epochs_seed=3")
    train_steps(trainer, 200)
    images = torch.cat([next(trainer.dataloader_val)["data"] for _ in range(3)])
    with torch.no_grad():
        _, features = forward_with_features(trainer.network, images)
        heads = {name: (logits > 0).numpy() for name, logits in trainer._run_heads(features).items()}
    conservative, radical = heads["conservative"], heads["radical"]
    assert radical.sum() > conservative.sum() > 0
    assert np.logical_and(conservative, ~radical).sum() < 0.05 * conservative.sum()
