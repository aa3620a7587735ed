"""What a method sees of the frame: what it overrides, and what helps it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import nn

from nnunet_semiseg.losses.pseudo_labels import DeeplySupervised, VoxelLoss, WeightedSegmentationLoss
from nnunet_semiseg.networks.ema import EMATeacher, unwrap
from nnunet_semiseg.networks.features import Outputs, forward_with_features, full_resolution
from nnunet_semiseg.trainers.frame.options import FrameOptions, PseudoLabelOptions, SecondNetworkOptions
from nnunet_semiseg.trainers.frame.part import Part
from nnunet_semiseg.trainers.frame.settings import SeedOptions
from nnunet_semiseg.trainers.options import build_options


class Term(NamedTuple):
    """One term of a loss: an unweighted scalar tensor, and its weight."""

    value: torch.Tensor
    weight: float = 1.0


# What a term trains.
STUDENT, SECOND, BOTH = ("student",), ("second",), ("student", "second")
# The moving averages of the students, in their order.
TEACHERS = ("teacher", "second_teacher")


class Paper(NamedTuple):
    """Where a method comes from: authors, venue and year, with the equations; and the year alone, to sort by."""

    citation: str
    year: int


class Unlabeled(NamedTuple):
    """Two views of the same unlabeled patches, (B, C, *) each, voxel by voxel in correspondence."""

    weak: torch.Tensor
    strong: torch.Tensor


# What belongs to the voxels of patches, by name: (B, any, *) each.
Voxels = dict[str, torch.Tensor]

# A student or a teacher, as it is run.
Network = Callable[[torch.Tensor], Outputs]
# A module or a function.
Compiled = TypeVar("Compiled", bound=Callable)


class MethodHooks(Part):
    """Mixin: everything that a method overrides or calls.

    A method says what it needs of the frame by what its ``Options`` descend from: a moving-average teacher
    (TeacherOptions), a second network (SecondNetworkOptions), a schedule with a ramp (RampOptions) or with a first
    phase on labels alone (PretrainingOptions), weights of pseudo labels (PseudoLabelOptions).
    """

    Options: type[SeedOptions] = FrameOptions
    # Facts about a method, from which README, docs and benchmark are made.
    paper: Paper | None = None
    idea = ""
    # In a few words that follow "Use it".
    use_when = ""
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
    # So many resolutions of the decoder have to be trained by nnU-Net's deep supervision.
    min_resolutions = 1
    # Whether the second network segments as the first one does, so that a trained network can take its place.
    second_segments = True
    # Whether the teacher starts as a copy of the student when phase 2 does, and then averages with a constant decay;
    # else it averages from the first step on.
    teacher_starts_pretrained = False

    def build_companions(self) -> dict[str, nn.Module]:
        """Networks beside the student, by name; those with trainable parameters join nnU-Net's optimizer.

        Called once, after the student and the networks that the frame makes, the teacher and the second network.
        """
        return {}

    def build_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Optimizers of companions that do not join nnU-Net's, a discriminator with Adam say, by the companion's name.

        Called once after ``build_companions``. They step when nnU-Net's does, and are saved and resumed.
        """
        return {}

    def needs_unlabeled(self) -> bool:
        """Whether any step of the run can have unlabeled data; if not, a dataset needs no unlabeled cases.

        A function of ``self.options`` alone.
        """
        return not isinstance(self.options, PseudoLabelOptions) or self.options.pseudo_weight > 0

    @classmethod
    def learns_from_unlabeled(cls) -> bool:
        """``needs_unlabeled`` of a trainer of this name, without making one."""
        trainer = cls.__new__(cls)
        trainer.options = build_options(cls.Options, cls.chosen_options)
        return trainer.needs_unlabeled()

    def uses_unlabeled(self) -> bool:
        """Whether this step has an unsupervised loss; a function of ``self.progress``, the same on all ranks."""
        return self.needs_unlabeled() and self.schedule.has_begun()

    def losses(self, data: torch.Tensor, target: Outputs) -> Iterator[dict[str, Term]]:
        """The terms of a step, in groups with a backward pass each; names are unique in a step.

        ``target`` is as nnU-Net's loss takes it. A method with another order of things overrides this instead of the
        hooks below.
        """
        for network in range(len(self.students)):
            yield self.supervised_loss(data, target, network)
        if self.uses_unlabeled():
            yield from self.unsupervised_losses(self.next_unlabeled(), data, target)

    def supervised_loss(self, data: torch.Tensor, target: Outputs, network: int = 0) -> dict[str, Term]:
        """nnU-Net's loss of one of ``students`` on the labeled batch."""
        outputs = self.labeled_outputs(data, target, network)
        with self.autocast():
            return {("supervised", "supervised_second")[network]: Term(self.loss(outputs, target))}

    def labeled_outputs(self, data: torch.Tensor, target: Outputs, network: int = 0) -> Outputs:
        """Outputs of one of ``students`` on the labeled batch; the schedule sees what it finds."""
        outputs = self.outputs(self.students[network], data)
        self.schedule.see(outputs, full_resolution(target), network)
        return outputs

    def unsupervised_losses(
        self, unlabeled: Unlabeled, data: torch.Tensor, target: Outputs
    ) -> Iterator[dict[str, Term]]:
        """Targets from the weak view; the student's view of the same voxels; and what holds the student to them.

        Args:
            unlabeled: The unlabeled batch.
            data, target: The labeled one, of which ``mixing`` may take boxes.
        """
        own = {"image": self.student_input(unlabeled), **self.targets(unlabeled)}
        yield from self.student_losses(**self.perturbed(own, self.labeled_voxels(data, target)))

    def targets(self, unlabeled: Unlabeled) -> Voxels:
        """What the student is to learn of unlabeled patches, from their weak view: labels, weights, masks.

        Decorate it with ``torch.no_grad`` unless gradients are meant to flow through it.
        """
        return {}

    def targets_of_labels(self, hard: torch.Tensor, valid: torch.Tensor) -> Voxels:
        """The same of labeled patches, with the same names; a target that it leaves out is 0 there.

        Args:
            hard: Their labels as LabelAdapter's hard prediction, background where they are ignored.
            valid: (B, 1, *) bool, False where they are ignored.
        """
        return {"hard": hard, "weight": valid}

    def student_losses(self, image: torch.Tensor, **targets: torch.Tensor) -> Iterator[dict[str, Term]]:
        """The terms on unlabeled patches, in groups with a backward pass each.

        Args:
            image: (B, C, *), mixed and turned by the frame if the options say so.
            targets: What ``targets`` made, mixed and turned alike.
        """
        raise NotImplementedError

    def next_unlabeled(self) -> Unlabeled:
        """The unlabeled batch of this step, on the device."""
        batch = self.draw_unlabeled()
        self._unlabeled_keys = batch["keys"]
        return Unlabeled(self.to_device(batch["weak"]), self.to_device(batch["strong"]))

    def before_step(self) -> None:
        """Called before every training step."""
        self.schedule.before_step()

    def start_phase_2(self) -> None:
        """Called once, before the first step with unlabeled data, by the schedule of PretrainingOptions."""
        if self.teacher_starts_pretrained:
            self._teachers_start()

    def after_step(self) -> None:
        """Called after every optimizer step, also one that the gradient scaler of mixed precision left out."""
        for teacher, student in zip(self.teachers, self.students):
            teacher.update(student)

    def target_transforms(self) -> list:
        """Transforms that follow nnU-Net's own on labeled training patches, and never run on unlabeled ones."""
        return []

    def foreground_of(self, hard: torch.Tensor) -> torch.Tensor:
        """The part of a hard prediction of a whole case, (1, 1 or R, Z, Y, X), that patches may be centered on."""
        return hard

    def take_pretrained_weights(self) -> None:
        """Called at the start of a training whose network has got weights by nnU-Net's ``-pretrained_weights``."""
        if self.has_second_network():
            self._second.take_pretrained_weights(self.network, "-pretrained_weights")
        self._teachers_start()

    def fork(self, second: dict[str, torch.Tensor] | None, dice: Sequence[float]) -> None:
        """Called before a training whose network has got all weights of a trained one (``nnunet_semiseg fork``).

        Args:
            second: Weights of another trained network, for the second one.
            dice: As of ``Schedule.fork``.
        """
        students = []
        if self.has_second_network():
            if second is not None and self.second_segments:
                self._second.module.load_state_dict(second)
            elif self._second.take_pretrained_weights(self.network if second is None else second, "--from"):
                students.append("the second network's segmentation layers")
            else:
                students.append("a second network")
        self._teachers_start()
        others = [
            name
            for name, module in self.companions.items()
            if name != "second" and any(p.requires_grad for p in module.parameters())
        ]
        self.schedule.fork(students, others, dice)

    def _teachers_start(self) -> None:
        """As copies of their students."""
        for teacher, student in zip(self.teachers, self.students):
            teacher.copy_from(student)

    def method_state(self) -> dict:
        """What a method has to remember over a restart beside its companions; plain Python values.

        It is also kept when another training starts from this one's weights.
        """
        return {}

    def load_method_state(self, state: dict) -> None:
        """Inverse of ``method_state``."""

    def predicting(self) -> str:
        """Which of ``networks`` predicts: it is what the checkpoint's ``network_weights`` hold."""
        return getattr(self.options, "predict_with", "student")

    def writes_second(self) -> bool:
        """False for a setting of the method in which only one of the two networks learns."""
        return True

    @classmethod
    def has_second_network(cls) -> bool:
        """Whether a second student learns beside the first: a method asks for it with SecondNetworkOptions."""
        return issubclass(cls.Options, SecondNetworkOptions)

    @property
    def progress(self) -> float:
        """Share of all training steps that is done, in [0, 1)."""
        return self.global_step / self.total_steps

    @property
    def total_steps(self) -> int:
        return self.num_epochs * self.num_iterations_per_epoch

    @property
    def student(self) -> nn.Module:
        """The network that is trained, compiled if nnU-Net compiles. Gradients are averaged over ranks by the step."""
        return self.network.module if self.is_ddp else self.network

    @property
    def students(self) -> tuple[nn.Module, ...]:
        """The networks that learn to segment, as they are run: the student, and a second one beside it."""
        return (self.student,) if self.second is None else (self.student, self.second)

    @property
    def teachers(self) -> tuple[EMATeacher, ...]:
        """The moving averages of ``students``, in their order, if the method asks for them with TeacherOptions."""
        companions = dict(self.companions)
        return tuple(cast(EMATeacher, companions[name]) for name in TEACHERS if name in companions)

    @property
    def teacher(self) -> EMATeacher | None:
        """The moving average of the student, or None."""
        return self.teachers[0] if self.teachers else None

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The networks that segment: ``student``, ``teacher``, ``second`` and ``second_teacher``, as far as there are.

        Each has the outputs of its plans.
        """
        second = {} if self.second is None else {"second": self._second.module}
        return {"student": self.network, **second, **{name: t.module for name, t in zip(TEACHERS, self.teachers)}}

    def predicting_network(self) -> nn.Module:
        return self.networks[self.predicting()]

    def ramp(self) -> float:
        """The share of its weight that an unsupervised term has now; see ``schedule``."""
        return self.schedule.ramp()

    @property
    def class_names(self) -> list[str]:
        """Names of the K foreground classes or regions, as in dataset.json."""
        names = {as_key(value): name for name, value in self.dataset_json["labels"].items()}
        return [names.get(as_key(label), str(label)) for label in self.labels.foreground_names]

    def segmentation_loss(self, ce_weight: float = 1.0, dice_weight: float = 1.0) -> DeeplySupervised:
        """nnU-Net's loss with a weight for every voxel: of a network's outputs, a hard prediction and the weights.

        It is taken at every resolution that nnU-Net supervises; with the option ``deep_pseudo=false``, at full
        resolution only.
        """
        loss = WeightedSegmentationLoss(self.labels, self.configuration_manager.batch_dice, ce_weight, dice_weight)
        return self.deeply_supervised(loss)

    def deeply_supervised(self, loss: VoxelLoss) -> DeeplySupervised:
        """A loss of (logits, hard, weight) at every resolution that nnU-Net supervises, with nnU-Net's weights."""
        deep = self.enable_deep_supervision and getattr(self.options, "deep_pseudo", True)
        return DeeplySupervised(loss, self.loss.weight_factors if deep else (1.0,))

    @property
    def trained_resolutions(self) -> list[int]:
        """Indices of the network's outputs that nnU-Net's loss trains; it leaves the lowest resolution out."""
        if not self.enable_deep_supervision:
            return [0]
        # On several ranks its weight is 1e-6 instead of 0.
        return [i for i, weight in enumerate(self.loss.weight_factors) if weight > 1e-5]

    def student_input(self, unlabeled: Unlabeled) -> torch.Tensor:
        """The view that the option ``student_view`` names; strong if there is none."""
        return unlabeled.weak if getattr(self.options, "student_view", "strong") == "weak" else unlabeled.strong

    def confidence_weight(self, logits: torch.Tensor) -> torch.Tensor:
        """(B, 1, *) weights of the pseudo labels that (B, C, *) logits make, by the options of PseudoLabelOptions."""
        options: PseudoLabelOptions = self.options
        if options.confidence == 0:
            return torch.ones_like(logits[:, :1], dtype=torch.float32)
        sure = self.labels.confidence(self.labels.probabilities(logits)) >= options.confidence
        self.monitor("sure_voxels", sure.float().mean())
        return torch.where(sure, 1.0, options.unsure_weight)

    def outputs(self, network: Network, data: torch.Tensor) -> Outputs:
        """What a student or a teacher answers, as nnU-Net's loss takes it: a list with deep supervision."""
        with self.autocast():
            return network(data)

    def outputs_of_dropped_channels(self, network: nn.Module, data: torch.Tensor, probability: float = 0.5) -> Outputs:
        """``outputs``, with channels of every skip connection and of the bottleneck dropped at random (UniMatch)."""
        with self.random_stream, self.autocast():
            return forward_with_features(unwrap(network), data, channel_dropout=probability)[0]

    def logits(self, network: Network, data: torch.Tensor) -> torch.Tensor:
        """Full-resolution (B, C, *) logits of a student or a teacher."""
        return full_resolution(self.outputs(network, data))

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device, non_blocking=True)

    def draw_unlabeled(self) -> dict:
        """The next batch of the unlabeled loader, on the CPU."""
        with self.random_stream:
            return next(self.dataloader_unlabeled)

    def monitor(self, name: str, value: torch.Tensor | float) -> None:
        """Log a scalar that is no loss (a mask's utilization, say) as its mean over the epoch."""
        self._step_monitors[name] = torch.as_tensor(value, dtype=torch.float32, device=self.device).detach()

    def compiled(self, function: Compiled) -> Compiled:
        """``torch.compile`` where nnU-Net compiles its network."""
        return cast(Compiled, torch.compile(function)) if self._do_i_compile() else function


def as_key(label: Any) -> Any:
    """A label or region as it stands as key in ``class_locations``."""
    return tuple(label) if isinstance(label, (list, tuple)) else label
