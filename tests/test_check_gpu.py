"""scripts/check_gpu.py on the CPU: what it makes, runs and reports, and what it does with cases that break or hang."""

import json
import subprocess
import sys

import pytest
from conftest import REPOSITORY

SCRIPTS = REPOSITORY / "scripts"

# Calls with the same folder; in the first two, a case of each kind of trouble.
TROUBLE = """
import os, signal, sys, time
sys.path.insert(0, sys.argv[1])
import check_gpu

def training(args, case):
    if case.configuration == "2d" and trouble:
        if case.trainer == "CutMix":
            os.kill(os.getpid(), signal.SIGKILL)
        if case.trainer == "CPS":
            raise RuntimeError("CUDA error: nothing works after it")
        if case.trainer == "DTC":
            time.sleep(60)
    return {"error": 0.0}

check_gpu.CHECKS["training"] = training
check_gpu.LONGEST = 1
options = ["-o", sys.argv[2], "--device", "cpu", "--trainers", "CutMix", "CPS", "DTC", "URPC", "--checks", "training"]
for trouble, minutes in ((True, 0), (True, 1), (False, 1)):
    sys.argv[1:] = [*options, "--minutes", str(minutes)]
    print("exit code", check_gpu.main())
"""


def run(*command):
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, timeout=600)


def test_cases_that_break_or_hang_fail_alone_and_are_repeated(tmp_path):
    result = run("-c", TROUBLE, SCRIPTS, tmp_path)
    assert result.returncode == 0, result.stderr
    no_time, trouble, repeated = result.stdout.split("exit code ")[:3]
    assert "LEFT 20 cases" in no_time and trouble.startswith("75\n") and repeated.startswith("1\n")
    assert result.stdout.endswith("exit code 0\n")
    assert "7 passed, 3 failed" in trouble
    assert "FAILED training 2d eager CutMix: ended its process with code -9" in trouble
    assert "FAILED training 2d eager CPS: RuntimeError('CUDA error: nothing works after it')" in trouble
    assert "FAILED training 2d eager DTC: took more than 1 s" in trouble
    assert "NOT RUN training, compiled: nnU-Net does not compile on the CPU (10 cases)" in trouble
    # Only those that failed.
    assert repeated.count("eager CutMix: ok") == 1 and "URPC: ok" not in repeated and "10 passed, 0 failed" in repeated
    results = tmp_path / "results.json"
    content = json.loads(results.read_text())
    results.write_text(json.dumps({**content, "machine": {"device": "another"}, "cases": {}}))
    result = run(SCRIPTS / "check_gpu.py", "-o", tmp_path, "--device", "cpu")
    assert result.returncode == 1 and result.stdout.startswith(f"Error: {results} is of {{'device': 'another'}}")
    assert result.stdout.count("\n") == 1 and not result.stderr


@pytest.mark.slow
def test_one_trainer_passes_everything_that_a_cpu_can_run(tmp_path):
    command = (SCRIPTS / "check_gpu.py", "-o", tmp_path, "--device", "cpu", "--trainers", "CutMix", "--steps", 2)
    result = run(*command)
    assert result.returncode == 0, result.stdout + (tmp_path / "log.txt").read_text()[-3000:]
    # Trainings, sizes and augmentation, stock and CutMix, 2d and 3d_fullres.
    assert "12 passed, 0 failed" in result.stdout
    assert "NOT RUN ranks, eager: NCCL needs two GPUs, one for each rank, and there are 0" in result.stdout
    cases = json.loads((tmp_path / "results.json").read_text())["cases"]
    assert cases["size 2d eager CutMix"]["step_ms"] > cases["size 2d eager stock"]["step_ms"]
    assert 0 <= cases["augmentation 2d eager CutMix"]["waiting"] < 1
