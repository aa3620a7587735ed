"""Settings in the name of trainers that are not of this package, and methods that users write."""

import math
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHORT, flat, make_case, train_steps
from nnunetv2.run.run_training import run_training
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find
from test_frame import assert_same, run_until
from test_methods import predict

from nnunet_semiseg import checkpoints, cli
from nnunet_semiseg.trainers.registry import TRAINERS, find_trainer
from pseudo_label.rounds.settings import Member

METHOD = """
from dataclasses import dataclass

import torch

from nnunet_semiseg.trainers.frame import RampOptions, SemiSupervisedTrainer, Term
from nnunet_semiseg.trainers.options import option


@dataclass(frozen=True)
class Options(RampOptions):
    sharpness: float = option(2.0, "of the labels", low=1.0)


class nnUNetTrainerOfMine(SemiSupervisedTrainer):
    \"\"\"The student follows a sharper version of itself.\"\"\"

    Options = Options

    @torch.no_grad()
    def targets(self, unlabeled):
        weak = self.logits(self.student, unlabeled.weak)
        return {"sharp": self.labels.probabilities(self.options.sharpness * weak)}

    def targets_of_labels(self, hard, valid):
        return {"sharp": self.labels.as_probabilities(hard)}

    def student_losses(self, image, sharp):
        own = self.labels.probabilities(self.logits(self.student, image))
        yield {"sharp": Term((own - sharp).square().mean(), self.ramp())}
"""


ADVERSARIAL = """
from dataclasses import dataclass

import torch
from torch import nn

from nnunet_semiseg.trainers.frame import FrameOptions, SemiSupervisedTrainer, Term


@dataclass(frozen=True)
class Options(FrameOptions):
    pass


class nnUNetTrainerAdversarial(SemiSupervisedTrainer):
    \"\"\"A discriminator tells predictions on labeled and unlabeled patches apart; with its own optimizer.\"\"\"

    Options = Options

    def build_companions(self):
        return {"discriminator": nn.Linear(3, 1)}

    def build_optimizers(self):
        return {"discriminator": torch.optim.Adam(self.companions["discriminator"].parameters(), 1e-2)}

    def student_losses(self, image):
        outputs = self.outputs_of_dropped_channels(self.student, image)
        p = self.labels.probabilities(outputs[0]).flatten(2).mean(2)
        yield {"adversarial": Term(self.companions["discriminator"](p.detach()).sigmoid().log().mean().neg())}
        yield {"fooled": Term(p.square().sum(), 0.01)}
"""


def schedule(trainer):
    return trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.initial_lr


def test_stock_trainers_take_a_schedule_and_a_seed(make_trainer):
    trainer = make_trainer("nnUNetTrainer_20epochs_num_iterations_per_epoch=100_initial_lr=0.005_seed=1")
    assert schedule(trainer) == (20, 100, 0.005) and trainer.options.seed == 1
    other = make_trainer("nnUNetTrainerDiceCELoss_noSmooth_3epochs")
    assert schedule(other) == (3, 250, 0.01)
    assert (
        type(other.loss if other.was_initialized else other).__mro__[2].__name__ == "nnUNetTrainerDiceCELoss_noSmooth"
    )


def test_a_stock_trainer_killed_while_it_saves_keeps_the_checkpoint_before(make_trainer, monkeypatch):
    trainer = make_trainer("nnUNetTrainer_3epochs")
    trainer.initialize()
    file = Path(trainer.output_folder) / "checkpoint_latest.pth"
    trainer.save_checkpoint(str(file))

    def killed(content, name):
        Path(name).write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "save", killed)
        trainer.save_checkpoint(str(file))
    assert checkpoints.read(file)["current_epoch"] == 1
    assert [p.name for p in file.parent.glob("*check*")] == [file.name]
    trainer.disable_checkpointing = True
    file.unlink()
    trainer.save_checkpoint(str(file))
    assert not file.exists()


@pytest.mark.parametrize("name", ["nnUNetTrainer", "nnUNetTrainerMeanTeacher"])
def test_a_restart_knows_that_the_last_epoch_was_the_best(name, make_trainer):
    """Or checkpoint_best.pth would be overwritten by the first epoch after it."""
    trainer = make_trainer(name + SHORT)
    trainer.initialize()
    for epoch, dice in enumerate((0.5, 0.9, math.nan)):
        trainer.logger.log("mean_fg_dice", dice, epoch)
    trainer._best_ema = 0.5
    file = str(Path(trainer.output_folder) / "checkpoint_latest.pth")
    trainer.save_checkpoint(file)
    resumed = make_trainer(name + SHORT, continue_training=True)
    resumed.load_checkpoint(file)
    assert resumed._best_ema == pytest.approx(0.54)


