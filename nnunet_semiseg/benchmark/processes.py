"""A command with an end of its time, and the peak of its memory."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from nnunet_semiseg.jobs import POLL_SECONDS, Job, end_processes, start


class OutOfTime(Exception):
    """The time of the call is over."""


class Child:
    """A job that runs (``jobs.start``).

    Args:
        job: On the CPU its command does not compile, unless the user's variable says so.
        lock_file: Of its processes.
        device: "cpu" or "cuda".

    Raises:
        FileNotFoundError: if there is no such program.
    """

    def __init__(self, job: Job, lock_file: Path, device: str):
        if device == "cpu" and "nnUNet_compile" not in os.environ:
            job = replace(job, environment={**job.environment, "nnUNet_compile": "f"})
        job.check_program()
        self.lock_file = lock_file
        self.peak_gib = 0.0
        self.process = start(job, lock_file)

    @property
    def exit_code(self) -> int | None:
        return self.process.returncode

    def running(self) -> bool:
        if self.process.returncode is None:
            # Unlike poll(), this tells the memory of this very process. It is born with its parent's peak, which is
            # below that of any training.
            ended, status, usage = os.wait4(self.process.pid, os.WNOHANG)
            if ended:
                self.process.returncode = os.waitstatus_to_exitcode(status)
                self.peak_gib = usage.ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
        return self.process.returncode is None

    def wait(self, deadline: float, look: Callable[[], None] = lambda: None) -> None:
        """Wait for the end, looking after something meanwhile; whatever happens, no process of it is left.

        Raises:
            OutOfTime: at the deadline.
        """
        try:
            while self.running():
                if time.monotonic() > deadline:
                    raise OutOfTime
                look()
                time.sleep(POLL_SECONDS)
        finally:
            end_processes([self.lock_file])
            while self.running():
                time.sleep(0.01)
