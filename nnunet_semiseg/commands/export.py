"""``nnunet_semiseg export``: a trained model as a plain nnU-Net model folder."""

from __future__ import annotations

import argparse
import os
import shutil
import zipfile
from pathlib import Path

from nnunet_semiseg import checkpoints

_FILES = ("plans.json", "dataset.json", "dataset_fingerprint.json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-i", required=True, help="model folder: <nnUNet_results>/<Dataset>/<Trainer>__<Plans>__<Config>"
    )
    parser.add_argument("-o", required=True, help="folder to write; with --zip, the archive")
    parser.add_argument("-chk", default="checkpoint_final.pth", help="checkpoint (default %(default)s)")
    parser.add_argument("--zip", action="store_true", help="write a zip for nnUNetv2_install_pretrained_model_from_zip")


def run(args: argparse.Namespace) -> None:
    source, target = Path(args.i), Path(args.o)
    if args.zip and target.suffix != ".zip":
        target = target.with_name(target.name + ".zip")
    if target.exists():
        raise FileExistsError(f"{target} exists. Remove it, or export to another name")
    for name in ("plans.json", "dataset.json"):
        if not (source / name).is_file():
            raise FileNotFoundError(
                f"{source} has no {name}, so it is not a model folder. Give the folder above fold_0"
            )
    folds = sorted(path for path in source.glob("fold_*") if (path / args.chk).is_file())
    if not folds:
        found = sorted({str(p.relative_to(source)) for p in source.glob("fold_*/checkpoint_*.pth")})
        raise FileNotFoundError(
            f"No fold of {source} has {args.chk}. It has {', '.join(found) or 'no checkpoint'}; see -chk"
        )
    # Everything is read before anything is written.
    exported = {fold.name: plain_checkpoint(fold / args.chk) for fold in folds}
    temporary = target.with_name(target.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        for fold, checkpoint in exported.items():
            (temporary / fold).mkdir(parents=True)
            checkpoints.write(checkpoint, temporary / fold / "checkpoint_final.pth")
        for name in _FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, temporary / name)
        if args.zip:
            # Under its own name, so that installing it overwrites no other model.
            inside = "/".join(source.resolve().parts[-2:])
            archive = target.with_name(target.name + ".part")
            with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as zipped:
                for file in sorted(p for p in temporary.rglob("*") if p.is_file()):
                    zipped.write(file, f"{inside}/{file.relative_to(temporary)}")
            os.replace(archive, target)
        else:
            os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"Exported {', '.join(exported)} to {target}")
    if args.zip:
        print(f"Install elsewhere: nnUNetv2_install_pretrained_model_from_zip {target}")
    else:
        print(
            f"Predict anywhere: nnUNetv2_predict_from_modelfolder -i IMAGES -o OUT -m {target}"
            f" -f {' '.join(f.removeprefix('fold_') for f in exported)}"
        )


def plain_checkpoint(file: Path) -> dict:
    """What inference needs of a checkpoint, as one of nnU-Net's own trainer.

    Raises:
        CheckpointError: if the file cannot be read safely or is no checkpoint of nnU-Net.
    """
    checkpoint = checkpoints.read(file)
    try:
        return checkpoints.plain(
            checkpoint["network_weights"],
            checkpoint["inference_allowed_mirroring_axes"],
            checkpoint["init_args"]["configuration"],
        )
    except (KeyError, TypeError):
        raise checkpoints.CheckpointError(f"{file} is not a checkpoint of an nnU-Net trainer") from None
