"""When unlabeled data take part in a training, and with what share of their weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist

from nnunet_semiseg.losses.ramps import ramp_up_between
from nnunet_semiseg.networks.features import Outputs, full_resolution
from nnunet_semiseg.trainers.frame.options import PretrainingOptions, RampOptions

if TYPE_CHECKING:
    from nnunet_semiseg.trainers.frame.trainer import SemiSupervisedTrainer


# Twice the pretraining, and at least this share of the run: after it, phase 2 is late.
LATE = 0.2


def schedule_of(trainer: SemiSupervisedTrainer) -> Schedule:
    """The schedule that a trainer's options ask for."""
    if isinstance(trainer.options, PretrainingOptions):
        return TwoPhases(trainer)
    return RampUp(trainer) if isinstance(trainer.options, RampOptions) else Schedule(trainer)


class Schedule:
    """Unlabeled data take part from the first step to the last, with their whole weight."""

    # The values of a state that hold for one training only.
    OF_THIS_RUN: tuple[str, ...] = ("forked",)

    def __init__(self, trainer: SemiSupervisedTrainer):
        self.trainer = trainer
        # Whether the time on labels alone is behind the networks when the training starts.
        self.forked = False

    def ramp(self) -> float:
        """In [0, 1]; the same on all ranks."""
        return 1.0

    def has_begun(self) -> bool:
        """Whether this step has unlabeled data."""
        return self.ramp() > 0

    def see(self, outputs: Outputs, target: torch.Tensor, network: int = 0, valid: torch.Tensor | None = None) -> None:
        """Called with the outputs of one of the trainer's ``students`` on labeled patches.

        Args:
            target: nnU-Net's or a hard prediction, at full resolution.
            valid: (B, 1, *) bool, the voxels that count; None: those whose label is not ignored.
        """

    def before_step(self) -> None:
        """Called before every training step."""

    def start_epoch(self) -> None: ...

    def end_epoch(self) -> None: ...

    def end(self) -> None:
        """Called at the end of the training."""

    def fork(self, students: list[str], others: list[str], dice: Sequence[float]) -> None:
        """Called before a training that starts from trained networks.

        Args:
            students: What of the students starts untrained nevertheless, in words.
            others: Names of the other networks that do, heads say, which are in no supervised model.
            dice: What the trained networks reached in each class, the worst of them; empty if nobody knows.
        """

    def state(self) -> dict:
        """What a training that is continued has to know; plain Python values."""
        return {"forked": True} if self.forked else {}

    def load_state(self, state: dict) -> None:
        """Inverse of ``state``. What a training that starts from a finished one's weights has not got is missing."""
        self.forked = state.get("forked", False)


class RampUp(Schedule):
    """exp(-5 (1 - s)^2), s from 0 to 1 over ``ramp_up`` of the run, after ``warm_up`` of it; 0 before.

    From trained networks, without ``warm_up``.
    """

    def ramp(self) -> float:
        options = self.trainer.options
        warm_up = 0.0 if self.forked and options.warm_up < 1 else options.warm_up
        return ramp_up_between(self.trainer.progress, warm_up, options.ramp_up)

    def fork(self, students: list[str], others: list[str], dice: Sequence[float]) -> None:
        self.forked = not (students or others)
        stays = f"with warm_up, because the model lacks {', '.join(students + others)}"
        self.trainer.print_to_log_file(f"The run starts {'without warm_up' if self.forked else stays}")


