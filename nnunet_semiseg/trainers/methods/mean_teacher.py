"""Mean Teacher (Tarvainen and Valpola 2017), as the papers use it for a baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from nnunet_semiseg.losses.consistency import clamped_noise, masked_squared_distance
from nnunet_semiseg.trainers.frame import (
    STUDENT,
    WHOLE_RUN,
    Paper,
    RampOptions,
    SemiSupervisedTrainer,
    TeacherOptions,
    Term,
)
from nnunet_semiseg.trainers.frame.settings import SeedOptions
from nnunet_semiseg.trainers.options import option


@dataclass(frozen=True)
class NoisyTeacherOptions(TeacherOptions):
    noise: float = option(0.1, "SD of the noise on the teacher's input, in normalized intensities", low=0.0)
    student_view: str = option(
        "strong", "the student's input; the teacher's is the weak one", choices=("strong", "weak"), ablation=True
    )


@dataclass(frozen=True)
class MeanTeacherOptions(NoisyTeacherOptions, RampOptions):
    consistency_weight: float = option(1.0, "largest weight of the consistency term", low=0.0)
    preset: str = option("default", "paper: the baseline of the papers' tables", choices=("default", "paper"))


# 0.1 beside half of a Dice and cross-entropy, which counts whole here.
MeanTeacherOptions.PRESETS = {"paper": dict(consistency_weight=0.2, student_view="weak", **WHOLE_RUN)}


class nnUNetTrainerMeanTeacher(SemiSupervisedTrainer):
    """Mean Teacher: the student's probabilities follow those of its own moving average on unlabeled patches.

    L = L_nnU-Net(labeled) + w(t) mean((softmax(student(x)) - softmax(teacher(x + noise)))^2)

    * Teacher: average of the student's weights with decay min(1 - 1 / (t + 1), ``ema_decay``), no gradient.
    * Noise: N(0, ``noise``^2), clamped to two standard deviations.
    * w(t) = ``consistency_weight`` exp(-5 (1 - s)^2), s from 0 to 1 over ``ramp_up`` of the run, after ``warm_up``.
      The papers have 0.1 beside half of a Dice and cross-entropy, over the whole run; beside nnU-Net's whole sum that
      is the 0.2 of the preset.

    ``student_view=weak`` gives student and teacher the same image but for the noise, as the papers' code does. With
    ``strong`` the student also sees nnU-Net's intensity augmentation.
    """

    paper = Paper("Tarvainen and Valpola, NeurIPS 2017", 2017)
    idea = "the student's predictions on unlabeled patches follow those of its moving average"
    use_when = "as a reference implementation, the baseline that most papers compare with"
    corrected = "averages parameters, not the state dict, in which nnU-Net names most tensors several times"
    labeled_by = "teacher"
    terms = dict(supervised=STUDENT, consistency=STUDENT)
    switched_off = "consistency_weight=0"
    Options: type[SeedOptions] = MeanTeacherOptions
    # Of a subclass, other NoisyTeacherOptions.
    options: Any

    @property
    def largest_weight(self) -> float:
        return self.options.consistency_weight

    def unsupervised_weight(self) -> float:
        """w(t)."""
        return self.largest_weight * self.ramp()

    def needs_unlabeled(self):
        return self.largest_weight > 0

    @torch.no_grad()
    def teacher_logits(self, weak: torch.Tensor) -> torch.Tensor:
        """(B, C, *) of the teacher, on the weak view with noise."""
        assert self.teacher is not None
        with self.random_stream:
            return self.logits(self.teacher, clamped_noise(weak, self.options.noise))

    @torch.no_grad()
    def targets(self, unlabeled):
        probabilities = self.labels.probabilities(self.teacher_logits(unlabeled.weak))
        return {"probabilities": probabilities, "counts": torch.ones_like(probabilities[:, :1], dtype=torch.bool)}

    def targets_of_labels(self, hard, valid):
        return {"probabilities": self.labels.as_probabilities(hard), "counts": valid}

    def student_losses(self, image, probabilities, counts):
        """``counts``: (B, 1, *) bool, the voxels whose difference does."""
        student = self.labels.probabilities(self.logits(self.student, image))
        distance = masked_squared_distance(student, probabilities, counts) / self.labels.num_outputs
        yield {"consistency": Term(distance, self.unsupervised_weight())}
