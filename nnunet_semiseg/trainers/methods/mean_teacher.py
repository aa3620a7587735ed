"""Mean Teacher (Tarvainen and Valpola 2017), as the papers use it for a baseline."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nnunet_semiseg.losses.consistency import clamped_noise, probability_mse
from nnunet_semiseg.networks.ema import EMATeacher
from nnunet_semiseg.trainers.frame import (
    STUDENT,
    WHOLE_RUN,
    FrameOptions,
    Paper,
    RampOptions,
    SemiSupervisedTrainer,
    Term,
    Unlabeled,
)
from nnunet_semiseg.trainers.options import option


@dataclass(frozen=True)
class TeacherOptions(FrameOptions):
    ema_decay: float = option(0.99, "largest decay of the teacher, per step", low=0.0, high=1.0)
    noise: float = option(0.1, "SD of the noise on the teacher's input, in normalized intensities", low=0.0)
    student_view: str = option(
        "strong", "the student's input; the teacher's is the weak one", choices=("strong", "weak")
    )
    predict_with: str = option("student", "the network that predicts", choices=("student", "teacher"))


@dataclass(frozen=True)
class MeanTeacherOptions(TeacherOptions, RampOptions):
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
    idea = "the student's probabilities follow those of its moving average on unlabeled patches"
    corrected = "averages parameters, not the state dict, in which nnU-Net names most tensors several times"
    labeled_by = "teacher"
    terms = dict(supervised=STUDENT, consistency=STUDENT)
    switched_off = "consistency_weight=0"
    Options = MeanTeacherOptions
    options: TeacherOptions

    def build_companions(self):
        if not self.needs_unlabeled() and self.options.predict_with == "student":
            return {}
        return {"teacher": EMATeacher(self.network, self.options.ema_decay, warm_up=True)}

    def predicting(self):
        return self.options.predict_with

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
        with self.random_stream:
            return self.logits(self.teacher_network, clamped_noise(weak, self.options.noise))

    def unsupervised_loss(self, unlabeled: Unlabeled):
        teacher = self.labels.probabilities(self.teacher_logits(unlabeled.weak))
        student = self.labels.probabilities(self.logits(self.student, self.student_input(unlabeled)))
        return {"consistency": Term(probability_mse(student, teacher), self.unsupervised_weight())}
