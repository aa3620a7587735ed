"""Mixed precision as far as a CPU can show it: bfloat16 in the networks, and a gradient scaler."""

import pytest
import torch
from conftest import SHORT, UNLABELED_TERMS, fitting, flat, short, slow_unless, train_steps

from nnunet_semiseg.trainers.registry import TRAINERS


@pytest.fixture
def mixed_precision(monkeypatch):
    monkeypatch.setenv("nnUNet_semiseg_bfloat16", "t")


@pytest.mark.parametrize(
    "name, kind, configuration",
    slow_unless(
        [(name, *where) for name in TRAINERS for where in (("labels", "2d"), ("regions_ignore", "3d_fullres"))],
        lambda name, kind, configuration: configuration == "2d",
    ),
)
def test_every_trainer_under_autocast_and_a_gradient_scaler(started, mixed_precision, name, kind, configuration):
    trainer = started(short(name), kind, fitting(name, configuration))
    trainer.grad_scaler = torch.amp.GradScaler("cpu")
    before = flat(trainer.network).clone()
    train_steps(trainer, 3)
    assert trainer._non_finite_total == 0 and torch.isfinite(flat(trainer.network)).all()
    assert not torch.equal(before, flat(trainer.network))
    assert UNLABELED_TERMS & set(trainer._epoch_sums)
    # The scaler's own steps were taken: none was skipped as overflowing.
    assert trainer.grad_scaler.get_scale() == 2.0**16
    assert all(p.dtype == torch.float32 for p in (*trainer.network.parameters(), *trainer.companions.parameters()))


def test_stock_trainers_take_part(started, mixed_precision, monkeypatch):
    """The control of a comparison computes as the methods do."""
    weights = []
    for value in ("t", "f"):
        monkeypatch.setenv("nnUNet_semiseg_bfloat16", value)
        trainer, seen = started(f"nnUNetTrainer{SHORT}"), []
        trainer.network.encoder.stages[0].register_forward_hook(lambda _, __, output, seen=seen: seen.append(output))
        train_steps(trainer, 2)
        assert {output.dtype for output in seen} == {torch.bfloat16 if value == "t" else torch.float32}
        weights.append(flat(trainer.network).clone())
    torch.testing.assert_close(*weights, rtol=0.1, atol=0.01)
    assert not torch.equal(*weights)


@pytest.mark.parametrize("name", ["nnUNetTrainerCutMix", "nnUNetTrainerCoraNet"])
def test_the_scale_leaves_the_gradient_as_it_is(started, name):
    """A step with a scale that is a power of two is the step without, bit for bit."""
    weights = []
    for scaler in (None, torch.amp.GradScaler("cpu")):
        trainer = started(short(name))
        trainer.grad_scaler = scaler
        train_steps(trainer, 3)
        weights.append(flat(trainer.network).clone())
    assert torch.equal(*weights)
