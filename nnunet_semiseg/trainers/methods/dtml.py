"""Dual-task mutual learning, DTML (Zhang and Zhang 2021)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import nn

from nnunet_semiseg.losses.distance import distance_error, mask_of_distance
from nnunet_semiseg.networks.features import check_is_unet, full_resolution
from nnunet_semiseg.trainers.distance_task import DistanceOptions, DistanceTask
from nnunet_semiseg.trainers.frame import (
    BOTH,
    SECOND,
    STUDENT,
    WHOLE_RUN,
    Paper,
    SecondNetworkOptions,
    SemiSupervisedTrainer,
    Term,
)
from nnunet_semiseg.trainers.options import option

# With distances as targets, tanh and k = 1500 leave a gradient to half a percent of the voxels at nnU-Net's usual scale
# of a segmentation layer.
HEAD_DEVIATION = 1e-3


@dataclass(frozen=True)
class DTMLOptions(SecondNetworkOptions, DistanceOptions):
    preset: str = option(
        "default",
        "paper: ramp over the whole run; code: also its consistency, weight 2 beside half of M_s's loss",
        choices=("default", "paper", "code"),
    )
    supervision: str = option(
        "mask", "what M_d learns from labels (Table 1)", choices=("mask", "distance", "both"), ablation=True
    )
    consistency_weight: float = option(0.1, "largest weight of the cross-task consistency", low=0.0)
    setting: str = option(
        "full",
        "rows of Table 2: segmentation or distance: that network alone; labeled: consistency on labeled data only",
        choices=("full", "labeled", "segmentation", "distance"),
        ablation=True,
    )


DTMLOptions.PRESETS = {
    "paper": dict(consistency_weight=0.1, **WHOLE_RUN),
    # 2 (the term is in both losses) beside half of a Dice and cross-entropy, which counts whole here.
    "code": dict(consistency_weight=4.0, **WHOLE_RUN),
}


class nnUNetTrainerDTML(DistanceTask, SemiSupervisedTrainer):
    """Two networks of the same plans learn from each other: M_s segments, M_d regresses signed distances.

    L = L_nnU-Net(M_s) + L_M_d + lambda(t) mean |p_s - sigmoid(-k z)|^2 over labeled and unlabeled patches

    * M_d: z = tanh of a map for each foreground class or region, negative inside (Eqs. 1 to 3). L_M_d is
      the Dice loss of sigmoid(-k z) (``supervision=mask``, the paper's best), the squared error to the signed distance
      of the labels, or both (Table 1).
    * The consistency (Eq. 4, squares summed over the K maps) reaches both networks: in each it is Eq. 5 or 6 with
      weight lambda, since neither network depends on the other's weights.
    * lambda(t): Gaussian ramp-up to ``consistency_weight``.
    * M_s predicts; with ``setting=distance``, M_d does.

    Corrected or decided, against paper and published code:

    * Eq. 2 has the wrong sign for distances that are negative inside: sigmoid(-k z).
    * lambda(t) lacks the square of the Gaussian ramp-up. The paper's maximum is 0.1, which is the default here. The
      code's is 1, but it adds the same term to both losses and back-propagates both, so it works as 2.
    * The losses of both networks have weight 1. The code's M_s has half of a Dice and cross-entropy, so that its 2 is 4
      here (``preset=code``); for M_d, whose Dice counts whole in the code as well, that is twice the code's weight.
    * Distances are divided by a constant (``max_distance``), not by the patch's own maximum.
    * The output of M_d is -o, with a background channel that stays 0. Its argmax is the mask of z < 0, so that M_d is a
      plain nnU-Net too.
    * z = tanh(o / k) where only the mask is learned, so that sigmoid(-k z) is about sigmoid(-o). With tanh(o) and
      k = 1500 hardly a voxel has a gradient after the first steps: the loss then stays where it is. So it is in the
      presets, too. Where distances are learned, z = tanh(o), and the segmentation layers start small.
    * L_mask has deep supervision, as nnU-Net's own loss; the consistency is at full resolution.
    """

    paper = Paper("Zhang and Zhang, PRCV 2021, Eqs. 1-6", 2021)
    idea = "a segmentation network and a signed-distance network agree"
    use_when = "as a reference implementation, for a shape constraint with two networks"
    corrected = (
        "sign of the inverse transform (Eq. 2), and a scale with which the distance network learns from "
        "masks; the square in the ramp; the consistency counts once, not twice; distances divided by a "
        "constant, not by the patch's maximum; both supervised losses have weight 1; squares summed over "
        "classes; the distance network has the plans' outputs, background included, and deep supervision"
    )
    labeled_by = "second"
    passes = (2, 0, 2, 0)
    terms = dict(supervised=STUDENT, mask=SECOND, consistency_labeled=BOTH, consistency=BOTH)
    switched_off = "consistency_weight=0"
    second_segments = False
    Options = DTMLOptions
    options: DTMLOptions

    def build_companions(self):
        if self.options.setting == "distance" and self.options.second_network != "same":
            raise ValueError(
                "With setting=distance M_d predicts, so it has to be the network of the plans: leave second_network out"
            )
        second = self.companions["second"]
        check_is_unet(second)
        for layer in second.decoder.seg_layers:
            if self.needs_distance():
                nn.init.normal_(layer.weight, std=HEAD_DEVIATION)
            nn.init.zeros_(layer.bias)
            if not self.labels.has_regions:
                nn.init.zeros_(layer.weight[:1])
        self.mask_dice = MemoryEfficientSoftDiceLoss(
            lambda x: mask_of_distance(self.distance_of(x), self.options.steepness),
            batch_dice=self.configuration_manager.batch_dice,
            smooth=1e-5,
            ddp=self.is_ddp,
        )
        self.mask_loss = self.deeply_supervised(self._mask_loss)
        return {}

    def _mask_loss(self, logits, hard, valid):
        """Dice of M_d's (B, C, *) outputs; arguments as of WeightedSegmentationLoss."""
        foreground, _ = self.labels.one_vs_rest(hard)
        return self.mask_dice(self.labels.foreground_channels(logits), foreground, loss_mask=valid)

    def writes_second(self):
        return self.options.setting in ("full", "labeled")

    def predicting(self):
        return "second" if self.options.setting == "distance" else "student"

    def needs_distance(self):
        return self.options.supervision != "mask" and self.options.setting != "segmentation"

    def consistency_weight(self) -> float:
        """lambda(t)."""
        return self.options.consistency_weight * self.ramp() if self.options.setting in ("full", "labeled") else 0.0

    def needs_unlabeled(self):
        return self.options.setting == "full" and self.options.consistency_weight > 0

    def distance_of(self, output: torch.Tensor) -> torch.Tensor:
        """z of M_d's output for foreground, -o."""
        scale = 1.0 if self.needs_distance() else self.options.steepness
        return -(output.float() / scale).tanh()

    def distances(self, outputs) -> torch.Tensor:
        """z, (B, K, *) of M_d's outputs, at full resolution."""
        return self.distance_of(self.labels.foreground_channels(full_resolution(outputs)))

    def losses(self, data, target):
        o = self.options
        target, distance = self.split_distance(target)
        hard, valid = self.labels.without_ignored(full_resolution(target))
        terms = {}
        with self.autocast():
            if o.setting != "distance":
                segmentation = self.student(data)
                terms["supervised"] = Term(self.loss(segmentation, target))
            if o.setting != "segmentation":
                distances = self.second(data)
        if o.setting != "segmentation":
            if o.supervision != "distance":
                terms["mask"] = Term(self.mask_loss(distances, hard, valid))
            if distance is not None:
                terms["distance"] = Term(distance_error(self.distances(distances), distance, valid))
        weight = self.consistency_weight()
        if weight > 0:
            # The mean over labeled and unlabeled patches, of which there are as many.
            weight = weight / 2 if self.uses_unlabeled() else weight
            terms["consistency_labeled"] = Term(
                self.consistency(segmentation, self.distances(distances), valid), weight
            )
        yield terms
        if self.uses_unlabeled():
            yield from self.unsupervised_losses(self.next_unlabeled(), data, target)

    def student_losses(self, image, valid):
        with self.autocast():
            segmentation, distances = self.student(image), self.second(image)
        consistency = self.consistency(segmentation, self.distances(distances), valid)
        yield {"consistency": Term(consistency, self.consistency_weight() / 2)}
