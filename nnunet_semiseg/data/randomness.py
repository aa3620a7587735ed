"""Random number generators that can be told apart, saved and restored."""

from __future__ import annotations

import random

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch, on all devices."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _cpu_state() -> tuple:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def _set_cpu_state(state: tuple) -> None:
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])


def _packed(state: tuple) -> dict:
    """A CPU state in types that ``torch.load(weights_only=True)`` reads."""
    python, (name, keys, *rest), torch_state = state
    return {"python": python, "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest), "torch": torch_state}


def _unpacked(packed: dict) -> tuple:
    version, internal, gauss = packed["python"]
    name, keys, *rest = packed["numpy"]
    keys = keys.cpu().numpy().astype(np.uint32)
    return (version, tuple(internal), gauss), (name, keys, *rest), packed["torch"].cpu()


def global_state() -> dict:
    """The global generators' state, CUDA included, in types that ``torch.load(weights_only=True)`` reads."""
    return {**_packed(_cpu_state()), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def set_global_state(state: dict) -> None:
    """Inverse of ``global_state``."""
    _set_cpu_state(_unpacked(state))
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])


class RandomStream:
    """Random numbers of its own: inside ``with stream:`` the global CPU generators are this stream's.

    Patches, augmentation and noise of the unlabeled half come from such a stream. With a seed, the labeled half
    therefore sees the same patches and augmentations whatever method runs (but for methods with dropout), and without
    augmentation processes the same as plain nnU-Net's. The processes have seeds of their own (``data.workers``).

    Args:
        seed: None takes one from the operating system.
    """

    def __init__(self, seed: int | None):
        entropy = np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]
        outside = _cpu_state()
        random.seed(int(entropy))
        np.random.seed(int(entropy % 2**32))
        # Seeds the CPU generator alone; torch.manual_seed would also reset the CUDA ones.
        torch.default_generator.manual_seed(int(entropy >> np.uint64(1)))
        self._state = _cpu_state()
        _set_cpu_state(outside)

    def __enter__(self) -> RandomStream:
        self._outside = _cpu_state()
        _set_cpu_state(self._state)
        return self

    def __exit__(self, *error: object) -> None:
        self._state = _cpu_state()
        _set_cpu_state(self._outside)

    def state(self) -> dict:
        """For a checkpoint."""
        return _packed(self._state)

    def set_state(self, state: dict) -> None:
        """Inverse of ``state``."""
        self._state = _unpacked(state)
