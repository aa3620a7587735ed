"""Bidirectional copy-paste, BCP (Bai et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nnunet_semiseg.data.components import keep_largest_components
from nnunet_semiseg.losses.mixing import random_cuboid
from nnunet_semiseg.networks.ema import EMATeacher
from nnunet_semiseg.networks.features import full_resolution
from nnunet_semiseg.trainers.frame import STUDENT, Paper, PretrainingOptions, Term, TwoPhaseTrainer
from nnunet_semiseg.trainers.options import option


@dataclass(frozen=True)
class BCPOptions(PretrainingOptions):
    box: float = option(2 / 3, "side of the pasted cuboid, as a share of the patch's", low=0.0, high=1.0)
    pseudo_weight: float = option(0.5, "weight of pseudo-labeled voxels beside labeled ones", low=0.0)
    largest_component: bool = option(True, "keep only the largest component of each class in pseudo labels")
    unmixed: bool = option(
        True, "labeled patches as they are, and one of the two mixed batches in turn; else both, as the paper"
    )
    mix_pretraining: bool = option(False, "copy-paste between labeled patches while pretraining, as the paper")
    origin_normalized: bool = option(
        False, "a loss for each origin of voxels, normalized by its own size, as the paper; else one loss with weights"
    )
    unlabeled_foreground_sampling: float = option(
        0.33, "probability of centering an unlabeled patch on predicted foreground", low=0.0, high=1.0
    )
    student_view: str = option("strong", "the student's unlabeled input; labels: weak view", choices=("strong", "weak"))
    ema_decay: float = option(0.99, "decay of the teacher, per step", low=0.0, high=1.0)
    predict_with: str = option("student", "the network that predicts", choices=("student", "teacher"))
    preset: str = option("default", "paper: its settings for ACDC", choices=("default", "paper"))


BCPOptions.PRESETS = {
    "paper": dict(
        pretraining=0.25,
        min_recall=0.0,
        ramp_up=0.0,
        unmixed=False,
        mix_pretraining=True,
        origin_normalized=True,
        unlabeled_foreground_sampling=0.0,
        student_view="weak",
    )
}


class nnUNetTrainerBCP(TwoPhaseTrainer):
    """Bidirectional copy-paste: labeled and unlabeled patches are pasted into each other, with their labels.

    M is 0 in a cuboid of 2/3 of every side at a random place, 1 outside; one for each step.

    * Phase 1: nnU-Net's loss on labeled patches; with ``mix_pretraining`` on X_a * M + X_b * (1 - M).
    * Phase 2: X_out = X_a * M + U_a * (1 - M) and X_in = U_b * M + X_b * (1 - M). Their loss is nnU-Net's with weight 1
      for voxels of labeled patches and ``pseudo_weight`` for those of unlabeled ones, at every resolution of deep
      supervision. A step has two passes, and the mean of their losses: the labeled patches as they are, and X_out and
      X_in in turn; without ``unmixed``, X_out and X_in.
    * Pseudo labels: argmax of a teacher on the weak view, largest component of each class. The teacher starts from the
      pretrained student and is its moving average with a constant decay.

    Decided:

    * Labeled patches are also seen as they are (``unmixed``). A network that sees nothing but mixed patches, as the
      paper's, falls back when they come; in short trainings with more than the fewest labels it did not catch up with
      nnU-Net (docs/results.md).
    * Patches are mixed after augmentation, at full resolution; the targets of deep supervision are made from the mixed
      one.
    * Both directions use the whole batch, where the paper's halves of a batch go one way each. Both in one step, they
      learn from every labeled voxel once, whatever the batch size, and a labeled patch is mixed with different
      unlabeled patches.
    * One Dice for a mixed patch, of the foreground classes, as nnU-Net's. The paper has one for each origin
      (``origin_normalized``): slivers of an organ that the cuboid's edge cuts off then count as much as the whole organ
      on the other side.
    * Labeled patches are not mixed while pretraining; mixing them measured no better (docs/results.md).
    * An unlabeled patch is centered on predicted foreground with probability 0.33. (nnU-Net's setting of that value
      forces it for a rounded number of the labeled patches: one of a batch of 2, three of 8.) A few cases are predicted
      in each epoch, so that in a short run many have no foreground yet. With ``largest_component`` only that of each
      class is used, in the whole case: a far false blob would attract patches for the rest of the run.
    * Phase 2 starts when every class is found in labeled patches (``min_recall``), so that pseudo labels do not teach
      that a class is absent.
    * ``largest_component`` is wrong for structures in several pieces (tumors, ribs): turn it off there. Of nested
      regions, the inner one's component is the largest in the component of the outer one.
    * The paper's code computes a ramped consistency weight and never uses it; here ``ramp_up`` raises
      ``pseudo_weight`` after the change of phase.
    """

    paper = Paper("Bai et al., CVPR 2023", 2023)
    idea = "labeled and unlabeled patches are pasted into each other, with labels and pseudo labels"
    corrected = (
        "the unused consistency weight is left out; phase 2 starts when every class is found; one loss with a "
        "weight for each voxel, because a loss for each origin is ruled by slivers of organs; labeled patches "
        "are also seen unmixed, while X_out and X_in take turns; the whole batch in both directions; no "
        "mixing while pretraining; unlabeled patches also around predicted foreground, labels from the weak "
        "view, Dice of the foreground classes"
    )
    labeled_by = "teacher"
    terms = dict(supervised=STUDENT, mixed_out=STUDENT, mixed_in=STUDENT)
    switched_off = "pretraining=1"
    Options = BCPOptions
    options: BCPOptions

    def build_companions(self):
        self.host_loss = self.segmentation_loss()
        return {"teacher": EMATeacher(self.network, self.options.ema_decay, warm_up=False)}

    def predicting(self):
        return self.options.predict_with

    def foreground_of(self, hard):
        return keep_largest_components(hard, self.labels) if self.options.largest_component else hard

    def start_phase_2(self):
        self.teacher.copy_from(self.network)

    def labeled_loss(self, outputs, hard: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """The loss on labeled voxels, those of the mask ``valid``."""
        return self.host_loss(outputs, hard, valid)

    def pseudo_loss(self, outputs, hard: torch.Tensor, valid: torch.Tensor, labeling: torch.Tensor) -> torch.Tensor:
        """The loss on pseudo-labeled voxels. ``labeling``: the (B, C, *) logits that the labels come from."""
        return self.host_loss(outputs, hard, valid)

    def labeled_weights(self, outputs, valid: torch.Tensor) -> torch.Tensor:
        """(B, 1, *) weights of the voxels of labeled patches, those of the mask ``valid``."""
        return valid.float()

    def pseudo_weights(self, labeling: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """The same of pseudo-labeled voxels, without ``pseudo_weight``."""
        return valid.float()

    def is_origin_normalized(self) -> bool:
        return self.options.origin_normalized

    def losses(self, data, target):
        hard, valid = self.labels.without_ignored(full_resolution(target))
        if not self.uses_unlabeled():
            yield self.pretraining_loss(data, hard, valid)
            return
        if self.options.unmixed:
            yield self.labeled_term(data, hard, valid, 0.5)
        yield from self.mixed_losses(data, hard, valid)

    def cuboid(self, data: torch.Tensor) -> torch.Tensor:
        """(1, 1, *) bool, True inside."""
        with self.random_stream:
            return random_cuboid(data.shape[2:], self.options.box).to(data.device)

    def labeled_term(self, data, hard, valid, weight: float = 1.0) -> dict[str, Term]:
        """The loss on labeled patches."""
        with self.autocast():
            outputs = self.student(data)
        if not self.knows_classes:
            self.count_hard_recall(outputs, hard, valid)
        return {"supervised": Term(self.labeled_loss(outputs, hard, valid), weight)}

    def pretraining_loss(self, data, hard, valid) -> dict[str, Term]:
        """Phase 1. Mixed, every sample is background of one patch and cuboid of another."""
        if self.options.mix_pretraining:
            inside, shift = self.cuboid(data), (len(data) + 1) // 2
            data, hard, valid = (torch.where(inside, x.roll(shift, 0), x) for x in (data, hard, valid))
        return self.labeled_term(data, hard, valid)

    @torch.no_grad()
    def pseudo_labels(self, weak: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Hard pseudo labels of the teacher, and its (B, C, *) logits."""
        logits = self.logits(self.teacher_network, weak)
        return self.foreground_of(self.labels.hard(logits)), logits

    def mixed_losses(self, data, hard, valid):
        """X_out, then X_in; if labeled patches have a pass of their own, one of the two."""
        unlabeled = self.next_unlabeled()
        pseudo, labeling = self.pseudo_labels(unlabeled.weak)
        self.monitor("pseudo_foreground", self.labels.is_foreground(pseudo).float().mean())
        image, inside = self.student_input(unlabeled), self.cuboid(data)
        weight = self.options.pseudo_weight * self.ramp()
        directions = (("out", ~inside), ("in", inside))
        if self.options.unmixed:
            directions = (directions[self.global_step % 2],)
        for i, (name, real) in enumerate(directions):
            if i > 0:
                # X_b is not pasted into the patch that was pasted into it.
                image, pseudo, labeling = (x.roll(1, 0) for x in (image, pseudo, labeling))
            mixed = torch.where(real, data, image)
            with self.autocast():
                outputs = self.student(mixed)
            mixed_hard = torch.where(real, hard, pseudo)
            pasted = (~real).expand_as(valid)
            if self.is_origin_normalized():
                yield {
                    f"supervised_{name}": Term(self.labeled_loss(outputs, mixed_hard, valid & real), 0.5),
                    f"pseudo_{name}": Term(self.pseudo_loss(outputs, mixed_hard, pasted, labeling), 0.5 * weight),
                }
            else:
                weights = self.labeled_weights(outputs, valid & real) + weight * self.pseudo_weights(labeling, pasted)
                yield {f"mixed_{name}": Term(self.host_loss(outputs, mixed_hard, weights), 0.5)}
