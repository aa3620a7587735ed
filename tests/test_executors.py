"""Executors: real processes, and a real Slurm that scripts/slurm_single_machine.sh starts on this machine."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from nnunet_semiseg import executors, jobs
from nnunet_semiseg.executors import LocalExecutor, SlurmExecutor
from nnunet_semiseg.jobs import HEADER, Job

# Not from conftest: callers, which are processes of their own, import this module, too, and should not wait for torch.
REPOSITORY = Path(__file__).resolve().parent.parent
PATIENCE = 120.0


def make_job(name, folder, code, *arguments, **environment):
    """A job that runs Python code with the folder, then the arguments, then the executor's, in sys.argv[1:]."""
    script = folder / "scripts" / f"{name}.py"
    script.parent.mkdir(exist_ok=True)
    imports = "import json, os, signal, subprocess, sys, time\nfrom pathlib import Path\n"
    script.write_text(imports + textwrap.dedent(code))
    command = (sys.executable, str(script), str(folder), *map(str, arguments))
    return Job(name, command, folder / "logs" / f"{name}.log", environment)


def wait_for(condition):
    """The condition's value as soon as it is true."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError("it did not happen")


def is_alive(process_id):
    """Whether a process runs; one that nobody has collected does not."""
    status = Path(f"/proc/{process_id}/status")
    try:
        return "State:\tZ" not in status.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def start_caller(code, folder):
    """A process of its own that runs code which makes jobs of this module; it prints into caller.log."""
    code = f"import sys\nsys.path.insert(0, {str(REPOSITORY / 'tests')!r})\nfrom test_executors import *\n{code}"
    with open(folder / "caller.log", "w") as log:
        return subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=log, stderr=log)


def printed_by_caller(folder):
    return " ".join((folder / "caller.log").read_text().split())


def headers(job):
    return [line for line in job.log.read_text().splitlines() if line.startswith(HEADER)]


# --------------------------------------------------------------------------------------------------------------- local

RECORD = """
with open(Path(sys.argv[1]) / "record", "a") as stream:
    print("begin", sys.argv[2], file=stream, flush=True)
    time.sleep(0.1)
    print("end", sys.argv[2], file=stream)
"""


def test_a_device_runs_one_job_at_a_time_in_their_order(tmp_path):
    jobs = [make_job(f"job{i}", tmp_path, RECORD, i) for i in range(4)]
    assert LocalExecutor(["cpu"]).run(jobs) == []
    expected = [line for i in range(4) for line in (f"begin {i}", f"end {i}")]
    assert (tmp_path / "record").read_text().splitlines() == expected
    assert LocalExecutor(["cpu"]).run([]) == []


# Ends only if another one runs at the same time.
TOGETHER = """
folder, name, other = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
(folder / name).write_text(json.dumps([os.environ.get("CUDA_VISIBLE_DEVICES"), sys.argv[4:], os.environ["COLOR"]]))
for _ in range(1000):
    if (folder / other).exists():
        sys.exit()
    time.sleep(0.02)
