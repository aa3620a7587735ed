"""Does the steps that are left to do, until a reason to stop comes up."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from nnunet_semiseg.executors import LocalExecutor, SlurmExecutor
from nnunet_semiseg.jobs import lock
from pseudo_label.rounds import command_lines, dataset_ids
from pseudo_label.rounds.manifest import Manifest
from pseudo_label.rounds.round import Round
from pseudo_label.rounds.settings import RoundsSettings
from pseudo_label.rounds.setup import Setup
from pseudo_label.rounds.steps import FIRST, STEPS, TRAIN, RoundStep


class Rounds:
    """A work folder with a manifest, and the datasets and trainings that belong to it. Nothing is deleted.

    Args:
        settings: Those of the first call, except for more rounds and ``allow_drift``.
        folder: The work folder.
        executor: Runs trainings and predictions.
        parts: Into how many jobs a member's prediction is cut.
        processes: For scoring and preprocessing; up to 3 for reading and writing of predictions.

    Raises:
        ValueError, FileNotFoundError, CaseError: naming what cannot be used.
    """

    def __init__(
        self,
        settings: RoundsSettings,
        folder: Path,
        executor: LocalExecutor | SlurmExecutor,
        parts: int,
        processes: int,
    ):
        self.folder, self.executor = folder.resolve(), executor
        self.setup = Setup.read(settings, self.folder, parts, processes)
        self.manifest = self._open_manifest()
        dataset_ids.check_ids(settings.dataset_ids, settings.rounds, self.manifest.datasets[1:], self.folder)

    def _open_manifest(self) -> Manifest:
        setup = self.setup
        manifest = Manifest.open(setup.work.manifest, json.loads(json.dumps(asdict(setup.settings))))
        now = setup.cases.as_json()
        setup.cases.check_unchanged(manifest.cases or now, setup.first.splits_file)
        manifest.cases = now
        return manifest

    def run(self, call: str | None = None) -> str:
        """Do what is left to do; returns why the rounds stopped.

        Args:
            call: The command line, for the manifest.

        Raises:
            RuntimeError: with the ends of the logs, if trainings or predictions failed; a further call continues.
            CaseError, OSError: naming the case or file.
        """
        held = lock(self.setup.work.lock)
        if held is None:
            raise ValueError(f"Another call works on {self.folder}. Wait for it, or stop it")
        with held:
            # Another call may have gone on since this one read it.
            self.manifest = self._open_manifest()
            if call and self.manifest.stopped is None:
                self.manifest.calls.append(call)
            self._loop()
        assert self.manifest.stopped is not None
        return self.manifest.stopped

    def _loop(self) -> None:
        manifest = self.manifest
        if not manifest.rounds:
            manifest.begin_round(self.setup.first.name)
        self._do(self.round(0), FIRST)
        while manifest.stopped is None:
            last = self.round(len(manifest.rounds) - 1)
            if not manifest.is_done(last.number, TRAIN.name):
                self._finish(last)
            elif reason := self._reason_to_end(last):
                self._stop(reason)
            else:
                self._begin(last.number + 1)

    def _reason_to_end(self, last: Round) -> str | None:
        """Why no round follows one that is done.

        Its step asked, too, but may have been killed before it was written down; or more rounds may be allowed now.
        """
        reason = (TRAIN if last.number > 0 else FIRST).reason_to_stop(last)
        if reason is None and last.number >= self.setup.settings.rounds:
            return f"All {last.number} rounds are done"
        return reason

    def _begin(self, number: int) -> None:
        ids = self.setup.settings.dataset_ids
        self.manifest.begin_round(dataset_ids.take_name(self.setup.first.name, number, ids, self.folder))

    def _finish(self, current: Round) -> None:
        """The steps of a round that are not done; it may stop the rounds."""
        for step in STEPS:
            self._do(current, step)
            reason = step.reason_to_stop(current)
            if reason:
                self._stop(reason)
                return

    def _do(self, current: Round, step: RoundStep) -> None:
        if not self.manifest.is_done(current.number, step.name):
            print(f"Round {current.number}: {step.name}", flush=True)
            with self.manifest.step(current.number, step.name) as record:
                record.update(step.run(current))

    def _stop(self, reason: str) -> None:
        self.manifest.stopped = reason
        self.manifest.write()

    def round(self, number: int) -> Round:
        return Round(self.setup, self.manifest, self.executor, number)

    def describe(self) -> list[str]:
        """The command lines of all rounds, in their order, as if no round stopped them early."""
        s, first, begun = self.setup.settings, self.setup.first.name, self.manifest.datasets[1:]
        names = dataset_ids.planned_names(first, begun, s.rounds, s.dataset_ids, self.folder)
        return command_lines.all_of_them(self.setup, [first, *names], self.executor)
