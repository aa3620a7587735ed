"""CoraNet (Shi et al. 2021): conservative and radical heads tell the certain region from the uncertain one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from nnunet_semiseg.losses.consistency import masked_squared_distance
from nnunet_semiseg.losses.cost_sensitive import cost_sensitive_bce, cost_sensitive_dice
from nnunet_semiseg.losses.uncertainty import heteroscedastic_bce
from nnunet_semiseg.networks.ema import EMATeacher, unwrap
from nnunet_semiseg.networks.features import check_is_unet, forward_with_features, full_resolution
from nnunet_semiseg.networks.heads import FeatureHead
from nnunet_semiseg.trainers.certainty import DROPOUT, LABEL_BY
from nnunet_semiseg.trainers.frame import (
    MIXING,
    STUDENT,
    Paper,
    PretrainingOptions,
    SemiSupervisedTrainer,
    TeacherOptions,
    Term,
    Unlabeled,
    Voxels,
)
from nnunet_semiseg.trainers.options import option

# Table IV: on which region self-training (C-SN) and mean teacher (UC-SN) work.
SETTINGS = {
    "full": ("certain", "uncertain"),
    "seg": (None, None),
    "seg+st": ("all", None),
    "seg+st-mask": ("certain", None),
    "seg+mt": (None, "all"),
    "seg+mt-mask": (None, "certain"),
}


@dataclass(frozen=True)
class CoraNetOptions(TeacherOptions, PretrainingOptions):
    pretraining: float = option(0.1, "share of the run that trains on labeled data only", low=0.0, high=1.0)
    ramp_up: float = option(0.1, "share of the run over which the weights rise, after pretraining", low=0.0, high=1.0)
    mixing: str = option("both", "the box's origin", choices=MIXING)
    strong_view: str = option("strong", "intensities of the student's view", choices=("none", "nnunet", "strong"))
    predict_with: str = option("teacher", "the network that predicts", choices=("student", "teacher"))
    preset: str = option(
        "default",
        "paper: the printed settings; code: those of the published code",
        choices=("default", "paper", "code"),
    )
    alpha: float = option(
        5.0,
        "cost of a head's expensive mistake, that of the cheap one is 1; with 1 the heads differ by their start",
        low=1.0,
    )
    setting: str = option("full", "rows of the paper's Table IV", choices=tuple(SETTINGS), ablation=True)
    uncertainty: str = option(
        "cost",
        "what makes the mask: heads, test-time augmentation, MC dropout or aleatoric",
        choices=tuple(LABEL_BY),
        ablation=True,
    )
    passes: int = option(20, "forward passes or draws of the tta, mcdropout and aleatoric masks", low=2, ablation=True)
    head_gradient: float = option(
        0.0, "share of the heads' gradient in what they share with the main branch", low=0.0, high=1.0
    )
    cost_dice: float = option(
        1.0, "weight of cost-sensitive Dice beside the heads' cross-entropy", low=0.0, ablation=True
    )
    certain_weight: float = option(1.0, "largest weight of self-training on the certain region", low=0.0)
    pseudo_dice: float = option(
        1.0, "weight of soft Dice beside the cross-entropy in self-training", low=0.0, ablation=True
    )
    uncertain_weight: float = option(
        0.3, "weight of uncertain voxels in self-training, that of certain ones is 1; 0: the paper's mask", low=0.0
    )
    consistency_weight: float = option(
        0.0, "largest weight of the consistency on the uncertain region", low=0.0, ablation=True
    )
    all_heads: bool = option(False, "self-training and consistency on the two cost heads as well", ablation=True)
    relabel_every: int = option(
        0,
        "steps between two relabelings by the student; 0: the teacher labels each step's patches",
        low=0,
        ablation=True,
    )
    label_reuse: int = option(
        5, "with relabel_every, steps that train on a patch before it is replaced", low=1, ablation=True
    )
    deep_pseudo: bool = option(True, "self-training at every resolution that nnU-Net supervises")


# As they are published: the student labels, without mixing.
_PUBLISHED = dict(
    mixing="none",
    strong_view="nnunet",
    predict_with="student",
    deep_pseudo=False,
    relabel_every=50,
    uncertain_weight=0.0,
)
CoraNetOptions.PRESETS = {
    "paper": dict(
        **_PUBLISHED,
        pretraining=0.23,
        min_recall=0.0,
        head_gradient=1.0,
        cost_dice=0.0,
        certain_weight=1.0,
        pseudo_dice=0.0,
        consistency_weight=1.0,
        ramp_up=0.0,
        all_heads=False,
    ),
    # The code divides the supervised and the certain sum by 4 but not the consistency, and adds the unlabeled half
    # with 0.5; here, nothing is divided.
    "code": dict(
        **_PUBLISHED,
        pretraining=0.23,
        min_recall=0.0,
        head_gradient=1.0,
        cost_dice=0.0,
        certain_weight=0.5,
        pseudo_dice=1.0,
        consistency_weight=0.2,
        ramp_up=0.15,
        all_heads=True,
    ),
}


class Relabeled(NamedTuple):
    """An unlabeled batch of the pool: its views, the student's labels, and where they are certain, (B, 1, *) bool."""

    weak: torch.Tensor
    strong: torch.Tensor
    hard: torch.Tensor
    certain: torch.Tensor


