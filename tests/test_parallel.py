"""Cases in several processes."""

import os
import signal
import subprocess
import sys
import time

import pytest
from test_executors import is_alive

# A module of its own, so that spawned workers can import the function.
WORK = """
import os, sys, time
from pathlib import Path
from nnunet_semiseg.parallel import over_cases

def work(folder, case):
    (Path(folder) / f"{case}.{os.getpid()}").touch()
    time.sleep(2)

if __name__ == "__main__":
    over_cases(work, {str(i): (sys.argv[1], i) for i in range(20)}, 2, "Working")
"""


@pytest.mark.slow
def test_workers_end_with_a_caller_that_is_killed(tmp_path):
    script = tmp_path / "work.py"
    script.write_text(WORK)
    folder = tmp_path / "cases"
    folder.mkdir()
    caller = subprocess.Popen([sys.executable, str(script), str(folder)], stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while len(workers := {int(file.suffix[1:]) for file in folder.iterdir()}) < 2:
        assert time.monotonic() < end and caller.poll() is None
        time.sleep(0.1)
    os.kill(caller.pid, signal.SIGKILL)
    caller.wait()
    while any(map(is_alive, workers)):
        assert time.monotonic() < end
        time.sleep(0.1)
    # They did not go on with the cases that were waiting.
    assert len(list(folder.iterdir())) < 6
