"""One function over many cases, in processes, with a progress bar; a case that fails does not stop the others."""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

from tqdm import tqdm

from nnunet_semiseg.files import CaseError


def default_processes() -> int:
    """nnU-Net's number, but no more than there are cores."""
    # Prediction with OpenVINO gets here without nnU-Net.
    from nnunetv2.configuration import default_num_processes

    return min(default_num_processes, os.cpu_count() or 1)


def add_processes_argument(parser: argparse.ArgumentParser) -> None:
    """``-np``, as nnU-Net's commands call it."""
    parser.add_argument(
        "-np",
        type=int,
        default=default_processes(),
        help="processes; each holds one case in memory (default %(default)s)",
    )


def _end_with(parent: int) -> None:
    """End this worker when its parent is gone, also after a kill -9: it would go on with the cases that are waiting."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def over_cases(
    function: Callable, jobs: Mapping[str, tuple], processes: int, description: str, done: int = 0
) -> tuple[dict, list[str]]:
    """``function(*arguments)`` for every case, each in one of several processes.

    Args:
        function: Of a module, so that a process can import it.
        jobs: {case: arguments}.
        processes: 1 runs them here, without a process.
        description: Of the progress bar.
        done: Cases that were finished before, for the progress bar.

    Returns:
        {case: result} in the order of ``jobs``, whatever the order in which they ended; and one line for each case that
        failed, sorted.

    Raises:
        ValueError: if ``processes`` is below 1.
        RuntimeError: if a process was killed, as happens when memory runs out.
    """
    if processes < 1:
        raise ValueError(f"-np {processes} is not a number of processes. Use 1 or more")
    results: dict[str, Any] = {}
    failures: list[str] = []

    def collect(case: str, get: Callable) -> None:
        try:
            results[case] = get()
        except BrokenProcessPool:
            raise
        except (CaseError, OSError) as error:
            failures.append(f"Error: {error}")
        except Exception as error:
            failures.append(f"Error: case {case} failed: {type(error).__name__}: {error}")
        bar.update()

    bar = tqdm(total=done + len(jobs), initial=done, desc=description, unit="case", file=sys.stderr)
    with bar:
        processes = min(processes, len(jobs))
        if processes <= 1:
            for case, arguments in jobs.items():
                collect(case, lambda arguments=arguments: function(*arguments))
        else:
            # A thread or lock of this process must not be copied into a worker.
            context = get_context("spawn")
            with ProcessPoolExecutor(processes, context, initializer=_end_with, initargs=(os.getpid(),)) as pool:
                futures = {pool.submit(function, *arguments): case for case, arguments in jobs.items()}
                try:
                    for future in as_completed(futures):
                        collect(futures[future], future.result)
                except BaseException as error:
                    pool.shutdown(wait=False, cancel_futures=True)
                    if isinstance(error, BrokenProcessPool):
                        raise RuntimeError(
                            "A worker process was killed, most likely because memory ran out. Finished cases are "
                            f"kept: run the command again with fewer processes, -np {max(1, processes // 2)}"
                        ) from None
                    raise
    return {case: results[case] for case in jobs if case in results}, sorted(failures)


def print_failures(failures: list[str], summary: str) -> None:
    """Print the lines of cases that failed, and then what that means, to stderr."""
    print("\n".join([*failures, summary]), file=sys.stderr)


def raise_failures(failures: list[str], summary: str) -> None:
    """Print the lines of cases that failed, if there are any, and raise CaseError with the summary."""
    if failures:
        print("\n".join(failures), file=sys.stderr)
        raise CaseError(summary)
