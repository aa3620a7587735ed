"""Prediction of the cases that are still unlabeled, with every member."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from pathlib import Path

from nnunetv2.imageio.base_reader_writer import BaseReaderWriter

from nnunet_semiseg.datasets import CaseError
from nnunet_semiseg.jobs import Job, end_of
from nnunet_semiseg.parallel import over_cases
from nnunet_semiseg.segmentations import Classes, read_labels
from pseudo_label.rounds import command_lines
from pseudo_label.rounds.links import link_images
from pseudo_label.rounds.next_dataset import next_dataset
from pseudo_label.rounds.round import Round
from pseudo_label.rounds.settings import Member


def predict(current: Round) -> dict:
    """{"predicted": the number of cases}.

    Raises:
        RuntimeError: naming a case that a prediction has left out.
    """
    remaining = next_dataset(current).remaining
    for case, files in remaining.items():
        link_images(files, current.folder.images, case, current.setup.first.file_ending)
    _predict(current, remaining)
    # A kill of an earlier call, or of a job that the executor tried again, cuts off files, which --continue_prediction
    # takes for finished. They are looked for only now: jobs on a cluster go on after a kill and may have been writing
    # them.
    damaged = _damaged(current, remaining)
    for file in damaged:
        file.unlink()
    if damaged:
        _predict(current, remaining)
    return {"predicted": len(remaining)}


def _predict(current: Round, cases: Iterable[str]) -> None:
    """Run the predictions of members that lack cases. Raises RuntimeError naming a case that is lacking then."""
    waiting = [member for member in current.setup.members if _unpredicted(current, member, cases)]
    current.run([job for member in waiting for job in _jobs(current, member)])
    for member in waiting:
        missing = _unpredicted(current, member, cases)
        if missing:
            logs = [end_of(job.log) for job in _jobs(current, member)]
            folder = current.folder.predictions(member.name)
            raise RuntimeError("\n".join([f"The prediction of {member.name} left no {missing[0]} in {folder}.", *logs]))


def _jobs(current: Round, member: Member) -> list[Job]:
    return command_lines.predictions(current.setup, current.number, current.before.dataset, member)


def _unpredicted(current: Round, member: Member, cases: Iterable[str]) -> list[str]:
    """The cases without one of a member's files."""
    return [case for case in cases if not all(file.is_file() for file in _files(current, member, case))]


def _files(current: Round, member: Member, case: str) -> list[Path]:
    """A member's label map of a case, and the probabilities, if they are needed."""
    setup, folder = current.setup, current.folder.predictions(member.name)
    endings = [setup.first.file_ending, *([".npz"] if setup.settings.needs_probabilities else [])]
    return [folder / f"{case}{ending}" for ending in endings]


def _damaged(current: Round, cases: Iterable[str]) -> list[Path]:
    setup = current.setup
    jobs = {
        f"{member.name} {case}": (_files(current, member, case), setup.classes, setup.reader)
        for member in setup.members
        for case in cases
    }
    found, failures = over_cases(_damaged_files, jobs, setup.processes, "Checking")
    if failures:
        raise CaseError("\n".join(failures))
    return [file for files in found.values() for file in files]


def _damaged_files(files: list[Path], classes: Classes, reader: type[BaseReaderWriter]) -> list[Path]:
    """Those of a case's label map and probabilities that are cut off; both, or nnU-Net would write only one."""
    try:
        read_labels(files[0], classes.known, reader)
    except CaseError:
        return files
    return files if not all(zipfile.is_zipfile(file) for file in files[1:]) else []
