"""The options that methods share; with those that it takes, a method asks for a part of the frame."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from nnunet_semiseg.trainers.frame.settings import SeedOptions
from nnunet_semiseg.trainers.options import option

MIXING = ("none", "unlabeled", "labeled", "both", "copypaste")


@dataclass(frozen=True)
class FrameOptions(SeedOptions):
    """Options that every method has."""

    # Settings by name, for an option ``preset``.
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {}

    strong_view: str = option(
        "nnunet",
        "intensities of an unlabeled patch's strong view: those of the weak view, nnU-Net's augmentation, or on top of "
        "it contrast, brightness, gamma, noise and blur for nearly every patch",
        choices=("none", "nnunet", "strong"),
    )
    mixing: str = option(
        "none",
        "source of the box that is pasted into each unlabeled patch: other patches of these kinds; copypaste: labeled "
        "patches, which give the box and its surroundings by turns",
        choices=MIXING,
    )
    box: float = option(
        0.0, "side of the box, as a share of the patch's; 0: drawn, half of the patch on average", low=0.0, high=1.0
    )
    turns: bool = option(False, "mirror and turn the student's patches by right angles, after they were labeled")
    unlabeled_foreground_sampling: float = option(
        0.0, "probability of centering an unlabeled patch on predicted foreground", low=0.0, high=1.0
    )
    half_batches: bool = option(
        False,
        "labeled and unlabeled patches are half of nnU-Net's batch each, and a step costs little more than nnU-Net's; "
        "else each are as many as nnU-Net's batch",
    )
    allow_absent_classes: bool = option(False, "train although a class is in no labeled training case")


@dataclass(frozen=True)
class RampOptions(FrameOptions):
    """Options of methods whose unsupervised weight rises over the run."""

    warm_up: float = option(0.1, "share of the run without unlabeled data, at the start", low=0.0, high=1.0)
    ramp_up: float = option(
        0.3, "share of the run over which the unsupervised weight rises, after warm-up", low=0.0, high=1.0
    )


# As in the papers: the weight rises over the whole run.
WHOLE_RUN = dict(warm_up=0.0, ramp_up=1.0)


@dataclass(frozen=True)
class PretrainingOptions(FrameOptions):
    """Options of methods that learn from labels alone until their networks know every class."""

    pretraining: float = option(0.2, "share of the run that trains on labeled data only", low=0.0, high=1.0)
    min_recall: float = option(
        0.3, "recall of each class on labeled patches, before which pretraining goes on", low=0.0, high=1.0
    )
    ramp_up: float = option(
        0.2, "share of the run over which the unsupervised weight rises, after pretraining", low=0.0, high=1.0
    )


@dataclass(frozen=True)
class TeacherOptions:
    """Options of methods with a teacher, the moving average of the student."""

    ema_decay: float = option(0.99, "largest decay of the teacher, per step", low=0.0, high=1.0)
    predict_with: str = option("student", "the network that predicts", choices=("student", "teacher"))


@dataclass(frozen=True)
class PseudoLabelOptions:
    """Options of methods whose student learns hard labels that a network made.

    The frame then makes ``pseudo_label_loss``, nnU-Net's loss with a weight for each voxel (``segmentation_loss``).
    """

    pseudo_weight: float = option(1.0, "largest weight of the loss on pseudo labels", low=0.0)
    confidence: float = option(
        0.0, "probability from which a pseudo label has weight 1; 0: all have", low=0.0, high=1.0
    )
    unsure_weight: float = option(0.3, "weight of the pseudo labels below it", low=0.0, high=1.0)
    deep_pseudo: bool = option(True, "pseudo labels at every resolution that nnU-Net supervises")


def second_network_option(default: str) -> str:
    return option(
        default,
        "architecture of the second network: the plans' own, or a plain or residual encoder U-Net; other: the one of "
        "these that the plans' own is not",
        choices=("same", "resenc", "plain", "other"),
    )


@dataclass(frozen=True)
class SecondNetworkOptions:
    """Options of methods with a second network that learns beside the first."""

    second_network: str = second_network_option("same")
