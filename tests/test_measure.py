"""The command measure: what a run costs, sampled; resumed, interrupted, and in a container."""

import csv
import json
import math
import os
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

psutil = pytest.importorskip("psutil")

from nnunet_semiseg import cli, measuring  # noqa: E402
from nnunet_semiseg.jobs import Job  # noqa: E402
from nnunet_semiseg.measuring import Curves, areas, run_measured  # noqa: E402

# Copies the images as predictions, under the names of the cases.
COPY = 'for f in {input}/*; do n=${f##*/}; cp "$f" "{output}/${n%_0000.nii.gz}.nii.gz"; done'


@pytest.fixture
def cases(tmp_path):
    folder = tmp_path / "cases"
    folder.mkdir()
    for case in "ab":
        (folder / f"{case}_0000.nii.gz").write_text(f"image {case}")
    return folder


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)


def measure(cases, *options):
    return cli.main(["measure", "-i", str(cases), "-o", str(cases.parent / "out"), *map(str, options)])


def lines(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if line and "Measuring:" not in line]


def curves(cases, case):
    return json.loads((cases.parent / "out" / "curves" / f"{case}.json").read_text())


def table(cases):
    with open(cases.parent / "out" / "efficiency.csv") as file:
        return list(csv.DictReader(file))


def test_each_case_has_its_run_curves_prediction_and_row(cases, capsys):
    assert measure(cases, "--", "sh", "-c", f"ls {{input}} >&2; sleep 0.5; {COPY}") == 0
    printed = capsys.readouterr()
    assert "no GPU is measured, and its columns are NaN: nvidia-ml-py is not installed" in printed.err
    assert "| Time " in printed.out and "– " in printed.out
    out = cases.parent / "out"
    for case, row in zip("ab", table(cases)):
        assert (out / "predictions" / f"{case}.nii.gz").read_text() == f"image {case}"
        # A run sees its own case alone.
        assert (out / "logs" / f"{case}.log").read_text().splitlines()[1:] == [f"{case}_0000.nii.gz"]
        assert (out / "curves" / f"{case}.png").stat().st_size > 1000
        content = curves(cases, case)
        samples = len(content["seconds"])
        assert 2 <= samples == len(content["gpu_memory"]) == len(content["cpu_list"]) == len(content["RAM_list"])
        assert (np.diff(content["seconds"]) > 0).all() and content["seconds"][-1] <= content["time"]
        assert all(math.isnan(value) for value in content["gpu_memory"])
        assert row["Name"] == f"{case}.nii.gz" and float(row["Time"]) == round(content["time"], 2) >= 0.5
        assert float(row["AUC_RAM_Time"]) == np.round(sum(content["RAM_list"]) * 0.1)
        used = [100 - idle for _, _, idle in content["cpu_list"]]
        assert float(row["AUC_CPU_Time"]) == round(sum(used) * 0.1, 2)
        assert math.isnan(float(row["AUC_GPU_Time"])) and row["GPU_tolerance_MB"] == "2048"
    assert sorted(p.name for p in out.iterdir() if not p.name.startswith(".")) == [
        "curves",
        "efficiency.csv",
        "logs",
        "predictions",
    ]
    assert not list(out.glob(".unfinished-*"))


def test_figures_by_hand():
    made = Curves([0.0, 0.1, 0.3], [(0, 0, 100), (20, 10, 70), (40, 0, 60)], [10, 30, 20], [1000, 3000, 5000], 0.449)
    assert areas(made, 2048) == {
        "Time": 0.45,
        "GPU_Mem": 5000,
        "AUC_GPU_Time": 900,
        "CPU_Utilization": 40,
        "AUC_CPU_Time": 7,
        "RAM": 30,
        "AUC_RAM_Time": 6,
        "AUC_GPU_above_tolerance": round((952 + 2952) * 0.1),
        "AUC_GPU_trapezoids": pytest.approx(0.1 * 2000 + 0.2 * 4000),
        "AUC_CPU_trapezoids": pytest.approx(0.1 * 15 + 0.2 * 35),
        "AUC_RAM_trapezoids": pytest.approx(0.1 * 20 + 0.2 * 25),
    }


