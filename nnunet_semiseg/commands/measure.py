"""``nnunet_semiseg measure``: time, memory, CPU and GPU of predicting each case, as in the FLARE challenges."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nnunet_semiseg.datasets import CaseError
from nnunet_semiseg.files import read_json, write_csv, write_json
from nnunet_semiseg.jobs import Job, end_of, end_processes, exit_reason, lock, signals_raise
from nnunet_semiseg.markdown import table
from nnunet_semiseg.measuring import (
    INTERVAL,
    Container,
    Curves,
    Gpus,
    areas,
    check_psutil,
    placeholders,
    plot,
    program,
    run_measured,
)
from nnunet_semiseg.parallel import over_cases, print_failures
from nnunet_semiseg.segmentations import find_files, holds, version

TABLE = "efficiency.csv"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-i", required=True, metavar="CASES", help="folder with images, CASE_0000.nii.gz ...")
    parser.add_argument(
        "-o", required=True, metavar="OUT", help=f"folder for {TABLE}, and curves, logs and predictions of each case"
    )
    parser.add_argument(
        "--image",
        metavar="NAME",
        help="image of podman or docker, run as the FLARE challenges do: sh predict.sh with one case in "
        "/workspace/inputs, which leaves CASE.nii.gz in /workspace/outputs",
    )
    parser.add_argument(
        "--gpu-tolerance",
        type=float,
        default=2048,
        metavar="MB",
        help="of GPU memory, which counts as none in AUC_GPU_above_tolerance (default %(default)g: FLARE22's)",
    )
    parser.add_argument(
        "command_to_measure",
        nargs="*",
        metavar="-- COMMAND",
        help="instead of --image: a command with {input} and {output} for the folders of one case",
    )


@dataclass(frozen=True)
class _Call:
    """What the cases of a call have in common."""

    output: Path
    ending: str
    command: tuple[str, ...]
    container: Container | None
    gpus: Gpus
    gpu_tolerance: float

    @property
    def lock_file(self) -> Path:
        return self.output / ".running.lock"

    def prediction(self, case: str) -> Path:
        return self.output / "predictions" / f"{case}{self.ending}"

    def curves(self, case: str) -> Path:
        return self.output / "curves" / f"{case}.json"

    def key(self, files: list[Path]) -> str:
        """What a measurement depends on."""
        what = [self.container.id] if self.container else self.command
        return json.dumps([what, INTERVAL, *map(version, files)])


def run(args: argparse.Namespace) -> int:
    check_psutil()
    command = tuple(args.command_to_measure)
    if bool(args.image) == bool(command):
        raise ValueError("Give either --image NAME or -- COMMAND")
    if not args.gpu_tolerance >= 0:
        raise ValueError(f"--gpu-tolerance {args.gpu_tolerance:g} is not a number of MB. Use 0 or more")
    for name in ("{input}", "{output}") if command else ():
        if not any(name in part for part in command):
            raise ValueError(f"The command has no {name}, for the folder of a case. Put it where the folder belongs")
    if command:
        program(command)
    cases, ending = _cases(Path(args.i), bool(args.image))
    output = Path(args.o).resolve()
    with _alone(output), signals_raise():
        gpus = Gpus()
        # The same in every call on this folder, which removes what a killed one has left.
        name = f"nnunet_semiseg_measure_{hashlib.sha256(str(output).encode()).hexdigest()[:12]}"
        container = Container(args.image, name, gpus) if args.image else None
        call = _Call(output, ending, command, container, gpus, args.gpu_tolerance)
        if gpus.missing:
            print(f"Warning: no GPU is measured, and its columns are NaN: {gpus.missing}", file=sys.stderr)
        # Those of an earlier call that was killed.
        if container:
            container.remove()
        end_processes([call.lock_file])
        for left in output.glob(".unfinished-*"):
            shutil.rmtree(left, ignore_errors=True)
        finished = {case: _finished(call, case, files) for case, files in cases.items()}
        jobs = {case: (call, case, cases[case]) for case, curves in finished.items() if curves is None}
        if jobs:
            # Should a case fail now, nobody takes it for that of these cases.
            (output / TABLE).unlink(missing_ok=True)
        done, failures = over_cases(_measure, jobs, 1, "Measuring", done=len(cases) - len(jobs))
    if failures:
        print_failures(
            failures,
            f"{len(failures)} of {len(cases)} cases could not be measured (above), so {TABLE} is not written. "
            "Fix these and run the command again: the others are kept.",
        )
        return 1
    measured = {case: curves for case, curves in finished.items() if curves} | done
    rows = {case: areas(measured[case], args.gpu_tolerance) for case in cases}
    columns = list(next(iter(rows.values())))
    write_csv(
        output / TABLE,
        ["Name", *columns, "GPU_tolerance_MB"],
        ([f"{case}.nii.gz", *row.values(), f"{args.gpu_tolerance:g}"] for case, row in rows.items()),
    )
    print(page(rows))
    print(f"\nWritten to {output / TABLE}; curves in {output / 'curves'}, predictions in {output / 'predictions'}")
    return 0


def _cases(folder: Path, flare: bool) -> tuple[dict[str, list[Path]], str]:
    """{case: its images, one for each channel}, and the ending of their files."""
    files = find_files(folder, ".nii.gz" if flare else None)
    cases: dict[str, list[Path]] = {}
    for name, file in files.items():
        match = re.fullmatch(r"(.+)_\d{4}", name)
        if not match:
            raise CaseError(f"{file} has no number of its channel. Name it {name}_0000{file.name[len(name) :]}")
        cases.setdefault(match[1], []).append(file)
    several = [case for case, images in cases.items() if len(images) > 1]
    if flare and several:
        raise CaseError(f"{cases[several[0]][1]} is a second channel of {several[0]}. The FLARE challenges have one")
    first = next(iter(files))
    return cases, files[first].name[len(first) :]


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Raises ValueError if another call measures into this folder."""
    held = lock(output / ".lock")
    if held is None:
        raise ValueError(f"Another call measures into {output}. Wait for it, or give another -o")
    with held:
        yield


