"""Time and memory of scoring one case, against the straightforward loop over classes, measured in one run.

    python scripts/benchmark_score.py [--shape 300 512 512] [--members 5] [--classes 14] [--repeats 3] [--softmax]

The case is a body of ellipsoids, and each member's label map is that of ellipsoids a little displaced. Both ways form
the majority vote and the scores of all classes and pairs from label maps in memory; theirs are compared, too. Writing
the consensus and the disagreement map, and the whole command on files with reading and writing, are timed beside them.
With --softmax the command also runs on probabilities. The ways take turns, and medians are compared. Peak memory is
that of a process that does nothing but score the case, with everything that it imports (Linux).
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import combinations
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunet_semiseg.segmentations import Classes, Geometry, write_labels, write_map
from pseudo_label.scores import score_labels

SPACING = (0.8, 0.8, 2.0)


def organs(shape, classes, seed):
    """(Z, Y, X) labels: ellipsoids at the same places for every seed, but for a shift and growth of a few voxels."""
    places, member = np.random.RandomState(0), np.random.RandomState(seed)
    labels = np.zeros(shape, dtype=np.uint8)
    for label in range(1, classes + 1):
        center = places.uniform(0.2, 0.8, 3) * shape + member.normal(0, 1.5, 3)
        half_axes = places.uniform(0.06, 0.14, 3) * shape * (1 + member.normal(0, 0.03, 3))
        low = np.maximum((center - half_axes).astype(int), 0)
        box = tuple(slice(a, b) for a, b in zip(low, (center + half_axes).astype(int) + 2))
        grid = np.ogrid[tuple(slice(s.start, min(s.stop, n)) for s, n in zip(box, shape))]
        labels[box][sum(((g - c) / a) ** 2 for g, c, a in zip(grid, center, half_axes)) < 1] = label
    return labels


def straightforward(labels, classes):
    """Votes class by class, then a pass over the volume for each class and each two masks."""
    most = np.zeros(labels[0].shape, dtype=np.uint8)
    consensus = np.zeros(labels[0].shape, dtype=np.uint8)
    for label in range(classes + 1):
        votes = sum((mask == label).astype(np.uint8) for mask in labels)
        consensus[votes > most] = label
        np.maximum(most, votes, out=most)
    disagreement = np.mean([mask != consensus for mask in labels], axis=0, dtype=np.float32)
    dice = np.empty((classes, len(labels)))
    for label in range(1, classes + 1):
        agreed = consensus == label
        masks = [mask == label for mask in labels]
        dice[label - 1] = [2 * (mask & agreed).sum() / (mask.sum() + agreed.sum()) for mask in masks]
        [2 * (a & b).sum() / (a.sum() + b.sum()) for a, b in combinations(masks, 2)]
        disagreement[agreed | np.logical_or.reduce(masks)].mean()
    return dice.mean()


def ours(labels, classes):
    return score_labels(labels, Classes.from_labels(range(classes + 1)), SPACING)[0].score


def timed(function, *arguments):
    """Seconds of processor time, so that other processes on the machine do not count; all of it is on one core."""
    begin = time.process_time()
    result = function(*arguments)
    return time.process_time() - begin, result


def command(folders, out):
    """Seconds, and the peak memory in MB, of ``pseudo_label score`` in a process of its own."""
    code = (
        "import sys; from pseudo_label.cli import main; code = main(sys.argv[1:]);"
        "print(next(line for line in open('/proc/self/status') if 'VmHWM' in line).split()[1]); sys.exit(code)"
    )
    arguments = ["score", "-i", *folders, "-o", out, "--dataset-json", out.parent / "dataset.json", "-np", "1"]
    begin = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    seconds = time.perf_counter() - begin
    if result.returncode:
        sys.exit(result.stderr)
    return seconds, float(result.stdout.split()[-1]) / 1e3


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=[300, 512, 512], help="Z Y X")
    parser.add_argument("--members", type=int, default=5)
    parser.add_argument("--classes", type=int, default=14)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--softmax", action="store_true", help="also on probabilities (several GB of disk, minutes)")
    args = parser.parse_args()

    labels = [organs(args.shape, args.classes, seed) for seed in range(1, args.members + 1)]
    print(f"{' x '.join(map(str, args.shape))} voxels, {args.members} members, {args.classes} classes of which "
          f"{100 * (labels[0] > 0).mean():.0f} % of the volume is made, {os.cpu_count()} cores\n")  # fmt: skip
    ways = {"straightforward": straightforward, "score_labels": ours}
    times, results = {name: [] for name in ways}, {}
    for _ in range(args.repeats):
        for name, way in ways.items():
            seconds, results[name] = timed(way, labels, args.classes)
            times[name].append(seconds)
    median = {name: statistics.median(values) for name, values in times.items()}
    print("| way | median, s | straightforward / this | score |\n|---|---|---|---|")
    for name, value in median.items():
        print(f"| {name} | {value:.2f} | {median['straightforward'] / value:.1f} | {results[name]:.12f} |")

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        names = ", ".join(f'"{label}": {label}' for label in range(1, args.classes + 1))
        (folder / "dataset.json").write_text(f'{{"labels": {{"background": 0, {names}}}}}')
        image = sitk.GetImageFromArray(labels[0])
        image.SetSpacing(SPACING)
        geometry = Geometry.of_image(image)
        disagreement = (labels[0] != labels[1]).astype(np.float32)
        written = [
            timed(write_labels, folder / "a.nii.gz", labels[0], geometry)[0]
            + timed(write_map, folder / "b.nii.gz", disagreement, geometry)[0]
            for _ in range(args.repeats)
        ]
        print(f"\nWriting consensus and disagreement: {statistics.median(written):.2f} s; with score_labels "
              f"{statistics.median(written) + median['score_labels']:.2f} s")  # fmt: skip
        members = [folder / f"member_{m}" for m in range(args.members)]
        for member, mask in zip(members, labels):
            write_labels(member / "case.nii.gz", mask, geometry)
        print("pseudo_label score, with start, reading and writing: {:.1f} s, peak memory {:.0f} MB".format(
            *command(members, folder / "scores")))  # fmt: skip
        if args.softmax:
            for member, mask in zip(members, labels):
                probabilities = np.empty((args.classes + 1, *args.shape), dtype=np.float16)
                for label, channel in enumerate(probabilities):
                    channel[:] = np.where(mask == label, 0.9, 0.1 / args.classes)
                np.savez_compressed(member / "case.npz", probabilities=probabilities)
                del probabilities
            print("The same on probabilities: {:.1f} s, peak memory {:.0f} MB".format(
                *command(members, folder / "softmax")))  # fmt: skip


if __name__ == "__main__":
    main()
