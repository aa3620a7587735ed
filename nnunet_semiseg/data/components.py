"""Connected components of pseudo labels."""

from __future__ import annotations

from itertools import product
from typing import Literal

import cc3d
import numpy as np
import torch

from nnunet_semiseg.labels import LabelAdapter


def keep_largest_components(hard: torch.Tensor, labels: LabelAdapter) -> torch.Tensor:
    """The largest connected component of each class or region in each sample; the rest becomes background.

    Neighbors share a face, an edge or a corner. Of components of the same size the first stays. A region that lies in
    others by its label values (a core in a whole tumor) is first cut to what is kept of these.

    Args:
        hard: A hard prediction: (B, 1, *) integer labels or (B, R, *) bool.

    Returns:
        The same shape, type and device.
    """
    # A copy whose channels can be written to in place, whatever the layout of the input.
    array = np.array(hard.cpu(), np.uint8 if labels.has_regions else np.uint16, order="C")
    connectivity: Literal[8, 26] = 8 if array.ndim == 4 else 26
    parents = labels.parents if labels.has_regions else [[]]
    # Outer regions first.
    for sample, k in product(array, sorted(range(len(parents)), key=lambda k: len(parents[k]))):
        channel = sample[k]
        for parent in parents[k]:
            channel *= sample[parent]
        # Touching components of different labels are told apart, so one pass does for all classes.
        components, count = cc3d.connected_components(channel, connectivity=connectivity, return_N=True)
        size = np.bincount(components.ravel(), minlength=count + 1)
        label = np.zeros(count + 1, channel.dtype)
        label[components] = channel
        keep = np.zeros(count + 1, bool)
        for present in np.unique(label[1:]):
            of_label = 1 + np.flatnonzero(label[1:] == present)
            keep[of_label[np.argmax(size[of_label])]] = True
        channel *= keep[components]
    return torch.from_numpy(array).to(hard.device, hard.dtype)
