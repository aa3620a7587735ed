"""Region learning on Mean Teacher (Zhou et al. 2025: "MT + ours")."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nnunet_semiseg.losses.regions import NONE
from nnunet_semiseg.networks.features import full_resolution
from nnunet_semiseg.trainers.frame import STUDENT, Paper, PretrainingOptions, Term
from nnunet_semiseg.trainers.methods.mean_teacher import NoisyTeacherOptions, nnUNetTrainerMeanTeacher
from nnunet_semiseg.trainers.options import option
from nnunet_semiseg.trainers.region_learning import RegionLearning, RegionOptions


@dataclass(frozen=True)
class MeanTeacherBURLOptions(RegionOptions, NoisyTeacherOptions, PretrainingOptions):
    pseudo_weight: float = option(0.5, "largest weight of the loss on pseudo labels", low=0.0)
    preset: str = option(
        "default", "paper: pseudo labels have weight 1 from the start, one view", choices=("default", "paper")
    )


MeanTeacherBURLOptions.PRESETS = {
    "paper": dict(pseudo_weight=1.0, pretraining=0.0, min_recall=0.0, ramp_up=0.0, student_view="weak")
}


class nnUNetTrainerMeanTeacherBURL(RegionLearning, nnUNetTrainerMeanTeacher):
    """Mean Teacher with pseudo labels, weighted by certain and uncertain regions.

    L = L^l (Eq. 7, URL) + w(t) L^u (Eq. 8, CRL); L_seg is nnU-Net's Dice and cross-entropy, deep supervision included.

    * Labeled: voxels where the student is uncertain weigh 1, the others ``alpha_labeled``.
    * Unlabeled: the teacher's argmax is the label (in place of Mean Teacher's squared difference); voxels where the
      teacher is certain weigh 1, the others ``alpha_unlabeled``.
    * ``labeled_regions`` and ``unlabeled_regions`` switch, exchange or drop the two (Tables 3 to 5).

    Corrected or decided, against the paper (there is no published code):

    * Eq. 3 lacks the minus sign, without which the certain voxels would be called uncertain; U is one map, the sum over
      classes.
    * Eqs. 5 to 8 multiply labels by masks, which would turn voxels into background; here both sides of the loss are
      masked, as the text says. Eq. 6 prints Y^l for Y^u.
    * One student learns from both halves; the teacher is its moving average with theta_t = a theta_t-1 +
      (1 - a) theta_s. (Eq. 10 has the two exchanged, and sections 3.2 to 3.4 call the student a teacher.)
    * The percentiles, 95 for labels and 99 for pseudo labels, are the paper's for ACDC; for LA both are 95.
    * They are taken in each sample, over voxels that are not ignored. Where a patch reaches beyond the image,
      padding counts as well: nnU-Net does not tell it from background.
    * Voxel weights by default; Eqs. 7 and 8 read as two normalized losses are ``region_normalized``.
    * Eq. 9 has weight 1 and no ramp. Here it rises to ``pseudo_weight``, and begins when every class is found in
      labeled patches (``min_recall``), so that pseudo labels do not teach that a class is absent.
    """

    paper = Paper("Zhou et al. 2025, Eqs. 3-10", 2025)
    idea = (
        "Mean Teacher with pseudo labels: labels count more where the network is uncertain, pseudo labels "
        "where it is certain"
    )
    use_when = "as a reference implementation, to test region weights on Mean Teacher"
    corrected = (
        "sign of the entropy (Eq. 3); masked losses instead of masked labels (Eqs. 5-8), and pseudo labels in "
        "Eq. 6; roles in the moving average (Eq. 10); a weight per voxel, because region by region inverts "
        "the method; percentiles in each sample; a ramp. There is no published code"
    )
    labeled_by = "teacher"
    terms = dict(supervised=STUDENT, pseudo=STUDENT)
    switched_off = "pseudo_weight=0_labeled_regions=none"
    Options = MeanTeacherBURLOptions
    options: MeanTeacherBURLOptions

    def build_companions(self):
        self.host_loss = self.segmentation_loss()
        self.build_region_loss()
        return {}

    @property
    def largest_weight(self):
        return self.options.pseudo_weight

    def supervised_loss(self, data, target, network=0):
        if self.options.labeled_regions == NONE:
            return super().supervised_loss(data, target)
        outputs = self.labeled_outputs(data, target)
        return {"supervised": Term(self.labeled_loss(outputs, *self.labels.without_ignored(full_resolution(target))))}

    @torch.no_grad()
    def targets(self, unlabeled):
        teacher = self.teacher_logits(unlabeled.weak)
        valid = torch.ones_like(teacher[:, :1], dtype=torch.bool)
        return {"hard": self.labels.hard(teacher), "uncertain": self.uncertain_labels(teacher, valid), "valid": valid}

    def targets_of_labels(self, hard, valid):
        return {"hard": hard, "valid": valid}

    def student_losses(self, image, hard, uncertain, valid):
        outputs, o = self.outputs(self.student, image), self.options
        loss = self.region_loss(outputs, hard, uncertain, o.unlabeled_regions, o.alpha_unlabeled, valid)
        yield {"pseudo": Term(loss, self.unsupervised_weight())}
