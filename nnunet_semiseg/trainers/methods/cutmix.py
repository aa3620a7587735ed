"""Pseudo labels of a moving average, learned on strong views with exchanged boxes (French et al. 2020)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nnunet_semiseg.trainers.frame import (
    MIXING,
    STUDENT,
    Paper,
    PretrainingOptions,
    PseudoLabelOptions,
    SemiSupervisedTrainer,
    TeacherOptions,
    Term,
)
from nnunet_semiseg.trainers.options import option


@dataclass(frozen=True)
class CutMixOptions(PseudoLabelOptions, TeacherOptions, PretrainingOptions):
    pretraining: float = option(0.1, "share of the run that trains on labeled data only", low=0.0, high=1.0)
    ramp_up: float = option(0.1, "share of the run over which the weight rises, after pretraining", low=0.0, high=1.0)
    mixing: str = option("both", "the box's origin", choices=MIXING)
    strong_view: str = option("strong", "intensities of the student's view", choices=("none", "nnunet", "strong"))
    confidence: float = option(0.7, "probability from which a pseudo label has weight 1", low=0.0, high=1.0)
    predict_with: str = option("teacher", "the network that predicts", choices=("student", "teacher"))


class nnUNetTrainerCutMix(SemiSupervisedTrainer):
    """A moving average labels the weak view; the student learns the labels on a strong view with exchanged boxes.

    L = L_nnU-Net(labeled) + w(t) L_nnU-Net(student(mix(x_strong)), mix(argmax teacher(x_weak)), mix(c))

    * mix: one box a step, its share of the patch drawn from Beta(4, 4), with the content of a random other patch of the
      step, unlabeled (with its pseudo labels) or labeled (with its labels, weight 1). Image, labels and weights alike.
    * c: 1 where the teacher's probability reaches ``confidence``, ``unsure_weight`` elsewhere.
    * The loss is nnU-Net's at all its resolutions. w(t): Gaussian ramp-up to ``pseudo_weight`` after pretraining.
    """

    Options = CutMixOptions
    options: CutMixOptions
    paper = Paper("French et al., BMVC 2020; Yun et al., ICCV 2019", 2020)
    idea = "a moving average labels weak views; the student learns these labels on strong views with swapped boxes"
    use_when = "first: the best results so far"
    corrected = "hard labels; confidence is a weight, not a threshold; boxes from labeled patches as well"
    labeled_by = "teacher"
    terms = dict(supervised=STUDENT, mixed=STUDENT)
    switched_off = "pseudo_weight=0"

    @torch.no_grad()
    def targets(self, unlabeled):
        logits = self.logits(self.teacher, unlabeled.weak)
        return {"hard": self.labels.hard(logits), "weight": self.confidence_weight(logits)}

    def student_losses(self, image, hard, weight):
        loss = self.pseudo_label_loss(self.outputs(self.student, image), hard, weight)
        yield {"mixed": Term(loss, self.options.pseudo_weight * self.ramp())}
