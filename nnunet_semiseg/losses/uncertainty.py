"""Where a prediction can be trusted: the mask makers that CoraNet compares (Table VI).

All take what a network said and return a (B, 1, *) bool mask that is True in the certain region.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def agreement(conservative: torch.Tensor, radical: torch.Tensor) -> torch.Tensor:
    """Certain where both heads decide alike in every binary problem (CoraNet, Eqs. 5 and 6).

    Args:
        conservative, radical: (B, K, *) logits; a problem's foreground is logit > 0.
    """
    return ~((conservative > 0) ^ (radical > 0)).any(1, keepdim=True)


def small_deviation(deviation: torch.Tensor, threshold: float) -> torch.Tensor:
    """Certain where the predicted standard deviation of every logit is below a threshold (aleatoric uncertainty).

    Args:
        deviation: (B, K, *), positive.
    """
    return (deviation < threshold).all(1, keepdim=True)


def heteroscedastic_bce(
    mean: torch.Tensor, deviation: torch.Tensor, foreground: torch.Tensor, valid: torch.Tensor, noise: torch.Tensor
) -> torch.Tensor:
    """Binary cross-entropy of the mean probability of logits drawn from N(mean, deviation^2) (Kendall and Gal 2017).

    Args:
        mean, deviation: (B, K, *) of the two branches; deviation positive.
        foreground: (B, K, *) float in {0, 1}.
        valid: (B, 1, *) bool, the voxels that count.
        noise: (T, B, K, *) standard normal draws.

    Returns:
        A scalar, mean over valid voxels and K; 0 with a graph if none is valid.
    """
    logits = mean.float() + deviation.float() * noise
    # log of the mean over T of sigmoid(+-logit), stable for large logits.
    log_count = torch.log(torch.tensor(float(len(noise)), device=noise.device))
    log_foreground = torch.logsumexp(F.logsigmoid(logits), 0) - log_count
    log_background = torch.logsumexp(F.logsigmoid(-logits), 0) - log_count
    loss = -(foreground * log_foreground + (1 - foreground) * log_background)
    weight = valid.float().expand_as(loss)
    return (loss * weight).sum() / weight.sum().clamp(min=1.0)


def above_percentile(uncertainty: torch.Tensor, percentile: float, valid: torch.Tensor | None = None) -> torch.Tensor:
    """The uncertain region: voxels above a percentile of their own sample (Zhou et al. 2025, Eq. 4).

    With n voxels and no ties these are the n - ceil(percentile / 100 n) most uncertain ones; voxels that tie with the
    percentile are not among them, so a constant map has no uncertain region.

    Args:
        uncertainty: (B, 1, *), float32.
        percentile: In [0, 100]; 0 calls everything above the minimum uncertain.
        valid: (B, 1, *) bool, the voxels that the percentile is taken over; others are never uncertain.

    Returns:
        (B, 1, *) bool.
    """
    result = torch.zeros_like(uncertainty, dtype=torch.bool)
    for b, values in enumerate(uncertainty):
        chosen = values.flatten() if valid is None else values[valid[b]]
        if chosen.numel():
            # torch.quantile refuses more than 2^24 voxels.
            rank = max(1, math.ceil(percentile / 100 * chosen.numel()))
            result[b] = values > chosen.kthvalue(rank).values
    return result if valid is None else result & valid
