"""Uncertainty rectified pyramid consistency, URPC (Luo et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from nnunet_semiseg.trainers.frame import STUDENT, WHOLE_RUN, Paper, RampOptions, SemiSupervisedTrainer, Term
from nnunet_semiseg.trainers.options import option


@dataclass(frozen=True)
class URPCOptions(RampOptions):
    consistency_weight: float = option(0.1, "largest weight of the pyramid consistency", low=0.0)
    preset: str = option("default", "code: the ramp is over the whole run", choices=("default", "code"))


URPCOptions.PRESETS = {"code": dict(WHOLE_RUN)}


class nnUNetTrainerURPC(SemiSupervisedTrainer):
    """The decoder's predictions at several resolutions agree with their mean, the less where they differ much.

    L = L_nnU-Net(labeled) + w(t) mean_s [ sum_v (p_s - q)^2 exp(-D_s) / sum_v exp(-D_s) + mean_v D_s ]

    * p_s: probabilities of nnU-Net's deep supervision outputs, their logits interpolated linearly to full resolution.
      q: the mean of p_s over the resolutions s. (p_s - q)^2 is the mean over the classes.
    * D_s = KL(q || p_s), for regions the sum over their binary divergences. Gradients flow through all of it.
    * w(t): Gaussian ramp-up to ``consistency_weight``.

    Decided: nnU-Net does not train its lowest resolution, so that one takes no part; at least two others are needed.
    The published code adds noise and dropout to the lower outputs in 2D and averages their supervised losses; here
    the supervised loss is nnU-Net's. Divergences are of log-probabilities, which stay finite.
    """

    Options = URPCOptions
    options: URPCOptions
    paper = Paper("Luo et al., MICCAI 2021", 2021)
    idea = "predictions at several resolutions agree with their mean where they do not differ much"
    use_when = "as a reference implementation, with one pass and no teacher"
    corrected = "without the untrained lowest resolution; nnU-Net's deep supervision; divergences of log-probabilities"
    passes = (2, 0, 0, 0)
    terms = dict(supervised=STUDENT, consistency=STUDENT)
    switched_off = "consistency_weight=0"
    min_resolutions = 2

    def needs_unlabeled(self):
        return self.options.consistency_weight > 0

    def student_losses(self, image):
        outputs = self.outputs(self.student, image)
        log_p = torch.stack([self.log_probabilities(outputs[s], image.shape[2:]) for s in self.trained_resolutions])
        yield {"consistency": Term(pyramid_consistency(log_p), self.options.consistency_weight * self.ramp())}

    def log_probabilities(self, logits: torch.Tensor, size) -> torch.Tensor:
        """(B, C, *) of labels, or (B, 2 R, *) of regions and of what is outside them, at a size."""
        logits = F.interpolate(logits.float(), size, mode="bilinear" if len(size) == 2 else "trilinear")
        if self.labels.has_regions:
            return torch.cat((F.logsigmoid(logits), F.logsigmoid(-logits)), 1)
        return logits.log_softmax(1)


def pyramid_consistency(log_p: torch.Tensor) -> torch.Tensor:
    """The consistency of (S, B, C, *) log-probabilities of S resolutions with their mean."""
    log_mean = log_p.logsumexp(0) - torch.tensor(float(len(log_p))).log()
    mean = log_mean.exp()
    divergence = (mean * (log_mean - log_p)).sum(2, keepdim=True)
    certainty = (-divergence).exp()
    axes = tuple(range(1, log_p.ndim))
    squares = (log_p.exp() - mean).square().mean(2, keepdim=True)
    # 1e-8: where no voxel is certain, the squares do not count.
    rectified = (squares * certainty).mean(axes) / (certainty.mean(axes) + 1e-8)
    return (rectified + divergence.mean(axes)).mean()
