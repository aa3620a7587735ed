"""``nnunet_semiseg fork``: a training that starts from a whole trained model, output layers included."""

from __future__ import annotations

import argparse
import io
import os
import shutil
from collections.abc import Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from nnunetv2.run.run_training import get_trainer_from_args
from nnunetv2.utilities.file_path_utilities import get_output_folder
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunet_semiseg import checkpoints
from nnunet_semiseg.data.splits import check_trained_on, read_splits
from nnunet_semiseg.datasets import Dataset, dataset_name, read_dataset_json
from nnunet_semiseg.files import read_json, whole
from nnunet_semiseg.networks.ema import unwrap
from nnunet_semiseg.trainers.frame import SemiSupervisedTrainer
from nnunet_semiseg.trainers.frame.second_network import first_fold
from nnunet_semiseg.trainers.registry import find_trainer

Fold = int | Literal["all"]


def _fold(text: str) -> Fold:
    return "all" if text == "all" else int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-d", required=True, help="dataset id or name")
    parser.add_argument("-c", required=True, help="configuration")
    parser.add_argument("-f", required=True, type=_fold, help="fold to train, or all")
    parser.add_argument("-tr", required=True, help="trainer, with its settings")
    parser.add_argument("-p", default="nnUNetPlans", help="plans (default %(default)s)")
    parser.add_argument(
        "--from",
        dest="models",
        required=True,
        nargs="+",
        type=Path,
        metavar="MODEL",
        help="a trained model's checkpoint, or its fold's folder with checkpoint_final.pth; for a trainer with two "
        "networks, one for each",
    )
    parser.epilog = "Then nnUNetv2_train ... --c trains from there."


def run(args: argparse.Namespace) -> None:
    dataset = Dataset(dataset_name(args.d))
    plans = dataset.plans(args.p)
    configuration = plans.get_configuration(args.c)
    # The first one raises an OptionError, the second one finds trainers that are not of this package.
    trainer = find_trainer(args.tr) or recursive_find_trainer_class_by_name(args.tr)
    second = issubclass(trainer, SemiSupervisedTrainer) and trainer.has_second_network()
    if len(args.models) > 1 + second:
        raise ValueError(
            f"{args.tr} trains {'two networks' if second else 'one network'}, so --from takes "
            f"{'two models at most' if second else 'one model'}, not {len(args.models)}"
        )
    folder = Path(get_output_folder(dataset.name, args.tr, plans.plans_name, args.c, args.f))
    there = sorted(file.name for file in folder.glob("checkpoint_*.pth"))
    if there:
        raise FileExistsError(
            f"{folder} has a training already ({', '.join(there)}). Continue it with nnUNetv2_train ... --c, or move "
            "the folder away"
        )
    models = [read_model(path) for path in args.models]
    for model in models:
        check_task(model, dataset, configuration)
        if model.trained_on is None:
            print(f"Not checked: on which cases {model.file} was trained. It must not have seen labels that are hidden")
        cure = "Start from a model that has not seen its label"
        check_trained_on(dataset.splits_file, args.f, model.trained_on or (), model.file, cure)
    is_new = not folder.exists()
    try:
        _write(args, dataset, models, folder / "checkpoint_latest.pth")
    except BaseException:
        if is_new:
            shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):
                folder.parent.rmdir()
        raise
    print(f"Train: nnUNetv2_train {dataset.name} {args.c} {args.f} -tr {args.tr} -p {args.p} --c")


def _write(args: argparse.Namespace, dataset: Dataset, models: Sequence[Model], file: Path) -> None:
    # It is not a run of its own.
    os.environ["nnUNet_wandb_enabled"] = "0"
    # nnU-Net's request to be cited.
    with redirect_stdout(io.StringIO()):
        trainer = get_trainer_from_args(dataset.name, args.c, args.f, args.tr, args.p, device=torch.device("cpu"))
        trainer.initialize()
    networks = [trainer.network, *([trainer._second.module] if len(models) > 1 else [])]
    for model, network in zip(models, networks):
        check_fits(model, unwrap(network))
    trainer.print_to_log_file(f"Starts from {' and '.join(str(model.file) for model in models)}")
    unwrap(trainer.network).load_state_dict(models[0].weights)
    if isinstance(trainer, SemiSupervisedTrainer):
        known = [model.dice for model in models if model.dice]
        trainer.fork(models[1].weights if len(models) > 1 else None, np.min(known, axis=0).tolist() if known else [])
        trainer.trained_on.update(*(model.trained_on or () for model in models))
    # nnU-Net saves the epoch that comes next.
    trainer.current_epoch = -1
    with whole(file) as temporary:
        trainer.save_checkpoint(str(temporary))
        checkpoint = checkpoints.read(temporary)
        # Random numbers as in any training that begins.
        checkpoint.get(checkpoints.STATE_KEY, {})["random"] = []
        checkpoints.write(checkpoint, temporary)


