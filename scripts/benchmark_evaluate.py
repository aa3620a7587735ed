"""Time and memory of evaluating one large case, against the straightforward way, measured in one run.

    OMP_NUM_THREADS=1 python scripts/benchmark_evaluate.py [--shape 300 512 512] [--classes 13] [--straightforward 1]

The case has ellipsoids for organs; the prediction has them moved and scaled by some voxels, and a stray component of
each far away. Both ways read the two files. The straightforward one computes every metric on the full volume, with
scipy's distance transforms; it takes minutes for each class, so it does --straightforward of them, and its time is
scaled to all. Making the case and each way run in processes of their own, so that a peak of resident memory is that of
one way, libraries included. CPU seconds do not depend on what else the machine does. Their values are compared, too.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from scipy.ndimage import binary_erosion, correlate, distance_transform_edt

from nnunet_semiseg.evaluation.cases import evaluate_case
from nnunet_semiseg.evaluation.metrics import METRICS, TOLERANCE, Rules, distance_metrics, element_areas, overlap
from nnunet_semiseg.segmentations import Classes

SPACING = (1.5, 0.8, 0.8)


def paint(labels, label, center, half_axes):
    """An axis-parallel ellipsoid, where nothing has been painted yet."""
    box = tuple(slice(max(0, int(c - h)), min(n, int(c + h) + 2)) for c, h, n in zip(center, half_axes, labels.shape))
    part = labels[box]
    x = np.ogrid[box]
    part[(sum(((x - c) / h) ** 2 for x, c, h in zip(x, center, half_axes)) < 1) & (part == 0)] = label


def make_case(folder, shape, classes):
    """Files of truth and prediction."""
    random = np.random.RandomState(0)
    truth, prediction = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
    for label in range(1, classes + 1):
        # From an adrenal gland to a liver; the large ones do not hide the small ones.
        size = np.array(shape) * np.geomspace(0.02, 0.2, classes)[label - 1]
        center = random.uniform(0.2, 0.8, 3) * shape
        paint(truth, label, center, size)
        paint(prediction, label, center + random.normal(0, 1.5, 3), size * random.uniform(0.95, 1.05, 3))
        paint(prediction, label, random.uniform(0.03, 0.97, 3) * shape, (3, 3, 3))
    files = []
    for name, labels in (("truth", truth), ("prediction", prediction)):
        image = sitk.GetImageFromArray(labels)
        image.SetSpacing(SPACING[::-1])
        files.append(folder / f"{name}.nii.gz")
        sitk.WriteImage(image, str(files[-1]))
    share = 100 * np.count_nonzero(truth) / truth.size
    print(f"{' x '.join(map(str, shape))} voxels, {len(np.unique(truth)) - 1} classes, {share:.0f} % of the image.\n")
    return files


def ours(files, classes, folder):
    rules = Rules((TOLERANCE,) * len(classes.names))
    return evaluate_case("case", *files, classes, rules, folder / "case.json", "")["metrics"]


def straightforward(files, classes, folder):
    truth, prediction = (sitk.GetArrayFromImage(sitk.ReadImage(str(file))) for file in files)
    results = {}
    for name, (value,) in zip(classes.names, classes.values):
        masks = [labels == value for labels in (prediction, truth)]
        tp, *counts = (np.count_nonzero(mask) for mask in (masks[0] & masks[1], *masks))
        surfaces = [mask & ~binary_erosion(mask) for mask in masks]
        between = [distance_transform_edt(~other, sampling=SPACING)[own] for own, other in (surfaces, surfaces[::-1])]
        kernel = 2 ** np.arange(8, dtype=np.uint8).reshape(2, 2, 2)
        codes = [correlate(np.pad(mask, 1).view(np.uint8), kernel, mode="constant") for mask in masks]
        borders = [(code > 0) & (code < 255) for code in codes]
        within = total = 0
        for i in (0, 1):
            area = element_areas(SPACING)[codes[i][borders[i]]]
            distance = distance_transform_edt(~borders[1 - i], sampling=SPACING)[borders[i]]
            within, total = within + area[distance <= TOLERANCE].sum(), total + area.sum()
        values = overlap(tp, counts[0] - tp, counts[1] - tp)
        results[name] = {**values, **distance_metrics(*between), "NSD": within / total}
    return results


def apart(function, *arguments):
    """The result of a function in a process of its own. On Linux its peak of memory starts at that of this process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measured(way, *arguments):
    """(CPU seconds, seconds, peak of this process in GB, result)."""
    cpu, begin = time.process_time(), time.perf_counter()
    result = way(*arguments)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return time.process_time() - cpu, time.perf_counter() - begin, peak / 1e9, result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=[300, 512, 512], help="Z Y X (default %(default)s)")
    parser.add_argument("--classes", type=int, default=13)
    parser.add_argument("--straightforward", type=int, default=1, metavar="N", help="classes (default %(default)s)")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        files = apart(make_case, folder, tuple(args.shape), args.classes)
        classes = Classes.from_labels(range(1, args.classes + 1))
        few = Classes(classes.names[: args.straightforward], classes.values[: args.straightforward])
        cpu, seconds, peak, values = apart(measured, ours, files, classes, folder)
        slow_cpu, slow, slow_peak, expected = apart(measured, straightforward, files, few, folder)
    scale = args.classes / args.straightforward
    difference = max(abs(values[name][m] - expected[name][m]) for name in few.names for m in METRICS)
    print("| way | CPU seconds | seconds | peak memory, GB |\n|---|---|---|---|")
    print(f"| nnunet_semiseg evaluate | {cpu:.1f} | {seconds:.1f} | {peak:.2f} |")
    scaled = f"{args.straightforward} of the classes, scaled to {args.classes}"
    print(f"| full volume, scipy ({scaled}) | {slow_cpu * scale:.0f} | {slow * scale:.0f} | {slow_peak:.2f} |")
    ratios = f"Ratio of CPU seconds {slow_cpu * scale / cpu:.0f}, of peak memory {slow_peak / peak:.1f}"
    print(f"\n{ratios}; largest difference of a metric {difference:.0e}.")


if __name__ == "__main__":
    main()
