"""Runs jobs in local processes, one on each device, or on a SLURM cluster.

Both executors take the same jobs, go on after a failure, and continue when the same jobs are given again after the
caller was killed. Linux and macOS.
"""

from __future__ import annotations

import io
import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

from nnunet_semiseg.files import read_json, write_json, write_text
from nnunet_semiseg.jobs import POLL_SECONDS, Job, end_processes, exit_reason, lock, shown, signals_raise, start, tail

SLURM_POLL_SECONDS = 10.0
# How long a Slurm job may be unknown to squeue without an exit code before it counts as failed: files appear late on
# network file systems, and some clusters' squeue answers from a cache.
GONE_SECONDS = 60.0
# Slurm's final states, except those after which it may start the job again by itself (NODE_FAIL, PREEMPTED).
SLURM_ENDED = {"COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "OUT_OF_MEMORY", "DEADLINE"}


@dataclass(frozen=True)
class Failure:
    """A job that failed.

    Args:
        exit_code: Of the command; negative is the number of the signal that ended it; None if it could not tell.
        reason: The same in words, or Slurm's.
        log: File that tells most about it.
        tail: Its last lines.
    """

    job: Job
    exit_code: int | None
    reason: str
    log: Path
    tail: str

    def __str__(self) -> str:
        return f"{self.job.name} failed ({self.reason}). {shown(self.log, self.tail)}"


@contextmanager
def _alone(folders: Iterable[Path]) -> Iterator[None]:
    """Raises ValueError if another call has one of the folders."""
    with ExitStack() as stack:
        for folder in sorted(set(folders)):
            held = lock(folder / ".lock")
            if held is None:
                raise ValueError(f"Another call runs the jobs of {folder}. Wait for it, or stop it")
            stack.enter_context(held)
        yield


def _check(jobs: Sequence[Job]) -> None:
    twice = [name for name, count in Counter(job.name for job in jobs).items() if count > 1]
    if twice:
        raise ValueError(f"Two jobs are called {twice[0]}. Give them different names")
    for job in jobs:
        job.check_program()


def _bar(jobs: Sequence[Job]) -> tqdm:
    return tqdm(total=len(jobs), desc="Jobs", unit="job", file=sys.stderr)


def _show(bar: tqdm, text: str) -> None:
    """What runs, beside the bar. The time goes on in a terminal; a file gets a line for a change alone."""
    if text != bar.postfix or sys.stderr.isatty():
        bar.set_postfix_str(text)


def _say(text: str) -> None:
    tqdm.write(text, file=sys.stderr)


# --------------------------------------------------------------------------------------------------------------- local


_LOCK = ".lock"


def _left_lock_files(jobs: Sequence[Job]) -> set[Path]:
    """Those beside the jobs' logs: an earlier call may have cut the same work into other jobs."""
    return {file for folder in {job.log.parent for job in jobs} for file in folder.glob(f".?*{_LOCK}")}


class LocalExecutor:
    """Runs jobs in processes of this machine, one at a time on each device.

    Args:
        devices: ``cuda:0``, ``cuda:1`` ..., ``cuda`` (the first), ``cpu`` or ``mps``. A device that is named twice gets
            two jobs at a time. If CUDA_VISIBLE_DEVICES is set, the numbers count the GPUs that it shows.

    Raises:
        ValueError: naming the device, if there is no such device.
    """

    def __init__(self, devices: Sequence[str]):
        wrong = [device for device in devices if not re.fullmatch(r"cuda(:\d+)?|cpu|mps", device)]
        if wrong or not devices:
            raise ValueError(f"There is no device {wrong[0] if wrong else ''!r}. Use cuda:0, cuda:1 ..., cpu or mps")
        self.devices = list(devices)
        for device in self.devices:
            self._visible(device)

    @staticmethod
    def _visible(device: str) -> dict[str, str]:
        """The variable that makes the device the only GPU of a process."""
        kind, _, number = device.partition(":")
        if kind != "cuda":
            return {}
        shown = os.environ.get("CUDA_VISIBLE_DEVICES")
        if shown is None:
            return {"CUDA_VISIBLE_DEVICES": number or "0"}
        gpus = [gpu.strip() for gpu in shown.split(",") if gpu.strip()]
        if int(number or 0) >= len(gpus):
            raise ValueError(
                f"There is no device {device}: CUDA_VISIBLE_DEVICES='{shown}' shows {len(gpus)} GPUs, counted from 0"
            )
        return {"CUDA_VISIBLE_DEVICES": gpus[int(number or 0)]}

    def _on(self, device: str, job: Job) -> Job:
        command = (*job.command, "-device", device.partition(":")[0])
        return replace(job, command=command, environment={**job.environment, **self._visible(device)})

    def _check_gpus(self) -> None:
        numbers = [int(device.partition(":")[2] or 0) for device in self.devices if device.startswith("cuda")]
        if numbers:
            # Takes seconds, and is needed here only.
            import torch

            count = torch.cuda.device_count()
            if max(numbers) >= count:
                raise ValueError(
                    f"There is no device cuda:{max(numbers)}: PyTorch sees {count} GPUs here, counted from 0. Use "
                    "another device, such as cpu"
                )

    @staticmethod
    def _lock_file(job: Job) -> Path:
        return job.log.with_name(f".{job.log.name}{_LOCK}")

    def describe(self, jobs: Sequence[Job]) -> list[str]:
        """The jobs as lines for a shell. Devices take turns; ``run`` gives a job to the device that is free first."""
        return [self._on(self.devices[i % len(self.devices)], job).line for i, job in enumerate(jobs)]

    def run(self, jobs: Sequence[Job]) -> list[Failure]:
        """Run jobs, started in their order, until every one of them has ended.

        Processes that an earlier call on the same folder of logs left when it was killed are ended first. Whatever
        happens to this call, short of a kill -9, it leaves no process of a job.

        Returns:
            Those that failed, in their order.

        Raises:
            ValueError: if there is no such device, two jobs have one name, or another call has the logs' folder.
            FileNotFoundError: if there is no such program.
            RuntimeError: if a process cannot be ended.
            KeyboardInterrupt, SystemExit: on Ctrl-C, and on SIGTERM or SIGHUP.
        """
        if not jobs:
            return []
        _check(jobs)
        self._check_gpus()
        lock_files = sorted({*map(self._lock_file, jobs), *_left_lock_files(jobs)})
        waiting = deque(jobs)
        running: dict[int, tuple[Job, subprocess.Popen]] = {}
        failures: dict[str, Failure] = {}
        with _alone(job.log.parent for job in jobs), signals_raise(), _bar(jobs) as bar:
            try:
                end_processes(lock_files)
                while waiting or running:
                    for slot, device in enumerate(self.devices):
                        if waiting and slot not in running:
                            job = waiting.popleft()
                            running[slot] = job, start(self._on(device, job), self._lock_file(job))
                    _show(bar, ", ".join(f"{running[slot][0].name}: {self.devices[slot]}" for slot in running))
                    time.sleep(POLL_SECONDS)
                    for slot, (job, process) in list(running.items()):
                        if process.poll() is None:
                            continue
                        # Data loaders can outlive a training that crashed.
                        end_processes([self._lock_file(job)])
                        self._lock_file(job).unlink()
                        del running[slot]
                        if process.returncode:
                            reason = exit_reason(process.returncode)
                            failures[job.name] = Failure(job, process.returncode, reason, job.log, tail(job.log))
                            _say(f"{job.name} failed ({reason}): {job.log}")
                        bar.update()
            finally:
                end_processes(lock_files)
        return [failures[job.name] for job in jobs if job.name in failures]


# --------------------------------------------------------------------------------------------------------------- SLURM


@dataclass
class _Attempt:
    """A job that was given to Slurm.

    Args:
        log: The job's; a job with another log is another job.
        line: The job's command.
        batch: Slurm's name of the job or job array. It is known before sbatch runs, unlike the number, so that nothing
            is lost when this process is killed meanwhile.
        index: Place in the job array; 0 of a single job.
        number: 1 for the first attempt.
        id: Slurm's number, once it is known.
    """

    log: str
    line: str
    batch: str
    index: int
    number: int
    id: str | None = None


def run_in_slurm(job: Job, exit_file: Path) -> None:
    """What a Slurm job does: run a command with its log, as a local one, and leave the exit code in a file."""
    # Of an earlier start, if Slurm has started the job again.
    exit_file.unlink(missing_ok=True)
    exit_code = start(job).wait()
    write_text(exit_file, f"{exit_code}\n")
    # Slurm is to know, too, that it failed.
    sys.exit(exit_code)


class SlurmExecutor:
    """Runs jobs on a SLURM cluster; those of a call are one job array.

    Slurm's jobs go on when this process ends. The same jobs, given again with the same folder, are found and waited for
    instead of started a second time.

    Args:
        folder: Of the job numbers (jobs.json), and of submitit's files and Slurm's output (submitit). It has to be on a
            file system that all nodes share, as the logs.
        partition: Slurm's; None for the default one.
        gpus: GPUs of each job; 0 for the CPU.
        minutes: Time limit of an attempt.
        parameters: Other options of sbatch by their long names, such as ``{"cpus_per_task": 12, "mem": "64G"}``; True
            for those without a value.
        retries: How often a job is started again after it failed or ran out of time. One that somebody cancels is not.

    Raises:
        ValueError: naming the parameter that is wrong.
    """

    def __init__(
        self,
        folder: Path,
        partition: str | None = None,
        gpus: int = 1,
        minutes: int = 1440,
        parameters: Mapping[str, str | int | bool] | None = None,
        retries: int = 1,
    ):
        parameters = {key.lstrip("-").replace("-", "_"): value for key, value in (parameters or {}).items()}
        own = sorted({"array", "error", "job_name", "output"} & set(parameters))
        if own:
            raise ValueError(f"The Slurm parameter {own[0]} cannot be chosen. Leave it out")
        for name, value, lowest in (("gpus", gpus, 0), ("minutes", minutes, 1), ("retries", retries, 0)):
            if value < lowest:
                raise ValueError(f"{name} is {value}. Use {lowest} or more")
        self.folder = Path(folder).resolve()
        self.gpus, self.minutes, self.retries = gpus, minutes, retries
        self.options = {"time": minutes, **({"partition": partition} if partition else {})}
        if gpus and not any(key == "gres" or key.startswith("gpus") for key in parameters):
            self.options["gpus_per_node"] = gpus
        self.options.update(parameters)
        self._attempts: dict[str, _Attempt] = {}

    def _with_device(self, job: Job) -> Job:
        return replace(job, command=(*job.command, "-device", "cuda" if self.gpus else "cpu"))

    def describe(self, jobs: Sequence[Job]) -> list[str]:
        """Lines for a shell that give the jobs to Slurm; ``run`` makes one array of them."""
        options = [
            f"--{key.replace('_', '-')}" + ("" if value is True else f"={value}") for key, value in self.options.items()
        ]
        return [
            shlex.join(
                ["sbatch", f"--job-name={job.name}", *options, f"--output={job.log}", "--open-mode=append"]
                + [f"--wrap={self._with_device(job).line}"]
            )
            for job in jobs
        ]

    def run(self, jobs: Sequence[Job]) -> list[Failure]:
        """Give jobs to Slurm and wait until every one of them has ended, for the last time.

        Returns:
            Those that failed, in their order.

        Raises:
            ValueError: if two jobs have one name, Slurm has a job of this name with another log, another call has the
                folder, submitit is missing, or sbatch refuses the jobs.
            OSError: if a program is missing, or squeue fails.
            KeyboardInterrupt, SystemExit: on Ctrl-C, and on SIGTERM or SIGHUP. Slurm's jobs go on.
        """
        if not jobs:
            return []
        _check(jobs)
        _check_slurm()
        by_name = {job.name: job for job in jobs}
        with _alone([self.folder]), signals_raise(), _bar(jobs) as bar:
            end_processes(_left_lock_files(jobs))
            self._continue(by_name)
            try:
                self._submit([job for name, job in by_name.items() if name not in self._attempts])
                failures = self._wait(by_name, bar)
            except BaseException:
                self._say_what_goes_on()
                raise
        return [failures[job.name] for job in jobs if job.name in failures]

    def _wait(self, jobs: dict[str, Job], bar: tqdm) -> dict[str, Failure]:
        failures: dict[str, Failure] = {}
        seen = dict.fromkeys(jobs, time.monotonic())
        while seen:
            time.sleep(SLURM_POLL_SECONDS)
            try:
                states = self._states()
            except OSError as error:
                # The cluster's controller is away for a while; the jobs are not.
                _show(bar, str(error))
                continue
            again: list[Job] = []
            counts: Counter[str] = Counter()
            for name in list(seen):
                attempt = self._attempts[name]
                state, why = states.get((attempt.batch, attempt.index), ("", ""))
                exit_code = self._exit_code(attempt)
                if _is_active(state):
                    seen[name] = time.monotonic()
                    counts[state.lower() + (f" ({why})" if why != "None" else "")] += 1
                elif state == "COMPLETED" or (not state and exit_code == 0):
                    del seen[name]
                    bar.update()
                elif state or exit_code is not None or time.monotonic() - seen[name] > GONE_SECONDS:
                    failure = self._failure(jobs[name], attempt, state, exit_code)
                    retry = attempt.number <= self.retries and state != "CANCELLED"
                    _say(f"{name} failed ({failure.reason}){', it is tried again' if retry else ''}: {failure.log}")
                    if retry:
                        again.append(jobs[name])
                        seen[name] = time.monotonic()
                    else:
                        failures[name] = failure
                        del seen[name]
                        self._forget([name])
                        bar.update()
            self._submit(again)
            _show(bar, ", ".join(f"{count} {state}" for state, count in counts.items()))
        self._forget(jobs)
        return failures

    def _continue(self, jobs: dict[str, Job]) -> None:
        """Keep, of an earlier call that was killed, what Slurm has still to do or has done; the rest starts again."""
        file = self.folder / "jobs.json"
        records = read_json(file) if file.is_file() else {}
        self._attempts = {name: _Attempt(**record) for name, record in records.items()}
        states = self._states()
        for name in [name for name in self._attempts if name not in jobs]:
            attempt = self._attempts[name]
            if _is_active(states.get((attempt.batch, attempt.index), ("", ""))[0]):
                raise ValueError(
                    f"Slurm job {attempt.id} is {name} of an earlier call, which this one cuts into other jobs. Wait "
                    f"for it, or run: scancel {attempt.id}"
                )
            self._forget([name])
        for name in [name for name in jobs if name in self._attempts]:
            attempt, line = self._attempts[name], self._with_device(jobs[name]).line
            state, _ = states.get((attempt.batch, attempt.index), ("", ""))
            if _is_active(state):
                if attempt.log != str(jobs[name].log.resolve()):
                    raise ValueError(
                        f"Slurm job {attempt.id} is an earlier {name}, with the log {attempt.log}. Wait for it, or "
                        f"run: scancel {attempt.id}"
                    )
                # A training that has a checkpoint by now may be given with --c.
                if attempt.line != line:
                    _say(f"{name} is in Slurm already, as job {attempt.id}: {attempt.line}")
            elif attempt.line != line or not (state == "COMPLETED" or self._exit_code(attempt) == 0):
                self._forget([name])

    def _say_what_goes_on(self) -> None:
        with suppress(OSError):
            states = self._states()
            active = [
                a.id
                for a in self._attempts.values()
                if a.id and _is_active(states.get((a.batch, a.index), ("", ""))[0])
            ]
            if active:
                _say(
                    "The jobs go on in Slurm. Run the same command again to wait for them, or cancel them: scancel "
                    + " ".join(sorted({number.partition("_")[0] for number in active}))
                )

    def _states(self) -> dict[tuple[str, int], tuple[str, str]]:
        """{(batch, index): (state, Slurm's reason for it)} of the jobs that Slurm knows; learns their numbers, too.

        Raises:
            OSError: if squeue fails.
        """
        if not self._attempts:
            return {}
        command = ["squeue", "--noheader", "--array", "--states=all", "--format=%i|%j|%T|%r"]
        names = ",".join(sorted({attempt.batch for attempt in self._attempts.values()}))
        result = subprocess.run([*command, f"--name={names}"], capture_output=True, text=True)
        if result.returncode:
            raise OSError(f"squeue failed: {_one_line(result.stderr)}")
        ids, states = {}, {}
        for line in result.stdout.splitlines():
            number, batch, state, why = line.strip().split("|", 3)
            key = batch, int(number.partition("_")[2] or 0)
            ids[key], states[key] = number, (state, why)
        for attempt in self._attempts.values():
            attempt.id = ids.get((attempt.batch, attempt.index), attempt.id)
        return states

    def _submit(self, jobs: list[Job]) -> None:
        """Give jobs to Slurm as one array.

        Raises:
            ValueError: with sbatch's message, if it refuses them.
        """
        if not jobs:
            return
        import submitit

        jobs = [self._with_device(job) for job in jobs]
        batch = f"nnunet_semiseg-{secrets.token_hex(4)}"
        for index, job in enumerate(jobs):
            before = self._attempts.get(job.name)
            if before:
                self._exit_file(before).unlink(missing_ok=True)
            number = before.number + 1 if before else 1
            self._attempts[job.name] = _Attempt(str(job.log.resolve()), job.line, batch, index, number)
        self._save()
        # Also where a cluster does not hand the caller's environment on.
        variables = {key: value for key, value in os.environ.items() if key.startswith("nnUNet")}
        functions = [
            partial(
                run_in_slurm,
                replace(job, log=job.log.resolve(), environment={**variables, **job.environment}),
                self._exit_file(self._attempts[job.name]),
            )
            for job in jobs
        ]
        # If this process is a Slurm job itself, its variables are not the new jobs'; where Slurm is, and what the user
        # wants of sbatch, is.
        kept = {key: value for key, value in os.environ.items() if key == "SLURM_CONF" or key.startswith("SBATCH_")}
        # exec: the batch script's shell would end at SIGTERM, and all with it, before the exit code is known.
        executor = submitit.SlurmExecutor(self.folder / "submitit", python=f"exec {shlex.quote(sys.executable)}")
        # srun would give a job one CPU only, whatever was asked for, from Slurm 22.05 on.
        executor.update_parameters(
            job_name=batch,
            time=self.minutes,
            use_srun=False,
            stderr_to_stdout=True,
            wckey=None,
            additional_parameters=self.options,
        )
        with submitit.helpers.clean_env():
            os.environ.update(kept)
            try:
                # submitit prints what it raises, too.
                with redirect_stderr(io.StringIO()):
                    submitted = executor.submit_array(functions)
            except RuntimeError as error:
                raise ValueError(
                    f"sbatch refused the jobs: {_one_line(str(error))}. Change partition, minutes or parameters"
                ) from None
        for job, slurm_job in zip(jobs, submitted):
            self._attempts[job.name].id = slurm_job.job_id
        self._save()

    def _failure(self, job: Job, attempt: _Attempt, state: str, exit_code: int | None) -> Failure:
        if exit_code is not None and state in ("FAILED", ""):
            reason = exit_reason(exit_code)
        else:
            reason = state or "it left the queue without an exit code"
        # Where the command did not start or could not end, Slurm's output is the one that says why.
        own = exit_code is not None or attempt.id is None
        log = job.log if own else self.folder / "submitit" / f"{attempt.id}_0_log.out"
        return Failure(job, exit_code, f"Slurm job {attempt.id}: {reason}", log, tail(log))

    def _exit_file(self, attempt: _Attempt) -> Path:
        return self.folder / f"{attempt.batch}_{attempt.index}.exit"

    def _exit_code(self, attempt: _Attempt) -> int | None:
        with suppress(FileNotFoundError):
            return int(self._exit_file(attempt).read_text())
        return None

    def _forget(self, names: Iterable[str]) -> None:
        for name in set(names) & set(self._attempts):
            self._exit_file(self._attempts.pop(name)).unlink(missing_ok=True)
        self._save()

    def _save(self) -> None:
        write_json(self.folder / "jobs.json", {name: asdict(attempt) for name, attempt in self._attempts.items()})


def _is_active(state: str) -> bool:
    return state not in {"", *SLURM_ENDED}


def _check_slurm() -> None:
    try:
        import submitit  # noqa: F401
    except ImportError:
        raise ValueError('SLURM jobs need submitit. Run: pip install "nnunet-semiseg[slurm]"') from None
    for program in ("sbatch", "squeue"):
        if shutil.which(program) is None:
            raise FileNotFoundError(f"{program} is not on PATH. Run this on a login node of the cluster")


def _one_line(text: str) -> str:
    return "; ".join(line.strip() for line in text.splitlines() if not line.startswith("Try ")) or "no message"
