"""Bidirectional copy-paste, BCP (Bai et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nnunet_semiseg.data.components import keep_largest_components
from nnunet_semiseg.networks.features import full_resolution
from nnunet_semiseg.trainers.frame import (
    MIXING,
    STUDENT,
    Paper,
    PretrainingOptions,
    SemiSupervisedTrainer,
    TeacherOptions,
    Term,
)
from nnunet_semiseg.trainers.options import option


@dataclass(frozen=True)
class BCPOptions(TeacherOptions, PretrainingOptions):
    mixing: str = option("copypaste", "where the cuboid in each unlabeled patch comes from", choices=MIXING)
    box: float = option(2 / 3, "side of the pasted cuboid, as a share of the patch's", low=0.0, high=1.0)
    pseudo_weight: float = option(0.5, "weight of pseudo-labeled voxels beside labeled ones", low=0.0)
    largest_component: bool = option(True, "keep only the largest component of each class in pseudo labels")
    unmixed: bool = option(
        True,
        "labeled patches as they are, and one of the two mixed batches in turn; else both, as the paper",
        ablation=True,
    )
    mix_pretraining: bool = option(
        False, "copy-paste between labeled patches while pretraining, as the paper", ablation=True
    )
    origin_normalized: bool = option(
        False,
        "a loss for each origin of voxels, normalized by its own size, as the paper; else one loss with weights",
        ablation=True,
    )
    unlabeled_foreground_sampling: float = option(
        0.33, "probability of centering an unlabeled patch on predicted foreground", low=0.0, high=1.0
    )
    student_view: str = option(
        "strong", "the student's unlabeled input; labels: weak view", choices=("strong", "weak"), ablation=True
    )
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


class nnUNetTrainerBCP(SemiSupervisedTrainer):
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
      nnU-Net (docs/results_archive.md).
    * Patches are mixed after augmentation, at full resolution; the targets of deep supervision are made from the mixed
      one.
    * Both directions use the whole batch, where the paper's halves of a batch go one way each. Both in one step, they
      learn from every labeled voxel once, whatever the batch size, and a labeled patch is mixed with different
      unlabeled patches.
    * One Dice for a mixed patch, of the foreground classes, as nnU-Net's. The paper has one for each origin
      (``origin_normalized``): slivers of an organ that the cuboid's edge cuts off then count as much as the whole organ
      on the other side.
    * Labeled patches are not mixed while pretraining; mixing them measured no better (docs/results_archive.md).
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
    use_when = "with very few labels and organs in one piece"
    corrected = (
        "the unused consistency weight is left out; phase 2 starts when every class is found; one loss with a "
        "weight for each voxel, because a loss for each origin is dominated by slivers of organs; labeled patches "
        "are also seen unmixed, while X_out and X_in take turns; the whole batch in both directions; no "
        "mixing while pretraining; unlabeled patches also around predicted foreground, labels from the weak "
        "view, Dice of the foreground classes"
    )
    labeled_by = "teacher"
    terms = dict(supervised=STUDENT, mixed=STUDENT)
    switched_off = "pretraining=1"
    teacher_starts_pretrained = True
    Options = BCPOptions
    options: BCPOptions

    def build_companions(self):
        self.host_loss = self.segmentation_loss()
        return {}

    def foreground_of(self, hard):
        return keep_largest_components(hard, self.labels) if self.options.largest_component else hard

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
        unlabeled = self.uses_unlabeled()
        if self.options.unmixed or not unlabeled:
            mixed = self.options.mix_pretraining and not unlabeled
            yield self.labeled_term(data, target, mixed, weight=0.5 if unlabeled else 1.0)
        if unlabeled:
            yield from self.unsupervised_losses(self.next_unlabeled(), data, target)

    def labeled_term(self, data, target, mixed: bool, weight: float) -> dict[str, Term]:
        """The loss on labeled patches. Mixed, each is the background of one and the cuboid of another."""
        hard, valid = self.labels.without_ignored(full_resolution(target))
        if mixed:
            inside, shift = self.cuboid(data), (len(data) + 1) // 2
            data, hard, valid = (torch.where(inside, x.roll(shift, 0), x) for x in (data, hard, valid))
        outputs = self.outputs(self.student, data)
        self.schedule.see(outputs, hard, valid=valid)
        return {"supervised": Term(self.labeled_loss(outputs, hard, valid), weight)}

    @torch.no_grad()
    def targets(self, unlabeled):
        logits = self.logits(self.teacher, unlabeled.weak)
        hard = self.foreground_of(self.labels.hard(logits))
        self.monitor("pseudo_foreground", self.labels.is_foreground(hard).float().mean())
        nothing = torch.zeros_like(hard[:, :1], dtype=torch.bool)
        return {"hard": hard, "labeling": logits, "labeled": nothing, "pseudo": ~nothing}

    def targets_of_labels(self, hard, valid):
        return {"hard": hard, "labeled": valid}

    def unsupervised_losses(self, unlabeled, data, target):
        if self.options.unmixed or self.options.mixing != "copypaste":
            yield from super().unsupervised_losses(unlabeled, data, target)
            return
        own = {"image": self.student_input(unlabeled), **self.targets(unlabeled)}
        labeled, inside = self.labeled_voxels(data, target), self.cuboid(data)
        for direction, name in enumerate(("out", "in")):
            # X_b is not pasted into the patch that was pasted into it.
            rolled = {key: x.roll(direction, 0) for key, x in own.items()}
            for group in self.student_losses(**self.copy_paste(inside, rolled, labeled, direction)):
                yield {f"{term}_{name}": value for term, value in group.items()}

    def student_losses(self, image, hard, labeling, labeled, pseudo):
        """``labeled``, ``pseudo``: (B, 1, *) bool, the voxels of labels and of pseudo labels."""
        outputs = self.outputs(self.student, image)
        weight = self.options.pseudo_weight * self.ramp()
        if self.is_origin_normalized():
            yield {
                "mixed_labels": Term(self.labeled_loss(outputs, hard, labeled), 0.5),
                "mixed_pseudo": Term(self.pseudo_loss(outputs, hard, pseudo, labeling), 0.5 * weight),
            }
        else:
            weights = self.labeled_weights(outputs, labeled) + weight * self.pseudo_weights(labeling, pseudo)
            yield {"mixed": Term(self.host_loss(outputs, hard, weights), 0.5)}
