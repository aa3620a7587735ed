"""The parts of demo.sh that are not commands of nnU-Net: simulated data, held-out cases, table and picture.

python scripts/demo.py {simulate | split | heldout | table | picture} ...
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np

from nnunet_semiseg.data.splits import read_splits
from nnunet_semiseg.files import read_json

LABELED, UNLABELED, VALIDATION, HELD_OUT = 2, 22, 2, 6


def simulate(folder: str) -> None:
    """Write a dataset of subjects that are all one average brain, deformed, recolored, shaded and noisy.

    The brain is the MNI152 T1 template that comes inside the nilearn package; gray and white matter are its tissue
    maps. Nothing here was measured in a person.
    """
    import nibabel
    from nilearn.datasets import load_mni152_gm_template, load_mni152_template, load_mni152_wm_template
    from scipy.ndimage import gaussian_filter, map_coordinates

    resolution = 3
    images = [
        load(resolution=resolution) for load in (load_mni152_template, load_mni152_gm_template, load_mni152_wm_template)
    ]
    brain, gray, white = (np.asarray(image.dataobj, dtype=np.float32) for image in images)
    brain /= np.percentile(brain[brain > 0], 99)
    shape = brain.shape
    folder = Path(folder)
    temporary = folder.with_name(folder.name + ".tmp")
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij")).astype(np.float32)

    def smooth_field(random, sd, size):
        field = gaussian_filter(random.normal(size=shape).astype(np.float32), size)
        return field / field.std() * sd

    names = [("imagesTr", "labelsTr", "subject")] * (LABELED + UNLABELED + VALIDATION)
    names += [("imagesTs", "labelsTs", "heldout")] * HELD_OUT
    for number, (image_folder, label_folder, name) in enumerate(names):
        random = np.random.RandomState(number)
        where = grid + np.stack([smooth_field(random, 2.0, 8) for _ in range(3)])
        values, g, w = (map_coordinates(v, where, order=1) for v in (brain, gray, white))
        labels = np.where(np.maximum(g, w) > 0.4, np.where(w > g, 2, 1), 0).astype(np.uint8)
        gamma, gray_shift, white_shift = random.uniform(0.6, 1.6), *random.uniform(-0.15, 0.15, 2)
        image = np.clip(values, 0, None) ** gamma + gray_shift * g + white_shift * w
        image = image * np.exp(smooth_field(random, 0.25, 14)) + random.normal(0, random.uniform(0.03, 0.1), shape)
        case = f"{name}_{number:02d}"
        for kind, data, file in (
            (image_folder, (1000 * image).astype(np.int16), f"{case}_0000.nii.gz"),
            (label_folder, labels, f"{case}.nii.gz"),
        ):
            (temporary / kind).mkdir(parents=True, exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(data, images[0].affine), temporary / kind / file)
    description = {
        "channel_names": {"0": "T1"},
        "labels": {"background": 0, "gray matter": 1, "white matter": 2},
        "numTraining": LABELED + UNLABELED + VALIDATION,
        "file_ending": ".nii.gz",
        "description": "Simulated from one average brain (MNI152 T1 template and tissue maps of nilearn)",
    }
    (temporary / "dataset.json").write_text(json.dumps(description, indent=2))
    os.replace(temporary, folder)


def split(raw: str) -> None:
    """Fold 0 of the simulated subjects hides all labels but a few; fold 1 shows them."""
    cases = sorted(p.name.removesuffix(".nii.gz") for p in (Path(raw) / "labelsTr").iterdir())
    train, val = cases[:-VALIDATION], cases[-VALIDATION:]
    folds = [
        {"train": train[:LABELED], "val": val, "unlabeled": train[LABELED:]},
        {"train": train, "val": val, "unlabeled": []},
    ]
    file = Path(os.environ["nnUNet_preprocessed"]) / Path(raw).name / "splits_final.json"
    file.write_text(json.dumps(folds, indent=1))


def heldout(raw: str, target: str) -> None:
    """Link the cases to score into ``target``, imagesTs with labels or those of fold 0, and print the fold to train."""
    raw, target = Path(raw), Path(target)
    ending = read_json(raw / "dataset.json")["file_ending"]
    if (raw / "labelsTs").is_dir():
        fold, kind = "all" if (raw / "imagesUn").is_dir() else "0", "Ts"
        cases = [p.name[: -len(ending)] for p in sorted((raw / "labelsTs").glob("*" + ending))]
    else:
        from batchgenerators.utilities.file_and_folder_operations import save_json
        from nnunetv2.utilities.crossval_split import generate_crossval_split

        fold, kind = "0", "Tr"
        file = Path(os.environ["nnUNet_preprocessed"]) / raw.name / "splits_final.json"
        if not file.is_file():
            every = sorted(p.name[: -len(ending)] for p in (raw / "labelsTr").glob("*" + ending))
            save_json(generate_crossval_split(every), str(file))
        cases = read_splits(file)[0]["val"]
    for name in ("images", "labels"):
        (target / name).mkdir(parents=True, exist_ok=True)
    for case in cases:
        files = [(p, target / "images" / p.name) for p in (raw / f"images{kind}").glob(f"{case}_????{ending}")]
        files.append((raw / f"labels{kind}" / f"{case}{ending}", target / "labels" / f"{case}{ending}"))
        for source, link in files:
            if not link.exists():
                link.symlink_to(source.resolve())
    print(fold)


def table(*predicted: str) -> None:
    """Print Dice per class of each ``NAME=FOLDER``."""
    folders = dict(argument.split("=", 1) for argument in predicted)
    summaries = {name: read_json(Path(folder) / "summary.json") for name, folder in folders.items()}
    labels = read_json(Path(next(iter(folders.values()))) / "dataset.json")["labels"]
    names = {str(tuple(v) if isinstance(v, list) else v): k for k, v in labels.items()}
    rows = {
        names.get(k, k): [s["mean"][k]["Dice"] for s in summaries.values()]
        for k in next(iter(summaries.values()))["mean"]
    }
    rows["mean"] = [s["foreground_mean"]["Dice"] for s in summaries.values()]
    width = max(map(len, rows))
    print(" " * width, *summaries, sep="  ")
    for row, values in rows.items():
        print(f"{row:{width}}", *(f"{value:{len(name)}.3f}" for name, value in zip(summaries, values)), sep="  ")


def uncertain_slice(model, image_files: list[str], slice_index: int) -> np.ndarray:
    """Where CoraNet's two heads disagree in one slice: (Y, X) bool, in the file's grid after nnU-Net's transpose."""
    from skimage.transform import resize

    data, _, properties = model.preprocess(image_files)
    (z0, z1), (y0, y1), (x0, x1) = properties["bbox_used_for_cropping"]
    result = np.zeros(properties["shape_before_cropping"][1:], dtype=bool)
    if z0 <= slice_index < z1:
        # The 2d configuration keeps the slices; within them the image may have been resampled.
        uncertain = ~model(data[:, slice_index - z0, None])[-1][0, 0].numpy()
        result[y0:y1, x0:x1] = resize(uncertain.astype(float), (y1 - y0, x1 - x0), order=0) > 0.5
    return result


