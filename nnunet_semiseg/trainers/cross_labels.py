"""Two networks of which each learns the labels that the other one's side makes."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from nnunet_semiseg.trainers.frame import SECOND, STUDENT, Network, SemiSupervisedTrainer, Term, Unlabeled, Voxels


class CrossLabels(SemiSupervisedTrainer):
    """Base of methods whose options are SecondNetworkOptions and PseudoLabelOptions."""

    passes = (2, 1, 2, 1)
    terms = dict(supervised=STUDENT, supervised_second=SECOND, cross_first=STUDENT, cross_second=SECOND)
    switched_off = "pseudo_weight=0"

    @property
    def labeling(self) -> tuple[Network, ...]:
        """The networks that label, each for the other one's student."""
        return self.students

    @torch.no_grad()
    def targets(self, unlabeled: Unlabeled) -> Voxels:
        first, second = (self.logits(network, unlabeled.weak) for network in self.labeling)
        hard_first, hard_second = self.labels.hard(first), self.labels.hard(second)
        self.monitor("disagreement", self.labels.differ(hard_first, hard_second).float().mean())
        return {
            "hard_first": hard_first,
            "hard_second": hard_second,
            "weight_first": self.confidence_weight(first),
            "weight_second": self.confidence_weight(second),
        }

    def targets_of_labels(self, hard: torch.Tensor, valid: torch.Tensor) -> Voxels:
        return {"hard_first": hard, "hard_second": hard, "weight_first": valid, "weight_second": valid}

    def student_losses(self, image: torch.Tensor, **targets: torch.Tensor) -> Iterator[dict[str, Term]]:
        """A group for each network, so that one graph is in memory at a time."""
        for name, other, network in zip(("first", "second"), ("second", "first"), self.students):
            outputs = self.outputs(network, image)
            loss = self.pseudo_label_loss(outputs, targets[f"hard_{other}"], targets[f"weight_{other}"])
            yield {f"cross_{name}": Term(loss, self.options.pseudo_weight * self.ramp())}
