"""Networks in OpenVINO: several times as fast on a processor, and without torch."""

from __future__ import annotations

import html
import importlib.util
import json
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_semiseg.inference.model import converted, fingerprint

PRECISIONS = ("f32", "bf16")
_KEY = "nnunet_semiseg"


def available() -> bool:
    return importlib.util.find_spec("openvino") is not None


def import_openvino() -> Any:
    """The module, which reports nothing to anybody. Raises NotImplementedError, if it is not installed."""
    if "openvino" not in sys.modules:
        # Importing it reports that to its makers; without this package it does not.
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        import openvino
    except ImportError as error:
        raise NotImplementedError(
            f'OpenVINO cannot be imported ({error}). Install it with pip install "nnunet-semiseg[openvino]", or use '
            "--runtime torch"
        ) from None
    return openvino


def facts(checkpoint: Path) -> dict | None:
    """What a converted network says of itself: configuration, mirroring_axes, checkpoint. None if there is none.

    Raises:
        ValueError: naming the file, if it is of another checkpoint than the one beside it, or is damaged.
    """
    file = converted(checkpoint)
    if not file.is_file():
        return None
    # The end of the file has it; OpenVINO itself would read the weights as well.
    text = file.read_text(encoding="utf-8")
    found = text.rpartition(f'<{_KEY} value="')[2].partition('"')[0]
    try:
        content = json.loads(html.unescape(found))
    except json.JSONDecodeError:
        raise ValueError(f"{file} is no network that was converted here. Remove it and its .bin") from None
    if checkpoint.is_file() and fingerprint(checkpoint) != content["checkpoint"]:
        raise ValueError(f"{file} was converted from another checkpoint than {checkpoint.name}. Remove it and its .bin")
    return content


class OpenVINO:
    """Compiles networks for this processor.

    Args:
        precision: ``f32``, or ``bf16``, twice as fast where the processor has it.
        threads: For one network.
    """

    def __init__(self, precision: str, threads: int) -> None:
        openvino = import_openvino()
        self._core = openvino.Core()
        if precision == "bf16" and "BF16" not in self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise NotImplementedError(
                f"This processor ({self._core.get_property('CPU', 'FULL_DEVICE_NAME').strip()}) has no bfloat16. Use "
                "--precision f32"
            )
        self._settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": precision,
        }

    def network(self, checkpoint: Path) -> Network:
        """Raises ValueError naming the file, if it is damaged."""
        file = converted(checkpoint)
        try:
            return Network(self._core.compile_model(str(file), "CPU", self._settings))
        except RuntimeError as error:
            reason = " ".join(str(error).split())[-300:]
            raise ValueError(f"{file} cannot be used ({reason}). Remove it and its .bin, and convert again") from None


class Network:
    """A compiled network as a function of windows; see ``sliding_window.Network``."""

    def __init__(self, compiled: Any) -> None:
        # While one is running, the result of the other is worked on.
        self._requests = [compiled.create_infer_request() for _ in range(2)]

    def __call__(self, windows: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        running: list[Any] = []
        for i, window in enumerate(windows):
            request = self._requests[i % 2]
            request.start_async({0: window})
            running.append(request)
            if len(running) == 2:
                yield self._result(running.pop(0))
        for request in running:
            yield self._result(request)

    @staticmethod
    def _result(request: Any) -> np.ndarray:
        request.wait()
        return request.get_output_tensor(0).data


def convert(checkpoint: Path, network: Any, window: tuple[int, ...], configuration: str, mirroring_axes: Any) -> None:
    """Write a network beside its checkpoint for OpenVINO.

    Args:
        network: Of torch, in evaluation mode.
        window: (1, C, *patch).
    """
    import torch

    openvino = import_openvino()
    with torch.no_grad(), warnings.catch_warnings():
        # Of torch's tracing: shapes are fixed here.
        warnings.simplefilter("ignore")
        model = openvino.convert_model(network, example_input=torch.zeros(window), input=[window])
    content = {
        "configuration": configuration,
        "mirroring_axes": mirroring_axes,
        "checkpoint": fingerprint(checkpoint),
    }
    model.set_rt_info(json.dumps(content), [_KEY])
    file = converted(checkpoint)
    temporary = file.with_name(f".unfinished-{os.getpid()}-{file.name}")
    weights = temporary.with_suffix(".bin")
    try:
        openvino.save_model(model, str(temporary), compress_to_fp16=False)
        os.replace(weights, file.with_suffix(".bin"))
        os.replace(temporary, file)
    except (RuntimeError, OSError) as error:
        raise OSError(
            f"{file} could not be written ({' '.join(str(error).split())[-200:]}). Free some space, or copy the model "
            "to a folder that you can write to"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)
        weights.unlink(missing_ok=True)