@dataclass(frozen=True)
class Model:
    """A trained network, and what it was trained for.

    Args:
        file: Its checkpoint.
        weights: State dict of the network that predicts.
        trained_on: Cases on whose labels it was trained; None if nobody knows.
        dice: nnU-Net's Dice of each class on validation patches of the last epoch; empty if the file has none.
    """

    file: Path
    weights: dict[str, torch.Tensor]
    configuration: ConfigurationManager
    dataset_json: dict
    trained_on: set[str] | None
    dice: list[float]


def read_model(path: Path) -> Model:
    """Of a checkpoint that nnU-Net, this package or ``nnunet_semiseg export`` has written, or of a fold's folder.

    Raises:
        FileNotFoundError, ValueError, CheckpointError: naming the file, if there is none, or it is no trained model.
    """
    file = path / "checkpoint_final.pth" if path.is_dir() else path
    if path.is_dir() and not file.is_file():
        there = ", ".join(sorted(str(p.relative_to(path)) for p in path.rglob("checkpoint_*.pth")))
        raise FileNotFoundError(
            f"{path} has no checkpoint_final.pth. {f'Give one of its checkpoints: {there}' if there else 'Train first'}"
        )
    checkpoint = checkpoints.read(file)
    try:
        weights, told = checkpoint["network_weights"], checkpoint["init_args"]
        configuration = told["configuration"]
    except (KeyError, TypeError):
        raise checkpoints.CheckpointError(f"{file} is not a checkpoint of an nnU-Net trainer") from None
    # Checkpoints of a second network, and exported ones, have these beside them.
    cure = "Give the checkpoint where it lies in its model folder"
    around = file.resolve().parent
    plans = PlansManager(told.get("plans") or read_json(around.parent / "plans.json", cure=cure))
    dataset_json = told.get("dataset_json") or read_dataset_json(around.parent / "dataset.json")
    dice = checkpoint.get("logging", {}).get("dice_per_class_or_region")
    cases = checkpoint.get(checkpoints.STATE_KEY, {}).get("trained_on")
    if not cases:
        cases = _trained_on(file, plans.dataset_name, told.get("fold", first_fold(around.name)))
    return Model(
        file,
        weights,
        plans.get_configuration(configuration),
        dataset_json,
        None if cases is None else set(cases),
        list(map(float, dice[-1])) if dice else [],
    )


def _trained_on(file: Path, name: str, fold: Fold | None) -> list[str] | None:
    """The cases that nnU-Net's own trainer sees in a fold, by the splits as they are now; None without them."""
    dataset = Dataset(name)
    if fold is None or not dataset.json_file.is_file():
        return None
    splits = read_splits(dataset.splits_file) if dataset.splits_file.is_file() else []
    print(f"{file} does not name the cases that it was trained on: those of fold {fold} of {name} are assumed")
    # A fold that the file lacks is a random part of all cases.
    return splits[fold]["train"] if fold != "all" and fold < len(splits) else dataset.labeled_cases()


def check_task(model: Model, dataset: Dataset, configuration: ConfigurationManager) -> None:
    """Raises ValueError, naming the checkpoint, if a model knows other labels, or has learned from other images."""
    cure = "Start from its features alone: nnUNetv2_train ... -pretrained_weights"
    labels, own = model.dataset_json["labels"], dataset.json["labels"]
    # The order of regions is that of the outputs.
    if labels != own or (any(isinstance(v, list) for v in own.values()) and list(labels) != list(own)):
        raise ValueError(f"{model.file} was trained for the labels {labels}, and {dataset.name} has {own}. {cure}")
    both = model.configuration, configuration
    for what, (others, ours) in (
        ("a spacing of", [np.round(of.spacing, 3).tolist() for of in both]),
        ("the normalization", [of.normalization_schemes for of in both]),
    ):
        if others != ours:
            raise ValueError(
                f"{model.file} was trained with other plans: {what} {others}, here {ours}. Use the same plans "
                "(nnUNetv2_move_plans_between_datasets moves them), or start from its features alone: nnUNetv2_train "
                "... -pretrained_weights"
            )


def check_fits(model: Model, network: nn.Module) -> None:
    """Raises ValueError, naming checkpoint and layer, if the weights are those of another architecture."""
    shapes: dict[str, Any] = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    given: dict[str, Any] = {key: tuple(value.shape) for key, value in model.weights.items()}
    for key in (*shapes, *given):
        if shapes.get(key) != given.get(key):
            raise ValueError(
                f"{model.file} is of another network: {key} is {given.get(key, 'missing')} there, and "
                f"{shapes.get(key, 'missing')} in the one to train. Use the plans, or second_network=, that it was "
                "trained with"
            )