sys.exit("alone")
"""


@pytest.mark.parametrize("visible, expected", [(None, ["0", "1"]), ("7, GPU-5a ,3", ["7", "GPU-5a"])])
def test_every_device_has_a_job_of_its_own(tmp_path, monkeypatch, visible, expected):
    # This machine need not have GPUs.
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    jobs = [make_job(a, tmp_path, TOGETHER, a, b, COLOR=a * 2) for a, b in (("x", "y"), ("y", "x"))]
    assert LocalExecutor(["cuda:0", "cuda:1"]).run(jobs) == []
    for name, gpu in zip("xy", expected):
        assert json.loads((tmp_path / name).read_text()) == [gpu, ["-device", "cuda"], name * 2]


def test_cpu_jobs_keep_the_callers_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert LocalExecutor(["cpu"]).run([make_job("x", tmp_path, TOGETHER, "x", "x", COLOR="red")]) == []
    assert json.loads((tmp_path / "x").read_text()) == ["3", ["-device", "cpu"], "red"]


def test_devices_that_do_not_exist_are_refused(tmp_path, monkeypatch):
    for devices in ([], ["gpu"], ["cpu", "cuda:x"], ["cuda:"]):
        with pytest.raises(ValueError, match="There is no device"):
            LocalExecutor(devices)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    LocalExecutor(["cuda", "cuda:1"])
    with pytest.raises(ValueError, match="no device cuda:2: CUDA_VISIBLE_DEVICES='4,5' shows 2 GPUs"):
        LocalExecutor(["cuda:0", "cuda:2"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    job = make_job("job", tmp_path, RECORD, 0)
    with pytest.raises(ValueError, match="no device cuda:999"):
        LocalExecutor(["cuda:999"]).run([job])
    assert not job.log.exists()


def test_mistakes_are_found_before_anything_starts(tmp_path):
    good = make_job("good", tmp_path, RECORD, 0)
    with pytest.raises(FileNotFoundError, match="There is no nnUNetv2_tranquil"):
        LocalExecutor(["cpu"]).run([good, Job("bad", ("nnUNetv2_tranquil", "501"), tmp_path / "bad.log")])
    with pytest.raises(ValueError, match="Two jobs are called good"):
        LocalExecutor(["cpu"]).run([good, good])
    assert not good.log.exists()


def test_a_failure_has_the_end_of_its_own_log_and_stops_no_other(tmp_path, capsys):
    fails = """
    for i in range(40):
        print("line", i)
    sys.exit(3)
    """
    jobs = [
        make_job("before", tmp_path, "print('old', end='')"),
        make_job("fails", tmp_path, fails),
        make_job("silent", tmp_path, "sys.exit(1)"),
        make_job("memory", tmp_path, "os.kill(os.getpid(), signal.SIGKILL)"),
        make_job("after", tmp_path, RECORD, 0),
    ]
    for job in jobs[1:3]:
        job.log.parent.mkdir(exist_ok=True)
        job.log.write_text("from an earlier attempt")
    failures = LocalExecutor(["cpu", "cpu"]).run(jobs)
    assert [(f.job, f.exit_code) for f in failures] == list(zip(jobs[1:4], (3, 1, -9)))
    assert failures[0].tail == "\n".join(f"line {i}" for i in range(30, 40))
    assert str(failures[0]).splitlines()[:2] == [
        f"fails failed (exit code 3). The end of {jobs[1].log}:",
        "    line 30",
    ]
    assert failures[1].tail == "" and "earlier" not in str(failures[1])
    assert "SIGKILL, as happens when memory runs out" in str(failures[2])
    assert (tmp_path / "record").exists()
    # Told at once, too.
    assert f"fails failed (exit code 3): {jobs[1].log}" in capsys.readouterr().err
    # Logs are added to, each attempt after a line with its command.
    log = jobs[1].log.read_text().splitlines()
    assert log[0] == "from an earlier attempt" and log[1] == headers(jobs[1])[0] and log[1].endswith("-device cpu")
    assert sorted(p.name for p in jobs[0].log.parent.glob("[!.]*")) == sorted(f"{job.name}.log" for job in jobs)
    assert not list(jobs[0].log.parent.glob(".*.log.lock"))


def test_a_failure_of_nnunet_shows_its_message(tmp_path, work, monkeypatch):
    # Found beside the interpreter, wherever PATH points.
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    command = ("nnUNetv2_train", "987", "2d", "0", "-p", "nnUNetPlans_cpu")
    [failure] = LocalExecutor(["cpu"]).run([Job("member_0", command, tmp_path / "member_0.log")])
    assert failure.exit_code == 1 and "987" in failure.tail and "Error" in failure.tail


def test_described_lines_do_what_run_does(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    executor = LocalExecutor(["cuda:0", "cuda:1"])
    jobs = [make_job(name, tmp_path, TOGETHER, name, name, COLOR="it's $HOME") for name in ("x y", "z")]
    lines = executor.describe(jobs)
    assert executor.run(jobs) == []
    ran = [json.loads((tmp_path / job.name).read_text()) for job in jobs]
    assert ran == [[str(i), ["-device", "cuda"], "it's $HOME"] for i in (0, 1)]
    for job, line, expected in zip(jobs, lines, ran):
        (tmp_path / job.name).unlink()
        assert headers(job)[0].endswith(line)
        subprocess.run(line, shell=True, check=True)
        assert json.loads((tmp_path / job.name).read_text()) == expected


# A training with a data loader: a child process that would go on for long. "again": only if the first one is gone.
TRAINING = """
folder = Path(sys.argv[1])
numbers = folder / "numbers"
if numbers.exists():
    for number in json.loads(numbers.read_text()):
        status = Path(f"/proc/{number}/status")
        if status.exists() and "State:\\tZ" not in status.read_text():
            sys.exit("still there")
    sys.exit()
