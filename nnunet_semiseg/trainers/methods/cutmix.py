"""Pseudo labels of a moving average, learned on strong views in which boxes are exchanged (French et al. 2020)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nnunet_semiseg.losses.mixing import beta_side, random_cuboid
from nnunet_semiseg.networks.ema import EMATeacher
from nnunet_semiseg.networks.features import full_resolution
from nnunet_semiseg.trainers.frame import STUDENT, Paper, PretrainingOptions, Term, TwoPhaseTrainer
from nnunet_semiseg.trainers.options import option


@dataclass(frozen=True)
class CutMixOptions(PretrainingOptions):
    pretraining: float = option(0.1, "share of the run that trains on labeled data only", low=0.0, high=1.0)
    ramp_up: float = option(0.1, "share of the run over which the weight rises, after pretraining", low=0.0, high=1.0)
    pseudo_weight: float = option(1.0, "weight of the loss on mixed patches", low=0.0)
    confidence: float = option(0.7, "probability from which a pseudo label has weight 1", low=0.0, high=1.0)
    unsure_weight: float = option(0.3, "weight of the other pseudo labels", low=0.0, high=1.0)
    partners: str = option("both", "where the boxes come from", choices=("both", "labeled", "unlabeled", "none"))
    beta: float = option(4.0, "a box's share of the patch is drawn from Beta(beta, beta)", low=0.1)
    strong_view: str = option("strong", "intensities of the student's view", choices=("strong", "nnunet"))
    ema_decay: float = option(0.99, "decay of the teacher, per step", low=0.0, high=1.0)
    predict_with: str = option("teacher", "the network that predicts", choices=("student", "teacher"))


class nnUNetTrainerCutMix(TwoPhaseTrainer):
    """A moving average labels the weak views; the student learns these labels on strong views with exchanged boxes."""

    paper = Paper("French et al., BMVC 2020; Yun et al., ICCV 2019", 2020)
    idea = (
        "a moving average labels the weak view; the student learns the labels on strong views in which boxes "
        "are exchanged"
    )
    corrected = (
        "the labels are hard, and a voxel's confidence is a weight, not a threshold; partners are labeled patches, too"
    )
    labeled_by = "teacher"
    terms = dict(supervised=STUDENT, mixed=STUDENT)
    switched_off = "pseudo_weight=0"
    Options = CutMixOptions
    options: CutMixOptions

    def build_companions(self):
        self.pseudo_loss = self.segmentation_loss()
        return {"teacher": EMATeacher(self.network, self.options.ema_decay, warm_up=True)}

    def predicting(self):
        return self.options.predict_with

    def needs_unlabeled(self):
        return self.options.pseudo_weight > 0

    def losses(self, data, target):
        yield self.supervised_loss(data, target)
        if self.uses_unlabeled():
            yield self.mixed_loss(data, target)

    def mixed_loss(self, data, target):
        unlabeled = self.next_unlabeled()
        own = self.pseudo_labeled(unlabeled)
        labels, valid = self.labels.without_ignored(full_resolution(target))
        image, hard, weight = self.mixed(own, (data, labels, valid.float()))
        with self.autocast():
            outputs = self.student(image)
        return {"mixed": Term(self.pseudo_loss(outputs, hard, weight), self.options.pseudo_weight * self.ramp())}

    @torch.no_grad()
    def pseudo_labeled(self, unlabeled):
        """The strong view, the teacher's (B, 1 or R, *) labels of the weak one, and their (B, 1, *) weights."""
        logits = self.logits(self.teacher_network, unlabeled.weak)
        sure = self.labels.confidence(self.labels.probabilities(logits)) >= self.options.confidence
        self.monitor("sure_voxels", sure.float().mean())
        return unlabeled.strong, self.labels.hard(logits), torch.where(sure, 1.0, self.options.unsure_weight)

    def mixed(self, own, labeled):
        """Each patch with the same box of a random partner, labels and weights alike."""
        if self.options.partners == "none":
            return own
        batch = len(own[0])
        first, last = {"both": (0, 2 * batch), "unlabeled": (0, batch), "labeled": (batch, 2 * batch)}[
            self.options.partners
        ]
        with self.random_stream:
            shape = own[0].shape[2:]
            inside = random_cuboid(shape, beta_side(len(shape), self.options.beta)).to(self.device)
            partner = torch.randint(first, last, (batch,)).to(self.device)
        return tuple(
            torch.where(inside, torch.cat((mine, theirs))[partner], mine) for mine, theirs in zip(own, labeled)
        )
