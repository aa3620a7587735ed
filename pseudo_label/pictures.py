"""Pictures of the report, as data URIs: charts are SVG, scans are PNG."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter

from nnunet_semiseg.datasets import affine
from nnunet_semiseg.segmentations import Classes, read_labels, read_voxels

ACCEPTED, REJECTED = "#1b7837", "#b35806"
_TAB20 = [to_hex(matplotlib.colormaps["tab20"](i)) for i in range(20)]
COLORS = _TAB20[::2] + _TAB20[1::2]
# Names are shown as they are, "$" included; without a date the same report has the same bytes.
_STYLE: dict[Any, Any] = {"text.parse_math": False, "svg.hashsalt": "report", "font.size": 9}
_STYLE |= {"axes.spines.top": False, "axes.spines.right": False}
BINS = 20


def class_colors(number: int) -> list[str]:
    """The colors of the contours, as in HTML."""
    return [to_hex(COLORS[i % len(COLORS)]) for i in range(number)]


def _uri(figure: Figure, kind: str, dpi: int = 100) -> str:
    content = io.BytesIO()
    metadata = {"Date": None} if kind == "svg+xml" else {}
    figure.savefig(content, format=kind[:3], dpi=dpi, bbox_inches="tight", metadata=metadata)
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"


def _chart(width: float, height: float) -> tuple[Figure, Axes]:
    # No layout engine: what it finds may change from call to call, and "tight" cuts the picture to what is in it.
    figure = Figure(figsize=(width, height))
    return figure, figure.add_subplot()


def histogram(accepted: Sequence[float], rejected: Sequence[float], threshold: float | None) -> str:
    """How many cases have which score; the threshold is a dashed line."""
    with matplotlib.rc_context(_STYLE):
        figure, axis = _chart(5, 2.4)
        low = min([*accepted, *rejected, 0.95 if threshold is None else threshold])
        bins = np.linspace(np.floor(10 * low) / 10, 1, BINS + 1).tolist()
        labels = [f"accepted ({len(accepted)})", f"rejected ({len(rejected)})"]
        axis.hist([accepted, rejected], bins, stacked=True, color=[ACCEPTED, REJECTED], label=labels)
        if threshold is not None:
            axis.axvline(threshold, color="black", linestyle="--", linewidth=1, label=f"threshold {threshold:g}")
        axis.set(xlabel="score", ylabel="cases")
        axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        return _uri(figure, "svg+xml")


def boxes(values: Mapping[str, Sequence[float]], label: str) -> str:
    """A box with its points for each name."""
    with matplotlib.rc_context(_STYLE):
        figure, axis = _chart(max(4, 0.5 * len(values)), 2.4)
        for at, own in enumerate(values.values()):
            axis.boxplot(own, positions=[at], widths=0.6, showfliers=False, medianprops={"color": "black"})
            # Points of the same value are side by side; the seed makes the same picture each time.
            shift = np.random.default_rng(0).uniform(-0.2, 0.2, len(own))
            axis.plot(at + shift, own, ".", color=COLORS[at % len(COLORS)], markersize=4)
        turned: dict[str, Any] = {"rotation": 40, "ha": "right"} if len(values) > 5 else {}
        axis.set_xticks(range(len(values)), list(values), **turned)
        axis.set_ylabel(label)
        return _uri(figure, "svg+xml")


def lines(series: Mapping[str, Sequence[float | None]], ticks: Sequence[str], label: str, mean: bool = False) -> str:
    """A line for each name over the ticks; with ``mean``, the mean of all of them in black."""
    with matplotlib.rc_context(_STYLE):
        figure, axis = _chart(7, 2.6)
        for i, (name, values) in enumerate(series.items()):
            axis.plot(
                [np.nan if value is None else value for value in values],
                marker="o",
                markersize=4,
                linewidth=1,
                color=COLORS[i % len(COLORS)],
                label=name,
            )
        if mean:
            table = np.array([[np.nan if v is None else v for v in values] for values in series.values()])
            axis.plot(table.mean(0), marker="o", color="black", linewidth=2, label="mean")
        axis.set_xticks(range(len(ticks)), ticks)
        axis.set_ylabel(label)
        axis.grid(axis="y", alpha=0.3)
        axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
        return _uri(figure, "svg+xml")


def case_picture(
    image_file: Path,
    labels_file: Path,
    disagreement_file: Path,
    classes: Classes,
    reader: type[BaseReaderWriter] | None = None,
) -> str:
    """Three planes through the middle of the consensus; one for a 2D image.

    Contours are the consensus, a color for each class or region; the more members disagree, the redder.

    Raises:
        CaseError: naming the file that cannot be read.
    """
    labels, geometry = read_labels(labels_file, classes.known, reader)
    image, disagreement = (read_voxels(file, geometry.reader)[0][0] for file in (image_file, disagreement_file))
    spacing = geometry.spacing
    matrix = affine(geometry.properties or {})
    if matrix is not None:
        # Rows to the back and slices to the head, so that every plane has its usual side up.
        turn = ornt_transform(io_orientation(matrix), axcodes2ornt("LPS"))
        image, labels, disagreement = (apply_orientation(array.T, turn).T for array in (image, labels, disagreement))
        spacing = tuple(spacing[::-1][int(axis)] for axis in np.argsort(turn[:, 0]))[::-1]
    if labels.ndim == 2:
        image, labels, disagreement, spacing = image[None], labels[None], disagreement[None], (1.0, *spacing)
    inside = np.argwhere(labels > 0)
    middle = np.median(inside, 0).astype(int) if len(inside) else np.array(labels.shape) // 2
    low, high = np.percentile(image, [1, 99.5])
    masks = [np.isin(labels, values) for values in classes.values]
    planes = [0] if labels.shape[0] == 1 else [0, 1, 2]
    sizes = [np.delete(np.array(labels.shape) * spacing, plane) for plane in planes]
    height = 2.4
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(height * sum(w / h for h, w in sizes) + 0.1, height))
        grid = {"left": 0, "right": 1, "bottom": 0, "top": 1, "wspace": 0.03}
        axes = figure.subplots(1, len(planes), width_ratios=[w / h for h, w in sizes], squeeze=False, gridspec_kw=grid)[
            0
        ]
        for axis, plane in zip(axes, planes):
            at = middle[plane]
            rows, columns = np.delete(spacing, plane)
            # Head up.
            options = {"aspect": rows / columns, "origin": "upper" if plane == 0 else "lower"}
            axis.imshow(image.take(at, plane), cmap="gray", vmin=low, vmax=max(high, low + 1e-6), **options)
            share = disagreement.take(at, plane)
            axis.imshow(
                share, cmap="autumn_r", vmin=0, vmax=1, alpha=np.where(share > 0, 0.3 + 0.5 * share, 0), **options
            )
            for i, mask in enumerate(masks):
                if mask.take(at, plane).any():
                    axis.contour(mask.take(at, plane), [0.5], colors=[COLORS[i % len(COLORS)]], linewidths=1)
            axis.set_axis_off()
        return _uri(figure, "png", dpi=110)
