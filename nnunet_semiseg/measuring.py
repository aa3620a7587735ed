"""How long a command takes, and the memory, CPU and GPU that it and all of its processes use meanwhile.

The figures are those of the FLARE challenges (https://github.com/JunMa11/FLARE, FLARE22/Evaluation), whose scripts
sample the whole machine; here only the processes of the command count. Linux and macOS; containers on Linux.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.integrate import trapezoid

from nnunet_semiseg.files import whole
from nnunet_semiseg.jobs import Job, end_processes, start

INTERVAL = 0.1
MB = 2**20
INSTALL = 'pip install "nnunet-semiseg[measure]"'


@dataclass
class Curves:
    """Samples of N moments.

    Args:
        seconds: When, since the start.
        cpu: Shares of the time of all cores since the sample before, in percent: of the program, of the system for it,
            and the rest.
        ram: Resident memory in MB; pages that processes share count for each of them.
        gpu: Memory of all GPUs in MB; NaN if there is none.
        time: From the start to the end of the command, in seconds.
        exit_code: Of the command; negative is the number of the signal that ended it.
    """

    seconds: list[float] = field(default_factory=list)
    cpu: list[tuple[float, float, float]] = field(default_factory=list)
    ram: list[float] = field(default_factory=list)
    gpu: list[float] = field(default_factory=list)
    time: float = float("nan")
    exit_code: int = 0


class Gpus:
    """The NVIDIA GPUs of this machine.

    Args:
        missing: Why there is none to measure; empty if there is.
    """

    def __init__(self) -> None:
        self._handles: list[Any] = []
        self._nvml: Any = None
        self.missing = ""
        try:
            import pynvml
        except ImportError:
            self.missing = f"nvidia-ml-py is not installed. Run: {INSTALL}"
            return
        self._nvml = pynvml
        try:
            pynvml.nvmlInit()
            self._handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
            self.used()
        except pynvml.NVMLError as error:
            self._handles = []
            self.missing = f"NVIDIA's driver says: {error}"
            return
        self.missing = "" if self._handles else "NVIDIA's driver knows no GPU"

    def used(self) -> float:
        """Memory of all GPUs in MB that anybody uses."""
        return sum(self._nvml.nvmlDeviceGetMemoryInfo(handle).used for handle in self._handles) / MB

    def used_by(self, pids: Iterable[int]) -> float:
        """Memory of all GPUs in MB that these processes use, as far as the driver tells."""
        pids = set(pids)
        try:
            processes = [p for h in self._handles for p in self._nvml.nvmlDeviceGetComputeRunningProcesses(h)]
        except self._nvml.NVMLError:
            return 0.0
        return sum(p.usedGpuMemory or 0 for p in processes if p.pid in pids) / MB


class _Tree:
    """All processes of a session, and what they started, also those whose parents have ended meanwhile."""

    def __init__(self) -> None:
        self._seen: set[tuple[int, float]] = set()

    def processes(self, root: int | None) -> list[Any]:
        """Those that are running now.

        Args:
            root: The first process of the session; None as long as there is none.
        """
        import psutil

        if root is None:
            return []
        children = defaultdict(list)
        found = []
        for process in psutil.process_iter(["ppid", "create_time"]):
            known = (process.pid, process.info["create_time"]) in self._seen
            if known or root in (process.pid, _session(process.pid)):
                found.append(process)
            else:
                children[process.info["ppid"]].append(process)
        # Each one appends its own.
        for process in found:
            found += children.pop(process.pid, [])
        self._seen = {(process.pid, process.info["create_time"]) for process in found}
        return found


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except OSError:
        # It has just ended.
        return None


def check_psutil() -> None:
    """Raises ValueError if psutil is missing."""
    try:
        import psutil  # noqa: F401
    except ImportError:
        raise ValueError(f"psutil is not installed. Run: {INSTALL}") from None


def run_measured(job: Job, lock_file: Path, gpus: Gpus, container: Container | None = None) -> Curves:
    """Run a command and sample it every INTERVAL seconds until it ends; it leaves no process.

    Args:
        lock_file: See ``jobs.start``.
        container: Which the command runs, and whose processes count; None for the command's own.

    Raises:
        RuntimeError: if a process does not end.
    """
    curves, tree = Curves(), _Tree()
    idle = None if gpus.missing else gpus.used()
    of_processes: list[float] = []
    of_gpus: list[float] = []
    try:
        with container.found() if container else nullcontext(lambda pid: pid) as root:
            begin = time.monotonic()
            process = start(job, lock_file)
            ended = threading.Event()

            def wait() -> None:
                curves.exit_code = process.wait()
                curves.time = time.monotonic() - begin
                ended.set()

            threading.Thread(target=wait, daemon=True).start()
            before, last = (0.0, 0.0), begin
            try:
                while True:
                    running = tree.processes(root(process.pid))
                    now = time.monotonic()
                    user, system, ram = _used(running)
                    time_of_cores = (now - last) * (os.cpu_count() or 1) / 100
                    # Less than before, if a process took its time with it.
                    shares = [max(0.0, new - old) / time_of_cores for new, old in zip((user, system), before)]
                    before, last = (user, system), now
                    curves.seconds.append(now - begin)
                    curves.cpu.append((shares[0], shares[1], max(0.0, 100 - sum(shares))))
                    curves.ram.append(ram)
                    if idle is not None:
                        of_processes.append(gpus.used_by(p.pid for p in running))
                        of_gpus.append(max(0.0, gpus.used() - idle))
                    # Not a fixed time after the last: a sample that took long would shift all others.
                    if ended.wait(INTERVAL - (time.monotonic() - begin) % INTERVAL):
                        break
            finally:
                if container:
                    # Or it may start the container after that is removed.
                    process.kill()
    finally:
        # After the container's: they hold the lock, too.
        end_processes([lock_file])
    # A last one may have been taken when the command had ended.
    samples = max(1, sum(moment <= curves.time for moment in curves.seconds))
    lists: list[list[Any]] = [curves.seconds, curves.cpu, curves.ram, of_processes, of_gpus]
    for values in lists:
        del values[samples:]
    if idle is None:
        curves.gpu = [float("nan")] * len(curves.seconds)
    else:
        # In a container of its own, the driver's numbers of processes are not those here.
        curves.gpu = of_processes if any(of_processes) else of_gpus
    return curves


def _used(processes: Iterable[Any]) -> tuple[float, float, float]:
    """CPU time of the program and of the system in seconds, with that of ended children, and resident memory in MB."""
    import psutil

    user = system = ram = 0.0
    for process in processes:
        try:
            with process.oneshot():
                times, memory = process.cpu_times(), process.memory_info()
        except psutil.Error:
            # It has just ended; its parent has its time.
            continue
        user += times.user + getattr(times, "children_user", 0.0)
        system += times.system + getattr(times, "children_system", 0.0)
        ram += memory.rss / MB
    return user, system, ram


def areas(curves: Curves, gpu_tolerance: float) -> dict[str, float]:
    """The challenges' figures of a run, by the names of their tables, and areas by trapezoids between true times.

    Args:
        gpu_tolerance: MB of GPU memory that count as none in ``AUC_GPU_above_tolerance``.
    """
    gpu, ram = np.array(curves.gpu), np.array(curves.ram)
    cpu = 100 - np.array(curves.cpu)[:, 2]
    return {
        # As FLARE22's script rounds them.
        "Time": round(curves.time, 2),
        "GPU_Mem": float(np.round(gpu.max())),
        "AUC_GPU_Time": float(np.round(gpu.sum() * INTERVAL)),
        "CPU_Utilization": round(float(cpu.max()), 2),
        "AUC_CPU_Time": round(float(cpu.sum() * INTERVAL), 2),
        "RAM": round(float(ram.max()), 2),
        "AUC_RAM_Time": float(np.round(ram.sum() * INTERVAL)),
        "AUC_GPU_above_tolerance": float(np.round(np.maximum(gpu - gpu_tolerance, 0).sum() * INTERVAL)),
        **{
            f"AUC_{name}_trapezoids": round(float(trapezoid(values, curves.seconds)), 2)
            for name, values in (("GPU", gpu), ("CPU", cpu), ("RAM", ram))
        },
    }


def plot(file: Path, curves: Curves, gpu_tolerance: float) -> None:
    """A picture of the curves; what lies below the tolerance of GPU memory is marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 7), layout="constrained")
    cpu = 100 - np.array(curves.cpu)[:, 2]
    shown = (("CPU, % of all cores", cpu), ("RAM, MB", np.array(curves.ram)), ("GPU memory, MB", np.array(curves.gpu)))
    for axes, (label, values) in zip(figure.subplots(len(shown), 1, sharex=True), shown):
        axes.plot(curves.seconds, values)
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        if label.startswith("GPU") and not np.isnan(values).any():
            axes.axhspan(0, gpu_tolerance, color="gray", alpha=0.2)
    axes.set_xlabel("s")
    with whole(file) as temporary:
        figure.savefig(temporary, dpi=100)


