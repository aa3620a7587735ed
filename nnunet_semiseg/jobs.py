"""Jobs, which are command lines that run for hours in processes of their own: their locks, logs and ends.

Linux and macOS.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

# Begins the line that a job's log has before the output of each attempt.
HEADER = "=== job "
TAIL_LINES = 10
POLL_SECONDS = 0.2
# How long processes have to end after SIGTERM, and again after SIGKILL.
END_SECONDS = 15.0


@dataclass(frozen=True)
class Job:
    """A command line.

    Args:
        name: Different for each job of a call.
        command: Program and arguments.
        log: File that gets what the command prints, after a line with the time and the command; every attempt is added.
        environment: Variables that the command gets beside those of this process.
    """

    name: str
    command: tuple[str, ...]
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def line(self) -> str:
        """The command as a line for a shell."""
        variables = [f"{key}={shlex.quote(value)}" for key, value in self.environment.items()]
        return " ".join([*variables, shlex.join(self.command)])

    def full_environment(self) -> dict[str, str]:
        """All variables of the command."""
        # Unbuffered, so that a process that is killed has written all it had to say.
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **self.environment}
        # nnU-Net's commands lie beside this interpreter, even where its environment is not activated.
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', os.defpath)}"
        return environment

    def check_program(self) -> None:
        """Raises FileNotFoundError if there is no such program."""
        if shutil.which(self.command[0], path=self.full_environment()["PATH"]) is None:
            raise FileNotFoundError(f"There is no {self.command[0]}. Install nnU-Net where {sys.executable} is")


def start(job: Job, lock_file: Path | None = None) -> subprocess.Popen:
    """Start a job's command; its output is added to the log.

    Args:
        lock_file: For a command in a process group of its own. The group's number is written into the file, and is
            valid as long as there is a lock on it: until the last process of the group has ended (``end_processes``).
    """
    job.log.parent.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = dict(env=job.full_environment(), stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    with open(job.log, "ab") as log:
        begin = "\n" if log.tell() else ""
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        log.write(f"{begin}{HEADER}{job.name} on {socket.gethostname()}, {now}: {job.line}\n".encode())
        log.flush()
        if lock_file is None:
            return subprocess.Popen(job.command, stdout=log, **options)
        held = lock(lock_file)
        if held is None:
            raise RuntimeError(f"{lock_file} is locked: the processes of an earlier {job.name} have not ended")
        with held:
            held.truncate(0)
            # The command's own process writes its number, so that there is one even if this process is killed now.
            script = 'echo "$$ $1" > "$0" && shift && exec "$@"'
            command = ["/bin/sh", "-c", script, str(lock_file), socket.gethostname(), *job.command]
            return subprocess.Popen(command, stdout=log, pass_fds=[held.fileno()], start_new_session=True, **options)


def lock(file: Path) -> TextIO | None:
    """The open file with a lock on it, or None if another process has it. The lock lasts as long as the file is open.

    Raises:
        OSError: if the file system has no locks.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    stream = open(file, "a+", encoding="utf-8")  # noqa: SIM115
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.close()
        return None
    except OSError as error:
        stream.close()
        raise OSError(f"{file} cannot be locked ({error.strerror}). Use a file system that has locks (flock)") from None
    return stream


def _is_locked(file: Path) -> bool:
    if not file.exists():
        return False
    stream = lock(file)
    if stream is not None:
        stream.close()
    return stream is None


def end_processes(lock_files: Iterable[Path]) -> None:
    """End the process groups whose numbers are in the files, those of which a process has the lock on its file.

    That is how a command is found whose caller was killed. The lock makes sure that the number is still that group's.

    Raises:
        RuntimeError: naming the group, if it runs on another machine or does not end.
    """
    lock_files = list(lock_files)
    for number in (signal.SIGTERM, signal.SIGKILL):
        told = set()
        deadline = time.monotonic() + END_SECONDS
        while held := [file for file in lock_files if _is_locked(file)]:
            for file in held:
                # The first thing that a command does is to write its group and machine into the file.
                group, _, host = file.read_text().strip().partition(" ")
                if not host or file in told:
                    continue
                if host != socket.gethostname():
                    raise RuntimeError(f"The job of {file} still runs on {host}. Run there: kill -- -{group}")
                with suppress(ProcessLookupError):
                    os.killpg(int(group), number)
                told.add(file)
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        else:
            return
    raise RuntimeError(f"The processes of {held[0]} do not end. End them by hand; the file has their group's number")


@contextmanager
def signals_raise() -> Iterator[None]:
    """SIGTERM and SIGHUP raise SystemExit as Ctrl-C raises KeyboardInterrupt; what nohup ignores stays ignored."""
    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def exit_reason(exit_code: int) -> str:
    """An exit code in words; negative is the number of the signal that ended the command."""
    if exit_code >= 0:
        return f"exit code {exit_code}"
    memory = ", as happens when memory runs out" if exit_code == -signal.SIGKILL else ""
    return f"ended by {signal.Signals(-exit_code).name}{memory}"


def tail(log: Path) -> str:
    """The last lines that the latest attempt has written, without empty ones."""
    if not log.is_file():
        return ""
    with open(log, "rb") as stream:
        stream.seek(max(0, log.stat().st_size - 2**16))
        lines = stream.read().decode(errors="replace").splitlines()
    begin = max((i for i, line in enumerate(lines) if line.startswith(HEADER)), default=-1) + 1
    return "\n".join([line for line in lines[begin:] if line.strip()][-TAIL_LINES:])


def shown(log: Path, end: str) -> str:
    """``end``, the last lines of a log, as they are shown with an error."""
    return "\n    ".join([f"The end of {log}:", *(end.splitlines() or ["(nothing)"])])


def end_of(log: Path) -> str:
    """The end of a log, as it is shown with an error."""
    return shown(log, tail(log))
