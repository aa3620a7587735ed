"""A round, as its steps see it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from nnunet_semiseg.executors import LocalExecutor, SlurmExecutor
from nnunet_semiseg.jobs import Job
from pseudo_label.rounds.manifest import Manifest
from pseudo_label.rounds.setup import Setup
from pseudo_label.rounds.work_folder import RoundFolder


@dataclass(frozen=True)
class Round:
    """One round: what is asked, what is done, and who runs jobs.

    Args:
        executor: Runs trainings and predictions.
        number: Of the round.
    """

    setup: Setup
    manifest: Manifest
    executor: LocalExecutor | SlurmExecutor
    number: int

    @property
    def record(self) -> dict:
        """What the manifest knows of it."""
        return self.manifest.rounds[self.number]

    @property
    def dataset(self) -> str:
        """The name of the dataset on which its members are trained."""
        return self.record["dataset"]

    @property
    def folder(self) -> RoundFolder:
        return self.setup.work.round(self.number)

    @property
    def before(self) -> Round:
        return self.earlier(self.number - 1)

    def earlier(self, number: int) -> Round:
        return replace(self, number=number)

    def run(self, jobs: Sequence[Job]) -> None:
        """Raises RuntimeError, with the ends of the logs, if jobs fail."""
        failures = self.executor.run(jobs)
        if failures:
            cure = "Fix the cause, and give the same command again: it continues"
            raise RuntimeError("\n".join([*map(str, failures), cure]))
