"""Checkpoints from which a training continues exactly, and which stock nnU-Net predicts with."""

from __future__ import annotations

import contextlib
import os
from dataclasses import asdict
from pathlib import Path
from typing import cast

import torch.distributed as dist

import nnunet_semiseg
from nnunet_semiseg import checkpoints
from nnunet_semiseg.data.randomness import global_state
from nnunet_semiseg.data.splits import check_trained_on
from nnunet_semiseg.networks.ema import unwrap
from nnunet_semiseg.trainers.frame.distributed import gathered
from nnunet_semiseg.trainers.frame.part import Part
from nnunet_semiseg.trainers.frame.settings import SettingsFromName

PREVIOUS = "checkpoint_previous.pth"


class Checkpointing(Part):
    """Mixin: nnU-Net's checkpoints with ``semiseg_state`` added, written atomically and read safely."""

    def save_checkpoint(self, filename: str) -> None:
        """nnU-Net's checkpoint with ``semiseg_state`` added, written atomically.

        ``network_weights`` is the network that predicts and nothing else, so that stock nnU-Net can use it.
        """
        random_states = gathered({"global": global_state(), "unlabeled": self.random_stream.state()})
        if self.local_rank != 0 or self.disable_checkpointing:
            super().save_checkpoint(filename)
            return
        # Not that of SettingsFromName, which wants a file.
        checkpoint = checkpoints.as_written_by(super(SettingsFromName, cast(SettingsFromName, self)).save_checkpoint)
        state = {
            "version": nnunet_semiseg.__version__,
            "options": asdict(self.options),
            "predicts": self.predicting(),
            "companions": self.companions.state_dict(),
            "random": random_states,
            "non_finite_steps": self._non_finite_total,
            "trained_on": sorted(self.trained_on),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.companion_optimizers.items()},
            "schedule": self.schedule.state(),
            "of_this_run": self.schedule.OF_THIS_RUN,
            "method": self.method_state(),
            "foreground_locations": self._foreground_state(),
        }
        if self.predicting() != "student":
            state["student"] = checkpoint["network_weights"]
            checkpoint["network_weights"] = self.predicting_network().state_dict()
        checkpoint[checkpoints.STATE_KEY] = state
        file = Path(filename)
        # The last but one stays, in case the last is damaged later.
        former = file.with_name(PREVIOUS) if file.name == "checkpoint_latest.pth" else None
        checkpoints.write(checkpoint, file, former)

    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        """Continue exactly where the checkpoint was written.

        A damaged checkpoint is reported, and the newest readable one of the same fold is taken instead.

        Raises:
            CheckpointError: if no checkpoint can be read, or it is of another trainer.
            ValueError: if it was trained on labels that the fold now hides.
        """
        if not self.was_initialized:
            self.initialize()
        file, checkpoint = self._readable_checkpoint(Path(filename_or_checkpoint))
        state = checkpoint.get(checkpoints.STATE_KEY)
        if state is None:
            raise checkpoints.CheckpointError(
                f"{file} was not written by a trainer of nnunet_semiseg, so there is nothing to continue. To start "
                f"from its whole network use nnunet_semiseg fork ... --from {file}; without its segmentation layers, "
                f"nnUNetv2_train ... -pretrained_weights {file}"
            )
        self.trained_on = set(state.get("trained_on", ()))
        cure = "Train anew, without --c, or restore the splits that it was trained with"
        check_trained_on(self._splits_file, self.fold, self.trained_on, file, cure)
        super().load_checkpoint(str(file))
        self._is_resumed = True
        if "student" in state:
            unwrap(self.network).load_state_dict(state["student"])
        self.companions.load_state_dict(state["companions"])
        for name, optimizer in self.companion_optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        if len(state["random"]) == (dist.get_world_size() if self.is_ddp else 1):
            self._resumed_random_state = state["random"][self.local_rank]
        self._non_finite_total = state["non_finite_steps"]
        # Before there was a schedule, its state was the method's.
        self.schedule.load_state(state.get("schedule", state["method"]))
        self.load_method_state(state["method"])
        self._load_foreground_state(state["foreground_locations"])

    def _readable_checkpoint(self, file: Path) -> tuple[Path, dict]:
        try:
            return file, checkpoints.read(file, self.device)
        except checkpoints.CheckpointError as error:
            if file.name == "checkpoint_final.pth":
                raise checkpoints.CheckpointError(
                    f"{error}. Delete it and run nnUNetv2_train ... --c to train on from an earlier checkpoint"
                ) from None
            candidates = [file.with_name(PREVIOUS), file.with_name("checkpoint_best.pth")]
            readable = []
            for candidate in candidates:
                if candidate != file and candidate.is_file():
                    with contextlib.suppress(checkpoints.CheckpointError):
                        readable.append((candidate, checkpoints.read(candidate, self.device)))
            if not readable:
                raise
            if self.local_rank == 0:
                # Kept to look at, and out of the way: the next checkpoint must not make it the last but one.
                os.replace(file, file.with_name(file.name + ".damaged"))
            best = max(readable, key=lambda pair: pair[1]["current_epoch"])
            self.print_to_log_file(
                f"WARNING: {error}. Continuing from {best[0].name} instead, at epoch {best[1]['current_epoch']}."
            )
            return best
