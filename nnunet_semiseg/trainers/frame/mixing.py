"""What the student sees of an unlabeled patch: exact turns of it, with boxes from other patches, targets alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from nnunet_semiseg.losses.mixing import beta_side, random_cuboid
from nnunet_semiseg.networks.features import Outputs, full_resolution
from nnunet_semiseg.trainers.frame.hooks import Voxels
from nnunet_semiseg.trainers.frame.part import Part

# A box's share of the patch is drawn from Beta(4, 4).
BETA = 4.0


class Mixing(Part):
    """Mixin: one box and one turn for each step; nothing is interpolated, so targets stay exact."""

    def perturbed(self, own: Voxels, labeled: Voxels) -> Voxels:
        """The student's view of unlabeled patches and of all that belongs to their voxels, by the frame's options.

        Args:
            own: ``image`` (B, C, *), and the targets, weights and masks of the same voxels, each (B, any, *).
            labeled: The same of the labeled batch; what it lacks is 0.

        Returns:
            As ``own``; unchanged without ``mixing`` and ``turns``.
        """
        if self.options.turns:
            turn = self._draw_turn(own["image"].shape[2:])
            own = {name: turn(x) for name, x in own.items()}
        if self.options.mixing == "none":
            return own
        box = self.cuboid(own["image"])
        if self.options.mixing == "copypaste":
            return self.copy_paste(box, own, labeled, self.global_step % 2)
        with self.random_stream:
            partner = self._draw_partners(len(own["image"]), len(labeled.get("image", ()))).to(self.device)
        return {
            name: torch.where(box, torch.cat((mine, _like(mine, labeled.get(name))))[partner], mine)
            for name, mine in own.items()
        }

    @staticmethod
    def copy_paste(box: torch.Tensor, own: Voxels, labeled: Voxels, direction: int) -> Voxels:
        """Unlabeled patches pasted into labeled ones (direction 0: they are inside the box), or the reverse (1)."""
        real = box if direction else ~box
        return {name: torch.where(real, _like(mine, labeled.get(name)), mine) for name, mine in own.items()}

    def cuboid(self, image: torch.Tensor) -> torch.Tensor:
        """The box of this step, (1, 1, *) bool, True inside."""
        shape = image.shape[2:]
        with self.random_stream:
            return random_cuboid(shape, self.options.box or beta_side(len(shape), BETA)).to(self.device)

    def labeled_voxels(self, data: torch.Tensor, target: Outputs) -> Voxels:
        """A labeled batch as ``perturbed`` takes it; empty if nothing of it is used."""
        if self.options.mixing in ("none", "unlabeled"):
            return {}
        return {"image": data, **self.targets_of_labels(*self.labels.without_ignored(full_resolution(target)))}

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

    def _draw_turn(self, shape: Sequence[int]) -> Callable[[torch.Tensor], torch.Tensor]:
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
            return torch.rot90(x, quarters, [2 + axis for axis in plane]) if quarters and plane else x

        return turn


def _like(mine: torch.Tensor, theirs: torch.Tensor | None) -> torch.Tensor:
    """What belongs to labeled voxels, in the type of what belongs to unlabeled ones; 0 if there is nothing."""
    return torch.zeros_like(mine) if theirs is None else theirs.to(mine.dtype)