def test_all_processes_count_also_those_whose_parents_have_ended(tmp_path):
    # tail keeps 20 MB until its input ends. Its shell has ended by then.
    orphan = "( (head -c 20000000 /dev/zero; sleep 1) | tail -c 20000000 >/dev/null & ) ; sleep 1"
    job = Job("a", ("sh", "-c", orphan), tmp_path / "a.log")
    made = run_measured(job, tmp_path / ".lock", measuring.Gpus())
    assert 20 < max(made.ram) < 100 and made.exit_code == 0
    before = os.times()
    busy = "import time; a = time.process_time()\nwhile time.process_time() < a + 0.5: pass"
    job = Job("b", ("sh", "-c", 'for i in 1 2; do "$0" -c "$1"; done', sys.executable, busy), tmp_path / "b.log")
    made = run_measured(job, tmp_path / ".lock", measuring.Gpus())
    after = os.times()
    true = after.children_user + after.children_system - before.children_user - before.children_system
    steps = np.diff(made.seconds, prepend=0)
    seconds = (steps * [user + system for user, system, _ in made.cpu]).sum() / 100 * os.cpu_count()
    # What is used after the last sample is not seen.
    assert true - 0.3 < seconds < true + 0.05


class FakeNvml:
    """A GPU with 300 MB in use by others, and 1000 MB by the process that it knows."""

    NVMLError = OSError

    def __init__(self, pid=None):
        self.pid = pid
        self.asked = 0

    def nvmlInit(self):
        pass

    def nvmlDeviceGetCount(self):
        return 1

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetMemoryInfo(self, handle):
        self.asked += 1
        # Twice before the start.
        return SimpleNamespace(used=(300 if self.asked <= 2 else 1300) * 2**20)

    def nvmlDeviceGetComputeRunningProcesses(self, handle):
        pids = [p.pid for p in psutil.Process().children(recursive=True)] if self.pid is None else [self.pid]
        return [SimpleNamespace(pid=pid, usedGpuMemory=2000 * 2**20) for pid in pids]


@pytest.mark.parametrize("pid, expected", [(None, 2000), (-1, 1000)])
def test_gpu_memory_is_that_of_the_processes_or_what_was_added(tmp_path, monkeypatch, pid, expected):
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(pid))
    gpus = measuring.Gpus()
    assert gpus.missing == ""
    made = run_measured(Job("a", ("sleep", "0.8"), tmp_path / "a.log"), tmp_path / ".lock", gpus)
    assert max(made.gpu) == expected
    measuring.plot(tmp_path / "a.png", made, 2048)


def test_a_case_that_fails_is_named_and_the_others_are_kept(cases, capsys):
    (cases.parent / "bad").write_text("")
    command = (
        "--",
        "sh",
        "-c",
        f'if [ -e {{input}}/b_0000.nii.gz ] && [ -e "$0" ]; then echo no memory; exit 3; fi; {COPY}',
    )
    command = (*command, cases.parent / "bad")
    assert measure(cases, *command) == 1
    told = lines(capsys)
    assert "Error: case b failed (exit code 3). The end of" in "\n".join(told) and "    no memory" in told
    assert "1 of 2 cases could not be measured" in told[-1] and not (cases.parent / "out" / "efficiency.csv").exists()
    first = curves(cases, "a")
    (cases.parent / "bad").unlink()
    assert measure(cases, *command) == 0 and curves(cases, "a") == first and len(table(cases)) == 2
    # Another image, or another command, is measured again.
    (cases / "a_0000.nii.gz").write_text("another")
    assert measure(cases, *command) == 0
    assert (cases.parent / "out" / "predictions" / "a.nii.gz").read_text() == "another"
    second = curves(cases, "a")
    assert second != first and measure(cases, *command, "more") == 0 and curves(cases, "a") != second


def test_a_run_without_a_prediction_is_an_error(cases, capsys):
    (cases / "b_0000.nii.gz").unlink()
    assert measure(cases, "--", "sh", "-c", ": {input}; touch {output}/other.nii.gz") == 1
    told = lines(capsys)
    assert told[1].startswith("Error: case a has no a.nii.gz in its output folder. It holds other.nii.gz")


def test_nothing_is_left_when_it_is_interrupted(cases, monkeypatch):
    used = measuring._used
    running = []

    def interrupt(processes):
        running.extend(processes)
        if len(running) > 3:
            raise KeyboardInterrupt
        return used(processes)

    monkeypatch.setattr(measuring, "_used", interrupt)
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        measure(cases, "--", "sh", "-c", "sleep 60; : {input} {output}")
    assert time.monotonic() - begin < 15
    gone, alive = psutil.wait_procs(set(running), timeout=5)
    assert not alive and not list((cases.parent / "out").glob(".unfinished-*"))


# ----------------------------------------------------------------------------------------------------------- containers

