"""Processes that draw and augment batches, and repeat them if they are seeded."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeAlias

import torch
from batchgenerators.dataloading.multi_threaded_augmenter import MultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader

# Of a loader: in this process, or in others.
Augmenter: TypeAlias = SingleThreadedAugmenter | MultiThreadedAugmenter


class _SeededLoader:
    """A loader that seeds torch's and Python's generators in its process; batchgenerators seeds NumPy's alone."""

    def __init__(self, loader: nnUNetDataLoader, seeds: list[int]):
        self.loader = loader
        self.seeds = seeds

    def set_thread_id(self, thread_id: int) -> None:
        """Called by each process before its first batch."""
        torch.set_num_threads(1)
        torch.manual_seed(self.seeds[thread_id])
        random.seed(self.seeds[thread_id])
        self.loader.set_thread_id(thread_id)

    def __iter__(self) -> _SeededLoader:
        return self

    def __next__(self) -> dict:
        return next(self.loader)


def augmenter(loader: nnUNetDataLoader, seeds: list[int], pin_memory: bool = False) -> Augmenter:
    """An iterator over a loader's batches, drawn by one process for each seed.

    The processes take turns, so that the seeds decide which batch is the n-th one; nnU-Net's own augmenter hands out
    whichever batch is ready first.

    Args:
        loader: nnU-Net's data loader, with its transforms.
        seeds: One in [0, 2**32) for each process; none draws in this process, with the global generators.
        pin_memory: For copies to a GPU.
    """
    if not seeds:
        return SingleThreadedAugmenter(loader, None)
    return MultiThreadedAugmenter(
        _SeededLoader(loader, seeds), None, len(seeds), seeds=seeds, pin_memory=pin_memory, wait_time=0.002
    )


@contextmanager
def no_workers() -> Iterator[None]:
    """Inside, nnU-Net makes data loaders without processes of its own."""
    variable = "nnUNet_n_proc_DA"
    before = os.environ.get(variable)
    os.environ[variable] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before
