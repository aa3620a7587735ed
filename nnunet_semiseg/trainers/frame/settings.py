"""Settings in a trainer's name, for any nnU-Net trainer: its schedule, and a seed."""

from __future__ import annotations

import contextlib
import errno
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA

from nnunet_semiseg.data.randomness import seed_everything
from nnunet_semiseg.data.views import fix_transform_arithmetic
from nnunet_semiseg.data.workers import Augmenter, augmenter, no_workers
from nnunet_semiseg.trainers.frame.distributed import gathered
from nnunet_semiseg.trainers.frame.part import Part
from nnunet_semiseg.trainers.options import build_options, check_folder_name, option

# The loaders of a training.
STREAMS = ("labeled", "validation", "unlabeled")
# Begins the names of our values in nnU-Net's logger.
LOG_KEY = "semiseg/"
PEAK_MEMORY = "peak_memory_gib"
# As nnUNet_compile: "t" trains in bfloat16 on a CPU, which is faster on one that computes in it.
BFLOAT16 = "nnUNet_semiseg_bfloat16"


def log_values(trainer: Part, values: dict[str, float]) -> None:
    """Into nnU-Net's logger, and from there into W&B where a user turned it on; mean over ranks."""
    ranks = gathered(values)
    values = {name: float(np.mean([rank[name] for rank in ranks if name in rank])) for name in values}
    log = trainer.logger.local_logger.my_fantastic_logging
    for name, value in values.items():
        log.setdefault(LOG_KEY + name, [math.nan] * trainer.current_epoch)
        trainer.logger.log(LOG_KEY + name, value, trainer.current_epoch)


@dataclass(frozen=True)
class SeedOptions:
    seed: int = option(-1, "seed of all random numbers, those of the augmentation processes included; -1: none", low=-1)


class SettingsFromName(Part):
    """Mixin in front of an nnU-Net trainer: its name sets nnU-Net's schedule attributes and a seed.

    Its checkpoints are whole, whenever it is killed, and its log has the peak of the GPU's memory.
    """

    Options: type[SeedOptions] = SeedOptions
    # Set by the class that a name with options makes (registry.find_trainer).
    chosen_options: dict = {}
    chosen_schedule: dict = {}

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 (nnU-Net's signature)
    ):
        check_folder_name(type(self).__name__ + self.folder_suffix(), plans["plans_name"], configuration)
        try:
            super().__init__(plans, configuration, fold, dataset_json, device)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.ENOTDIR, errno.ENOENT):
                raise
            raise OSError(
                f"The results folder cannot be written ({error}). Set nnUNet_results to a folder that you can write to"
            ) from error
        self.options = build_options(self.Options, self.chosen_options)
        for name, value in self.chosen_schedule.items():
            setattr(self, name, value)

    @classmethod
    def folder_suffix(cls) -> str:
        """What the trainer's name gets in the name of another model folder that it writes."""
        return ""

    @property
    def seed_of_rank(self) -> int | None:
        return self.options.seed + self.local_rank if self.options.seed >= 0 else None

    def initialize(self) -> None:
        if self.seed_of_rank is not None:
            seed_everything(self.seed_of_rank)
        super().initialize()

    def get_training_transforms(self, *args: Any, **kwargs: Any) -> ComposeTransforms:
        """nnU-Net's; with a seed, they compute the same again."""
        transforms = super().get_training_transforms(*args, **kwargs)
        if self.options.seed >= 0:
            fix_transform_arithmetic(transforms)
        return transforms

    def get_dataloaders(self) -> tuple[Augmenter, Augmenter]:
        """nnU-Net's; with a seed, their processes are seeded, which nnU-Net's are not."""
        if self.options.seed < 0:
            return super().get_dataloaders()
        with no_workers():
            train, val = (single.data_loader for single in super().get_dataloaders())
        return self._augmenter(train, "labeled", 1.0), self._augmenter(val, "validation", 0.5)

    def _augmenter(self, loader: nnUNetDataLoader, stream: str, share: float) -> Augmenter:
        """Batches of a loader.

        Args:
            stream: One of STREAMS; each has seeds of its own.
            share: Of nnU-Net's number of augmentation processes.
        """
        processes = get_allowed_n_proc_DA()
        if processes > 0:
            processes = max(1, int(processes * share))
        entropy = None
        if self.options.seed >= 0:
            # Other seeds after a restart, or the processes would draw the first patches once more.
            entropy = (self.options.seed, self.local_rank, self.current_epoch, STREAMS.index(stream))
        seeds = [int(seed) for seed in np.random.SeedSequence(entropy).generate_state(processes)]
        return augmenter(loader, seeds, pin_memory=self.device.type == "cuda")

    def autocast(self) -> contextlib.AbstractContextManager:
        """nnU-Net's mixed precision: float16 on CUDA; on a CPU bfloat16, if the environment asks for it."""
        if self.device.type == "cuda":
            return torch.autocast("cuda")
        if self.device.type == "cpu" and os.environ.get(BFLOAT16, "f").lower() in ("true", "1", "t"):
            return torch.autocast("cpu", torch.bfloat16)
        return contextlib.nullcontext()

    def train_step(self, batch: dict) -> dict:
        # nnU-Net turns it on by itself on CUDA.
        with self.autocast() if self.device.type == "cpu" else contextlib.nullcontext():
            return super().train_step(batch)

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        super().on_train_epoch_end(train_outputs)
        if self.device.type == "cuda":
            log_values(self, {PEAK_MEMORY: torch.cuda.max_memory_allocated(self.device) / 2**30})

    def save_checkpoint(self, filename: str) -> None:
        """nnU-Net's, which writes into the file: a training killed meanwhile would have nothing to continue from."""
        if self.local_rank != 0 or self.disable_checkpointing:
            super().save_checkpoint(filename)
            return
        temporary = Path(f"{filename}.tmp")
        try:
            super().save_checkpoint(str(temporary))
            os.replace(temporary, filename)
        finally:
            temporary.unlink(missing_ok=True)

    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        """nnU-Net's, which forgets an epoch that was the best one: it saves checkpoint_latest before it compares."""
        super().load_checkpoint(filename_or_checkpoint)
        seen = [value for value in self.logger.get_value("ema_fg_dice", step=None) if math.isfinite(value)]
        self._best_ema = max(seen, default=self._best_ema)
