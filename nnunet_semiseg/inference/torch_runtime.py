"""Networks in torch: nnU-Net's own predictor, on a processor or a GPU."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_semiseg import checkpoints
from nnunet_semiseg.inference.model import Model


def facts(file: Path) -> tuple[str, tuple[int, ...] | None]:
    """Configuration and mirroring axes of a checkpoint.

    Raises:
        FileNotFoundError, CheckpointError: naming the file.
    """
    checkpoint = _read(file)
    axes = checkpoint.get("inference_allowed_mirroring_axes")
    return checkpoint["init_args"]["configuration"], None if axes is None else tuple(int(axis) for axis in axes)


def _read(file: Path) -> dict:
    checkpoint = checkpoints.read(file)
    if not isinstance(checkpoint, dict) or not {"network_weights", "init_args", "trainer_name"} <= set(checkpoint):
        raise checkpoints.CheckpointError(f"{file} is not a checkpoint of an nnU-Net trainer")
    return checkpoint


def build(model: Model) -> tuple[torch.nn.Module, list[dict], str]:
    """The network as the model's trainer builds it, the weights of each fold, and the trainer's name.

    Raises:
        CheckpointError, NotImplementedError: naming the file, if the weights or the trainer are not there.
    """
    found = [_read(file) for file in model.checkpoints]
    name = found[0]["trainer_name"]
    try:
        with redirect_stdout(io.StringIO()):
            trainer = recursive_find_trainer_class_by_name(name)
    except RuntimeError:
        raise NotImplementedError(
            f"{model.checkpoints[0]} was trained by {name}, which is not installed here. Export it as a plain model "
            "with nnunet_semiseg export"
        ) from None
    plans = PlansManager(model.plans)
    configuration = plans.get_configuration(model.name)
    outputs = plans.get_label_manager(model.dataset_json).num_segmentation_heads
    channels = determine_num_input_channels(plans, configuration, model.dataset_json)
    network = trainer.build_network_architecture(plans, configuration, channels, outputs, enable_deep_supervision=False)
    weights = [checkpoint["network_weights"] for checkpoint in found]
    for file, of_fold in zip(model.checkpoints, weights):
        try:
            network.load_state_dict(of_fold)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise checkpoints.CheckpointError(f"{file} does not fit plans.json ({reason})") from None
    network.load_state_dict(weights[0])
    return network.eval(), weights, name


class Torch:
    """nnU-Net's predictor for one model.

    Args:
        device: ``cpu`` or ``cuda``.
        threads: On a processor.
    """

    def __init__(self, model: Model, device: str, threads: int, step: float, mirroring: bool) -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise NotImplementedError("torch finds no GPU here. Use -device cpu")
        torch.set_num_threads(threads)
        network, weights, trainer = build(model)
        plans = PlansManager(model.plans)
        with redirect_stdout(io.StringIO()):
            self._predictor: Any = nnUNetPredictor(
                tile_step_size=step, use_mirroring=mirroring, device=torch.device(device), allow_tqdm=False
            )
            self._predictor.manual_initialization(
                network,
                plans,
                plans.get_configuration(model.name),
                weights,
                model.dataset_json,
                trainer,
                model.mirroring_axes,
            )

    def logits(self, data: np.ndarray) -> np.ndarray:
        """(K, Z, Y, X) float16, the mean over the folds."""
        with redirect_stdout(io.StringIO()):
            return self._predictor.predict_logits_from_preprocessed_data(torch.from_numpy(data)).numpy()
