"""Class prototypes in feature space, and uncertain voxels against them (Karimijafarbigloo et al. 2024, Eq. 7)."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


def sample_voxels(labels: torch.Tensor, mask: torch.Tensor, num_classes: int, limit: int) -> torch.Tensor:
    """At most ``limit`` random voxels of each class within a mask.

    Args:
        labels: (B, *) integers.
        mask: (B, *) bool.
        num_classes: Classes are 0 to num_classes - 1.
        limit: Voxels per class.

    Returns:
        (N,) indices into the flattened labels.
    """
    chosen = []
    for k in range(num_classes):
        voxels = (mask & (labels == k)).flatten().nonzero()[:, 0]
        if len(voxels) > limit:
            voxels = voxels[torch.randperm(len(voxels))[:limit].to(voxels.device)]
        chosen.append(voxels)
    return torch.cat(chosen)


def gather_features(features: torch.Tensor, voxels: torch.Tensor) -> torch.Tensor:
    """(B, F, *) features at N flat voxel indices, as (N, F) float32 vectors of length 1."""
    features = features.flatten(2)
    size = features.shape[2]
    return F.normalize(features[voxels // size, :, voxels % size].float(), dim=1)


def class_means(vectors: torch.Tensor, labels: torch.Tensor, num_classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean vector of each class.

    Args:
        vectors: (N, F).
        labels: (N,) integers.

    Returns:
        (num_classes, F) means with a graph, 0 for a class that is absent; (num_classes,) bool, which are present.
    """
    counts = torch.bincount(labels, minlength=num_classes)
    sums = vectors.new_zeros(num_classes, vectors.shape[1]).index_add(0, labels, vectors)
    return sums / counts.clamp(min=1)[:, None], counts > 0


def prototype_contrast(
    vectors: torch.Tensor, labels: torch.Tensor, prototypes: torch.Tensor, present: torch.Tensor
) -> torch.Tensor:
    """- log p(y = label | v), p(y = k | v) = softmax over classes of the negative Euclidean distance to prototype k.

    Args:
        vectors: (N, F).
        labels: (N,) the vectors' own classes.
        prototypes: (K, F).
        present: (K,) bool; absent prototypes are left out of the softmax, and so are vectors of an absent class.

    Returns:
        A scalar, mean over vectors; 0 with a graph if none is left or fewer than two prototypes are present.
    """
    keep = present[labels]
    if present.sum() < 2 or not keep.any():
        return vectors.sum() * 0.0 + prototypes.sum() * 0.0
    vectors = vectors[keep]
    # One prototype after the other, without a tensor of (N, K, F). Not cdist: its gradient at distance 0 is not a
    # number.
    squares = torch.stack([(vectors - prototype).square().sum(1) for prototype in prototypes], 1)
    distances = squares.clamp(min=1e-12).sqrt()
    return F.cross_entropy((-distances).masked_fill(~present, -torch.inf), labels[keep])


def _mean_over_ranks(means: torch.Tensor, present: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean of each class over the ranks that have it, and which classes some rank has."""
    if not dist.is_initialized():
        return means, present
    total = torch.cat((torch.where(present[:, None], means, 0.0), present[:, None].to(means)), 1)
    dist.all_reduce(total)
    return total[:, :-1] / total[:, -1:].clamp(min=1), total[:, -1] > 0


class PrototypeMemory(nn.Module):
    """Moving averages of prototypes, so that a class which a small batch lacks still has one.

    Args:
        num_problems, num_classes, num_features: One (num_classes, num_features) table per problem.
        momentum: 0 keeps nothing: the batch's own prototypes.
    """

    means: torch.Tensor
    known: torch.Tensor

    def __init__(self, num_problems: int, num_classes: int, num_features: int, momentum: float):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("means", torch.zeros(num_problems, num_classes, num_features))
        self.register_buffer("known", torch.zeros(num_problems, num_classes, dtype=torch.bool))

    def forward(self, problem: int, batch: torch.Tensor, present: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The prototypes to use, with the batch's graph, and which are known; remembers them for the next step.

        Args:
            batch: (num_classes, F) prototypes of this batch.
            present: (num_classes,) bool.
        """
        if self.momentum == 0:
            return batch, present
        old, known = self.means[problem].clone(), self.known[problem].clone()

        def mixed(new: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
            new = torch.where(known[:, None], self.momentum * old + (1 - self.momentum) * new, new)
            return torch.where(present[:, None], new, old)

        # Remembered is what all ranks saw, and only numbers: one step that overflows must not spoil all that follow.
        finite = present & batch.detach().isfinite().all(1)
        seen, seen_present = _mean_over_ranks(batch.detach(), finite)
        self.means[problem] = mixed(seen, seen_present)
        self.known[problem] |= seen_present
        return mixed(batch, present), known | present
