"""Reading checkpoints without running their code, and writing them without ever leaving half a file."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

try:
    from numpy._core import multiarray
except ImportError:  # NumPy 1
    from numpy.core import multiarray  # type: ignore[no-redef]

# What nnU-Net's own checkpoints hold beyond tensors and plain Python: NumPy scalars and arrays in the logs.
_SAFE_GLOBALS: list[Callable | tuple[Callable, str]] = [
    np.dtype,
    np.ndarray,
    multiarray.scalar,
    multiarray._reconstruct,
    *{type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?", "U")},
]
STATE_KEY = "semiseg_state"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used; the message names the file and the cure."""


def read(file: str | os.PathLike, map_location: str | torch.device = "cpu") -> dict:
    """The content of a checkpoint, read with ``weights_only=True``: nothing in the file is executed.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if the file is damaged, or holds objects that a checkpoint of nnU-Net does not hold.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"There is no checkpoint {file}")
    try:
        with torch.serialization.safe_globals(_SAFE_GLOBALS):
            return torch.load(file, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported" in str(error) or "GLOBAL" in str(error):
            raise CheckpointError(
                f"{file} holds more than weights and settings, and reading it could run foreign code, so it is not "
                f"read. Use a checkpoint written by nnU-Net 2.8 or by this package ({str(error).splitlines()[0]})"
            ) from None
        raise CheckpointError(f"{file} is damaged: {str(error).splitlines()[0]}") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{file} is damaged or cut off: {str(error).splitlines()[0]}") from None


def write(checkpoint: dict, file: str | os.PathLike, former: Path | None = None) -> None:
    """Write a checkpoint under a temporary name, then rename: under ``file`` there is always a complete one.

    Args:
        checkpoint: What to write.
        file: Where.
        former: Name under which the checkpoint that is replaced is kept.

    Raises:
        OSError: if it cannot be written; a checkpoint that was there before is untouched.
    """
    file = Path(file)
    temporary = file.with_name(file.name + ".tmp")
    try:
        with open(temporary, "wb") as stream:
            torch.save(checkpoint, stream)
            stream.flush()
            os.fsync(stream.fileno())
        if former is not None and file.is_file():
            former.unlink(missing_ok=True)
            try:
                os.link(file, former)
            except OSError:  # a file system without links
                os.replace(file, former)
        os.replace(temporary, file)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise OSError(
            f"The checkpoint {file} could not be written ({error}). Earlier checkpoints are untouched: free some "
            "space in nnUNet_results and continue with nnUNetv2_train ... --c"
        ) from error


def plain(network_weights: dict, mirroring_axes: Sequence[int] | None, configuration: str) -> dict:
    """A checkpoint of nnU-Net's own trainer with what inference needs, and nothing else."""
    return {
        "network_weights": network_weights,
        "inference_allowed_mirroring_axes": mirroring_axes,
        "trainer_name": "nnUNetTrainer",
        "init_args": {"configuration": configuration},
    }


def restarted(checkpoint: dict) -> dict:
    """A checkpoint from which ``--c`` starts a training at epoch 0 with all weights of a finished one.

    Unlike nnU-Net's ``-pretrained_weights`` it keeps the output layers and the companions (teacher, second network),
    and a training that is killed and continued does not start anew.
    """
    new = {**checkpoint, "current_epoch": 0, "_best_ema": None, "logging": {name: [] for name in checkpoint["logging"]}}
    if STATE_KEY in new:
        state = new[STATE_KEY] = {**new[STATE_KEY]}
        # A second phase starts when it is its time in this training. (Once, its start stood in the method's state.)
        of_this_run = state.get("of_this_run", ("phase_2_start",))
        for part in {"schedule", "method"} & set(state):
            state[part] = {name: value for name, value in state[part].items() if name not in of_this_run}
    return new


def as_written_by(save: Callable[[io.BytesIO], object]) -> dict:
    """The checkpoint that ``save(stream)`` writes, on the CPU, so that more can be added to it."""
    stream = io.BytesIO()
    save(stream)
    stream.seek(0)
    return torch.load(stream, map_location="cpu", weights_only=False)
