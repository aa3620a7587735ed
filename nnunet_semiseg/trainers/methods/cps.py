"""Cross pseudo supervision, CPS (Chen et al. 2021; the first stage of Pham et al. 2022, FLARE22)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nnunet_semiseg.losses.pseudo_labels import WeightedSegmentationLoss
from nnunet_semiseg.trainers.frame import (
    SECOND,
    STUDENT,
    MixingOptions,
    Paper,
    PretrainingOptions,
    SecondNetworkOptions,
    Term,
    TwoNetworkTrainer,
    TwoPhaseTrainer,
)
from nnunet_semiseg.trainers.options import option


@dataclass(frozen=True)
class CPSOptions(SecondNetworkOptions, MixingOptions, PretrainingOptions):
    preset: str = option(
        "default",
        "paper: Dice alone and two architectures (the paper states no weight); code: weight 0.1 as well",
        choices=("default", "paper", "code"),
    )
    pseudo_weight: float = option(0.5, "largest weight of the loss on the other network's labels", low=0.0)
    pseudo_loss: str = option("both", "that loss", choices=("ce", "dice", "both"))
    student_view: str = option(
        "strong", "the input that is learned on; strong: labels from the weak view", choices=("strong", "weak")
    )


_PAPER = dict(
    second_network="other", pseudo_loss="dice", student_view="weak", pretraining=0.0, min_recall=0.0, ramp_up=1.0
)
CPSOptions.PRESETS = {"paper": _PAPER, "code": dict(_PAPER, pseudo_weight=0.1)}


class nnUNetTrainerCPS(TwoPhaseTrainer, TwoNetworkTrainer):
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
    * With ``student_view=strong``, labels come from the weak view: two more forward passes without a gradient.
      ``mixing`` and ``turns`` then change image and labels alike, as CutMix does in the original's experiments.
    * The code's unsupervised loss is Lovasz's, the paper's is Dice; the presets use Dice.
    * The paper's slice-position channel is not part of this trainer: nnU-Net's predictor does not tell a network where
      a slice lies.
    """

    paper = Paper("Chen et al., CVPR 2021; Pham et al., FLARE 2022", 2021)
    idea = "two networks, each learns from the other's argmax"
    corrected = (
        "starts when both networks find every class; the weight ramps up within the run, in the paper's code "
        "it hardly leaves zero; cross-entropy and Dice, in the presets Dice as in the paper, not the code's "
        "Lovasz; unlabeled patches only; labels from the weak view; without the paper's second stage (mask "
        "propagation) and its channel of slice positions"
    )
    labeled_by = "second"
    passes = (2, 1, 2, 1)
    terms = dict(supervised=STUDENT, supervised_second=SECOND, cross_first=STUDENT, cross_second=SECOND)
    switched_off = "pseudo_weight=0"
    Options = CPSOptions
    options: CPSOptions

    def build_companions(self):
        if self.options.student_view == "weak" and (self.options.mixing != "none" or self.options.turns):
            raise ValueError(
                "mixing and turns need labels from another view than the student's: use student_view=strong"
            )
        part = self.options.pseudo_loss
        self.pseudo_loss = WeightedSegmentationLoss(
            self.labels,
            self.configuration_manager.batch_dice,
            ce_weight=float(part != "dice"),
            dice_weight=float(part != "ce"),
        )
        return super().build_companions()

    def pseudo_weight(self) -> float:
        """w(t)."""
        return self.options.pseudo_weight * self.ramp()

    def needs_unlabeled(self):
        return self.options.pseudo_weight > 0

    def losses(self, data, target):
        yield self.supervised_loss(data, target)
        yield self.supervised_loss(data, target, network=1)
        if self.uses_unlabeled():
            yield from self.cross_losses(self.next_unlabeled(), self.labeled_voxels(data, target))

    def cross_losses(self, unlabeled, labeled=None):
        """The two cross terms, a backward pass each. ``labeled``: what ``mixing`` may take from labeled patches."""
        networks = self.trained_networks
        if self.options.student_view == "strong":
            with torch.no_grad():
                hard = [self.labels.hard(self.logits(network, unlabeled.weak)) for network in networks]
            self.monitor("disagreement", self.labels.differ(*hard).float().mean())
            everywhere = torch.ones_like(hard[0][:, :1], dtype=torch.bool)
            if labeled is not None:
                data, labels, valid = labeled
                labeled = data, labels, labels, valid
            image, *hard, weight = self.perturbed((unlabeled.strong, *hard, everywhere), labeled)
            # Lazily, so that one graph is in memory at a time.
            learned = (self.logits(network, image) for network in networks)
        else:
            learned = [self.logits(network, unlabeled.weak) for network in networks]
            hard = [self.labels.hard(logits.detach()) for logits in learned]
            self.monitor("disagreement", self.labels.differ(*hard).float().mean())
            weight = torch.ones_like(hard[0][:, :1], dtype=torch.bool)
        for name, logits, target in zip(("cross_first", "cross_second"), learned, reversed(hard)):
            yield {name: Term(self.pseudo_loss(logits, target, weight), self.pseudo_weight())}