@pytest.mark.parametrize("name", ["nnUNetTrainer", "nnUNetTrainerMeanTeacher"])
def test_peak_memory_of_the_gpu_is_logged_and_continues(name, make_trainer, monkeypatch):
    trainer = make_trainer(name + SHORT)
    trainer.initialize()
    monkeypatch.setattr(trainer, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**29)
    trainer.current_epoch = 1
    trainer.on_train_epoch_end([{"loss": np.ones(())}])
    np.testing.assert_equal(trainer.logger.get_checkpoint()["semiseg/peak_memory_gib"], [np.nan, 1.5])


def test_nnunets_own_names_win():
    assert find("nnUNetTrainer_20epochs").__module__.startswith("nnunetv2.")
    assert find_trainer("nnUNetTrainer_20epochs") is None and find_trainer("nnUNetTrainer_21epochs") is not None


@pytest.mark.parametrize("name", ["nnUNetTrainer_alpha=5", "nnUNetTrainerNobodyWrote_3epochs"])
def test_wrong_names_are_not_found(name, capsys):
    with pytest.raises(RuntimeError, match="Could not find"):
        find(name)
    assert ("there is no option 'alpha'" in capsys.readouterr().err) == ("alpha" in name)


def test_the_control_is_the_mean_teacher_with_weight_0_bit_for_bit(started):
    weights = []
    for name in ("nnUNetTrainer", "nnUNetTrainerMeanTeacher_consistency_weight=0"):
        trainer = started(name + SHORT)
        train_steps(trainer, 3)
        weights.append(flat(trainer.network))
    assert torch.equal(*weights)


@pytest.mark.parametrize("name", TRAINERS)
def test_rounds_know_which_members_need_unlabeled_cases(name):
    assert Member(name, 0).learns_from_unlabeled and Member(f"{name}_5epochs", 0).learns_from_unlabeled
    if "pretraining=1" not in TRAINERS[name].switched_off:
        assert not Member(f"{name}_{TRAINERS[name].switched_off}", 0).learns_from_unlabeled


def test_members_of_nnunet_need_none():
    names = ("nnUNetTrainer", "nnUNetTrainer_20epochs", "nnUNetTrainer_seed=1")
    assert not any(Member(name, 0).learns_from_unlabeled for name in names)


@pytest.fixture
def written(tmp_path, monkeypatch):
    """A user's method in a folder of nnU-Net's search path."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "of_mine.py").write_text(textwrap.dedent(METHOD))
    (tmp_path / "mine" / "adversarial.py").write_text(textwrap.dedent(ADVERSARIAL))
    import os

    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join([str(tmp_path / "mine"), os.environ["nnUNet_extTrainer"]]))


def test_a_users_method_trains_resumes_predicts_and_is_exported(written, make_trainer, prepared, work, tmp_path):
    name = f"nnUNetTrainerOfMine_warm_up=0_sharpness=3{SHORT}"
    assert find("nnUNetTrainerOfMine").Options().sharpness == 2
    run_training(prepared("labels"), "2d", 0, name, "nnUNetPlans_cpu", device=torch.device("cpu"))
    model = work / "results" / prepared("labels") / f"{name}__nnUNetPlans_cpu__2d"
    final = checkpoints.read(model / "fold_0" / "checkpoint_final.pth")
    assert final[checkpoints.STATE_KEY]["options"]["sharpness"] == 3
    assert "sharp" in (model / "fold_0" / "progress_semiseg.csv").read_text()

    run_until(make_trainer(name), 1)
    resumed = make_trainer(name, continue_training=True)
    resumed.load_checkpoint(str(model / "fold_0" / "checkpoint_latest.pth"))
    resumed.run_training()
    network = final["network_weights"]
    assert all(torch.equal(value, network[key]) for key, value in resumed.network.state_dict().items())

    image = make_case(300)[0]
    segmentation, probabilities = predict(model, image)
    assert segmentation.shape == image.shape
    assert cli.main(["export", "-i", str(model), "-o", str(tmp_path / "exported")]) == 0
    assert np.array_equal(predict(tmp_path / "exported", image)[1], probabilities)


def test_a_companion_with_an_optimizer_of_its_own_trains_and_resumes(written, make_trainer):
    name = f"nnUNetTrainerAdversarial{SHORT}"
    whole = make_trainer(name)
    whole.initialize()
    discriminator = whole.companions["discriminator"]
    of_sgd = {id(p) for group in whole.optimizer.param_groups for p in group["params"]}
    assert not of_sgd & {id(p) for p in discriminator.parameters()}
    before = flat(discriminator).clone()
    whole.run_training()
    assert (flat(discriminator) - before).abs().max() == pytest.approx(6 * 1e-2, rel=0.2), "Adam's steps"

    run_until(make_trainer(name), 1)
    resumed = make_trainer(name, continue_training=True)
    resumed.load_checkpoint(str(Path(resumed.output_folder) / "checkpoint_latest.pth"))
    resumed.run_training()
    assert torch.equal(flat(resumed.companions["discriminator"]), flat(discriminator))
    assert torch.equal(flat(resumed.network), flat(whole.network))
    assert_same(
        resumed.companion_optimizers["discriminator"].state_dict(),
        whole.companion_optimizers["discriminator"].state_dict(),
    )