PODMAN = """#!/bin/sh
here=${0%/*}
echo "$@" >> "$here/calls"
case "$1" in
image) [ -e "$here/image" ] && cat "$here/image" || { echo "Error: tiny: image not known" >&2; exit 125; } ;;
inspect) [ -e "$here/pid" ] && cat "$here/pid" ;;
kill) [ -e "$here/pid" ] && kill -9 "-$(cat "$here/pid")" ;;
rm) rm -f "$here/pid" ;;
run)
    while [ $# -gt 0 ]; do
        [ "$1" = -v ] && case "$2" in *:/workspace/inputs) in=${2%:*} ;; *) out=${2%:*} ;; esac
        shift
    done
    setsid sh -c 'echo $$ > "$2/pid"; trap "" TERM; sleep ${SLOW:-0.4}; cp "$0"/a_0000.nii.gz "$1"/a.nii.gz' \\
        "$in" "$out" "$here" &
    wait ;;
esac
"""


@pytest.fixture
def podman(tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "podman").write_text(PODMAN)
    (folder / "podman").chmod(0o755)
    (folder / "image").write_text("sha256:1\n")
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


def test_an_image_is_run_as_the_challenges_do(cases, podman, capsys):
    (cases / "b_0000.nii.gz").unlink()
    assert measure(cases, "--image", "tiny") == 0
    assert (cases.parent / "out" / "predictions" / "a.nii.gz").read_text() == "image a"
    calls = (podman / "calls").read_text().splitlines()
    run = next(call for call in calls if call.startswith("run "))
    assert " --network none -m 28g --shm-size 64m " in run and run.endswith("tiny sh predict.sh")
    assert ":/workspace/inputs -v " in run and "gpu" not in run
    # Its name is the same in the next call, which removes what a killed one has left.
    name = run.split("--name ")[1].split()[0]
    assert f"rm -f {name}" in calls[: calls.index(run)] and calls[-1] == f"rm -f {name}"
    # The client of the engine does not count.
    first = curves(cases, "a")
    assert first["RAM_list"][0] == 0 and 0 < max(first["RAM_list"]) < 50
    assert measure(cases, "--image", "tiny") == 0 and curves(cases, "a") == first
    (podman / "image").write_text("sha256:2\n")
    assert measure(cases, "--image", "tiny") == 0 and curves(cases, "a") != first


def test_a_container_ends_when_it_is_interrupted_though_it_takes_no_notice_of_sigterm(cases, podman, monkeypatch):
    def interrupt(processes):
        if (podman / "pid").exists():
            raise KeyboardInterrupt
        return 0.0, 0.0, 0.0

    monkeypatch.setenv("SLOW", "60")
    monkeypatch.setattr(measuring, "_used", interrupt)
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        measure(cases, "--image", "tiny")
    assert time.monotonic() - begin < 15
    calls = (podman / "calls").read_text().splitlines()
    assert [call.split()[0] for call in calls[-2:]] == ["kill", "rm"]


def test_an_image_or_engine_that_is_missing(cases, podman, capsys, monkeypatch):
    (podman / "image").unlink()
    monkeypatch.setenv("PATH", str(podman))
    os.symlink("/bin/cat", podman / "cat")
    assert measure(cases, "--image", "tiny") == 1
    (line,) = lines(capsys)
    assert line.startswith("Error: There is no image tiny (podman: Error: tiny: image not known). Load it: podman load")
    (podman / "podman").unlink()
    assert measure(cases, "--image", "tiny") == 1
    assert lines(capsys) == ["Error: There is neither podman nor docker. Install one, or measure a command: -- COMMAND"]


@pytest.mark.parametrize(
    "options, complaint",
    [
        ([], "Give either --image NAME or -- COMMAND"),
        (["--image", "x", "--", "ls", "{input}", "{output}"], "Give either --image NAME or -- COMMAND"),
        (["--", "ls", "{input}"], "The command has no {output}, for the folder of a case"),
        (["--", "nowhere", "{input}", "{output}"], "There is no program nowhere"),
        (["--gpu-tolerance", "-1", "--", "ls", "{input}", "{output}"], "--gpu-tolerance -1 is not a number of MB"),
    ],
)
def test_wrong_options_are_told_in_one_line(cases, capsys, options, complaint):
    assert measure(cases, *options) == 1
    (line,) = lines(capsys)
    assert complaint in line


def test_images_have_to_be_named_as_nnunet_names_them(cases, capsys):
    (cases / "c.nii.gz").write_text("")
    assert measure(cases, "--", "ls", "{input}", "{output}") == 1
    assert lines(capsys) == [f"Error: {cases / 'c.nii.gz'} has no number of its channel. Name it c_0000.nii.gz"]
    (cases / "c.nii.gz").rename(cases / "a_0001.nii.gz")
    assert measure(cases, "--image", "tiny") == 1
    assert "a_0001.nii.gz is a second channel of a" in lines(capsys)[0]


def test_without_psutil_it_says_how_to_install_it(cases, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert measure(cases, "--", "ls", "{input}", "{output}") == 1
    assert lines(capsys) == ['Error: psutil is not installed. Run: pip install "nnunet-semiseg[measure]"']
