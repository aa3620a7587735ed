"""Predicted foreground, on which unlabeled patches may be centered."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunet_semiseg.data.unlabeled import (
    ForegroundLocations,
)
from nnunet_semiseg.trainers.frame.distributed import gathered
from nnunet_semiseg.trainers.frame.part import Part

# Predicted foreground: cases predicted anew per epoch, the latest cases that are kept, and voxels per case and class.
# With 2000 cases and 13 classes that is 2 MB, in memory, in a checkpoint and in the file that the loaders read.
FOREGROUND_CASES_PER_EPOCH = 8
FOREGROUND_CASES = 200
FOREGROUND_VOXELS = 50


class ForegroundSampling(Part):
    """Mixin: a few unlabeled cases are predicted in each epoch, and voxels of each class remembered."""

    @torch.no_grad()
    def _refresh_foreground_locations(self) -> None:
        """Predict the next few unlabeled cases coarsely and remember where foreground is."""
        network = self.predicting_network()
        dataset = self._unlabeled_cases
        cases = [
            c
            for i, c in enumerate(dataset.identifiers)
            if i % (dist.get_world_size() if self.is_ddp else 1) == self.local_rank
        ]
        start = self.current_epoch * FOREGROUND_CASES_PER_EPOCH
        chosen = {cases[i % len(cases)] for i in range(start, start + FOREGROUND_CASES_PER_EPOCH)} if cases else set()
        predictor = nnUNetPredictor(
            tile_step_size=1.0, use_mirroring=False, device=self.device, allow_tqdm=False, verbose=False
        )
        found: dict[str, dict] = {}
        network.eval()
        with self._as_network(network), self.random_stream:
            self.set_deep_supervision_enabled(False)
            predictor.manual_initialization(
                network,
                self.plans_manager,
                self.configuration_manager,
                None,
                self.dataset_json,
                self.__class__.__name__,
                self.inference_allowed_mirroring_axes,
            )
            for case in sorted(chosen):
                data = torch.from_numpy(np.asarray(dataset.load_case(case)[0][:]))
                logits = predictor.predict_sliding_window_return_logits(data).cpu()
                hard = self.foreground_of(self.labels.hard(logits[None]))
                found[case] = {}
                for k in range(self.labels.num_foreground):
                    voxels = self.labels.is_class(hard, k)[0].nonzero().numpy()
                    if len(voxels):
                        keep = np.random.permutation(len(voxels))[:FOREGROUND_VOXELS]
                        voxels = np.pad(voxels[keep], ((0, 0), (1, 0))).astype(np.int32)
                        found[case][k + 1] = voxels
            self.set_deep_supervision_enabled(self.enable_deep_supervision)
        network.train()
        self._remember_foreground({case: locations for part in gathered(found) for case, locations in part.items()})
        self._publish_foreground_locations()

    def _remember_foreground(self, found: dict[str, dict]) -> None:
        """Add the locations of cases, the latest last, and forget those of the oldest."""
        kept = {case: by for case, by in self.foreground_locations.items() if case not in found} | found
        self.foreground_locations = dict(list(kept.items())[-FOREGROUND_CASES:])

    def _publish_foreground_locations(self) -> None:
        """Make the file that the loader reads what this trainer knows; nothing of an earlier run stays."""
        if self.foreground_locations:
            ForegroundLocations(self._foreground_file).write(self.foreground_locations)
        else:
            self._foreground_file.unlink(missing_ok=True)

    def _foreground_state(self) -> dict:
        """The locations in types that ``torch.load(weights_only=True)`` reads."""
        return {
            case: {k: torch.from_numpy(v) for k, v in by_class.items()}
            for case, by_class in self.foreground_locations.items()
        }

    def _load_foreground_state(self, state: dict) -> None:
        """Inverse of ``_foreground_state``; a checkpoint of an earlier version may hold more."""
        self._remember_foreground(
            {
                case: {k: v.cpu().numpy()[:FOREGROUND_VOXELS] for k, v in by_class.items()}
                for case, by_class in state.items()
            }
        )