class nnUNetTrainerCoraNet(SemiSupervisedTrainer):
    """CoraNet on nnU-Net's U-Net (Inconsistency-aware Uncertainty Estimation, IEEE TMI 2021).

    Three branches share encoder and decoder: the plans' own segmentation layer (main), and two heads on the last
    features, trained with unequal costs. What both heads call alike is certain. There the student learns pseudo labels
    with their whole weight; elsewhere with a smaller one, or, as published, it follows a mean teacher.

    * Phase 1 (``pretraining``): L_crm on labeled data (Eq. 1), until the main branch finds every class in labeled
      patches (``min_recall``).
    * Phase 2, each step: L_crm + v(t) L_c-sn (Eq. 7) + w(t) L_cnt (Eq. 8), then the teacher (Eq. 9). Both weights rise
      over ``ramp_up`` of the run to ``certain_weight`` and ``consistency_weight``, which is 0 by default.
    * The weak view is labeled by the teacher, and moving averages of the heads say where it is certain. The student
      sees the strong view, with a box from another patch, unlabeled or labeled, that brings its labels, certainty and
      probabilities along; labeled voxels are certain.
    * With ``relabel_every``, as published, the student labels instead: every so many steps it labels new patches (Eqs.
      2-6), each of which then serves ``label_reuse`` steps.

    Multi-class: the heads are one-vs-rest over the K foreground classes or regions, which is the paper's set of binary
    sub-tasks in one network; a voxel is uncertain if the heads disagree in any of them.

    Corrected or decided, against paper and published code:

    * Conservative is background cost alpha (the list in section III.A; the caption of Fig. 1 has it the other way
      round), on labeled and unlabeled data alike (the code swaps the heads' costs between the two).
    * The main branch is the plans' segmentation layer, not a head of its own, so that the checkpoint is a plain
      nnU-Net; its loss is nnU-Net's Dice and cross-entropy with deep supervision.
    * The two costs are alpha : 1, scaled to a mean of 1.
    * Sums over pixels (Eqs. 1, 7, 8) are means over the voxels of the region, so that the weights do not depend on
      the patch size. The code divides the cost terms by the sum of their costs, which leaves the conservative head so
      little gradient from foreground that it learns to predict none.
    * Uncertain voxels have a smaller weight in L_c-sn (``uncertain_weight``), not none: where no loss reaches, errors
      grow. With the paper's mask, false right ventricles spread over the background of cardiac MRI, where the heads
      disagree, and a mean teacher that has them too does not take them back (docs/results.md).
    * One step on the sum of the losses, instead of three steps in turn (Algorithm 1).
    * Pseudo labels are the main branch's; the paper's voting among binary networks has nothing to vote on here.
    * Table IV's "seg+mt (mask)" is the mean teacher on the certain region, as its text says.
    * The heads have cost-sensitive Dice beside the cross-entropy (``cost_dice``), as nnU-Net's own loss has Dice: with
      the cross-entropy alone, the conservative head had found no foreground after 2000 steps (docs/results_archive.md).
    * The heads are a quarter as wide as the features they read (at least 8 channels), and ``head_gradient`` of their
      gradient reaches encoder and decoder, by default nothing: the heads watch. With all of it, two losses out of three
      ask the shared network for costs that the main branch does not have, and the supervised loss falls behind that of
      nnU-Net (docs/results_archive.md).
    """

    paper = Paper("Shi et al., IEEE TMI 2021, Eqs. 1-9", 2021)
    idea = "heads with unequal costs tell certain pseudo labels from uncertain ones, which weigh less"
    use_when = "to study certain and uncertain regions"
    corrected = (
        "in the conservative head background is the costly class, on labeled and unlabeled data alike (Fig. "
        "1's caption has it the other way round); costs with a mean of 1, sums are means over voxels; one "
        "step on the sum of the losses; cost-sensitive Dice beside the cross-entropy; two thin heads on one "
        "network, without their gradient in it; pseudo labels without a vote; pretraining lasts until every class "
        "is found; a teacher labels, on mixed views, and uncertain voxels weigh less instead of following it"
    )
    labeled_by = "teacher"
    terms = dict(
        **dict.fromkeys(("supervised", "certain"), STUDENT),
        **dict.fromkeys(("conservative", "radical"), ("heads",)),
    )
    switched_off = "setting=seg"
    teacher_starts_pretrained = True
    Options = CoraNetOptions
    options: CoraNetOptions

    # ------------------------------------------------------------------------------------------------- networks, phases

    def build_companions(self):
        unet = unwrap(self.network)
        check_is_unet(unet)
        self._forward = self.compiled(forward_with_features)
        self._pool: list[dict] = []
        self._certain_loss = self.segmentation_loss(dice_weight=self.options.pseudo_dice)
        companions = {}
        names = {"cost": ("conservative", "radical"), "aleatoric": ("mean", "deviation")}
        heads = {
            name: FeatureHead(unet, self.labels.num_foreground) for name in names.get(self.options.uncertainty, ())
        }
        if heads:
            companions["heads"] = nn.ModuleDict(heads)
        if heads and self.needs_unlabeled() and (self._trains_all_heads or self._labels_afresh):
            companions["teacher_heads"] = EMATeacher(companions["heads"], self.options.ema_decay, warm_up=False)
        return companions

    @property
    def _trains_all_heads(self) -> bool:
        return self.options.all_heads and self.options.uncertainty == "cost"

    @property
    def _labels_afresh(self) -> bool:
        return self.options.relabel_every == 0

    @property
    def _dropout(self) -> float:
        return DROPOUT if self.options.uncertainty == "mcdropout" else 0.0

    def needs_unlabeled(self):
        return self._regions != (None, None)

    @property
    def _regions(self) -> tuple[str | None, str | None]:
        """Where self-training and mean teacher work: "certain", "uncertain", "all", or None for a term that is off."""
        self_training, mean_teacher = SETTINGS[self.options.setting]
        return (
            self_training if self.options.certain_weight > 0 else None,
            mean_teacher if self.options.consistency_weight > 0 else None,
        )

    def start_phase_2(self):
        """Algorithm 1, line 3: the teacher starts from the pretrained student."""
        super().start_phase_2()
        self._pool = []
        if "teacher_heads" in self.companions:
            self.companions["teacher_heads"].copy_from(self.companions["heads"])

    def on_train_epoch_start(self):
        super().on_train_epoch_start()
        self._pool = []

    def after_step(self):
        super().after_step()
        if "teacher_heads" in self.companions:
            self.companions["teacher_heads"].update(self.companions["heads"])

    # ------------------------------------------------------------------------------------------------------- CRM, Eq. 1

    def supervised_loss(self, data, target, network=0):
        with self.autocast():
            outputs, features = self._forward(unwrap(self.network), data, self._dropout)
            terms = {"supervised": Term(self.loss(outputs, target))}
            heads = self._run_heads(features)
        self.schedule.see(outputs, full_resolution(target))
        foreground, valid = self.labels.one_vs_rest(full_resolution(target))
        return terms | self._head_losses(heads, foreground, valid, "")

    def _run_heads(self, features: torch.Tensor, name: str = "heads") -> dict[str, torch.Tensor]:
        """(B, K, *) logits of each head."""
        if name not in self.companions:
            return {}
        heads: Any = self.companions[name]
        heads = heads.module if isinstance(heads, EMATeacher) else heads
        share = self.options.head_gradient
        if share == 0.0:
            features = features.detach()
        elif features.requires_grad and share != 1.0:
            features = features.view_as(features)
            features.register_hook(lambda gradient: share * gradient)
        return {key: head(features) for key, head in heads.items()}

    def _head_losses(self, heads: dict, foreground, valid, suffix: str, weight: float = 1.0) -> dict[str, Term]:
        if "conservative" in heads:
            alpha = self.options.alpha
            return {
                f"{name}{suffix}": Term(self._cost_loss(heads[name], foreground, valid, *costs), weight)
                for name, costs in (("conservative", (alpha, 1.0)), ("radical", (1.0, alpha)))
            }
        if "deviation" in heads:
            with self.random_stream:
                noise = torch.randn((self.options.passes, *heads["mean"].shape), device=self.device)
            deviation = F.softplus(heads["deviation"].float())
            loss = heteroscedastic_bce(heads["mean"], deviation, foreground, valid, noise)
            return {"aleatoric": Term(loss, weight)}
        return {}

    def _cost_loss(self, *arguments) -> torch.Tensor:
        loss = cost_sensitive_bce(*arguments)
        if self.options.cost_dice > 0:
            loss = loss + self.options.cost_dice * cost_sensitive_dice(*arguments)
        return loss

    # --------------------------------------------------------------------------------------- pseudo labels, Eqs. 2 to 6

    def next_unlabeled(self):
        """A patch; with ``relabel_every``, one of the pool that the last relabeling filled, with its pseudo label."""
        o = self.options
        if self._labels_afresh:
            return super().next_unlabeled()
        step = self.global_step - self.current_epoch * self.num_iterations_per_epoch
        # Counted from the start of the epoch, so that a run which resumes there has the same pool.
        since = step % o.relabel_every
        if since == 0 or not self._pool:
            steps = min(o.relabel_every - since, self.num_iterations_per_epoch - step)
            self._pool = [self._labeled_batch() for _ in range(math.ceil(steps / o.label_reuse))]
        batch = self._pool[since % len(self._pool)]
        self._unlabeled_keys = batch["keys"]
        relabeled = Relabeled(*(self.to_device(batch[name]) for name in Relabeled._fields))
        return relabeled if self.labels.has_regions else relabeled._replace(hard=relabeled.hard.long())

    @torch.no_grad()
    def _labeled_batch(self) -> dict:
        batch = self.draw_unlabeled()
        probabilities, certain = LABEL_BY[self.options.uncertainty](self, self.to_device(batch["weak"]))
        hard = self._hard(probabilities)
        hard = hard if self.labels.has_regions else hard.to(torch.int16)
        return {**batch, "hard": hard.cpu(), "certain": certain.cpu()}

    def _hard(self, probabilities: torch.Tensor) -> torch.Tensor:
        # LabelAdapter.hard reads logits; for sigmoids the threshold is 0.5.
        return self.labels.hard(probabilities - 0.5 if self.labels.has_regions else probabilities)

    @property
    def labeling(self) -> nn.Module:
        """The network that labels."""
        return self.networks["teacher"] if self._labels_afresh else unwrap(self.network)

    def probabilities_and_heads(self, data: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """(B, C, *) probabilities of the network that labels, and the (B, K, *) logits of each of its heads."""
        with self.autocast():
            outputs, features = self._forward(self.labeling, data)
            heads = self._run_heads(features, "teacher_heads" if self._labels_afresh else "heads")
        return self.labels.probabilities(full_resolution(outputs)), heads

    def probabilities_with_dropout(self, data: torch.Tensor) -> torch.Tensor:
        """(B, C, *) of one pass of the network that labels."""
        with self.autocast():
            outputs, _ = self._forward(self.labeling, data, DROPOUT)
        return self.labels.probabilities(full_resolution(outputs))

    # --------------------------------------------------------------------------------------- C-SN and UC-SN, Eqs. 7, 8

    @torch.no_grad()
    def targets(self, unlabeled: Unlabeled | Relabeled) -> Voxels:
        followed = {}
        if isinstance(unlabeled, Relabeled):
            hard, certain = unlabeled.hard, unlabeled.certain
        else:
            followed["main"], certain = LABEL_BY[self.options.uncertainty](self, unlabeled.weak)
            hard = self._hard(followed["main"])
        self.monitor("certain_voxels", certain.float().mean())
        self.monitor("pseudo_foreground", self.labels.is_foreground(hard).float().mean())
        if self._regions[1] is None:
            followed = {}
        elif not followed or self._trains_all_heads:
            followed = self._followed(unlabeled.weak)
        return {"hard": hard, "certain": certain, "known": torch.ones_like(certain), **followed}

    def _followed(self, weak: torch.Tensor) -> dict[str, torch.Tensor]:
        """Probabilities of the teacher, and with ``all_heads`` those of its two heads."""
        assert self.teacher is not None
        if not self._trains_all_heads:
            return {"main": self.labels.probabilities(self.logits(self.teacher, weak))}
        with self.autocast():
            outputs, features = self._forward(self.teacher.module, weak)
            heads = self._run_heads(features, "teacher_heads")
        followed = {"main": self.labels.probabilities(full_resolution(outputs))}
        return followed | {name: logits.float().sigmoid() for name, logits in heads.items()}

    def targets_of_labels(self, hard, valid):
        foreground, _ = self.labels.one_vs_rest(hard)
        branches = {"main": self.labels.as_probabilities(hard), "conservative": foreground, "radical": foreground}
        return {"hard": hard, "certain": valid, "known": valid, **branches}

    def student_losses(self, image, hard, certain, known, **followed):
        """
        Args:
            certain, known: (B, 1, *) bool; False in ``known`` where a labeled patch's label is ignored.
            followed: Probabilities that the branches follow on the uncertain region.
        """
        o, ramp = self.options, self.ramp()
        masks = {"certain": certain, "uncertain": ~certain & known, "all": known}
        self_training, mean_teacher = (masks.get(region) for region in self._regions)
        if self._trains_all_heads or self._dropout:
            with self.autocast():
                outputs, features = self._forward(unwrap(self.network), image, self._dropout)
                heads = self._run_heads(features) if self._trains_all_heads else {}
        else:
            outputs, heads = self.outputs(self.student, image), {}
        terms = {}
        if self_training is not None:
            weight = o.certain_weight * ramp
            voxels = torch.where(self_training, 1.0, o.uncertain_weight) * known
            terms["certain"] = Term(self._certain_loss(outputs, hard, voxels), weight)
            if heads:
                foreground, valid = self.labels.one_vs_rest(hard)
                terms |= self._head_losses(heads, foreground, valid & self_training, "_certain", weight)
        if mean_teacher is not None:
            consistency = self._consistency(full_resolution(outputs), heads, followed, mean_teacher)
            terms["consistency"] = Term(consistency, o.consistency_weight * ramp)
        yield terms

    def _consistency(self, student: torch.Tensor, heads: dict, followed: dict, mask: torch.Tensor) -> torch.Tensor:
        """Eq. 8, or its mean over the three branches with ``all_heads``."""
        distances = [masked_squared_distance(self.labels.probabilities(student), followed["main"], mask)]
        for name, logits in heads.items():
            # The two channels of a binary problem differ by the same amount.
            distances.append(2 * masked_squared_distance(logits.float().sigmoid(), followed[name], mask))
        return torch.stack(distances).mean()