child = os.fork()
if child:
    (folder / "numbers.tmp").write_text(json.dumps([os.getpid(), child]))
    (folder / "numbers.tmp").rename(numbers)
    if sys.argv[2] == "crash":
        sys.exit(5)
if sys.argv[2] == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(600)
"""
LOCAL_CALLER = 'LocalExecutor(["cpu"]).run([make_job("job", Path(sys.argv[1]), TRAINING, "run")])'


@pytest.mark.parametrize("number, exit_code", [(signal.SIGTERM, 143), (signal.SIGINT, -2)])
def test_a_caller_that_is_ended_leaves_no_process(tmp_path, number, exit_code):
    caller = start_caller(LOCAL_CALLER, tmp_path)
    wait_for((tmp_path / "numbers").exists)
    numbers = json.loads((tmp_path / "numbers").read_text())
    assert all(map(is_alive, numbers))
    with pytest.raises(ValueError, match="Another call runs the jobs of .*logs"):
        LocalExecutor(["cpu"]).run([make_job("job", tmp_path, TRAINING, "run")])
    caller.send_signal(number)
    assert caller.wait(PATIENCE) == exit_code, printed_by_caller(tmp_path)
    wait_for(lambda: not any(map(is_alive, numbers)))


def left_by_a_killed_caller(folder):
    """The numbers of the processes of its job, which live."""
    caller = start_caller(LOCAL_CALLER, folder)
    wait_for((folder / "numbers").exists)
    numbers = json.loads((folder / "numbers").read_text())
    caller.kill()
    caller.wait()
    assert all(map(is_alive, numbers))
    return numbers


def test_what_a_killed_caller_left_is_ended_before_its_job_starts_again(tmp_path):
    numbers = left_by_a_killed_caller(tmp_path)
    job = make_job("job", tmp_path, TRAINING, "run")
    assert LocalExecutor(["cpu"]).run([job]) == []
    assert not any(map(is_alive, numbers)) and len(headers(job)) == 2


def test_what_a_killed_caller_left_is_ended_before_the_same_work_starts_in_other_jobs(tmp_path):
    numbers = left_by_a_killed_caller(tmp_path)
    assert LocalExecutor(["cpu"]).run([make_job("job_part0", tmp_path, "pass")]) == []
    assert not any(map(is_alive, numbers))


def test_children_of_a_crashed_job_are_ended(tmp_path):
    [failure] = LocalExecutor(["cpu"]).run([make_job("job", tmp_path, TRAINING, "crash")])
    assert failure.exit_code == 5
    assert not any(map(is_alive, json.loads((tmp_path / "numbers").read_text())))


def test_processes_that_ignore_sigterm_are_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "END_SECONDS", 0.5)
    job = make_job("job", tmp_path, TRAINING, "stubborn")

    def stop():
        wait_for((tmp_path / "numbers").exists)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=stop).start()
    with pytest.raises(KeyboardInterrupt):
        LocalExecutor(["cpu"]).run([job])
    assert not any(map(is_alive, json.loads((tmp_path / "numbers").read_text())))
    # What the caller does with signals is as before.
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_job_that_runs_on_another_machine_is_left_alone(tmp_path):
    job = make_job("job", tmp_path, RECORD, 0)
    with jobs.lock(job.log.with_name(".job.log.lock")) as held:
        assert jobs.lock(Path(held.name)) is None
        # No process has this number.
        held.write("99999999 far-away\n")
        held.flush()
        with pytest.raises(RuntimeError, match="far-away. Run there: kill -- -99999999"):
            jobs.end_processes([Path(held.name)])
    # Without the lock the number means nothing.
    assert LocalExecutor(["cpu"]).run([job]) == []


# --------------------------------------------------------------------------------------------------------------- SLURM


@pytest.fixture(scope="module")
def single_machine(tmp_path_factory):
    """SLURM_CONF of a Slurm of its own."""
    pytest.importorskip("submitit", reason="submitit is not installed")
    folder = tmp_path_factory.mktemp("slurm") / "s"
    script = ["bash", str(REPOSITORY / "scripts" / "slurm_single_machine.sh")]
    environment = {**os.environ, "SLURM_SINGLE_MACHINE": str(folder)}
    # Its daemons would keep a pipe open.
    with open(folder.with_name("start.log"), "w+") as log:
        code = subprocess.run([*script, "start"], env=environment, stdout=log, stderr=log).returncode
        log.seek(0)
        printed = log.read()
    if code == 75:
        pytest.skip(printed.strip())
    assert code == 0, printed
    yield folder / "slurm.conf"
    subprocess.run([*script, "stop"], env=environment, check=True)
    assert not folder.exists()


# The time limit that it gives itself is over at once, but Slurm looks every 30 seconds only.
SLOW = """
folder = Path(sys.argv[1])
if (folder / "started").exists():
    sys.exit()
