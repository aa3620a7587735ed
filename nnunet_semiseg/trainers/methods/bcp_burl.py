"""Region learning on bidirectional copy-paste (Zhou et al. 2025: "BCP + ours")."""

from __future__ import annotations

from dataclasses import dataclass

from nnunet_semiseg.trainers.frame import Paper
from nnunet_semiseg.trainers.methods.bcp import BCPOptions, nnUNetTrainerBCP
from nnunet_semiseg.trainers.options import option
from nnunet_semiseg.trainers.region_learning import RegionLearning, RegionOptions


@dataclass(frozen=True)
class BCPBURLOptions(RegionOptions, BCPOptions):
    preset: str = option("default", "paper: BCP's settings for ACDC", choices=("default", "paper"))


class nnUNetTrainerBCPBURL(RegionLearning, nnUNetTrainerBCP):
    """Bidirectional copy-paste in which the losses are weighted by certain and uncertain regions.

    * Phase 1: URL (Eq. 7) on labeled patches.
    * Phase 2: URL on the voxels that come from labeled patches, by the student's entropy on the mixed patch; CRL
      (Eq. 8) on those from unlabeled ones, by the entropy of the teacher's prediction on the patch before mixing.

    Percentiles are taken in each mixed patch over the voxels of the same origin. The mean weight of the voxels of an
    origin in the batch is 1: regions shift weight within labels and within pseudo labels, not from one to the other
    (with ``origin_normalized``, each origin is divided by its own sum instead). What was corrected in the paper's
    equations stands at nnUNetTrainerMeanTeacherBURL.
    """

    paper = Paper("Zhou et al. 2025, Eqs. 3-10", 2025)
    idea = "BCP whose losses are weighted by certain and uncertain regions"
    use_when = "to test region weights where BCP works"
    corrected = "as nnUNetTrainerMeanTeacherBURL; pseudo labels keep the host's weight"
    labeled_by = "teacher"
    switched_off = "pretraining=1_labeled_regions=none"
    Options = BCPBURLOptions
    options: BCPBURLOptions

    def is_origin_normalized(self):
        return super().is_origin_normalized() or self.options.region_normalized

    def build_companions(self):
        companions = super().build_companions()
        self.build_region_loss()
        return companions
