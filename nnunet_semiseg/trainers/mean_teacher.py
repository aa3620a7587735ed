"""Mean Teacher (Tarvainen and Valpola 2017), as the papers use it for a baseline."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nnunet_semiseg.losses.consistency import probability_mse
from nnunet_semiseg.losses.ramps import ramp_up_between
from nnunet_semiseg.networks.ema import EMATeacher
from nnunet_semiseg.trainers.base import FrameOptions, SemiSupervisedTrainer, Term, Unlabeled
from nnunet_semiseg.trainers.options import option


@dataclass(frozen=True)
class MeanTeacherOptions(FrameOptions):
    consistency_weight: float = option(1.0, "largest weight of the consistency term", low=0.0)
    ramp_up: float = option(1.0, "share of the run at which the weight is full", low=0.0, high=1.0)
    warm_up: float = option(0.03, "share of the run without consistency, at the start", low=0.0, high=1.0)
    ema_decay: float = option(0.99, "largest decay of the teacher, per step", low=0.0, high=1.0)
    noise: float = option(0.1, "SD of the noise on the teacher's input, in normalized intensities", low=0.0)
    student_view: str = option(
        "strong", "the student's input; the teacher's is the weak one", choices=("strong", "weak")
    )
    predict_with: str = option("student", "the network that predicts", choices=("student", "teacher"))


class nnUNetTrainerMeanTeacher(SemiSupervisedTrainer):
    """Mean Teacher: the student's probabilities follow those of its own moving average on unlabeled patches.

    L = L_nnU-Net(labeled) + w(t) mean((softmax(student(x)) - softmax(teacher(x + noise)))^2)

    * Teacher: average of the student's weights with decay min(1 - 1 / (t + 1), ``ema_decay``), no gradient.
    * Noise: N(0, ``noise``^2), clamped to two standard deviations.
    * w(t) = ``consistency_weight`` exp(-5 (1 - s)^2), s from 0 to 1 between ``warm_up`` and ``ramp_up`` of the run. The
      papers have 0.1 beside half of a Dice and cross-entropy; the default is what measured best (docs/results.md).

    ``student_view=weak`` gives student and teacher the same image but for the noise, as the papers' code does. With
    ``strong`` the student also sees nnU-Net's intensity augmentation.
    """

    Options = MeanTeacherOptions
    options: MeanTeacherOptions

    def build_companions(self):
        return {"teacher": EMATeacher(self.network, self.options.ema_decay, warm_up=True)}

    def predicts_with_teacher(self):
        return self.options.predict_with == "teacher"

    def consistency_weight(self) -> float:
        """w(t)."""
        o = self.options
        return o.consistency_weight * ramp_up_between(self.progress, o.warm_up, o.ramp_up - o.warm_up)

    def uses_unlabeled(self):
        return self.consistency_weight() > 0

    def unsupervised_loss(self, unlabeled: Unlabeled):
        with self.random_stream:
            noise = torch.randn_like(unlabeled.weak).mul_(self.options.noise)
        noise = noise.clamp_(-2 * self.options.noise, 2 * self.options.noise)
        with torch.no_grad():
            teacher = self.labels.probabilities(self.logits(self.teacher_network, unlabeled.weak + noise))
        view = unlabeled.strong if self.options.student_view == "strong" else unlabeled.weak
        student = self.labels.probabilities(self.logits(self.student, view))
        return {"consistency": Term(probability_mse(student, teacher), self.consistency_weight())}
