"""Bidirectional uncertainty-aware region learning (Zhou et al. 2025), to be put onto a host method."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nnunet_semiseg.losses.pseudo_labels import OutputLoss
from nnunet_semiseg.losses.regions import CRL, NONE, URL, RegionLoss
from nnunet_semiseg.losses.uncertainty import above_percentile
from nnunet_semiseg.networks.features import Outputs, full_resolution
from nnunet_semiseg.trainers.frame.part import Part
from nnunet_semiseg.trainers.options import option

# Uncertain voxels, what is favored, alpha, and the voxels that count, as RegionLoss takes them.
Regions = tuple[torch.Tensor, str, float, torch.Tensor]


@dataclass(frozen=True)
class RegionOptions:
    labeled_regions: str = option(
        URL,
        "what labeled data favors: uncertain (url) or certain (crl) voxels",
        choices=(URL, CRL, NONE),
        ablation=True,
    )
    unlabeled_regions: str = option(CRL, "the same of unlabeled data", choices=(CRL, URL, NONE), ablation=True)
    alpha_labeled: float = option(
        0.5, "weight of the region that is not favored, labeled data; 0 removes it", low=0.0, high=1.0
    )
    alpha_unlabeled: float = option(0.5, "the same of unlabeled data", low=0.0, high=1.0)
    percentile_labeled: float = option(95.0, "voxels above it are uncertain, labeled data", low=0.0, high=100.0)
    percentile_unlabeled: float = option(99.0, "voxels above it are uncertain, unlabeled data", low=0.0, high=100.0)
    region_normalized: bool = option(False, "normalize each region's loss by the region's own size", ablation=True)


class RegionLearning(Part):
    """Mixin: the host's segmentation losses on labeled and on pseudo-labeled voxels, weighted by region.

    The uncertain region of a sample is where the entropy of a prediction lies above a percentile of the sample's own
    voxels (Eqs. 3 and 4): the student's own prediction for labels (URL), the teacher's that made them for pseudo
    labels (CRL).

    A host builds ``host_loss`` first and calls ``labeled_loss`` and ``pseudo_loss``; or, if one loss of its own has
    both kinds of voxels, ``labeled_weights`` and ``pseudo_weights``. Table 6 (uncertain pseudo labels removed instead
    of weighted down) is ``alpha_unlabeled=0``.
    """

    host_loss: OutputLoss

    def build_region_loss(self) -> None:
        self.region_loss = RegionLoss(self.host_loss, self.options.region_normalized)

    def labeled_loss(self, outputs: Outputs, hard: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        return self.region_loss(outputs, hard, *self._labeled_regions(outputs, valid))

    def pseudo_loss(
        self, outputs: Outputs, hard: torch.Tensor, valid: torch.Tensor, labeling: torch.Tensor
    ) -> torch.Tensor:
        """``labeling``: the (B, C, *) logits that ``hard`` comes from."""
        return self.region_loss(outputs, hard, *self._unlabeled_regions(labeling, valid))

    def labeled_weights(self, outputs: Outputs, valid: torch.Tensor) -> torch.Tensor:
        """(B, 1, *) weights instead of a loss, for a host that weights labels and pseudo labels in one.

        Their mean over the valid voxels is 1: regions shift weight within labeled data and within unlabeled data, not
        from one to the other.
        """
        return self._mean_one(self.region_loss.weights(*self._labeled_regions(outputs, valid)), valid)

    def pseudo_weights(self, labeling: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        return self._mean_one(self.region_loss.weights(*self._unlabeled_regions(labeling, valid)), valid)

    @staticmethod
    def _mean_one(weights: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        return weights * (valid.sum() / weights.sum().clamp(min=1e-6))

    def _labeled_regions(self, outputs: Outputs, valid: torch.Tensor) -> Regions:
        """Arguments of RegionLoss."""
        entropy = self.labels.entropy(full_resolution(outputs).detach())
        uncertain = above_percentile(entropy, self.options.percentile_labeled, valid)
        return uncertain, self.options.labeled_regions, self.options.alpha_labeled, valid

    def uncertain_labels(self, labeling: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """(B, 1, *) bool: the uncertain region of pseudo labels that come from (B, C, *) logits."""
        uncertain = above_percentile(self.labels.entropy(labeling), self.options.percentile_unlabeled, valid)
        self.monitor("uncertain_voxels", uncertain.sum() / valid.sum().clamp(min=1))
        return uncertain

    def _unlabeled_regions(self, labeling: torch.Tensor, valid: torch.Tensor) -> Regions:
        uncertain = self.uncertain_labels(labeling, valid)
        return uncertain, self.options.unlabeled_regions, self.options.alpha_unlabeled, valid