# ---------------------------------------------------------------------------------------------------------- containers


class Container:
    """An image that is run as the FLARE challenges run it, by podman or docker.

    Args:
        image: Its name; the first engine that has it is used.
        name: Of the container.

    Raises:
        FileNotFoundError: if there is no engine.
        ValueError: if there is no such image.
    """

    def __init__(self, image: str, name: str, gpus: Gpus) -> None:
        self.image, self.name, self._gpus = image, name, gpus
        engines = [engine for engine in ("podman", "docker") if shutil.which(engine)]
        if not engines:
            raise FileNotFoundError("There is neither podman nor docker. Install one, or measure a command: -- COMMAND")
        reasons = []
        for self.engine in engines:
            result = self._ask("image", "inspect", "--format", "{{.Id}}", image)
            if result.returncode == 0:
                self.id = result.stdout.strip()
                return
            reasons.append(f"{self.engine}: {(result.stderr.strip().splitlines() or ['no reason given'])[-1]}")
        raise ValueError(f"There is no image {image} ({'; '.join(reasons)}). Load it: {self.engine} load -i FILE")

    def _ask(self, *arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run([self.engine, *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL)

    def command(self, inputs: Path, outputs: Path) -> tuple[str, ...]:
        """Run ``sh predict.sh`` with the two folders, without network, with 28 GB of memory and 64 MB of /dev/shm."""
        gpu = ["--gpus", "all"] if self.engine == "docker" else ["--device", "nvidia.com/gpu=all"]
        return (
            *(self.engine, "run", "--rm", "--name", self.name, "--network", "none", "-m", "28g", "--shm-size", "64m"),
            *([] if self._gpus.missing else gpu),
            *("-v", f"{inputs}:/workspace/inputs", "-v", f"{outputs}:/workspace/outputs"),
            *(self.image, "sh", "predict.sh"),
        )

    @contextmanager
    def found(self) -> Iterator[Callable[[int], int | None]]:
        """Gives a function of the engine's process that gives the container's, once it is there.

        A container's processes are no children of the engine's. It is removed in the end, whatever happens.
        """
        self.remove()
        number: list[int] = []
        over = threading.Event()

        def look() -> None:
            while not over.wait(INTERVAL / 2):
                answer = self._ask("inspect", "--format", "{{.State.Pid}}", self.name).stdout.strip()
                if answer.isdigit() and int(answer):
                    number.append(int(answer))
                    return

        looking = threading.Thread(target=look, daemon=True)
        looking.start()
        try:
            yield lambda pid: number[0] if number else None
        finally:
            over.set()
            self.remove()
            looking.join()

    def remove(self) -> None:
        # Podman's rm waits for it to end; the first process of a container takes no notice of SIGTERM.
        self._ask("kill", self.name)
        self._ask("rm", "-f", self.name)


def placeholders(command: Sequence[str], inputs: Path, outputs: Path) -> tuple[str, ...]:
    """The command with its two folders for {input} and {output}."""
    return tuple(part.replace("{input}", str(inputs)).replace("{output}", str(outputs)) for part in command)


def program(command: Sequence[str]) -> str:
    """Raises FileNotFoundError if there is no such program, as ``jobs.start`` looks for it; gives it."""
    beside = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    if shutil.which(command[0], path=beside) is None:
        raise FileNotFoundError(f"There is no program {command[0]}. Install it, or give its path after --")
    return command[0]
