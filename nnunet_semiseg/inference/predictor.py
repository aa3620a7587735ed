"""From the images of a case to its label map."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from nnunet_semiseg.files import CaseError
from nnunet_semiseg.inference import images, machine, openvino_runtime, resampling, sliding_window
from nnunet_semiseg.inference.model import Model, converted, find_checkpoints, read
from nnunet_semiseg.inference.preprocessing import Preprocessed, preprocess, target_spacing


@dataclass(frozen=True)
class Settings:
    """How to predict.

    Args:
        runtime: ``openvino`` or ``torch``.
        precision: ``f32``, or ``bf16`` with OpenVINO.
        device: ``cpu``, or ``cuda`` with torch.
        step: Between windows, as a share of them; nnU-Net's tile_step_size.
        mirroring: Predict each window also mirrored, where the model allows it, as nnU-Net does without --disable_tta.
        threads: None for as many as this process may use.
    """

    runtime: str = "openvino"
    precision: str = "f32"
    device: str = "cpu"
    step: float = 0.5
    mirroring: bool = False
    threads: int | None = None

    def check(self) -> None:
        """Raises ValueError with one line, if they do not go together."""
        if self.runtime == "torch" and self.precision != "f32":
            raise ValueError(f"--precision {self.precision} is for --runtime openvino. Leave it out")
        if self.runtime == "openvino" and self.device != "cpu":
            raise ValueError(f"-device {self.device} is for --runtime torch. Leave it out, or add --runtime torch")
        if not 0 < self.step <= 1:
            raise ValueError(f"-step_size {self.step:g} is not a share of a window. Use more than 0 and at most 1")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"--threads {self.threads} is not a number of threads. Use 1 or more")


def open_model(folder: Path, folds: Sequence[str] | None = None, checkpoint: str = "checkpoint_final.pth") -> Model:
    """A model folder, with all that is known before its networks are loaded.

    Args:
        folds: Such as 0 or all; None for those that nnU-Net would find.

    Raises:
        OSError, ValueError, RuntimeError, NotImplementedError: with one line, if it is no plain nnU-Net model.
    """
    folder = Path(folder)
    plans, dataset_json = read(folder)
    files = find_checkpoints(folder, folds, checkpoint)
    found = openvino_runtime.facts(files[0])
    if found:
        name, axes = found["configuration"], found["mirroring_axes"]
        axes = None if axes is None else tuple(axes)
    else:
        from nnunet_semiseg.inference import torch_runtime

        name, axes = torch_runtime.facts(files[0])
    model = Model(folder, name, plans, dataset_json, files, axes)
    model.check()
    return model


def convert(model: Model) -> None:
    """Write the networks of a model for OpenVINO beside their checkpoints, where they are not there.

    Raises:
        OSError, ValueError, RuntimeError, NotImplementedError: with one line, as when torch is not installed.
    """
    missing = [file for file in model.checkpoints if openvino_runtime.facts(file) is None]
    if not missing:
        return
    openvino_runtime.import_openvino()
    try:
        from nnunet_semiseg.inference import torch_runtime
    except ImportError as error:
        raise NotImplementedError(
            f"{converted(missing[0])} is missing, and making it needs torch and nnunetv2 ({error}). Predict once where "
            "they are installed, and copy the model folder"
        ) from None
    network, weights, _ = torch_runtime.build(replace(model, checkpoints=tuple(missing)))
    window = (1, model.channels, *model.patch_size)
    for file, of_fold in zip(missing, weights):
        network.load_state_dict(of_fold)
        openvino_runtime.convert(file, network, window, model.name, model.mirroring_axes)


class Predictor:
    """Predicts cases with one model, or with several whose probabilities are averaged.

    Folds of one model are averaged as nnU-Net does it, by their logits; models as nnUNetv2_ensemble does it, by their
    probabilities, but before they are brought to the image.

    Args:
        models: With the same plans and configuration.

    Raises:
        OSError, ValueError, RuntimeError, NotImplementedError: with one line, if they do not go together, or cannot be
            run here.
    """

    def __init__(self, models: Sequence[Model], settings: Settings) -> None:
        settings.check()
        self.model = models[0]
        self.settings = settings
        for other in models[1:]:
            self._check_same(other)
        threads = settings.threads or machine.threads()
        self._logits: list[Callable[[np.ndarray], np.ndarray]]
        if settings.runtime == "torch":
            from nnunet_semiseg.inference.torch_runtime import Torch

            self._logits = [
                Torch(model, settings.device, threads, settings.step, settings.mirroring).logits for model in models
            ]
        else:
            for model in models:
                convert(model)
            runtime = openvino_runtime.OpenVINO(settings.precision, threads)
            self._logits = [
                _WithOpenVINO(model, [runtime.network(file) for file in model.checkpoints], settings).logits
                for model in models
            ]

    def _check_same(self, other: Model) -> None:
        first = self.model
        if other.name != first.name:
            raise ValueError(
                f"{other.folder} is of configuration {other.name}, but {first.folder} of {first.name}. Predict them "
                "each, and average with nnUNetv2_ensemble"
            )
        keys = ("image_reader_writer", "transpose_forward", "foreground_intensity_properties_per_channel")
        different = [key for key in keys if other.plans.get(key) != first.plans.get(key)]
        own = {**other.configuration, "batch_size": None}
        different += [key for key in own if own[key] != {**first.configuration, "batch_size": None}.get(key)]
        # Networks may differ: they see the same.
        different = [key for key in different if key not in ("architecture", "inherits_from", "data_identifier")]
        if different:
            raise ValueError(
                f"{other.folder} has other plans than {first.folder}: they differ in {different[0]}. Predict them "
                "each, and average with nnUNetv2_ensemble"
            )
        if other.dataset_json["labels"] != first.dataset_json["labels"] or other.regions != first.regions:
            raise ValueError(f"{other.folder} has other labels than {first.folder}. Predict them each")

    def predict(self, case: str, files: Sequence[Path], output: Path) -> None:
        """Predict a case and write its label map.

        Args:
            files: One for each channel.

        Raises:
            CaseError: naming the case or file, what is wrong, and the cure.
            OSError: naming the file that could not be written.
        """
        model = self.model
        reader = model.plans["image_reader_writer"]
        images.check_channels(case, files, model.channels, model.file_ending)
        header = images.shape_of(files, reader)
        if header:
            self._check_memory(case, *header)
        image = images.read(files, reader, model.channels)
        if not header:
            self._check_memory(case, image.data.shape[1:], image.spacing)
        try:
            labels = self.labels(image.data, image.spacing)
        except ValueError as error:
            raise CaseError(f"Case {case}: {error}") from None
        images.write(output, labels, image)

    def labels(self, data: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
        """The label map of an image.

        Args:
            data: (C, Z, Y, X) float32 as a reader gave it; it is overwritten.
            spacing: In mm, (Z, Y, X).

        Returns:
            (Z, Y, X), uint8 or uint16.
        """
        case = preprocess(data, spacing, self.model)
        del data
        return self.labels_of(self.values(case.data), case)

    def values(self, data: np.ndarray) -> np.ndarray:
        """(K, Z, Y, X) logits of preprocessed data in half precision; of several models, their mean probabilities."""
        if len(self._logits) == 1:
            return self._logits[0](data)
        total = np.zeros((self.model.outputs, *data.shape[1:]), dtype=np.float32)
        for logits in self._logits:
            # In place of the logits: one copy in single precision.
            total += probabilities(logits(data), self.model.regions is not None)
        total /= len(self._logits)
        return total

    def labels_of(self, values: np.ndarray, case: Preprocessed) -> np.ndarray:
        """The label map (Z, Y, X) of what ``values`` gave of a case."""
        threshold = resampling.REGION_LOGIT if values.dtype == np.float16 else 0.5
        regions = self.model.regions
        labels = resampling.labels(
            values,
            case.cropped,
            self.model.resampling("probabilities"),
            case.target,
            case.spacing,
            regions,
            threshold,
        )
        whole = np.zeros(case.full, dtype=labels.dtype)
        whole[case.box] = labels
        return whole.transpose(self.model.plans["transpose_backward"])

    def _check_memory(self, case: str, shape: Sequence[int], spacing: Sequence[float]) -> None:
        """Raises CaseError with the numbers, if a case does not fit."""
        needed, free = self.memory(shape, spacing), machine.free_memory()
        if needed > free:
            raise CaseError(
                f"Case {case} of {' x '.join(map(str, shape))} voxels needs about {needed / 1e9:.1f} GB of memory, and "
                f"{free / 1e9:.1f} GB are free. Crop it, or predict it on a larger machine"
            )

    def memory(self, shape: Sequence[int], spacing: Sequence[float]) -> float:
        """Bytes that a case of (Z, Y, X) voxels may take beyond what this process has, without its network."""
        model = self.model
        order = model.plans["transpose_forward"]
        shape, spacing = [shape[axis] for axis in order], [spacing[axis] for axis in order]
        voxels = float(np.prod(shape))
        low = float(np.prod(resampling.new_shape(shape, spacing, target_spacing(model, spacing))))
        reading = voxels * (4 * 2 * model.channels + 2)
        # Of one channel, a padded copy and, in double precision, the coefficients of its splines.
        preparing = voxels * (4 * model.channels + 1.4 * (4 + 8)) + low * 4 * model.channels
        members = 6 if len(self._logits) > 1 else 0
        predicting = low * (4 * model.channels + (2 + members) * model.outputs + 6)
        labeling = low * ((2 + members) * model.outputs + 12) + voxels * 2
        return max(reading, preparing, predicting, labeling)


@dataclass(frozen=True)
class _WithOpenVINO:
    model: Model
    networks: list[openvino_runtime.Network]
    settings: Settings

    def logits(self, data: np.ndarray) -> np.ndarray:
        """(K, Z, Y, X) float16, the mean over the folds."""
        axes = self.model.mirroring_axes if self.settings.mirroring else None
        return sliding_window.mean(
            sliding_window.logits(data, network, self.model.outputs, self.model.patch_size, self.settings.step, axes)
            for network in self.networks
        )


def probabilities(logits: np.ndarray, regions: bool) -> np.ndarray:
    """(K, ...) logits to probabilities in single precision: of regions each on its own, of classes together 1."""
    values = logits.astype(np.float32)
    if regions:
        # tanh does not overflow.
        values /= 2
        np.tanh(values, out=values)
        values += 1
        values /= 2
        return values
    values -= values.max(0)
    np.exp(values, out=values)
    values /= values.sum(0)
    return values
