"""Cross pseudo supervision, CPS (Chen et al. 2021; the first stage of Pham et al. 2022, FLARE22)."""

from __future__ import annotations

from dataclasses import dataclass

from nnunet_semiseg.trainers.cross_labels import CrossLabels
from nnunet_semiseg.trainers.frame import (
    Paper,
    PretrainingOptions,
    PseudoLabelOptions,
    SecondNetworkOptions,
)
from nnunet_semiseg.trainers.options import option


@dataclass(frozen=True)
class CPSOptions(SecondNetworkOptions, PseudoLabelOptions, PretrainingOptions):
    preset: str = option(
        "default",
        "paper: Dice alone and two architectures (the paper states no weight); code: weight 0.1 as well",
        choices=("default", "paper", "code"),
    )
    pseudo_weight: float = option(0.5, "largest weight of the loss on the other network's labels", low=0.0)
    pseudo_loss: str = option("both", "that loss", choices=("ce", "dice", "both"), ablation=True)
    deep_pseudo: bool = option(False, "that loss at every resolution that nnU-Net supervises")
    student_view: str = option(
        "strong",
        "the input that is learned on; strong: labels from the weak view",
        choices=("strong", "weak"),
        ablation=True,
    )


_PAPER = dict(
    second_network="other", pseudo_loss="dice", student_view="weak", pretraining=0.0, min_recall=0.0, ramp_up=1.0
)
CPSOptions.PRESETS = {"paper": _PAPER, "code": dict(_PAPER, pseudo_weight=0.1)}


class nnUNetTrainerCPS(CrossLabels):
    """Cross pseudo supervision: two networks, each learns from the other's argmax on unlabeled patches.

    L = L_nnU-Net(A) + L_nnU-Net(B) + w(t) [l(A(x), argmax B(x)) + l(B(x), argmax A(x))]

    * The networks are of the same plans with different initialization, or of two architectures (``second_network``).
    * l: nnU-Net's cross-entropy, Dice, or both, at full resolution; no gradient reaches the network that labels.
    * w(t): Gaussian ramp-up to ``pseudo_weight``. Pham et al. state no weight; their code ramps to 0.1 over 200
      epochs of thousands of steps, and so hardly leaves zero; the presets ramp over the run.

    Decided:

    * The cross terms begin when both networks find every class in labeled patches (``min_recall``): labels of networks
      that know background alone teach just that.
    * Unlabeled patches only, as in the medical implementations; the original also takes the labeled ones.
    * Labels come from the weak view, in forward passes of their own; with ``student_view=weak``, the networks learn on
      the same one. ``mixing`` and ``turns`` change image and labels alike, as CutMix does in the original's
      experiments.
    * The code's unsupervised loss is Lovasz's, the paper's is Dice; the presets use Dice.
    * The paper's slice-position channel is not part of this trainer: nnU-Net's predictor does not tell a network where
      a slice lies.
    """

    paper = Paper("Chen et al., CVPR 2021; Pham et al., FLARE 2022", 2021)
    idea = "two networks, each learns from the other's hard labels"
    use_when = "if you can afford two networks"
    corrected = (
        "starts when both networks find every class; the weight ramps up within the run, in the paper's code "
        "it hardly leaves zero; cross-entropy and Dice, in the presets Dice as in the paper, not the code's "
        "Lovasz; unlabeled patches only; labels from the weak view; without the paper's second stage (mask "
        "propagation) and its channel of slice positions"
    )
    labeled_by = "second"
    Options = CPSOptions
    options: CPSOptions

    def build_companions(self):
        part = self.options.pseudo_loss
        self.pseudo_label_loss = self.segmentation_loss(
            ce_weight=float(part != "dice"), dice_weight=float(part != "ce")
        )
        return {}
