"""Dual-task consistency, DTC (Luo et al. 2021), the single-network sibling of DTML."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from nnunet_semiseg.losses.distance import distance_error
from nnunet_semiseg.networks.ema import unwrap
from nnunet_semiseg.networks.features import check_is_unet, forward_with_features, full_resolution
from nnunet_semiseg.trainers.distance_task import DistanceOptions, DistanceTask
from nnunet_semiseg.trainers.frame import STUDENT, WHOLE_RUN, Paper, SemiSupervisedTrainer, Term
from nnunet_semiseg.trainers.options import option


@dataclass(frozen=True)
class DTCOptions(DistanceOptions):
    distance_weight: float = option(0.3, "weight of the supervised distance regression (beta)", low=0.0)
    preset: str = option("default", "code: weight 1, ramp over the whole run", choices=("default", "code"))


DTCOptions.PRESETS = {"code": dict(consistency_weight=1.0, **WHOLE_RUN)}


class nnUNetTrainerDTC(DistanceTask, SemiSupervisedTrainer):
    """One U-Net with two heads: nnU-Net's segmentation layer, and a 1x1 convolution with tanh for signed distances.

    L = L_nnU-Net + beta mean((z - SDF)^2) on labeled patches
        + lambda(t) mean |p - sigmoid(-k z)|^2 on labeled and unlabeled patches, the squares summed over K

    * z: one map for each foreground class or region, negative inside; SDF: signed distance of the labels, divided by a
      constant (``max_distance``).
    * lambda(t): Gaussian ramp-up to ``consistency_weight``. beta = 0.3 is the published code's, which has one class and
      weight 1. The squares are summed over classes: with three, 0.33 is the weight 1 of their mean.

    Corrected: the paper's inverse transform has the wrong sign for distances that are negative inside; the code's
    distances are divided by the patch's own maximum, are 0 everywhere in a patch without foreground, and NaN in a patch
    full of it. The code's supervised loss is Dice alone; here it is nnU-Net's.
    """

    paper = Paper("Luo et al., AAAI 2021", 2021)
    idea = "a segmentation head and a signed-distance head of one network agree"
    use_when = "as a reference implementation, for a shape constraint at the lowest cost"
    corrected = (
        "sign of the inverse transform; distances divided by a constant; patches without or full of "
        "foreground; nnU-Net's loss instead of Dice alone; squares summed over classes, so that the default "
        "weight 0.33 is the published 1 of their mean for three"
    )
    labeled_by = "student"
    passes = (2, 0, 0, 0)
    terms = dict(
        supervised=STUDENT,
        **dict.fromkeys(("distance", "consistency_labeled", "consistency"), ("student", "distance_head")),
    )
    switched_off = "consistency_weight=0_distance_weight=0"
    Options = DTCOptions
    options: DTCOptions

    def build_companions(self):
        unet = unwrap(self.network)
        check_is_unet(unet)
        self._forward = self.compiled(forward_with_features)
        head = unet.encoder.conv_op(unet.encoder.output_channels[0], self.labels.num_foreground, 1)
        nn.init.normal_(head.weight, std=1e-3)
        nn.init.zeros_(head.bias)
        return {"distance_head": head}

    def needs_distance(self):
        return self.options.distance_weight > 0

    def needs_unlabeled(self):
        return self.options.consistency_weight > 0

    def half_weight(self) -> float:
        """lambda(t) / 2: the mean is over labeled and unlabeled patches, of which there are as many."""
        return self.options.consistency_weight * self.ramp() / 2

    def both_tasks(self, data: torch.Tensor):
        """The network's outputs, and z (B, K, *)."""
        with self.autocast():
            outputs, features = self._forward(unwrap(self.network), data)
            distances = self.companions["distance_head"](features)
        return outputs, distances.float().tanh()

    def losses(self, data, target):
        o = self.options
        target, distance = self.split_distance(target)
        _, valid = self.labels.without_ignored(full_resolution(target))
        outputs, predicted = self.both_tasks(data)
        with self.autocast():
            terms = {"supervised": Term(self.loss(outputs, target))}
        if distance is not None:
            terms["distance"] = Term(distance_error(predicted, distance, valid), o.distance_weight)
        if self.uses_unlabeled():
            terms["consistency_labeled"] = Term(self.consistency(outputs, predicted, valid), self.half_weight())
        yield terms
        if self.uses_unlabeled():
            yield from self.unsupervised_losses(self.next_unlabeled(), data, target)

    def student_losses(self, image, valid):
        yield {"consistency": Term(self.consistency(*self.both_tasks(image), valid), self.half_weight())}
