"""What is known before the first step, and does not change in later calls."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nnunetv2.imageio.base_reader_writer import BaseReaderWriter

from nnunet_semiseg.datasets import Dataset
from nnunet_semiseg.segmentations import Classes
from nnunet_semiseg.trainers.options import MAX_NAME, check_folder_name
from nnunet_semiseg.trainers.registry import find_trainer
from pseudo_label.rounds.cases import Cases, read_cases
from pseudo_label.rounds.settings import Member, RoundsSettings
from pseudo_label.rounds.work_folder import WorkFolder


@dataclass(frozen=True)
class Setup:
    """The settings, and what the dataset of round 0 has.

    Args:
        first: The dataset of round 0.
        reader: nnU-Net's, of its images and label maps.
        parts: Into how many jobs a member's prediction is cut.
        processes: For scoring and preprocessing; up to 3 for reading and writing of predictions.
    """

    settings: RoundsSettings
    members: tuple[Member, ...]
    first: Dataset
    classes: Classes
    reader: type[BaseReaderWriter]
    cases: Cases
    work: WorkFolder
    parts: int
    processes: int

    @classmethod
    def read(cls, settings: RoundsSettings, folder: Path, parts: int, processes: int) -> Setup:
        """Raises ValueError, FileNotFoundError or CaseError, naming what cannot be used."""
        members = settings.read_members()
        settings.check_numbers()
        if parts < 1:
            raise ValueError(f"parts is {parts}. Use 1 or more")
        first = Dataset(settings.dataset)
        classes = Classes.from_file(first.json_file)
        classes.check_order(first.json_file)
        settings.rules.check(classes.names)
        plans = first.plans(settings.plans)
        if settings.configuration not in plans.available_configurations:
            raise ValueError(
                f"{settings.plans} has no configuration {settings.configuration}. It has "
                f"{', '.join(plans.available_configurations)}"
            )
        if plans.get_configuration(settings.configuration).previous_stage_name:
            raise ValueError(
                f"{settings.configuration} is the second stage of a cascade. Use the members' first stage for rounds"
            )
        for member in members:
            _check_length(member, settings, parts)
        return cls(
            settings=settings,
            members=members,
            first=first,
            classes=classes,
            reader=plans.image_reader_writer_class,
            cases=read_cases(first, sorted({member.fold for member in members})),
            work=WorkFolder(folder),
            parts=parts,
            processes=processes,
        )


def _check_length(member: Member, settings: RoundsSettings, parts: int) -> None:
    """Raises ValueError if a name of a file or folder would be too long."""
    trainer = find_trainer(member.trainer)
    second = "" if trainer is None else trainer.folder_suffix()
    check_folder_name(member.trainer + second, settings.plans, settings.configuration)
    # Of the files in the work folder, the lock beside the log of a prediction has the longest name.
    excess = len(f".predict_{member.name}_part{parts - 1}.log.lock".encode()) - MAX_NAME
    if excess > 0:
        raise ValueError(f"The name of member {member.name} is {excess} characters too long. Set fewer options")
