"""What a method sees of the frame: what it overrides, and what helps it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import autocast, nn

from nnunet_semiseg.losses.pseudo_labels import DeeplySupervised, WeightedSegmentationLoss
from nnunet_semiseg.losses.ramps import ramp_up_between
from nnunet_semiseg.networks.ema import EMATeacher
from nnunet_semiseg.networks.features import full_resolution
from nnunet_semiseg.trainers.frame.settings import SeedOptions
from nnunet_semiseg.trainers.options import build_options, option


class Term(NamedTuple):
    """One term of a loss: an unweighted scalar tensor, and its weight."""

    value: torch.Tensor
    weight: float = 1.0


# What a term trains.
STUDENT, SECOND, BOTH = ("student",), ("second",), ("student", "second")


class Paper(NamedTuple):
    """Where a method comes from: authors, venue and year, with the equations; and the year alone, to sort by."""

    citation: str
    year: int


class Unlabeled(NamedTuple):
    """Two views of the same unlabeled patches, (B, C, *) each, voxel by voxel in correspondence."""

    weak: torch.Tensor
    strong: torch.Tensor


@dataclass(frozen=True)
class FrameOptions(SeedOptions):
    """Options that every method has."""

    unlabeled_foreground_sampling: float = option(
        0.0, "probability of centering an unlabeled patch on predicted foreground", low=0.0, high=1.0
    )
    strong_view: str = option(
        "nnunet",
        "intensities of an unlabeled patch's strong view: those of the weak view, nnU-Net's augmentation, or on top of "
        "it contrast, brightness, gamma, noise and blur for nearly every patch",
        choices=("none", "nnunet", "strong"),
    )
    allow_absent_classes: bool = option(False, "train although a class is in no labeled training case")


@dataclass(frozen=True)
class RampOptions(FrameOptions):
    """Options of methods whose unsupervised weight rises over the run."""

    warm_up: float = option(0.1, "share of the run without unlabeled data, at the start", low=0.0, high=1.0)
    ramp_up: float = option(
        0.3, "share of the run over which the unsupervised weight rises, after warm-up", low=0.0, high=1.0
    )


# As in the papers: the weight rises over the whole run.
WHOLE_RUN = dict(warm_up=0.0, ramp_up=1.0)


class MethodHooks:
    """Mixin: everything that a method overrides or calls."""

    Options = FrameOptions
    # Facts about a method, from which README, docs and benchmark are made.
    paper: Paper | None = None
    idea = ""
    # What differs from the paper and its published code.
    corrected = ""
    # Which network makes the targets of unlabeled patches: student, teacher or second.
    labeled_by = "student"
    # Passes of a step through the student: forward and backward, forward only; the same through a second network.
    passes: tuple[float, float, float, float] = (2, 1, 0, 0)
    # The terms of a step with default options, and the networks that each one trains.
    terms: dict[str, tuple[str, ...]] = {"supervised": ("student",)}
    # The settings in a trainer's name with which its student trains as in nnU-Net, on labels alone.
    switched_off = ""

    def build_companions(self) -> dict[str, nn.Module]:
        """Networks beside the student, by name; those with trainable parameters join the optimizer.

        Called once after the student exists. A teacher is an EMATeacher under the name ``teacher``.
        """
        return {}

    def needs_unlabeled(self) -> bool:
        """Whether any step of the run can have unlabeled data; if not, a dataset needs no unlabeled cases.

        A function of ``self.options`` alone.
        """
        return True

    @classmethod
    def learns_from_unlabeled(cls) -> bool:
        """``needs_unlabeled`` of a trainer of this name, without making one."""
        trainer = cls.__new__(cls)
        trainer.options = build_options(cls.Options, cls.chosen_options)
        return trainer.needs_unlabeled()

    def uses_unlabeled(self) -> bool:
        """Whether this step has an unsupervised loss; a function of ``self.progress``, the same on all ranks."""
        return self.needs_unlabeled() and self.ramp() > 0

    def losses(self, data: torch.Tensor, target) -> Iterator[dict[str, Term]]:
        """The terms of a step, in groups with a backward pass each; names are unique in a step.

        A method with another order of things (several networks, labeled and unlabeled data in one image) overrides
        this instead of the three below.
        """
        yield self.supervised_loss(data, target)
        if self.uses_unlabeled():
            yield self.unsupervised_loss(self.next_unlabeled())

    def supervised_loss(self, data: torch.Tensor, target) -> dict[str, Term]:
        """nnU-Net's loss on the labeled batch. ``target`` as nnU-Net's loss takes it."""
        with self.autocast():
            return {"supervised": Term(self.loss(self.student(data), target))}

    def unsupervised_loss(self, unlabeled: Unlabeled) -> dict[str, Term]:
        """The method's terms on the unlabeled batch, computed in float32 outside autocast."""
        raise NotImplementedError

    def next_unlabeled(self) -> Unlabeled:
        """The unlabeled batch of this step, on the device."""
        batch = self.draw_unlabeled()
        self._unlabeled_keys = batch["keys"]
        return Unlabeled(self.to_device(batch["weak"]), self.to_device(batch["strong"]))

    def before_step(self) -> None:
        """Called before every training step."""

    def after_step(self) -> None:
        """Called after every optimizer step, also one that the gradient scaler of mixed precision left out."""
        if self.teacher is not None:
            self.teacher.update(self.student)

    def target_transforms(self) -> list:
        """Transforms that follow nnU-Net's own on labeled training patches."""
        return []

    def foreground_of(self, hard: torch.Tensor) -> torch.Tensor:
        """The part of a hard prediction of a whole case, (1, 1 or R, Z, Y, X), that patches may be centered on."""
        return hard

    def take_pretrained_weights(self) -> None:
        """Called at the start of a training whose network has got weights by nnU-Net's ``-pretrained_weights``."""
        if self.teacher is not None:
            self.teacher.copy_from(self.network)

    def method_state(self) -> dict:
        """What a method has to remember over a restart beside its companions; plain Python values."""
        return {}

    def load_method_state(self, state: dict) -> None:
        """Inverse of ``method_state``."""

    def predicting(self) -> str:
        """Which of ``networks`` predicts: it is what the checkpoint's ``network_weights`` hold."""
        return "student"

    @property
    def progress(self) -> float:
        """Share of all training steps that is done, in [0, 1)."""
        return self.global_step / self._total_steps

    @property
    def _total_steps(self) -> int:
        return self.num_epochs * self.num_iterations_per_epoch

    @property
    def student(self) -> nn.Module:
        """The network that is trained, compiled if nnU-Net compiles. Gradients are averaged over ranks by the step."""
        return self.network.module if self.is_ddp else self.network

    @property
    def trained_networks(self) -> tuple[nn.Module, ...]:
        """The networks that learn to segment, as they are run: the student, and a second network beside it."""
        return (self.student,)

    @property
    def teacher(self) -> EMATeacher | None:
        return dict(self.companions).get("teacher")

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The networks that segment, each with the plans' outputs: ``student``, and ``teacher`` or ``second``."""
        companions = dict(self.companions)
        networks = {"student": self.network}
        if "teacher" in companions:
            networks["teacher"] = companions["teacher"].module
        if "second" in companions:
            networks["second"] = companions["second"]
        return networks

    def predicting_network(self) -> nn.Module:
        return self.networks[self.predicting()]

    def ramp(self) -> float:
        """exp(-5 (1 - s)^2), s from 0 to 1 over ``ramp_up`` of the run, after ``warm_up`` of it; 0 before."""
        return ramp_up_between(self.progress, self.options.warm_up, self.options.ramp_up)

    @property
    def class_names(self) -> list[str]:
        """Names of the K foreground classes or regions, as in dataset.json."""
        names = {as_key(value): name for name, value in self.dataset_json["labels"].items()}
        return [names.get(as_key(label), str(label)) for label in self.labels.foreground_names]

    def segmentation_loss(self) -> DeeplySupervised:
        """nnU-Net's loss with a weight for every voxel, at every resolution that nnU-Net supervises."""
        return self.deeply_supervised(WeightedSegmentationLoss(self.labels, self.configuration_manager.batch_dice))

    def deeply_supervised(self, loss) -> DeeplySupervised:
        """A loss of (logits, hard, weight) at every resolution that nnU-Net supervises, with nnU-Net's weights."""
        return DeeplySupervised(loss, self.loss.weight_factors if self.enable_deep_supervision else (1.0,))

    def student_input(self, unlabeled: Unlabeled) -> torch.Tensor:
        """The view that the option ``student_view`` names."""
        return unlabeled.strong if self.options.student_view == "strong" else unlabeled.weak

    def autocast(self):
        """nnU-Net's mixed precision: float16 on CUDA, nothing elsewhere."""
        return autocast(self.device.type) if self.device.type == "cuda" else contextlib.nullcontext()

    def logits(self, network: nn.Module, data: torch.Tensor) -> torch.Tensor:
        """Full-resolution (B, C, *) logits of a network."""
        with self.autocast():
            return full_resolution(network(data))

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device, non_blocking=True)

    def draw_unlabeled(self) -> dict:
        """The next batch of the unlabeled loader, on the CPU."""
        with self.random_stream:
            return next(self.dataloader_unlabeled)

    def monitor(self, name: str, value) -> None:
        """Log a scalar that is no loss (a mask's utilization, say) as its mean over the epoch."""
        self._step_monitors[name] = torch.as_tensor(value, dtype=torch.float32, device=self.device).detach()

    def compiled(self, function):
        """``torch.compile`` where nnU-Net compiles its network."""
        return torch.compile(function) if self._do_i_compile() else function


def as_key(label):
    """A label or region as it stands as key in ``class_locations``."""
    return tuple(label) if isinstance(label, (list, tuple)) else label
