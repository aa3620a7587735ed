"""What a training tells about itself: terms, masks and validation Dice of each network, per epoch."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.utilities.collate_outputs import collate_outputs
from torch import nn

from nnunet_semiseg.files import write_csv
from nnunet_semiseg.networks.ema import unwrap
from nnunet_semiseg.trainers.frame.distributed import gathered
from nnunet_semiseg.trainers.frame.panel import plot_panel
from nnunet_semiseg.trainers.frame.part import Part
from nnunet_semiseg.trainers.frame.settings import LOG_KEY, log_values


class Monitoring(Part):
    """Mixin: nnU-Net's log with more values, a table and a panel beside it."""

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        values = {name: float(np.mean(v)) for name, v in self._epoch_sums.items()}
        values["non_finite_steps"] = float(self._non_finite_total)
        log_values(self, values)
        super().on_train_epoch_end(train_outputs)

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self.companions.eval()

    @contextlib.contextmanager
    def _as_network(self, network: nn.Module) -> Iterator[None]:
        """nnU-Net's own code, run on another network than the student."""
        student, self.network = self.network, network
        try:
            yield
        finally:
            self.network = student

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        decoder: Any = unwrap(self.network).decoder
        decoder.deep_supervision = enabled

    def validation_step(self, batch: dict) -> dict:
        """nnU-Net's, of the network that predicts; where there is another one, that is counted as well."""
        networks = self.networks
        if len(networks) == 1:
            return super().validation_step(batch)
        results = {}
        for name, network in networks.items():
            target = batch["target"]
            # nnU-Net overwrites ignored voxels of the target in place.
            copied = [t.clone() for t in target] if isinstance(target, list) else target.clone()
            with self._as_network(network):
                results[name] = super().validation_step({**batch, "target": copied})
        return {
            **results[self.predicting()],
            **{
                f"{other}_{key}": results[other][key]
                for other in networks
                if other != self.predicting()
                for key in ("tp_hard", "fp_hard", "fn_hard")
            },
        }

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        super().on_validation_epoch_end(val_outputs)
        networks = self.networks
        if len(networks) == 1:
            return
        outputs = collate_outputs(val_outputs)
        dice = {f"{self.predicting()}_val_dice": float(self.logger.get_value("mean_fg_dice", step=-1))}
        for other in networks:
            if other == self.predicting():
                continue
            counts = np.stack([np.sum(outputs[f"{other}_{key}"], 0) for key in ("tp_hard", "fp_hard", "fn_hard")])
            tp, fp, fn = np.sum(gathered(counts), 0).astype(float)
            with np.errstate(invalid="ignore"):
                dice[f"{other}_val_dice"] = float(np.nanmean(2 * tp / (2 * tp + fp + fn)))
        log_values(self, dice)

    def on_epoch_end(self) -> None:
        logged = self._logged()
        epoch = self.current_epoch
        for name, values in logged.items():
            # nnU-Net's logger wants one value per key and epoch.
            if len(values) <= epoch:
                log_values(self, {name: math.nan})
        latest = ", ".join(
            f"{name} {values[epoch]:.4f}" for name, values in logged.items() if np.isfinite(values[epoch])
        )
        self.print_to_log_file(f"Semi-supervised: {latest}")
        super().on_epoch_end()
        if self.local_rank == 0:
            self._write_csv()
            plot_panel(self._logged(), Path(self.output_folder) / "progress_semiseg.png")

    def _logged(self) -> dict[str, list[float]]:
        """Our values per epoch, as they stand in nnU-Net's logger."""
        log = self.logger.local_logger.my_fantastic_logging
        return {key[len(LOG_KEY) :]: values for key, values in log.items() if key.startswith(LOG_KEY)}

    def _write_csv(self) -> None:
        logged = self._logged()
        rows = [["" if math.isnan(v) else f"{v:.6g}" for v in row] for row in zip(*logged.values())]
        file = Path(self.output_folder) / "progress_semiseg.csv"
        write_csv(file, ["epoch", *logged], [[epoch, *row] for epoch, row in enumerate(rows)])

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        with self._as_network(self.predicting_network()):
            super().perform_actual_validation(save_probabilities)