(folder / "started").touch()
subprocess.run(["scontrol", "update", "JobId=" + os.environ["SLURM_JOB_ID"], "EndTime=now+1"])
time.sleep(600)
"""
SLOW_CALLER = """
executors.SLURM_POLL_SECONDS = 0.5
job = make_job("slow", Path(sys.argv[1]), SLOW)
sys.exit(len(SlurmExecutor(job.log.parent, gpus=0, minutes=10, parameters={"comment": "slow"}).run([job])))
"""


@pytest.fixture(scope="module")
def slow_call(single_machine, tmp_path_factory):
    """(process, folder) of a call whose job runs out of time; it goes on beside the other tests."""
    folder = tmp_path_factory.mktemp("slow")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(single_machine))
        caller = start_caller(SLOW_CALLER, folder)
    yield caller, folder
    caller.kill()
    caller.wait()


@pytest.fixture
def slurm(single_machine, slow_call, tmp_path, monkeypatch):
    """``slurm(**arguments)``: an executor for CPU jobs."""
    monkeypatch.setenv("SLURM_CONF", str(single_machine))
    monkeypatch.setattr(executors, "SLURM_POLL_SECONDS", 0.3)
    yield lambda **arguments: SlurmExecutor(tmp_path / "slurm", **{"gpus": 0, "minutes": 10, **arguments})
    for number, _ in queue():
        subprocess.run(["scancel", number], check=True)


def queue():
    """[(number, name)] of the jobs of this test that have not ended."""
    command = ["squeue", "--noheader", "--array", "--format=%i %j %k"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [tuple(line.split()[:2]) for line in lines if not line.endswith(" slow")]


# Tells about each attempt; "twice" succeeds the second time, "fails" never, "long" takes long the first time.
ATTEMPT = """
folder, name = Path(sys.argv[1]), sys.argv[2]
variables = ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "nnUNet_raw", "CUDA_VISIBLE_DEVICES")
told = [*map(os.environ.get, variables), sys.argv[3:]]
file = folder / f"{name}.json"
before = json.loads(file.read_text()) if file.exists() else []
(folder / f"{name}.tmp").write_text(json.dumps([*before, told]))
(folder / f"{name}.tmp").rename(file)
if name == "long" and not before:
    time.sleep(600)
if name == "fails" or (name == "twice" and not before):
    print("attempt", len(before) + 1)
    sys.exit(3)
