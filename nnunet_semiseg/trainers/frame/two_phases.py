"""Two-phase training: labeled data alone until the network knows every class, then unlabeled data as well."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

from nnunet_semiseg.losses.ramps import ramp_up_between
from nnunet_semiseg.networks.features import full_resolution
from nnunet_semiseg.trainers.frame.hooks import FrameOptions, Term
from nnunet_semiseg.trainers.frame.trainer import SemiSupervisedTrainer
from nnunet_semiseg.trainers.options import option


@dataclass(frozen=True)
class PretrainingOptions(FrameOptions):
    pretraining: float = option(0.2, "share of the run that trains on labeled data only", low=0.0, high=1.0)
    min_recall: float = option(
        0.3, "recall of each class on labeled patches, before which pretraining goes on", low=0.0, high=1.0
    )
    ramp_up: float = option(
        0.2, "share of the run over which the unsupervised weight rises, after pretraining", low=0.0, high=1.0
    )


class TwoPhaseTrainer(SemiSupervisedTrainer):
    """The frame of methods that teach themselves with pseudo labels of a pretrained network.

    Phase 2 starts when ``pretraining`` of the run is done and every class is found in labeled patches with
    ``min_recall`` by all ``trained_networks``: pseudo labels of a network that does not find a class yet teach that
    there is none. Recall is that of the last epoch; of a class which that epoch's patches lack, that of the last epoch
    with it.

    A method with a supervised loss of its own counts recall in it; one with more to do in between overrides
    ``start_phase_2``.
    """

    options: PretrainingOptions

    def initialize(self):
        # Progress at the start of phase 2, once it has started.
        self.phase_2_start: float | None = None
        self.knows_classes = self.options.min_recall == 0 or not self.needs_unlabeled()
        super().initialize()
        self.recall = dict.fromkeys(self.class_names, 0.0)
        self._recall_counts = torch.zeros(len(self.trained_networks), 2, self.labels.num_foreground, device=self.device)

    def start_phase_2(self) -> None:
        """Called once, before the first step of phase 2."""

    def uses_unlabeled(self):
        enough = self.global_step >= math.ceil(self.options.pretraining * self._total_steps)
        return self.needs_unlabeled() and self.knows_classes and enough

    def ramp(self) -> float:
        """From exp(-5) at the start of phase 2 to 1: SGD with momentum 0.99 takes a jump in the loss badly."""
        return ramp_up_between(self.progress, self.phase_2_start, self.options.ramp_up)

    def supervised_loss(self, data, target, network: int = 0):
        outputs = self.labeled_outputs(data, target, network)
        with self.autocast():
            return {("supervised", "supervised_second")[network]: Term(self.loss(outputs, target))}

    def labeled_outputs(self, data: torch.Tensor, target, network: int = 0):
        """Outputs of one of ``trained_networks`` on the labeled batch; what it finds counts for ``min_recall``."""
        with self.autocast():
            outputs = self.trained_networks[network](data)
        if not self.knows_classes:
            hard, valid = self.labels.without_ignored(full_resolution(target))
            self.count_hard_recall(outputs, hard, valid, network)
        return outputs

    def count_hard_recall(self, outputs, hard: torch.Tensor, valid: torch.Tensor, network: int = 0) -> None:
        """``count_recall`` of the outputs' decisions. ``valid``: (B, 1, *) bool, the voxels that count."""
        found = self.labels.hard(full_resolution(outputs).detach())
        self.count_recall(self.labels.one_vs_rest(found)[0], self.labels.one_vs_rest(hard)[0] * valid, network)

    @torch.no_grad()
    def count_recall(self, found: torch.Tensor, present: torch.Tensor, network: int = 0) -> None:
        """Count the labeled voxels of each class, and those of them that one of ``trained_networks`` finds.

        Args:
            found, present: (B, K, *) bool or float in {0, 1}.
        """
        axes = [0, *range(2, present.ndim)]
        self._recall_counts[network] += torch.stack(((found * present).sum(axes), present.sum(axes)))

    def before_step(self):
        if self.phase_2_start is None and self.uses_unlabeled():
            self.phase_2_start = self.progress
            self.start_phase_2()

    def on_train_epoch_start(self):
        super().on_train_epoch_start()
        self._recall_counts.zero_()

    def on_train_epoch_end(self, train_outputs):
        if not self.knows_classes:
            if self.is_ddp:
                dist.all_reduce(self._recall_counts)
            # All networks see the same labels; the worst one counts.
            for name, found, present in zip(self.class_names, *self._recall_counts.amin(0).tolist()):
                if present > 0:
                    self.recall[name] = found / present
            recall = {name: self.recall[name] for name in self.class_names if name not in self.absent_classes}
            self.knows_classes = all(value >= self.options.min_recall for value in recall.values())
            if not self.knows_classes and self.progress >= self.options.pretraining:
                listed = ", ".join(f"{name} {value:.3f}" for name, value in recall.items())
                self.print_to_log_file(
                    f"Pretraining goes on: recall on labeled data is {listed}; min_recall is {self.options.min_recall}"
                )
        super().on_train_epoch_end(train_outputs)

    def on_train_end(self):
        super().on_train_end()
        if self.phase_2_start is None and self.needs_unlabeled():
            self.print_to_log_file(
                "WARNING: This run never got beyond pretraining on labeled data"
                + ("" if self.knows_classes else ", because a class was not learned well enough (see above)")
                + ". Train longer, or lower "
                + ("pretraining" if self.knows_classes else "min_recall")
            )

    def method_state(self):
        return {"phase_2_start": self.phase_2_start, "knows_classes": self.knows_classes, "recall": self.recall}

    def load_method_state(self, state):
        self.phase_2_start, self.knows_classes = state["phase_2_start"], state["knows_classes"]
        self.recall = dict(state["recall"])
