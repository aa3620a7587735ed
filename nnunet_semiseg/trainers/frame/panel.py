"""The figure ``progress_semiseg.png``, beside nnU-Net's ``progress.png``."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from nnunet_semiseg.trainers.frame.settings import PEAK_MEMORY


def plot_panel(logged: dict[str, list[float]], file: Path) -> None:
    """One panel each for loss terms, their weights, mask utilization and other monitors, and validation Dice.

    Args:
        logged: Value per epoch by name; names that end in ``_weight`` and ``_val_dice`` get panels of their own.
        file: PNG to write.
    """
    weights = [name for name in logged if name.endswith("_weight")]
    terms = [name for name in ("supervised", *(name[: -len("_weight")] for name in weights)) if name in logged]
    dice = [name for name in logged if name.endswith("_val_dice")]
    rest = [name for name in logged if name not in (*weights, *terms, *dice, "non_finite_steps", PEAK_MEMORY)]
    panels = [
        ("loss term (unweighted)", terms),
        ("weight", weights),
        ("share of voxels", rest),
        ("validation Dice (patches)", dice),
    ]
    panels = [(title, names) for title, names in panels if names]
    figure, axes = plt.subplots(len(panels), 1, figsize=(9, 3 * len(panels)), sharex=True, squeeze=False)
    for axis, (title, names) in zip(axes[:, 0], panels):
        for name in names:
            values = np.asarray(logged[name])
            axis.plot(np.arange(len(values)), values, marker="." if len(values) < 50 else None, label=name)
        axis.set_ylabel(title)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    axes[-1, 0].set_xlabel("epoch")
    figure.savefig(file, dpi=90, bbox_inches="tight")
    plt.close(figure)