class TwoPhases(Schedule):
    """Labels alone until the students know every class, then unlabeled data with a weight that rises.

    Phase 2 starts when ``pretraining`` of the run is done and every class is found in labeled patches with
    ``min_recall`` by all students: pseudo labels of a network that does not find a class yet teach that there is none.
    Recall is that of the last epoch; of a class which that epoch's patches lack, that of the last epoch with it.

    From trained networks, it starts with the first step. If a student starts untrained, or did not find a class, it
    waits for ``min_recall``; if another network does, whose recall nobody counts, for ``pretraining``.
    """

    OF_THIS_RUN = ("phase_2_start", "forked")

    def __init__(self, trainer: SemiSupervisedTrainer):
        super().__init__(trainer)
        # Progress at the start of phase 2, once it has started.
        self.phase_2_start: float | None = None
        self.knows_classes = trainer.options.min_recall == 0 or not trainer.needs_unlabeled()
        self.recall = dict.fromkeys(trainer.class_names, 0.0)
        # Of each student and class: labeled voxels that it finds, and all of them.
        self.counts = torch.zeros(
            1 + trainer.has_second_network(), 2, trainer.labels.num_foreground, device=trainer.device
        )

    @property
    def pretraining(self) -> float:
        """Share of the run that trains on labels alone, whatever is learned; 1 stays 1, a training without phase 2."""
        pretraining = self.trainer.options.pretraining
        return 0.0 if self.forked and pretraining < 1 else pretraining

    def has_begun(self) -> bool:
        enough = self.trainer.global_step >= math.ceil(self.pretraining * self.trainer.total_steps)
        return self.knows_classes and enough

    def ramp(self) -> float:
        """From exp(-5) at the start of phase 2 to 1: SGD with momentum 0.99 takes a jump in the loss badly."""
        return ramp_up_between(self.trainer.progress, cast(float, self.phase_2_start), self.trainer.options.ramp_up)

    def see(self, outputs: Outputs, target: torch.Tensor, network: int = 0, valid: torch.Tensor | None = None) -> None:
        if self.knows_classes:
            return
        labels = self.trainer.labels
        found, _ = labels.one_vs_rest(labels.hard(full_resolution(outputs).detach()))
        foreground, known = labels.one_vs_rest(target)
        self.count(found, foreground * (known if valid is None else valid), network)

    @torch.no_grad()
    def count(self, found: torch.Tensor, present: torch.Tensor, network: int = 0) -> None:
        """Count the labeled voxels of each class, and those of them that one of the students finds.

        Args:
            found, present: (B, K, *) bool or float in {0, 1}.
        """
        axes = [0, *range(2, present.ndim)]
        self.counts[network] += torch.stack(((found * present).sum(axes), present.sum(axes)))

    def before_step(self) -> None:
        if self.phase_2_start is None and self.trainer.uses_unlabeled():
            self.phase_2_start = self.trainer.progress
            self.trainer.print_to_log_file(
                f"Phase 2 begins at epoch {self.trainer.current_epoch}: unlabeled data take part"
            )
            self.trainer.start_phase_2()

    def start_epoch(self) -> None:
        self.counts.zero_()

    def end_epoch(self) -> None:
        if self.knows_classes:
            return
        trainer, min_recall = self.trainer, self.trainer.options.min_recall
        if trainer.is_ddp:
            dist.all_reduce(self.counts)
        # All students see the same labels; the worst one counts.
        for name, found, present in zip(trainer.class_names, *self.counts.amin(0).tolist()):
            if present > 0:
                self.recall[name] = found / present
        recall = {name: value for name, value in self.recall.items() if name not in trainer.absent_classes}
        self.knows_classes = all(value >= min_recall for value in recall.values())
        if not self.knows_classes and trainer.progress >= self.pretraining:
            listed = ", ".join(f"{name} {value:.3f}" for name, value in recall.items())
            trainer.print_to_log_file(
                f"Pretraining goes on: recall on labeled data is {listed}; min_recall is {min_recall}"
            )
            # In the one epoch that passes it.
            late = max(2 * self.pretraining, LATE)
            if trainer.current_epoch < late * trainer.num_epochs <= trainer.current_epoch + 1:
                worst = min(recall, key=lambda name: recall[name])
                trainer.print_to_log_file(
                    f"WARNING: Phase 2 is late: after {(trainer.current_epoch + 1) / trainer.num_epochs:.0%} of the "
                    f"run, {worst} has a recall of {recall[worst]:.3f} on labeled data. Start from a supervised model "
                    "that finds it (nnunet_semiseg fork), train longer, or lower min_recall"
                )

    def end(self) -> None:
        if self.phase_2_start is None and self.trainer.needs_unlabeled():
            self.trainer.print_to_log_file(
                "WARNING: This run never got beyond pretraining on labeled data"
                + ("" if self.knows_classes else ", because a class was not learned well enough (see above)")
                + ". Train longer, or lower "
                + ("pretraining" if self.knows_classes else "min_recall")
            )

    def fork(self, students: list[str], others: list[str], dice: Sequence[float]) -> None:
        trainer, min_recall = self.trainer, self.trainer.options.min_recall
        self.forked = not others
        if not trainer.needs_unlabeled():
            return
        reasons = []
        if not self.knows_classes:
            # NaN: there was no such class.
            low = [f"{name} {value:.3f}" for name, value in zip(trainer.class_names, dice) if not value >= min_recall]
            reasons += [f"the model lacks {', '.join(students)}"] if students else []
            reasons += [f"the model's Dice is {', '.join(low)}"] if low else []
            self.knows_classes = not reasons
        stays = f"with pretraining, because the model lacks {', '.join(others)}"
        waits = f"; phase 2 waits for min_recall {min_recall}, because {'; '.join(reasons)}"
        trainer.print_to_log_file(
            f"The run starts {'without pretraining' if self.forked else stays}{waits if reasons else ''}"
        )

    def state(self) -> dict:
        return {
            "phase_2_start": self.phase_2_start,
            "knows_classes": self.knows_classes,
            "recall": self.recall,
            **super().state(),
        }

    def load_state(self, state: dict) -> None:
        super().load_state(state)
        self.phase_2_start, self.knows_classes = state.get("phase_2_start"), state["knows_classes"]
        self.recall = dict(state["recall"])
