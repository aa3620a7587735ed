"""Time of the signed distances of one patch, all measured in one run.

    python scripts/benchmark_signed_distance.py [--size 128] [--classes 13] [--max-distance 20 40 64] [--repeats 5]

The patch is a cube of ellipsoids at random places. The straightforward way is scipy's transform of the full volume,
twice per class. The ways take turns, and medians are compared, so that a change in the machine's load falls on all of
them. Their results are compared, too.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
from scipy.ndimage import distance_transform_edt

from nnunet_semiseg.data.signed_distance import BACKEND, signed_distance


def organs(size, classes, seed=0):
    """(size, size, size) labels: ellipsoids with half axes of 6 to 20 % of the patch, the later before the earlier."""
    random = np.random.RandomState(seed)
    x = np.stack(np.meshgrid(*[np.arange(size)] * 3, indexing="ij"), axis=-1)
    labels = np.zeros((size,) * 3, dtype=np.int16)
    for label in range(1, classes + 1):
        rotation = np.linalg.qr(random.normal(size=(3, 3)))[0]
        center, half_axes = random.uniform(0.1, 0.9, 3) * size, random.uniform(0.06, 0.2, 3) * size
        labels[((((x - center) @ rotation) / half_axes) ** 2).sum(-1) < 1] = label
    return labels


def straightforward(masks, spacing, max_distance):
    result = np.empty(masks.shape, dtype=np.float32)
    for mask, phi in zip(masks, result):
        outside = distance_transform_edt(~mask, sampling=spacing)
        inside = distance_transform_edt(mask, sampling=spacing)
        distance = np.where(mask, min(spacing) / 2 - inside, outside - min(spacing) / 2)
        phi[:] = np.clip(distance / max_distance, -1, 1)
    return result


def timed(function, *arguments):
    begin = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - begin, result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=128, help="voxels along each side of the patch")
    parser.add_argument("--classes", type=int, default=13)
    parser.add_argument("--max-distance", type=float, nargs="+", default=[20.0, 40.0, 64.0], help="in voxels")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()

    labels = organs(args.size, args.classes)
    masks = labels == np.arange(1, args.classes + 1).reshape(-1, 1, 1, 1)
    present = int(masks.any((1, 2, 3)).sum())
    spacing = (1.0, 1.0, 1.0)
    ways = {"straightforward, scipy": straightforward}
    for backend in ("scipy", "edt") if BACKEND == "edt" else ("scipy",):
        ways[f"signed_distance, {backend}"] = lambda *a, backend=backend: signed_distance(*a, backend=backend)

    print(f"{args.size}^3 voxels, {present} classes of which {100 * masks.any(0).mean():.0f} % of the patch is made\n")
    print("| max_distance | way | median, s | straightforward / this | largest difference |\n|---|---|---|---|---|")
    for max_distance in args.max_distance:
        times = {name: [] for name in ways}
        differences = dict.fromkeys(ways, 0.0)
        for _ in range(args.repeats):
            expected = None
            for name, way in ways.items():
                elapsed, result = timed(way, masks, spacing, max_distance)
                times[name].append(elapsed)
                expected = result if expected is None else expected
                differences[name] = float(np.abs(result - expected).max())
        median = {name: statistics.median(values) for name, values in times.items()}
        for name, value in median.items():
            ratio = median["straightforward, scipy"] / value
            print(f"| {max_distance:g} | {name} | {value:.3f} | {ratio:.1f} | {differences[name]:.0e} |")


if __name__ == "__main__":
    main()
