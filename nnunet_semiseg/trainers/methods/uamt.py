"""Uncertainty-aware Mean Teacher, UA-MT (Yu et al. 2019)."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from nnunet_semiseg.losses.ramps import gaussian_ramp_up
from nnunet_semiseg.losses.uncertainty import above_percentile
from nnunet_semiseg.networks.ema import unwrap
from nnunet_semiseg.networks.features import check_is_unet, forward_with_features
from nnunet_semiseg.trainers.frame import Paper
from nnunet_semiseg.trainers.methods.mean_teacher import MeanTeacherOptions, nnUNetTrainerMeanTeacher
from nnunet_semiseg.trainers.options import option


@dataclass(frozen=True)
class UAMTOptions(MeanTeacherOptions):
    preset: str = option("default", "paper: its weight, ramp and dropout", choices=("default", "paper"))
    uncertainty: bool = option(True, "false: consistency everywhere, the ablation", ablation=True)
    passes: int = option(8, "stochastic passes of the teacher", low=1)
    dropout: float = option(0.0, "dropout of both networks' bottleneck and last features", low=0.0, high=0.9)
    percentile: float = option(
        0.0,
        "the least uncertain percentage of each patch counts, instead of the threshold; 0: off",
        low=0.0,
        high=100.0,
    )


UAMTOptions.PRESETS = {"paper": dict(dropout=0.5, **MeanTeacherOptions.PRESETS["paper"])}


class nnUNetTrainerUAMT(nnUNetTrainerMeanTeacher):
    """Mean Teacher whose consistency counts only where the teacher is certain.

    L = L_nnU-Net(labeled) + w(t) sum_v [u_v < H(t)] mean_c (p_student - p_teacher)^2 / sum_v [u_v < H(t)]

    * p_teacher: mean over ``passes`` passes of the teacher, each with noise of its own on the input (and with
      ``dropout``); u_v: entropy of that mean.
    * H(t) = (3/4 + 1/4 exp(-5 (1 - t)^2)) ln 2; t is the progress of the run.

    Decided:

    * The student follows the mean that the entropy is of; the published code draws one more pass to follow.
    * ln 2 is the entropy of a voxel torn between two classes, or of one region that nothing is known of. With ln C or
      R ln 2, the most that there can be, such a voxel would count as certain from C = 3 or R = 2 on.
    * nnU-Net's networks have no dropout, so noise on the input is the default stochasticity; ``dropout=0.5`` adds the
      paper's, in the student's training as well, which works with nnU-Net's U-Nets.
    * An absolute threshold lets nearly all voxels pass once a network is confident. ``percentile`` keeps that share of
      each patch instead.
    """

    paper = Paper("Yu et al., MICCAI 2019", 2019)
    idea = "Mean Teacher, only where the teacher is certain"
    use_when = "as a reference implementation, a baseline with an uncertainty mask"
    corrected = (
        "the threshold is that of two classes (ln 2), whatever their number, and a percentile can replace it; "
        "the student follows the mean that the entropy is of; noise on the input by default, as nnU-Net has "
        "no dropout"
    )
    labeled_by = "teacher"
    passes = (2, 8, 0, 0)
    Options = UAMTOptions
    options: UAMTOptions

    def build_companions(self):
        if self.options.dropout > 0:
            check_is_unet(self.network)
        return super().build_companions()

    def outputs(self, network, data):
        """With ``dropout``."""
        if self.options.dropout == 0:
            return super().outputs(network, data)
        with self.autocast():
            return forward_with_features(unwrap(network), data, self.options.dropout)[0]

    def teacher_mean(self, weak: torch.Tensor) -> torch.Tensor:
        """(B, C, *) mean probabilities over the stochastic passes."""
        passes = self.options.passes if self.options.uncertainty else 1
        drawn = (self.labels.probabilities(self.teacher_logits(weak)) for _ in range(passes))
        return functools.reduce(torch.add, drawn) / passes

    def certain(self, teacher: torch.Tensor) -> torch.Tensor:
        """(B, 1, *) bool: where the consistency counts."""
        entropy = self.labels.probability_entropy(teacher)
        if not self.options.uncertainty:
            return torch.ones_like(entropy, dtype=torch.bool)
        if self.options.percentile > 0:
            return ~above_percentile(entropy, self.options.percentile)
        threshold = (0.75 + 0.25 * gaussian_ramp_up(self.progress)) * math.log(2)
        return entropy < threshold

    @torch.no_grad()
    def targets(self, unlabeled):
        teacher = self.teacher_mean(unlabeled.weak)
        certain = self.certain(teacher)
        self.monitor("certain_voxels", certain.float().mean())
        return {"probabilities": teacher, "counts": certain}
