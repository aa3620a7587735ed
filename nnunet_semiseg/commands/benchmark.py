"""``nnunet_semiseg benchmark``: does a method work?"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from nnunet_semiseg.benchmark.quality import score
from nnunet_semiseg.benchmark.report import report
from nnunet_semiseg.benchmark.runs import Benchmark, dry_run
from nnunet_semiseg.jobs import end_processes, lock, signals_raise

GPU_MINUTES = 9.0
CANNOT_START = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE.json", help="what to train; docs/benchmark.md explains it")
    parser.add_argument("--profile", choices=("cpu", "gpu"), default="cpu", help="device (default %(default)s)")
    parser.add_argument("--minutes", type=float, help=f"stop after so long (gpu: {GPU_MINUTES:g} unless given)")
    parser.add_argument("--report", action="store_true", help="only write the report, of what is done")
    parser.add_argument("--dry-run", action="store_true", help="only print what would be done")
    parser.add_argument("--score", type=Path, help=argparse.SUPPRESS)
    parser.epilog = (
        "The same command continues what was stopped or killed. Exit code: 0 everything is done, 1 a run failed, "
        "2 it cannot start, 3 stopped by --minutes, 130 interrupted."
    )


def run(args: argparse.Namespace) -> int:
    minutes = args.minutes
    if minutes is None:
        minutes = GPU_MINUTES if args.profile == "gpu" else float("inf")
    deadline = time.monotonic() + 60 * minutes
    # Of other commands this is 1, which is taken here.
    try:
        return _run(args, deadline)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return CANNOT_START


def _run(args: argparse.Namespace, deadline: float) -> int:
    benchmark = Benchmark(args.file, args.profile)
    if args.score:
        score(args.score, benchmark.dataset.preprocessed, benchmark.suite.quality_cases, benchmark.device)
        return 0
    if args.dry_run:
        dry_run(benchmark)
        return 0
    code = 0 if args.report else _train(benchmark, deadline)
    report(benchmark)
    print(f"Report: {benchmark.output / 'results.md'}")
    return code


def _train(benchmark: Benchmark, deadline: float) -> int:
    if benchmark.profile == "gpu" and not torch.cuda.is_available():
        raise ValueError("There is no CUDA device. Use --profile cpu")
    held = lock(benchmark.lock_file)
    if held is None:
        raise ValueError(f"Another benchmark of {benchmark.dataset.name} is running. Wait for it, or stop it")
    with held, signals_raise():
        end_processes([benchmark.child_lock])
        benchmark.write_splits()
        return benchmark.run(deadline)
