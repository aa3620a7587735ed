"""Where a prediction can be trusted: the mask makers that CoraNet compares (Table VI).

All take what a network said and return a (B, 1, *) bool mask that is True in the certain region.
"""

from __future__ import annotations

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