def picture(held: str, vanilla: str, coranet: str, fold: str, target: str) -> None:
    """One PNG: image, truth, vanilla, CoraNet and the uncertain region, for three held-out cases."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    from mask_quality import TrainedCoraNet

    held, vanilla, coranet, fold = map(Path, (held, vanilla, coranet, fold))
    model = TrainedCoraNet(fold)
    plans = model.plans
    ending = model.dataset_json["file_ending"]
    reader = plans.image_reader_writer_class()
    # Slices of the 2d configuration run along the first axis after nnU-Net's transpose.
    order = [0, *(axis + 1 for axis in plans.transpose_forward)]
    cases = [p.name[: -len(ending)] for p in sorted((held / "labels").glob("*" + ending))][:3]
    titles = ["image", "truth", "vanilla nnU-Net", "CoraNet", "uncertain region"]
    figure, axes = plt.subplots(len(cases), 5, figsize=(15, 3.3 * len(cases)), squeeze=False)
    for row, case in zip(axes, cases):
        files = sorted(str(p) for p in (held / "images").glob(f"{case}_????{ending}"))
        image = reader.read_images(files)[0].transpose(order)[0]
        truth, a, b = (
            reader.read_seg(str(d / f"{case}{ending}"))[0].transpose(order)[0]
            for d in (held / "labels", vanilla, coranet)
        )
        z = int(np.argmax((truth > 0).sum((1, 2))))
        # One color per label, whatever their number.
        colors = plt.get_cmap("tab10")
        for axis, title, labels in zip(row, titles, (None, truth[z], a[z], b[z], uncertain_slice(model, files, z))):
            axis.imshow(image[z], cmap="gray", origin="lower")
            if labels is not None:
                shown = np.zeros((*labels.shape, 4))
                for value in np.unique(labels[labels > 0]):
                    shown[labels == value] = (*colors(3 if title == titles[-1] else int(value) - 1)[:3], 0.55)
                axis.imshow(shown, origin="lower")
            axis.set_title(title)
            axis.set_axis_off()
        row[0].set_title(case)
    figure.tight_layout()
    figure.savefig(target, dpi=80)
    print(f"Picture written to {target}")


if __name__ == "__main__":
    commands = {f.__name__: f for f in (simulate, split, heldout, table, picture)}
    commands[sys.argv[1]](*sys.argv[2:])
