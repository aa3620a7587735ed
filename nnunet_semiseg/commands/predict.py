"""``nnunet_semiseg predict``: label maps of images, by one or several plain nnU-Net models."""

from __future__ import annotations

import argparse
from pathlib import Path

from nnunet_semiseg.files import read_json, write_json
from nnunet_semiseg.inference import openvino_runtime
from nnunet_semiseg.inference.images import find_cases
from nnunet_semiseg.inference.model import Model, converted, fingerprint
from nnunet_semiseg.inference.predictor import Predictor, Settings, open_model
from nnunet_semiseg.parallel import over_cases, print_failures

# Written beside the label maps: what made them.
SETTINGS = "predict.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-m",
        nargs="+",
        required=True,
        metavar="MODEL",
        help="model folders of nnU-Net with the same plans; the probabilities of several are averaged",
    )
    parser.add_argument("-i", required=True, metavar="IMAGES", help="folder of images CASE_0000, CASE_0001, ...")
    parser.add_argument("-o", required=True, metavar="OUT", help="folder for the label maps")
    parser.add_argument("-f", nargs="+", metavar="FOLD", help="folds of each model (default: all but fold_all)")
    parser.add_argument("-chk", default="checkpoint_final.pth", help="checkpoint (default %(default)s)")
    parser.add_argument(
        "--runtime",
        choices=("openvino", "torch"),
        help="of the network (default: openvino where it is installed and the device is the processor)",
    )
    parser.add_argument(
        "--precision",
        choices=openvino_runtime.PRECISIONS,
        default="f32",
        help="of OpenVINO: bf16 is faster and not exact (default %(default)s)",
    )
    parser.add_argument("-device", choices=("cpu", "cuda"), default="cpu", help="of torch (default %(default)s)")
    parser.add_argument(
        "-step_size", type=float, default=0.5, help="between windows, as a share of them (default %(default)s)"
    )
    parser.add_argument("--mirroring", action="store_true", help="predict each window mirrored, too, as nnU-Net does")
    parser.add_argument("--threads", type=int, help="default: as many as this process or container may use")
    parser.add_argument("--overwrite", action="store_true", help="predict again what is in OUT")


def run(args: argparse.Namespace) -> int:
    use_openvino = args.device == "cpu" and openvino_runtime.available()
    settings = Settings(
        runtime=args.runtime or ("openvino" if use_openvino else "torch"),
        precision=args.precision,
        device=args.device,
        step=args.step_size,
        mirroring=args.mirroring,
        threads=args.threads,
    )
    settings.check()
    models = [open_model(Path(folder), args.f, args.chk) for folder in args.m]
    cases = find_cases(Path(args.i), models[0].file_ending)
    out = Path(args.o)
    made_by = _made_by(models, settings)
    if not args.overwrite:
        _check_output(out, made_by, models[0].file_ending)
    outputs = {case: out / f"{case}{models[0].file_ending}" for case in cases}
    waiting = [case for case in cases if args.overwrite or not _is_done(cases[case], outputs[case])]
    failures: list[str] = []
    if waiting:
        predictor = Predictor(models, settings)
        for case in waiting:
            # Or a call that continues this one would take an old one for new.
            outputs[case].unlink(missing_ok=True)
        write_json(out / "plans.json", models[0].plans)
        write_json(out / "dataset.json", models[0].dataset_json)
        write_json(out / SETTINGS, made_by)
        jobs = {case: (case, cases[case], outputs[case]) for case in waiting}
        _, failures = over_cases(predictor.predict, jobs, 1, "Predicting", done=len(cases) - len(waiting))
    if failures:
        print_failures(
            failures,
            f"{len(failures)} of {len(cases)} cases could not be predicted (above); the others are done. Fix or remove "
            "these and run the command again.",
        )
        return 1
    print(f"{len(cases)} cases are in {out}")
    return 0


def _is_done(files: list[Path], output: Path) -> bool:
    """Whether there is a label map that is newer than the images. It is whole: it appears so."""
    try:
        return output.stat().st_mtime >= max(file.stat().st_mtime for file in files)
    except OSError:
        # A link whose target is gone is reported when it is read.
        return False


def _made_by(models: list[Model], settings: Settings) -> dict:
    """What the label maps depend on."""
    return {
        "models": [[_identity(file) for file in model.checkpoints] for model in models],
        "precision": settings.precision,
        "device": settings.device,
        "step_size": settings.step,
        "mirroring": settings.mirroring,
    }


def _check_output(out: Path, made_by: dict, ending: str) -> None:
    """Raises ValueError if there are label maps in ``out`` that something else made."""
    if not out.is_dir() or not any(out.glob(f"[!.]*{ending}")):
        return
    file = out / SETTINGS
    cure = "Choose another -o, or add --overwrite"
    if not file.is_file():
        raise ValueError(f"{out} has files that end in {ending} but no {file.name}: they were not made here. {cure}")
    before = read_json(file, made_by, cure)
    different = [key.replace("_", " ") for key in made_by if before[key] != made_by[key]]
    if different:
        raise ValueError(f"{out} has label maps made with other {different[0]} ({file.name}). {cure}")


def _identity(checkpoint: Path) -> str:
    """Of a checkpoint, also if only its network for OpenVINO is there."""
    if checkpoint.is_file():
        return fingerprint(checkpoint)
    found = openvino_runtime.facts(checkpoint)
    assert found is not None, converted(checkpoint)
    return found["checkpoint"]
