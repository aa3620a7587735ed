"""Largest difference between our metrics and other libraries', over the cases of two folders.

    python scripts/check_metrics.py GROUND_TRUTH PREDICTION DATASET_JSON [--tolerance 2]

Needs the libraries: pip install "nnunet-semiseg[test]". Each is asked for the metrics that it defines as we do.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import surface_distance
import torch
from medpy.metric import binary as medpy
from monai import metrics as monai
from tqdm import tqdm

from nnunet_semiseg.evaluation.metrics import METRICS, Rules, case_metrics
from nnunet_semiseg.segmentations import Classes, find_files, read_labels


def references(prediction, truth, spacing, tolerance):
    """{library: {metric: value}} of two bool masks of the same shape, neither of which is empty."""
    with warnings.catch_warnings():
        # surface-distance and MONAI call what scipy and torch have renamed.
        warnings.simplefilter("ignore")
        return {
            "MedPy": {
                "Dice": medpy.dc(prediction, truth),
                "Jaccard": medpy.jc(prediction, truth),
                "Precision": medpy.precision(prediction, truth),
                "Recall": medpy.recall(prediction, truth),
                "HD": medpy.hd(prediction, truth, spacing),
                "ASSD": medpy.assd(prediction, truth, spacing),
                "HD95_pooled": medpy.hd95(prediction, truth, spacing),
                "ASD": medpy.asd(prediction, truth, spacing),
            },
            "MONAI": _monai(prediction, truth, spacing, tolerance),
            "SimpleITK": _simpleitk(prediction, truth, spacing),
            "surface-distance": {
                "NSD": surface_distance.compute_surface_dice_at_tolerance(
                    surface_distance.compute_surface_distances(truth, prediction, spacing), tolerance
                )
            },
        }


def _monai(prediction, truth, spacing, tolerance):
    masks = [torch.from_numpy(mask)[None, None] for mask in (prediction, truth)]
    options = dict(include_background=True, spacing=list(spacing))
    confusion = monai.get_confusion_matrix(*(mask.float() for mask in masks))
    names = {"Precision": "precision", "Recall": "recall"}
    values = {
        **{ours: monai.compute_confusion_matrix_metric(name, confusion) for ours, name in names.items()},
        "Dice": monai.compute_dice(*masks),
        "Jaccard": monai.compute_iou(*masks),
        "HD": monai.compute_hausdorff_distance(*masks, **options),
        "HD95": monai.compute_hausdorff_distance(*masks, percentile=95, **options),
        "ASSD": monai.compute_average_surface_distance(*masks, symmetric=True, **options),
        "ASD": monai.compute_average_surface_distance(*masks, **options),
        "NSD": monai.compute_surface_dice(*masks, [tolerance], use_subvoxels=True, **options),
    }
    return {name: float(value) for name, value in values.items()}


def _simpleitk(prediction, truth, spacing):
    """Its distance maps of its contours, the way of its tutorial on evaluating segmentations."""
    images = [sitk.GetImageFromArray(np.pad(mask, 1).astype(np.uint8)) for mask in (prediction, truth)]
    for image in images:
        image.SetSpacing(spacing[::-1])
    overlap = sitk.LabelOverlapMeasuresImageFilter()
    overlap.Execute(*images)
    contours = [sitk.LabelContour(image) for image in images]
    maps = [sitk.SignedMaurerDistanceMap(c, squaredDistance=False, useImageSpacing=True) for c in contours]
    maps, contours = ([sitk.GetArrayFromImage(i) for i in images] for images in (maps, contours))
    directed = [np.abs(maps[1 - i][contours[i] > 0]) for i in (0, 1)]
    both = np.concatenate(directed)
    return {
        "Dice": overlap.GetDiceCoefficient(),
        "Jaccard": overlap.GetJaccardCoefficient(),
        "HD": both.max(),
        "HD95": max(np.percentile(d, 95) for d in directed),
        "ASSD": both.mean(),
        "HD95_pooled": np.percentile(both, 95),
        "ASD": directed[0].mean(),
    }


def difference(value, ours, where):
    """Absolute difference of two numbers; ends with a line about ``where`` if one is none, as max() would lose NaN."""
    if ours is None or not np.isfinite([value, ours]).all():
        sys.exit(f"{where} is {value}, but ours is {ours}")
    return abs(value - ours)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ground_truth", type=Path)
    parser.add_argument("prediction", type=Path)
    parser.add_argument("dataset_json", type=Path)
    parser.add_argument("--tolerance", type=float, default=2.0, help="of NSD in mm (default %(default)s)")
    args = parser.parse_args()

    classes = Classes.from_file(args.dataset_json)
    rules = Rules((args.tolerance,) * len(classes.names))
    truths, predictions = find_files(args.ground_truth), find_files(args.prediction)
    largest, compared = {}, 0
    for case, file in tqdm(predictions.items(), unit="case"):
        if case not in truths:
            sys.exit(f"{file} has no ground truth in {args.ground_truth}. Add it, or remove the prediction")
        (truth, geometry), (prediction, _) = read_labels(truths[case], classes.known), read_labels(file, classes.known)
        spacing = geometry.spacing
        ours = case_metrics(truth, prediction, spacing, classes, rules)
        for name, members in zip(classes.names, classes.membership()):
            if not (ours[name]["n_ref"] and ours[name]["n_pred"]):
                continue
            compared += 1
            for library, values in references(members[prediction], members[truth], spacing, args.tolerance).items():
                for metric, value in values.items():
                    key = metric, library
                    where = f"{file}, {name}: {metric} of {library}"
                    largest[key] = max(largest.get(key, 0.0), difference(value, ours[name][metric], where))
    libraries = sorted({library for _, library in largest})
    print(f"{compared} pairs of masks; largest absolute difference (distances in mm)\n")
    print(f"| metric | {' | '.join(libraries)} |\n{'|---' * (len(libraries) + 1)}|")
    for metric in METRICS:
        cells = [f"{largest[metric, library]:.0e}" if (metric, library) in largest else "" for library in libraries]
        print(f"| {metric} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
