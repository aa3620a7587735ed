"""What rounds are asked to do."""

from __future__ import annotations

from dataclasses import dataclass

from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from nnunet_semiseg.trainers.frame import SemiSupervisedTrainer
from nnunet_semiseg.trainers.options import OptionError
from nnunet_semiseg.trainers.registry import find_trainer
from pseudo_label.selection import SelectionRules


@dataclass(frozen=True)
class Member:
    """One of the models of a consensus.

    Args:
        trainer: For ``nnUNetv2_train -tr``.
        fold: nnU-Net's.
    """

    trainer: str
    fold: int

    @classmethod
    def of(cls, text: str) -> Member:
        """``TRAINER`` or ``TRAINER:FOLD``; fold 0 without one.

        Raises:
            ValueError: naming what is wrong.
        """
        trainer, colon, fold = text.partition(":")
        if colon and not fold.isdigit():
            raise ValueError(
                f"The fold of member {text} is not a number. A member is TRAINER or TRAINER:FOLD; fold 'all' has no "
                "validation cases that tell whether a round helped"
            )
        try:
            known = find_trainer(trainer)
        except OptionError as error:
            raise ValueError(f"Member {text}: {error}") from None
        if known is None:
            try:
                recursive_find_trainer_class_by_name(trainer)
            except RuntimeError:
                raise ValueError(
                    f"nnU-Net finds no trainer {trainer}. nnunet_semiseg trainers lists those of this package"
                ) from None
        return cls(trainer, int(fold or 0))

    @property
    def name(self) -> str:
        return f"{self.trainer}_fold{self.fold}"

    @property
    def learns_from_unlabeled(self) -> bool:
        trainer = find_trainer(self.trainer) or recursive_find_trainer_class_by_name(self.trainer)
        return issubclass(trainer, SemiSupervisedTrainer) and trainer.learns_from_unlabeled()


@dataclass(frozen=True)
class RoundsSettings:
    """What decides the outcome of rounds; kept in the manifest.

    Args:
        dataset: Of round 0, ``Dataset501_Name``.
        members: Two or more, all different.
        rounds: How often the labeled set grows, at most.
        dataset_ids: Of the rounds' datasets; empty for free ones.
        min_agreement: Voxels with less agreement become the ignore label; 0 for none.
        finetune: A round starts from all weights of the one before, rather than anew.
        relabel: Each round predicts and selects all cases anew, those with a pseudo label of an earlier one as well.
        repeat_real: How often a labeled case counts as one with a pseudo label; None: so often that a third of what
            is drawn is labeled.
        max_drop: By how much the members' mean validation Dice may fall from a round to the next.
        allow_drift: Go on although a class has drifted or is gone.
        annotate: How many cases to propose for annotation in each round.
    """

    dataset: str
    configuration: str
    plans: str
    members: tuple[str, ...]
    rounds: int
    rules: SelectionRules
    dataset_ids: tuple[int, ...] = ()
    consensus: str | None = None
    metric: str = "dice"
    per_slice: bool = False
    min_agreement: float = 0.0
    finetune: bool = False
    relabel: bool = False
    repeat_real: int | None = None
    max_drop: float = 0.0
    allow_drift: bool = False
    annotate: int = 5
    disable_tta: bool = False

    @property
    def needs_probabilities(self) -> bool:
        return self.consensus in (None, "mean")

    def read_members(self) -> tuple[Member, ...]:
        """Raises ValueError, naming the member, if they cannot form a consensus."""
        members = tuple(Member.of(text) for text in self.members)
        if len(members) < 2:
            raise ValueError("One member agrees with itself always. Give two or more --members")
        twice = [member for i, member in enumerate(members) if member in members[:i]]
        if twice:
            raise ValueError(f"Member {twice[0].name} is given twice. Use another fold, or another _seed=")
        return members

    def check_numbers(self) -> None:
        """Raises ValueError, naming the number, if one is too small."""
        lowest = {"rounds": (self.rounds, 1), "repeat_real": (self.repeat_real, 1), "annotate": (self.annotate, 0)}
        for name, (value, least) in lowest.items():
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}. Use {least} or more")