"""


def attempts(job, folder):
    return json.loads((folder / f"{job.name}.json").read_text())


def test_slurm_runs_an_array_and_tries_again_what_failed(slurm, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("nnUNet_raw", "/data/raw")
    # Some clusters do not hand the environment on.
    monkeypatch.setenv("SBATCH_EXPORT", "NONE")
    jobs = [make_job(name, tmp_path, ATTEMPT, name) for name in ("good", "twice", "fails")]
    failures = slurm(retries=1, parameters={"cpus-per-task": 1}).run(jobs)
    assert [(f.job, f.exit_code, f.tail) for f in failures] == [(jobs[2], 3, "attempt 2")]
    assert [len(attempts(job, tmp_path)) for job in jobs] == [1, 2, 2]
    assert [len(headers(job)) for job in jobs] == [1, 2, 2]
    first = [attempts(job, tmp_path)[0] for job in jobs]
    assert len({told[1] for told in first}) == 1 and first[0][1] is not None, "not one array"
    assert all(told[2:] == ["/data/raw", None, ["-device", "cpu"]] for told in first)
    assert "exit code 3), it is tried again" in capsys.readouterr().err
    assert json.loads((tmp_path / "slurm" / "jobs.json").read_text()) == {}
    assert not list((tmp_path / "slurm").glob("*.exit")) and queue() == []


def test_slurm_gives_gpus_and_what_is_asked_for(slurm, tmp_path):
    job = make_job("gpu", tmp_path, ATTEMPT, "gpu")
    assert slurm(gpus=1, partition="main", parameters={"comment": "two words"}).run([job]) == []
    [told] = attempts(job, tmp_path)
    assert told[3:] == ["0", ["-device", "cuda"]]
    shown = subprocess.run(["scontrol", "show", "job", told[0]], capture_output=True, text=True).stdout
    for expected in ("Comment=two words", "TimeLimit=00:10:00", "Partition=main", "JobState=COMPLETED"):
        assert expected in shown


def test_slurm_jobs_can_be_started_from_slurm_jobs(slurm, tmp_path):
    code = f"""
    sys.path[:0] = [{str(REPOSITORY / "tests")!r}]
    import test_executors as t
    t.executors.SLURM_POLL_SECONDS = 0.3
    folder = Path(sys.argv[1])
    inner = t.make_job(f"inner{{sys.argv[2]}}", folder, t.ATTEMPT, f"inner{{sys.argv[2]}}")
    assert not t.SlurmExecutor(folder / sys.argv[2], gpus=0, minutes=10, retries=0).run([inner])
    """
    assert slurm(retries=0).run([make_job(f"outer{i}", tmp_path, code, i) for i in range(2)]) == []
    for i in range(2):
        [[number, array, *_]] = json.loads((tmp_path / f"inner{i}.json").read_text())
        assert number and array is None


def test_slurm_says_what_it_refuses(slurm, tmp_path, capfd):
    job = make_job("job", tmp_path, ATTEMPT, "job")
    with pytest.raises(ValueError, match="sbatch refused the jobs: .*nvalid partition.*Change partition"):
        slurm(partition="nope").run([job])
    with pytest.raises(ValueError, match="sbatch refused the jobs: .*unrecognized option '--flavor=sweet'. Change"):
        slurm(parameters={"flavor": "sweet"}).run([job])
    assert "sbatch" not in capfd.readouterr().err
    assert queue() == [] and slurm().run([job]) == []
    for arguments, message in (
        (dict(parameters={"--job-name": "x"}), "parameter job_name cannot be chosen"),
        (dict(minutes=0), "minutes is 0"),
        (dict(gpus=-1), "gpus is -1"),
        (dict(retries=-1), "retries is -1"),
    ):
        with pytest.raises(ValueError, match=message):
            slurm(**arguments)


def test_slurm_jobs_that_somebody_cancels_are_not_tried_again(slurm, tmp_path):
    job = make_job("long", tmp_path, ATTEMPT, "long")

    def cancel():
        wait_for((tmp_path / "long.json").exists)
        subprocess.run(["scancel", attempts(job, tmp_path)[0][0]], check=True)

    threading.Thread(target=cancel).start()
    [failure] = slurm(retries=3).run([job])
    assert "CANCELLED" in failure.reason and len(attempts(job, tmp_path)) == 1
    # Given again, it is a new job.
    assert slurm().run([job]) == [] and len(attempts(job, tmp_path)) == 2


def test_slurm_jobs_whose_python_cannot_start_show_slurms_output(slurm, tmp_path, monkeypatch):
    monkeypatch.setattr(executors, "GONE_SECONDS", 0.0)
    # A module that breaks the interpreter of the job, not this one.
    (tmp_path / "submitit").mkdir()
    (tmp_path / "submitit" / "__init__.py").write_text("raise SystemExit('no such environment')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    job = make_job("job", tmp_path, ATTEMPT, "job")
    [failure] = slurm(retries=0).run([job])
    assert failure.exit_code is None and "FAILED" in failure.reason and failure.tail == "no such environment"
    assert not job.log.exists()


def test_described_slurm_lines_run(slurm, tmp_path):
    job = make_job("described", tmp_path, ATTEMPT, "described", nnUNet_raw="it's here")
    job.log.parent.mkdir()
    [line] = slurm(parameters={"requeue": True}).describe([job])
    assert shlex.split(line)[:4] == ["sbatch", "--job-name=described", "--time=10", "--requeue"]
    subprocess.run(line, shell=True, check=True, stdout=subprocess.DEVNULL)
    wait_for((tmp_path / "described.json").exists)
    assert attempts(job, tmp_path)[0][2] == "it's here" and attempts(job, tmp_path)[0][4] == ["-device", "cpu"]


# Waits for a file; every start is a line.
GATED = """
folder = Path(sys.argv[1])
with open(folder / "starts", "a") as stream:
    print(sys.argv[2], file=stream)