def _finished(call: _Call, case: str, files: list[Path]) -> Curves | None:
    """The curves of a case that an earlier call finished, if nothing changed since."""
    try:
        content = read_json(call.curves(case))
        if content["key"] != call.key(files) or not call.prediction(case).is_file():
            return None
        cpu = [tuple(shares) for shares in content["cpu_list"]]
        return Curves(content["seconds"], cpu, content["RAM_list"], content["gpu_memory"], content["time"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _measure(call: _Call, case: str, files: list[Path]) -> Curves:
    """Run one case, and keep its prediction, curves and picture.

    Raises:
        CaseError: naming the case, if the command fails or leaves no prediction.
    """
    key = call.key(files)
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=call.output, ignore_cleanup_errors=True) as folder:
        inputs, outputs = Path(folder, "inputs"), Path(folder, "outputs")
        for path in (inputs, outputs):
            path.mkdir()
            # An image's user is not the one here.
            path.chmod(0o777)
        for file in files:
            # No links: a container has only this folder.
            shutil.copyfile(file, inputs / file.name)
        log = call.output / "logs" / f"{case}.log"
        container = call.container
        command = container.command(inputs, outputs) if container else placeholders(call.command, inputs, outputs)
        job = Job(case, command, log)
        curves = run_measured(job, call.lock_file, call.gpus, container)
        if curves.exit_code:
            raise CaseError(f"case {case} failed ({exit_reason(curves.exit_code)}). {end_of(job.log)}")
        made = outputs / call.prediction(case).name
        if not made.is_file():
            there = holds([path.relative_to(outputs) for path in outputs.iterdir()])
            raise CaseError(f"case {case} has no {made.name} in its output folder. {there}. {end_of(job.log)}")
        plot(call.curves(case).with_suffix(".png"), curves, call.gpu_tolerance)
        call.prediction(case).parent.mkdir(exist_ok=True)
        os.replace(made, call.prediction(case))
    # Last: it says that the case is finished. The challenges' names, and true times beside them.
    write_json(
        call.curves(case),
        {
            "key": key,
            "time": curves.time,
            "gpu_memory": curves.gpu,
            "cpu_list": curves.cpu,
            "RAM_list": curves.ram,
            "seconds": curves.seconds,
        },
    )
    return curves


def page(rows: dict[str, dict[str, float]]) -> str:
    """Means and largest values over cases, and what one has to know to read them, as markdown."""
    units = {"Time": "s", "GPU_Mem": "MB", "CPU_Utilization": "%", "RAM": "MB"}
    areas_of = {"GPU": "MB s", "CPU": "% s", "RAM": "MB s"}
    lines = []
    for name in next(iter(rows.values())):
        values = np.array([row[name] for row in rows.values()])
        unit = units.get(name) or areas_of[name.split("_")[1]]
        lines.append([name, unit, *(f"{value:.6g}".replace("nan", "–") for value in (values.mean(), values.max()))])
    note = (
        f"{len(rows)} case(s), each in a run of its own. AUC_..._Time: sum of the samples x {INTERVAL:g} s, as in the "
        "challenges; trapezoids: area between the true times. CPU: 100 % are all cores of this machine."
    )
    return f"{table(['', 'unit', 'mean', 'largest'], lines)}\n\n{note}"
