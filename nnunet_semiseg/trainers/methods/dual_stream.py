"""Dual-stream learning with contrastive prototypes (Karimijafarbigloo et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist

from nnunet_semiseg.losses.consistency import masked_mean
from nnunet_semiseg.losses.prototypes import (
    PrototypeMemory,
    class_means,
    gather_features,
    prototype_contrast,
    sample_voxels,
)
from nnunet_semiseg.losses.uncertainty import above_percentile
from nnunet_semiseg.networks.ema import unwrap
from nnunet_semiseg.networks.features import check_is_unet, forward_with_features, full_resolution
from nnunet_semiseg.trainers.frame import (
    BOTH,
    SECOND,
    STUDENT,
    Paper,
    PretrainingOptions,
    SecondNetworkOptions,
    SemiSupervisedTrainer,
    Term,
    second_network_option,
)
from nnunet_semiseg.trainers.options import option

# Voxels per class that prototypes are made of, and as many that are drawn to them.
SAMPLED_VOXELS = 4096


@dataclass(frozen=True)
class DualStreamOptions(SecondNetworkOptions, PretrainingOptions):
    second_network: str = second_network_option("other")
    pseudo_weight: float = option(0.5, "largest weight of the winner's pseudo labels", low=0.0)
    taught: str = option("both", "the networks that learn them", choices=("both", "loser"), ablation=True)
    disagreement_weight: float = option(0.1, "largest weight of the term on confident disagreement", low=0.0)
    contrast_weight: float = option(0.1, "largest weight of the prototype term", low=0.0)
    mistake_weight: float = option(
        0.0, "weight of the code's labeled term where one network alone is sure", low=0.0, ablation=True
    )
    unreliable: float = option(2.0, "percentage of voxels, those of highest entropy", low=0.0, high=100.0)
    confidence: float = option(0.6, "both networks are this sure where their disagreement counts", low=0.0, high=1.0)
    prototype_momentum: float = option(0.0, "moving average of prototypes; 0: of the batch alone", low=0.0, high=0.999)
    deep_pseudo: bool = option(False, "pseudo labels at every resolution that nnU-Net supervises")
    student_view: str = option(
        "strong",
        "the input that is learned on; pseudo labels are from the weak view",
        choices=("strong", "weak"),
        ablation=True,
    )
    preset: str = option(
        "default",
        "paper: weight 1 for pseudo labels and disagreement, a fifth unreliable, one view; code: what trains there",
        choices=("default", "paper", "code"),
    )


DualStreamOptions.PRESETS = {
    "paper": dict(
        taught="both",
        pseudo_weight=1.0,
        disagreement_weight=1.0,
        contrast_weight=0.1,
        unreliable=20.0,
        student_view="weak",
        pretraining=0.0,
        min_recall=0.0,
        ramp_up=1.0,
    ),
    "code": dict(pseudo_weight=0.0, disagreement_weight=0.0, contrast_weight=0.0, mistake_weight=0.5),
}


class nnUNetTrainerDualStream(SemiSupervisedTrainer):
    """Two networks of different architecture; the better one labels, both contrast uncertain voxels with prototypes.

    L = L_s(A) + L_s(B) + lambda_u(t) [l(A, y^) + l(B, y^)] + lambda_d(t) L_reg + lambda_c(t) [L_c(A) + L_c(B)]

    * L_s: nnU-Net's loss on the labeled batch. The network with the lower one in this step is the winner.
    * y^: the winner's argmax on the unlabeled patches, for both networks, in the reliable region: the voxels but the
      ``unreliable`` percent of highest winner's entropy in each patch (Eq. 2). l: nnU-Net's cross-entropy and Dice.
    * L_reg (Eqs. 4 and 5): mean |p_A - p_B| over voxels where the argmaxes differ and both networks are more
      than ``confidence`` sure; the gradient goes to both.
    * L_c (Eq. 7): - log p(y^_v | v) over voxels of the unreliable region, p by Euclidean distance of normalized
      features to the prototypes; y^_v is the network's own argmax there. A prototype is the mean feature of reliable
      voxels of a class. Both sides have gradients: the softmax pulls voxels to their prototype and pushes prototypes
      apart. With regions, each region has two prototypes, inside and outside.
    * lambda(t): Gaussian ramp-up to the weights. It begins when both networks find every class in labeled patches
      (``min_recall``).

    The published code is no guide: it detaches the predictions and computes the prototypes without gradient, so that
    none of its unsupervised terms trains anything. Corrected or decided, against the paper:

    * Both networks learn the winner's labels (Eq. 2), so that the winner repeats its own; with ``taught=loser`` it does
      not.
    * lambda_c's exponent has the wrong sign and constant (5.5 at the start); it is the usual ramp-up to 0.1.
    * Eq. 2 compares the pseudo label with itself in Dice; here Dice(f(x), y^).
    * Eq. 4 is malformed; Eq. 5 is a sum, here a mean over the voxels of the mask.
    * The share of unreliable voxels is not stated; the code's percentile of 20 makes two thirds or more unreliable,
      and was probably meant to be 80, which is 20 percent. Where foreground is a few percent of the voxels, 20 percent
      take nearly all of it from the reliable region (``reliable_foreground`` in the log); the default is 2.
    * The paper adjusts the confidence threshold during training without saying how; here it is constant.
    * Eq. 7's loss, and the labels of uncertain voxels, are not written out; see above.
    * lambda_u is 1 in the paper, from the first step on, and L_reg is part of it. Here all terms have the ramp (that of
      ``preset=paper`` is over the whole run): wrong labels of an untrained network do less harm.
    * ``mistake_weight`` (0.5 in the code) is the one extra term that trained anything there: squared error to the
      labels where just one of the two networks is at least ``confidence`` sure of a foreground class. Each class has
      its own such voxels; the code has one.
    * The checkpoint predicts with A. The paper's prediction is the mean of both: ``nnUNetv2_ensemble``
      computes it from the probabilities of A and B.
    """

    paper = Paper("Karimijafarbigloo et al. 2024, Eqs. 1-7", 2024)
    idea = "two architectures: the better one labels; losses on confident disagreement and on class prototypes"
    use_when = "as a reference implementation, to study two architectures"
    corrected = (
        "every term has a gradient (none of the published code's unsupervised terms has); exponent of "
        "lambda_c; a ramp for lambda_u; Eqs. 2, 4 and 5; a loss for Eq. 7, which has none; a constant "
        "confidence threshold; starts when both networks find every class; 2 % of voxels are unreliable, the "
        "code's share takes nearly all foreground"
    )
    labeled_by = "second"
    # The winner labels, be it the one or the other.
    passes = (2, 0.5, 2, 0.5)
    terms = dict(
        **dict.fromkeys(("supervised", "pseudo_first", "contrast_first"), STUDENT),
        **dict.fromkeys(("supervised_second", "pseudo_second", "contrast_second"), SECOND),
        disagreement=BOTH,
    )
    switched_off = "pseudo_weight=0_disagreement_weight=0_contrast_weight=0"
    Options = DualStreamOptions
    options: DualStreamOptions

    def build_companions(self):
        first, second = unwrap(self.network), self.companions["second"]
        for network in (first, second):
            check_is_unet(network)
        self._forwards = [self.compiled(forward_with_features) for _ in range(2)]
        self.pseudo_loss = self.segmentation_loss()
        # Exclusive labels are one problem of C classes, regions are R problems of two.
        problems, classes = (self.labels.num_outputs, 2) if self.labels.has_regions else (1, self.labels.num_outputs)
        return {
            f"prototypes_{name}": PrototypeMemory(
                problems, classes, network.encoder.output_channels[0], self.options.prototype_momentum
            )
            for name, network in (("first", first), ("second", second))
        }

    def needs_unlabeled(self):
        o = self.options
        return max(o.pseudo_weight, o.disagreement_weight, o.contrast_weight) > 0

    def losses(self, data, target):
        outputs = [self.labeled_outputs(data, target, network) for network in range(2)]
        with self.autocast():
            supervised = [self.loss(output, target) for output in outputs]
        terms = {"supervised": Term(supervised[0]), "supervised_second": Term(supervised[1])}
        if self.options.mistake_weight > 0:
            terms |= self.mistake_terms([full_resolution(output) for output in outputs], full_resolution(target))
        yield terms
        del outputs
        if self.uses_unlabeled():
            self.labeler = self.winner(supervised)
            yield from self.unsupervised_losses(self.next_unlabeled(), data, target)

    def winner(self, supervised: list[torch.Tensor]) -> int:
        """Index of the network with the lower supervised loss, the same on all ranks."""
        values = torch.stack([value.detach().float() for value in supervised])
        if self.is_ddp:
            dist.all_reduce(values)
        winner = int(values.argmin())
        self.monitor("second_wins", float(winner))
        return winner

    def mistake_terms(self, logits: list[torch.Tensor], target: torch.Tensor) -> dict[str, Term]:
        """Squared error of the foreground's probabilities to the labels, where just one network is sure of the class.

        Args:
            logits: (B, C, *) of each network.
            target: nnU-Net's, full resolution.
        """
        foreground, valid = self.labels.one_vs_rest(target)
        p = [self.labels.foreground_channels(self.labels.probabilities(value)) for value in logits]
        first, second = (value.detach() >= self.options.confidence for value in p)
        differ = (first ^ second) & valid
        return {
            name: Term(masked_mean((value - foreground).square(), differ), self.options.mistake_weight)
            for name, value in zip(("mistake_first", "mistake_second"), p)
        }

    @torch.no_grad()
    def targets(self, unlabeled):
        labeling = self.logits(self.students[self.labeler], unlabeled.weak)
        hard = self.labels.hard(labeling)
        reliable = ~above_percentile(self.labels.entropy(labeling), 100 - self.options.unreliable)
        foreground = self.labels.is_foreground(hard)
        self.monitor("reliable_foreground", (foreground & reliable).sum() / foreground.sum().clamp(min=1))
        return {"hard": hard, "reliable": reliable, "known": torch.ones_like(reliable)}

    def targets_of_labels(self, hard, valid):
        return {"hard": hard, "reliable": valid, "known": valid}

    def student_losses(self, image, hard, reliable, known):
        """``known``: (B, 1, *) bool, False where a labeled patch's label is ignored."""
        o, ramp = self.options, self.ramp()
        networks = [unwrap(self.network), self.companions["second"]]
        with self.autocast():
            results = [forward(network, image) for forward, network in zip(self._forwards, networks)]
        logits = [full_resolution(outputs) for outputs, _ in results]
        own = [self.labels.hard(value.detach()) for value in logits]
        terms = {}
        if o.pseudo_weight > 0:
            for index, (name, (outputs, _)) in enumerate(zip(("pseudo_first", "pseudo_second"), results)):
                if o.taught == "loser" and index == self.labeler:
                    continue
                terms[name] = Term(self.pseudo_loss(outputs, hard, reliable), o.pseudo_weight * ramp)
        if o.disagreement_weight > 0:
            terms["disagreement"] = Term(self.disagreement(logits, own), o.disagreement_weight * ramp)
        if o.contrast_weight > 0:
            for name, (_, features), guessed in zip(("first", "second"), results, own):
                contrast = self.contrast(name, features, hard, reliable, ~reliable & known, guessed)
                terms[f"contrast_{name}"] = Term(contrast, o.contrast_weight * ramp)
        yield terms

    def disagreement(self, logits: list[torch.Tensor], hard: list[torch.Tensor]) -> torch.Tensor:
        """L_reg, Eqs. 4 and 5, of both networks' (B, C, *) logits and their own hard predictions."""
        p = [self.labels.probabilities(value) for value in logits]
        sure = torch.minimum(*(self.labels.confidence(value.detach()) for value in p)) > self.options.confidence
        mask = self.labels.differ(*hard) & sure
        self.monitor("confident_disagreement", mask.float().mean())
        return masked_mean((p[0] - p[1]).abs().mean(1, keepdim=True), mask)

    def contrast(self, name: str, features, pseudo, reliable, unreliable, own) -> torch.Tensor:
        """L_c of one network, Eq. 7.

        Args:
            name: "first" or "second".
            features: (B, F, *) of the decoder's last stage.
            pseudo: The winner's hard prediction, of which prototypes are made.
            reliable, unreliable: (B, 1, *) bool.
            own: The network's own hard prediction, which says which prototype an unreliable voxel is drawn to.
        """
        memory = cast(PrototypeMemory, self.companions[f"prototypes_{name}"])
        losses = []
        for problem in range(memory.means.shape[0]):
            classes = memory.means.shape[1]
            taught, guessed = pseudo[:, problem].long(), own[:, problem].long()
            with self.random_stream:
                sure = sample_voxels(taught, reliable[:, 0], classes, SAMPLED_VOXELS)
                unsure = sample_voxels(guessed, unreliable[:, 0], classes, SAMPLED_VOXELS)
            means, present = class_means(gather_features(features, sure), taught.flatten()[sure], classes)
            prototypes, known = memory(problem, means, present)
            vectors = gather_features(features, unsure)
            losses.append(prototype_contrast(vectors, guessed.flatten()[unsure], prototypes, known))
        return torch.stack(losses).mean()
