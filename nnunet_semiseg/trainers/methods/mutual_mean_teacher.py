"""Two networks, each learns from the moving average of the other (Ge et al. 2020), with exchanged boxes."""

from __future__ import annotations

from dataclasses import dataclass

from nnunet_semiseg.trainers.cross_labels import CrossLabels
from nnunet_semiseg.trainers.frame import Paper, SecondNetworkOptions
from nnunet_semiseg.trainers.methods.cutmix import CutMixOptions


@dataclass(frozen=True)
class MutualMeanTeacherOptions(SecondNetworkOptions, CutMixOptions):
    pass


class nnUNetTrainerMutualMeanTeacher(CrossLabels):
    """Cross pseudo supervision whose labels are made by moving averages, on strong views with exchanged boxes.

    L = L_nnU-Net(A) + L_nnU-Net(B) + w(t) [l(A, argmax B'(x_weak)) + l(B, argmax A'(x_weak))]

    * A', B': moving averages of A and B. l: nnU-Net's loss at all its resolutions, on a strong view with an exchanged
      box, with confidence weights, as in CutMix (cutmix.py). Both networks see the same mixed view.
    * A' predicts, and B' as the second network.

    Ge et al. adapt networks to another domain and learn soft labels of clusters of images; of their method this is the
    exchange of teachers, for segmentation.
    """

    paper = Paper("Ge et al., ICLR 2020; French et al., BMVC 2020", 2020)
    idea = "CutMix with two networks, each learns the labels of the other's moving average"
    use_when = "if you can afford two networks"
    corrected = "hard labels with confidence weights, as in CutMix"
    labeled_by = "teacher"
    Options = MutualMeanTeacherOptions
    options: MutualMeanTeacherOptions

    @property
    def labeling(self):
        return self.teachers
