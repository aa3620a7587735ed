"""What the student sees of an unlabeled patch: exact turns of it, with boxes from other patches, targets alike."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from nnunet_semiseg.losses.mixing import beta_side, random_cuboid
from nnunet_semiseg.networks.features import full_resolution
from nnunet_semiseg.trainers.options import option

# A box's share of the patch is drawn from Beta(4, 4).
BETA = 4.0


@dataclass(frozen=True)
class MixingOptions:
    """Options of methods whose targets are mixed and turned together with the image."""

    mixing: str = option(
        "none",
        "where the box in each unlabeled patch comes from: other patches of these kinds",
        choices=("none", "unlabeled", "labeled", "both"),
    )
    box: float = option(
        0.0, "side of the box, as a share of the patch's; 0: drawn, half of the patch on average", low=0.0, high=1.0
    )
    turns: bool = option(False, "mirror and turn the student's patches by right angles, after they were labeled")


class Mixing:
    """Mixin: one box and one turn for each step; nothing is interpolated, so targets stay exact."""

    def perturbed(self, own: tuple, labeled: tuple) -> tuple:
        """The student's view of unlabeled patches and of all that belongs to their voxels.

        Args:
            own: (B, channels, *) images, then targets, weights and masks of the same voxels, each (B, any, *).
            labeled: The same of the labeled batch.

        Returns:
            As ``own``; unchanged without ``mixing`` and ``turns``.
        """
        if self.options.turns:
            turn = self._draw_turn(own[0].shape[2:])
            own = tuple(turn(x) for x in own)
        if self.options.mixing == "none":
            return own
        with self.random_stream:
            shape = own[0].shape[2:]
            inside = random_cuboid(shape, self.options.box or beta_side(len(shape), BETA)).to(self.device)
            partner = self._draw_partners(len(own[0]), len(labeled[0])).to(self.device)
        return tuple(
            torch.where(inside, torch.cat((mine, theirs.to(mine.dtype)))[partner], mine)
            for mine, theirs in zip(own, labeled)
        )

    def _draw_partners(self, unlabeled: int, labeled: int) -> torch.Tensor:
        """For each unlabeled patch the index of another one, or of a labeled one counted on from the unlabeled."""
        own = torch.arange(unlabeled)
        if self.options.mixing == "labeled":
            return unlabeled + torch.randint(labeled, (unlabeled,))
        others = unlabeled - 1 + (labeled if self.options.mixing == "both" else 0)
        if others == 0:
            return own
        # Never itself.
        return (own + 1 + torch.randint(others, (unlabeled,))) % (others + 1)

    def _draw_turn(self, shape):
        """A random element of the group of mirrorings and right angles that the patch allows."""
        axes = list(self.inference_allowed_mirroring_axes or ())
        spacing = list(self.configuration_manager.spacing)[-len(shape) :]
        planes = [
            (a, b)
            for a in range(len(shape))
            for b in range(a + 1, len(shape))
            if {a, b} <= set(axes) and shape[a] == shape[b] and np.isclose(spacing[a], spacing[b])
        ]
        with self.random_stream:
            mirrored = [2 + axis for axis in axes if torch.rand(()) < 0.5]
            plane = planes[int(torch.randint(len(planes), ()))] if planes else None
            quarters = int(torch.randint(4, ())) if planes else 0

        def turn(x: torch.Tensor) -> torch.Tensor:
            x = x.flip(mirrored) if mirrored else x
            return torch.rot90(x, quarters, [2 + axis for axis in plane]) if quarters else x

        return turn

    def labeled_voxels(self, data: torch.Tensor, target) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A labeled batch as ``perturbed`` takes it: images, hard labels, and a mask that is False where ignored."""
        return data, *self.labels.without_ignored(full_resolution(target))
