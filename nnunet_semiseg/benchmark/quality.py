"""The quality of the labels that a training's networks give to the cases whose labels it did not see."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_semiseg import checkpoints
from nnunet_semiseg.benchmark.records import (
    QUALITY,
    QUALITY_COLUMNS,
    RECORD,
    SNAPSHOTS,
    read_quality,
    update_record,
)
from nnunet_semiseg.files import read_json, write_csv
from nnunet_semiseg.labels import LabelAdapter
from nnunet_semiseg.networks.second import second_plans
from nnunet_semiseg.trainers.frame.hooks import TEACHERS
from nnunet_semiseg.trainers.frame.settings import LOG_KEY, PEAK_MEMORY
from nnunet_semiseg.trainers.registry import find_trainer

# Checkpoints of a run whose pseudo labels are scored.
NUM_SNAPSHOTS = 20


class Snapshots:
    """Keeps about NUM_SNAPSHOTS checkpoints, evenly spaced over a run, without the training's help.

    Args:
        fold: The training's folder.
        epochs: Epochs of the whole run.
    """

    def __init__(self, fold: Path, epochs: int):
        self.latest = fold / "checkpoint_latest.pth"
        self.folder = fold / SNAPSHOTS
        self.folder.mkdir(exist_ok=True)
        self.epochs = epochs
        self._seen: tuple[int, int] | None = None

    def _share(self, epoch: int) -> int:
        return epoch * NUM_SNAPSHOTS // self.epochs

    def look(self) -> None:
        """Keep the checkpoint if there is a new one and its turn has come."""
        incoming = self.folder / "incoming.pth"
        incoming.unlink(missing_ok=True)
        try:
            status = self.latest.stat()
            stamp = status.st_ino, status.st_mtime_ns
            if stamp == self._seen:
                return
            try:
                # A checkpoint is never written into, only replaced.
                os.link(self.latest, incoming)
            except FileNotFoundError:
                raise
            except OSError:  # a file system without links
                shutil.copyfile(self.latest, incoming)
        except FileNotFoundError:
            return
        self._seen = stamp
        epoch = checkpoints.read(incoming)["current_epoch"]
        last = max((_epoch(file) for file in self.folder.glob("epoch_*.pth")), default=0)
        if self._share(epoch) > self._share(last):
            os.replace(incoming, self.folder / f"epoch_{epoch:03d}.pth")
        else:
            incoming.unlink()


def _epoch(snapshot: Path) -> int:
    return int(snapshot.stem.removeprefix("epoch_"))


class Scorer:
    """Predicts withheld cases with the networks of a checkpoint.

    Args:
        fold: The training's folder.
        preprocessed: The dataset's folder in nnUNet_preprocessed.
        cases: Cases to predict.
        device: "cpu" or "cuda".
    """

    def __init__(self, fold: Path, preprocessed: Path, cases: list[str], device: str):
        trainer, _, configuration = fold.parent.name.split("__")
        self.trainer, self.configuration, self.device = trainer, configuration, torch.device(device)
        self.plans = read_json(fold.parent / "plans.json")
        self.dataset_json = read_json(fold.parent / "dataset.json")
        manager = PlansManager(self.plans)
        self.labels = LabelAdapter(manager.get_label_manager(self.dataset_json))
        self.class_names = class_names(self.dataset_json)
        folder = str(preprocessed / manager.get_configuration(configuration).data_identifier)
        self.data = infer_dataset_class(folder)(folder, list(cases))

    def networks(self, checkpoint: dict) -> Iterator[tuple[str, dict, dict]]:
        """Yield name, weights and plans of every network in it that segments."""
        state = checkpoint.get(checkpoints.STATE_KEY, {"companions": {}})
        yield "student", state.get("student", checkpoint["network_weights"]), self.plans
        prefixes = {name: f"{name}.module." for name in TEACHERS} | {"second": "second."}
        for name, prefix in prefixes.items():
            companions = state["companions"].items()
            weights = {key.removeprefix(prefix): value for key, value in companions if key.startswith(prefix)}
            if weights:
                architecture = state["options"]["second_network"] if name.startswith("second") else "same"
                yield name, weights, second_plans(self.plans, self.configuration, architecture)

    def dice(self, weights: dict, plans: dict) -> dict[str, float]:
        """{class: mean Dice of the cases}; a case without the class in both label and prediction does not count."""
        manager = PlansManager(plans)
        configuration = manager.get_configuration(self.configuration)
        channels = determine_num_input_channels(manager, configuration, self.dataset_json)
        trainer = find_trainer(self.trainer)
        assert trainer is not None
        network = trainer.build_network_architecture(
            manager, configuration, channels, self.labels.num_outputs, enable_deep_supervision=False
        )
        network.load_state_dict(weights)
        predictor = nnUNetPredictor(
            tile_step_size=1.0,
            use_mirroring=False,
            perform_everything_on_device=self.device.type == "cuda",
            device=self.device,
            allow_tqdm=False,
        )
        predictor.manual_initialization(
            network,
            manager,
            configuration,
            None,
            self.dataset_json,
            self.trainer,
            inference_allowed_mirroring_axes=None,
        )
        dice = []
        for case in self.data.identifiers:
            image, truth, *_ = self.data.load_case(case)
            image, truth = (np.asarray(array[:]) for array in (image, truth))
            logits = predictor.predict_sliding_window_return_logits(torch.from_numpy(image)).cpu()
            predicted, _ = self.labels.one_vs_rest(self.labels.hard(logits[None]))
            dice.append(class_dice(predicted[0].bool().numpy(), truth, self.labels))
        names = [class_name(self.class_names, label) for label in self.labels.foreground_names]
        return dict(zip(names, map(float, np.nanmean(dice, axis=0))))


def class_dice(predicted: np.ndarray, truth: np.ndarray, labels: LabelAdapter) -> list[float]:
    """Dice of each foreground class or region, 2 |A and B| / (|A| + |B|), without ignored voxels.

    Args:
        predicted: (K, Z, Y, X) bool.
        truth: (1, Z, Y, X) label map as nnU-Net preprocesses it (-1: outside the image, background).
        labels: Of the dataset.

    Returns:
        K values; NaN for a class that is neither in the prediction nor in the label map, as in nnU-Net's evaluation.
    """
    valid = np.ones_like(truth, dtype=bool) if labels.ignore_label is None else truth != labels.ignore_label
    result = []
    for label, mask in zip(labels.foreground_names, predicted):
        true, mask = np.isin(truth, label) & valid, mask & valid
        size = true.sum() + mask.sum()
        result.append(2 * (true & mask).sum() / size if size else np.nan)
    return result


def class_names(dataset_json: dict) -> dict[str, str]:
    """{label or region as nnU-Net's summary.json writes it: name}."""
    labels = dataset_json["labels"]
    return {str(tuple(v) if isinstance(v, list) else v): name for name, v in labels.items()}


def class_name(names: dict[str, str], label: object) -> str:
    return names.get(str(label), str(label))


def score(fold: Path, preprocessed: Path, num_cases: int, device: str) -> None:
    """Everything about a finished training that needs its checkpoints: pseudo labels, curves and time.

    Args:
        fold: The training's folder.
        preprocessed: The dataset's folder in nnUNet_preprocessed.
        num_cases: How many of the withheld cases are predicted, at most.
        device: "cpu" or "cuda".
    """
    os.environ["nnUNet_compile"] = "f"
    final = fold / "checkpoint_final.pth"
    log = checkpoints.read(final)["logging"]
    snapshots = {_epoch(file): file for file in sorted((fold / SNAPSHOTS).glob("epoch_*.pth"))}
    hidden = read_json(fold / RECORD, ("split",))["split"]["unlabeled"]
    if (fold / SNAPSHOTS).is_dir() and hidden:
        snapshots[len(log["mean_fg_dice"])] = final
        number = min(num_cases, len(hidden))
        cases = [hidden[i] for i in np.linspace(0, len(hidden) - 1, number).round().astype(int)]
        scorer = Scorer(fold, preprocessed, cases, device)
        rows = read_quality(fold)
        for epoch, file in snapshots.items():
            if epoch not in {row[0] for row in rows}:
                for name, weights, plans in scorer.networks(checkpoints.read(file)):
                    rows += [(epoch, name, *pair) for pair in scorer.dice(weights, plans).items()]
                write_csv(fold / QUALITY, QUALITY_COLUMNS, rows)
            if file != final:
                file.unlink()
    shutil.rmtree(fold / SNAPSHOTS, ignore_errors=True)
    # The logger is part of the checkpoint, so that an epoch counts once, however often the run was stopped.
    seconds = sum(end - start for start, end in zip(log["epoch_start_timestamps"], log["epoch_end_timestamps"]))
    curve = [float(dice) for dice in log["mean_fg_dice"]]
    memory = log.get(LOG_KEY + PEAK_MEMORY)
    peak = {"peak_gpu_gib": float(np.nanmax(memory))} if memory else {}
    update_record(fold, training_minutes=float(seconds) / 60, validation_dice=curve, **peak)