while not (folder / "go").exists():
    time.sleep(0.05)
"""
SLURM_CALLER = """
folder = Path(sys.argv[1])
executors.SLURM_POLL_SECONDS = 0.3
SlurmExecutor(folder / "slurm", gpus=0, minutes=10).run([make_job(n, folder, GATED, n) for n in ("a", "b")])
"""


def starts(folder):
    return sorted((folder / "starts").read_text().split()) if (folder / "starts").exists() else []


def test_slurm_jobs_of_a_killed_caller_go_on_and_are_waited_for(slurm, tmp_path, capsys):
    caller = start_caller(SLURM_CALLER, tmp_path)
    wait_for(lambda: starts(tmp_path) == ["a", "b"])
    a, b = (make_job(name, tmp_path, GATED, name) for name in ("a", "b"))
    with pytest.raises(ValueError, match="Another call runs the jobs of .*slurm"):
        slurm().run([a, b])
    caller.kill()
    caller.wait()
    numbers = [number for number, _ in queue()]
    assert len(numbers) == 2
    other = replace(make_job("a", tmp_path, GATED, "a"), log=tmp_path / "other.log")
    with pytest.raises(ValueError, match=r"Slurm job \d+_0 is an earlier a, .*a.log. .* scancel \d+_0"):
        slurm().run([other, b])
    with pytest.raises(ValueError, match=r"Slurm job \d+_0 is a of an earlier call, which this one cuts"):
        slurm().run([make_job("a_part0", tmp_path, GATED, "a"), b])

    # Ctrl-C: they go on still, and it says how to end them.
    caller = start_caller(SLURM_CALLER, tmp_path)
    wait_for(lambda: "2 running" in printed_by_caller(tmp_path))
    caller.send_signal(signal.SIGINT)
    caller.wait(PATIENCE)
    array = numbers[0].partition("_")[0]
    expected = rf"go on in Slurm. Run the same command again to wait for them, or cancel them: scancel {array}\b"
    assert re.search(expected, printed_by_caller(tmp_path))
    assert [number for number, _ in queue()] == numbers

    (tmp_path / "go").touch()
    # What is given now may continue what was given then.
    assert slurm().run([a, make_job("b", tmp_path, GATED, "b", "--c")]) == []
    assert starts(tmp_path) == ["a", "b"] and len(headers(a)) == 1
    assert f"b is in Slurm already, as job {array}_1" in capsys.readouterr().err


def test_slurm_jobs_that_ended_while_nobody_waited(slurm, tmp_path):
    """What succeeded is not done again; what failed is."""
    code = ATTEMPT + "\nwhile not (folder / 'go').exists():\n    time.sleep(0.05)\nsys.exit(name == 'b' and not before)"
    caller = start_caller(SLURM_CALLER.replace("GATED", repr(code)), tmp_path)
    wait_for(lambda: (tmp_path / "a.json").exists() and (tmp_path / "b.json").exists())
    caller.kill()
    caller.wait()
    (tmp_path / "go").touch()
    wait_for(lambda: queue() == [])
    jobs = [make_job(name, tmp_path, code, name) for name in ("a", "b")]
    assert slurm(retries=0).run(jobs) == []
    assert [len(attempts(job, tmp_path)) for job in jobs] == [1, 2]


def test_a_caller_killed_within_sbatch_loses_no_job(slurm, tmp_path, monkeypatch):
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    real = subprocess.run(["which", "sbatch"], capture_output=True, text=True).stdout.strip()
    sbatch.write_text(f'#!/bin/sh\n{real} "$@"\nkill -KILL $PPID\n')
    sbatch.chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", f"{sbatch.parent}{os.pathsep}{os.environ['PATH']}")
        caller = start_caller(SLURM_CALLER, tmp_path)
        assert caller.wait(PATIENCE) == -signal.SIGKILL
        numbers = [number for number, _ in queue()]
    assert len(numbers) == 2
    executor = slurm()

    def stop():
        wait_for(lambda: executor._attempts and all(attempt.id for attempt in executor._attempts.values()))
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=stop).start()
    with pytest.raises(KeyboardInterrupt):
        executor.run([make_job(name, tmp_path, GATED, name) for name in ("a", "b")])
    assert [number for number, _ in queue()] == numbers


@pytest.mark.slow
def test_slurm_jobs_that_run_out_of_time_are_tried_again(slow_call):
    caller, folder = slow_call
    code = caller.wait(PATIENCE)
    printed = printed_by_caller(folder)
    assert code == 0, printed
    assert re.search(r"slow failed \(Slurm job \d+: TIMEOUT\), it is tried again", printed)
    assert (folder / "logs" / "slow.log").read_text().count(HEADER) == 2


@pytest.mark.slow
def test_rounds_run_through_slurm(single_machine, prepared, tmp_path, monkeypatch):
    """Arrays of two trainings and of two parts of a prediction, with stock nnU-Net in them."""
    from pseudo_label import cli

    monkeypatch.setenv("SLURM_CONF", str(single_machine))
    monkeypatch.setattr(executors, "SLURM_POLL_SECONDS", 0.5)
    prepared("labels")
    length = "_1epochs_num_iterations_per_epoch=4_num_val_iterations_per_epoch=1"
    members = [f"nnUNetTrainerMeanTeacher_warm_up=0{length}_seed={seed}" for seed in (3, 4)]
    command = ["rounds", "-d", "801", "-c", "2d", "-p", "nnUNetPlans_cpu", "-o", str(tmp_path / "work"), "--members"]
    command += [*members, "--rounds", "1", "--dataset-ids", "861", "--disable_tta", "-np", "1"]
    command += ["--fraction", "0.5", "--allow-drift", "--max-drop", "1", "--executor", "slurm", "--gpus", "0"]
    assert cli.main([*command, "--minutes", "10", "--parts", "2", "--slurm", "cpus_per_task=1"]) == 0
    logs = list((tmp_path / "work").glob("round_*/logs/*.log"))
    # Two trainings in both rounds, and two parts of two members' predictions between them; none of them twice.
    assert len(logs) == 8
    for log in logs:
        assert log.read_text(encoding="utf-8").count(HEADER) == 1
    content = json.loads((tmp_path / "work" / "manifest.json").read_text())
    assert content["stopped"].startswith("All 1 rounds are done") and len(content["rounds"][1]["accepted"]) == 3


def test_slurm_that_is_not_there_is_named(tmp_path, monkeypatch):
    job = make_job("job", tmp_path, ATTEMPT, "job")
    executor = SlurmExecutor(tmp_path / "slurm")
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        patch.setitem(sys.modules, "submitit", type(sys)("submitit"))
        with pytest.raises(FileNotFoundError, match="sbatch is not on PATH"):
            executor.run([job])
        patch.setitem(sys.modules, "submitit", None)
        with pytest.raises(ValueError, match=r'pip install "nnunet-semiseg\[slurm\]"'):
            executor.run([job])
    assert not (tmp_path / "slurm").exists()
