"""``nnunet_semiseg benchmark``: folds, refusals, a matrix that is killed and continued, and its report."""

import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LABELS, TWO_PHASES
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunet_semiseg import checkpoints, cli
from nnunet_semiseg.benchmark.processes import Child, OutOfTime
from nnunet_semiseg.benchmark.quality import Scorer, Snapshots, class_dice, score
from nnunet_semiseg.benchmark.records import QUALITY, QUALITY_COLUMNS, RECORD, Run, read_quality, update_record
from nnunet_semiseg.benchmark.report import draw_quality, draw_validation
from nnunet_semiseg.benchmark.runs import Benchmark
from nnunet_semiseg.benchmark.suite import folds_of_budgets
from nnunet_semiseg.files import write_csv, write_json
from nnunet_semiseg.jobs import Job, lock
from nnunet_semiseg.labels import LabelAdapter

CASES = [f"case_{i}" for i in range(10)]
NAME = "Dataset811_bench"
BCP = "BCP" + TWO_PHASES


@pytest.fixture
def dataset(prepared, work):
    """A copy of the tiny dataset without unlabeled images; its splits are nobody else's. The preprocessed folder."""
    source, target = work / "preprocessed" / prepared("labels"), work / "preprocessed" / NAME
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*_unlabeled", "*3d_fullres*", "splits_final*"))
    plans = target / "nnUNetPlans_cpu.json"
    plans.write_text(plans.read_text().replace(source.name, NAME))
    yield target
    shutil.rmtree(target)
    shutil.rmtree(work / "results" / NAME, ignore_errors=True)


@pytest.fixture
def write(tmp_path):
    """``write(key=value)``: a FILE.json of two short runs, with changes; None leaves a key out."""

    def write(**changes):
        content = {
            "dataset": 811,
            "configuration": "2d",
            "plans": "nnUNetPlans_cpu",
            "output": "out",
            "trainers": ["vanilla", BCP],
            "budgets": [2],
            "validation": ["lab_05"],
            "epochs": 2,
            "iterations": 2,
            "val_iterations": 1,
            "all_labels": False,
            "quality_cases": 2,
            **changes,
        }
        file = tmp_path / "bench.json"
        file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
        return file

    return write


def main(*arguments):
    return cli.main(["benchmark", *map(str, arguments)])


def folds(budgets, validation=("case_0", "case_1"), all_labels=True, more=False, seed=1):
    return folds_of_budgets(CASES, list(validation), budgets, seed, all_labels, more)


# Folds


def test_numbers_of_cases_are_drawn_nested_and_repeatably():
    first = folds([2, 5, 3])
    assert list(first) == ["2 cases", "5 cases", "3 cases", "all labels"]
    small, large, middle = (set(first[f"{n} cases"]["train"]) for n in (2, 5, 3))
    assert small < middle < large and len(large) == 5
    assert folds([2, 5, 3]) == first != folds([2, 5, 3], seed=2)


@pytest.mark.parametrize("budgets", [[1, 4], {"a": ["case_2"], "b": ["case_3", "case_9"]}])
def test_a_fold_holds_every_case_once(budgets):
    for fold in folds(budgets).values():
        assert sorted(fold["train"] + fold["val"] + fold["unlabeled"]) == CASES
        assert fold["val"] == ["case_0", "case_1"]


def test_all_labels_hides_nothing():
    for more in (True, False):
        fold = folds({"a": ["case_2"], "b": ["case_3"]}, more=more)["all labels"]
        assert fold["unlabeled"] == [] and fold["train"] == CASES[2:]


@pytest.mark.parametrize(
    "budgets, message",
    [
        ({"a": ["case_1", "case_2"]}, "case_1 is in 'a' and in the validation cases"),
        ({"a": ["nobody"]}, "'a' names nobody.*e.g., case_0"),
        ({"a": ["case_2", "case_2"]}, "'a' names a case twice"),
        ({"all labels": ["case_2"]}, "Use another name"),
        ([9], "only 8 that are not for validation"),
        ([8], "leaves no case unlabeled"),
    ],
)
def test_bad_budgets_are_named(budgets, message):
    with pytest.raises(ValueError, match=message):
        folds(budgets)


def test_unknown_validation_case_is_named():
    with pytest.raises(ValueError, match="'validation' names nobody"):
        folds([2], validation=["nobody"])


# What is refused before anything runs


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"epoch": 3}, "there is no key 'epoch'. Keys: dataset, "),
        ({"budgets": None}, "'budgets' is missing"),
        ({"epochs": "3"}, "'epochs' is \"3\", but has to be a whole number"),
        ({"seeds": [1, 1]}, "'seeds' names something twice"),
        ({"trainers": ["BCB"]}, "There is no trainer 'BCB'. Trainers: vanilla, EntropyMinimization, MeanTeacher"),
        ({"trainers": ["BCP_weight=1"]}, "Trainer 'BCP_weight=1': there is no option 'weight'"),
        ({"trainers": ["vanilla", "nnUNetTrainer"]}, "are the same trainer"),
        ({"trainers": ["BCP", "nnUNetTrainerBCP"]}, "are the same trainer"),
        ({"dataset": 999}, "There is no dataset 999"),
        ({"plans": "nnUNetPlans"}, "nnUNetPlans.json is missing"),
        ({"configuration": "3d_lowres"}, "has no configuration 3d_lowres. It has 2d"),
        ({"configuration": "3d_fullres"}, "has no cases. Run: nnUNetv2_preprocess -d 811 -plans_name nnUNetPlans_cpu"),
        ({"budgets": [6]}, "Use a smaller number"),
        ({"fork_after": "1"}, "'fork_after' is \"1\", but has to be a number of epochs"),
        ({"fork_after": 2}, "'fork_after' is 2, but has to be less than 'epochs', 2"),
    ],
)
def test_one_line_names_what_is_wrong(changes, message, dataset, write, capsys):
    assert main(write(**changes)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (dataset / "splits_final.json").exists()


def test_a_case_that_is_not_preprocessed_is_named(dataset, write, capsys):
    for file in (dataset / "nnUNetPlans_cpu_2d").glob("lab_03*"):
        file.unlink()
    assert main(write()) == 2
    assert "lacks case lab_03. Run: nnUNetv2_preprocess" in capsys.readouterr().err


def test_splits_that_were_there_are_kept(dataset, write, capsys):
    former = '[{"train": ["lab_00"], "val": ["lab_04"]}]'
    splits, backup = dataset / "splits_final.json", dataset / "splits_final.json.before_benchmark"
    splits.write_text(former)
    file = write(validation=None)
    # Out of time before the first run.
    assert main(file, "--minutes", 0) == 3
    assert backup.read_text() == former and backup.name in capsys.readouterr().out
    (fold,) = json.loads(splits.read_text())
    assert fold["val"] == ["lab_04"] and len(fold["train"]) == 2 and len(fold["unlabeled"]) == 3
    assert main(file, "--minutes", 0) == 3
    splits.write_text(former.replace("04", "05"))
    assert main(file, "--minutes", 0) == 3
    assert backup.read_text() == former
    assert "lab_05" in backup.with_name(backup.name + "_2").read_text()


@pytest.mark.parametrize("validation", [None, ["lab_05"]])
def test_splits_that_are_cut_off_are_named(dataset, write, capsys, validation):
    splits = dataset / "splits_final.json"
    splits.write_text('[{"train": ["lab')
    assert main(write(validation=validation), "--minutes", 0) == 2
    error = capsys.readouterr().err
    assert f"{splits} is cut off or not valid JSON" in error and error.count("\n") == 1
    assert splits.read_text() == '[{"train": ["lab'


def test_results_on_other_cases_are_refused(dataset, write, work, capsys):
    run = Benchmark(write(), "cpu").runs[0]
    update_record(run.fold, split={"train": ["lab_00"], "val": ["lab_05"], "unlabeled": []})
    assert main(write()) == 2
    assert f"{run.fold} was made by a benchmark with other cases" in capsys.readouterr().err
    (run.fold / RECORD).unlink()
    (run.fold / "checkpoint_best.pth").touch()
    assert main(write()) == 2
    assert "holds a training that this benchmark did not start" in capsys.readouterr().err


def test_dry_run_writes_nothing(dataset, write, work, capsys):
    assert main(write(trainers=["BCP"], all_labels=True), "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "Fold 1, all labels: 5 train, 1 val, 0 unlabeled" in printed
    assert "[1/2] BCP, 2 cases, seed 1: to do" in printed
    schedule = "_2epochs_num_iterations_per_epoch=2_num_val_iterations_per_epoch=1_save_every=1_seed=1"
    assert f"nnUNetv2_train {NAME} 2d 1 -tr nnUNetTrainer{schedule} -p nnUNetPlans_cpu -device cpu\n" in printed
    assert not (dataset / "splits_final.json").exists() and not (work / "results" / NAME).exists()


def test_gpu_profile_uses_cuda_and_stops_after_nine_minutes(dataset, write, monkeypatch, capsys):
    file = write()
    assert main(file, "--profile", "gpu", "--dry-run") == 0
    printed = capsys.readouterr().out
    assert printed.count("-device cuda\n") == 2 and "-device cpu" not in printed

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(file, "--profile", "gpu") == 2
    assert "There is no CUDA device. Use --profile cpu" in capsys.readouterr().err

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    left = []
    monkeypatch.setattr(Benchmark, "run", lambda self, until: left.append(until - time.monotonic()) or 3)
    assert main(file, "--profile", "gpu") == main(file, "--profile", "gpu", "--minutes", "2") == 3
    assert main(file) == 3
    assert [round(seconds / 60) for seconds in left[:2]] == [9, 2] and left[2] == float("inf")


# Running


@pytest.mark.slow
def test_a_matrix_that_is_killed_continues(dataset, write, tmp_path, capsys):
    file = write()
    runs = Benchmark(file, "cpu").runs
    process = subprocess.Popen(
        [sys.executable, "-m", "nnunet_semiseg.cli", "benchmark", str(file)], stdout=subprocess.DEVNULL
    )
    deadline = time.time() + 300
    while not (runs[0].fold / "snapshots" / "epoch_001.pth").is_file():
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.05)
    # The training itself goes on, as after a kill by the system, and is found by the next call.
    process.kill()
    process.wait()

    assert main(file) == 0
    printed = capsys.readouterr().out
    assert "0 of 2 runs are done" in printed and "[2/2] " + BCP in printed
    for run in runs:
        assert (run.fold / "run.log").read_text().count(": Epoch 0") == 1
        assert not (run.fold / "snapshots").exists()
        quality = read_quality(run.fold)
        assert {row[:3] for row in quality} == {
            (epoch, network, name)
            for epoch in (1, 2)
            for network in (("student",) if run.method == "vanilla" else ("student", "teacher"))
            for name in ("ball", "core")
        }
        assert all(0 <= row[3] <= 1 for row in quality)
        assert 0 < run.record["training_minutes"] < run.record["wall_minutes"]
        assert run.peak_gib > 0.1 and len(run.record["validation_dice"]) == 2

    page = (tmp_path / "out" / "results.md").read_text(encoding="utf-8")
    with open(tmp_path / "out" / "results.csv") as stream:
        rows = list(csv.DictReader(stream))
    for run in runs:
        summary = json.loads((run.fold / "validation" / "summary.json").read_text())
        assert f"| {run.method} | {summary['foreground_mean']['Dice']:.3f} |" in page
        dice = {row["class"]: float(row["dice"]) for row in rows if row["trainer"] == run.trainer}
        means = summary["mean"]
        assert dice == {
            "ball": means["1"]["Dice"],
            "core": means["2"]["Dice"],
            "mean": summary["foreground_mean"]["Dice"],
        }
    for name in ("label_efficiency", "pseudo_label_quality", "validation_curves"):
        assert (tmp_path / "out" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"

    before = [(run.fold / "run.log").stat().st_mtime_ns for run in runs]
    assert main(file) == 0
    assert "2 of 2 runs are done" in capsys.readouterr().out
    assert [(run.fold / "run.log").stat().st_mtime_ns for run in runs] == before


def test_a_run_that_fails_is_reported_and_the_others_go_on(dataset, write, monkeypatch, capsys):
    failing = [sys.executable, "-c", "print('no luck'); raise SystemExit(4)"]
    monkeypatch.setattr(Benchmark, "command", lambda self, run: failing)
    assert main(write()) == 1
    printed = capsys.readouterr().out
    assert printed.count("FAILED: exit code 4") == printed.count("    no luck\n") == 2


# A fork: one training on labels alone, from which the others start


def test_all_runs_of_a_budget_and_seed_start_from_one_network(dataset, write, capsys):
    file = write(fork_after=3, epochs=5, seeds=[1, 2], all_labels=True)
    runs = Benchmark(file, "cpu").runs
    assert [(run.method, run.budget, run.seed) for run in runs[:5]] == [
        ("at the fork", "2 cases", 1),
        ("vanilla", "2 cases", 1),
        (BCP, "2 cases", 1),
        ("at the fork", "all labels", 1),
        ("vanilla", "all labels", 1),
    ]
    assert [run.base for run in runs[:5]] == [None, runs[0], runs[0], None, runs[3]] and runs[6].base == runs[5]
    # Before the fork, other batches than after it.
    assert "_3epochs_" in runs[0].trainer and runs[0].trainer.endswith("_seed=1001")
    assert "_2epochs_" in runs[2].trainer and runs[2].trainer.endswith("_seed=1")
    assert main(file, "--dry-run") == 0
    fork, train = capsys.readouterr().out.split(f"{BCP}, 2 cases, seed 1: to do\n    ")[1].splitlines()[:2]
    assert fork == (
        f"nnunet_semiseg fork -d {NAME} -c 2d -f 0 -tr {runs[2].trainer} -p nnUNetPlans_cpu --from "
        f"$nnUNet_results/{NAME}/{runs[0].trainer}__nnUNetPlans_cpu__2d/fold_0"
    )
    assert train.strip() == f"nnUNetv2_train {NAME} 2d 0 -tr {runs[2].trainer} -p nnUNetPlans_cpu -device cpu --c"


def test_results_without_a_fork_are_not_those_with_one(dataset, write, capsys):
    run = Benchmark(write(epochs=1), "cpu").runs[0]
    update_record(run.fold, split=Benchmark(write(), "cpu").folds["2 cases"])
    Benchmark(write(epochs=1), "cpu")
    assert main(write(fork_after=1)) == 2
    assert f"{run.fold} was made by a benchmark with another 'fork_after'" in capsys.readouterr().err


@pytest.fixture
def pretend(monkeypatch):
    """``pretend(failing=METHOD)``: what trains, forks and scores takes no time; the log of what was run."""
    ran = []

    def pretend(failing=None):
        def doing(what, run, code):
            ran.append((what, run.method))
            fails = "raise SystemExit(4)" if run.method == failing and what == "train" else code
            return [sys.executable, "-c", f"from pathlib import Path; fold = Path({str(run.fold)!r}); {fails}"]

        summary = "fold.joinpath('validation').mkdir(); fold.joinpath('validation/summary.json').write_text({!r})"
        summary = summary.format(json.dumps({"foreground_mean": {"Dice": 0.5}, "mean": {}}))
        record = "import json; file = fold / 'benchmark.json'; of = json.loads(file.read_text())"
        record += "; file.write_text(json.dumps({**of, 'training_minutes': 1}))"
        checkpoint = "(fold / 'checkpoint_latest.pth').touch()"
        monkeypatch.setattr(Benchmark, "command", lambda self, run: doing("train", run, summary))
        monkeypatch.setattr(Benchmark, "fork_command", lambda self, run: doing("fork", run, checkpoint))
        monkeypatch.setattr(Benchmark, "_scoring", lambda self, run: doing("score", run, record))
        monkeypatch.setattr("nnunet_semiseg.commands.benchmark.report", lambda benchmark: None)
        monkeypatch.setattr("nnunet_semiseg.benchmark.runs.Snapshots.look", lambda self: None)
        ran.clear()
        return ran

    return pretend


def test_a_fork_comes_between_the_labels_and_the_methods(dataset, write, pretend, capsys):
    file = write(fork_after=1)
    ran = pretend(failing="vanilla")
    assert main(file) == 1
    assert ran == [
        *((what, "at the fork") for what in ("train", "score")),
        *((what, "vanilla") for what in ("fork", "train")),
        *((what, BCP) for what in ("fork", "train", "score")),
    ]
    # The next call goes on behind the fork.
    ran = pretend()
    assert main(file) == 0
    assert ran == [("train", "vanilla"), ("score", "vanilla")]
    base, *runs = Benchmark(file, "cpu").runs
    assert base.record["fork"] is None and [run.record["fork"] for run in runs] == 2 * [base.trainer]


def test_nothing_starts_from_a_training_that_failed(dataset, write, pretend, capsys):
    file = write(fork_after=1)
    ran = pretend(failing="at the fork")
    assert main(file) == 1
    printed = capsys.readouterr().out
    assert ran == [("train", "at the fork")]
    assert printed.count("FAILED: it starts from at the fork, 2 cases, seed 1, which is not done") == 2
    ran = pretend()
    assert main(file) == 0 and len(ran) == 8 and ran[0] == ("train", "at the fork")


@pytest.mark.slow
def test_a_forked_matrix(dataset, write, tmp_path, capsys):
    file = write(fork_after=1, epochs=3, trainers=["vanilla", "CutMix"])
    assert main(file) == 0, capsys.readouterr().out
    base, *runs = Benchmark(file, "cpu").runs
    for run in runs:
        log = (run.fold / "run.log").read_text()
        assert f"Starts from {base.fold / 'checkpoint_final.pth'}" in log and log.count(": Epoch 0") == 1
        assert {row[0] for row in read_quality(run.fold)} == {1, 2} and len(run.record["validation_dice"]) == 2
    page = (tmp_path / "out" / "results.md").read_text(encoding="utf-8")
    assert '"at the fork": nnU-Net\'s own training on labels alone for 1 of the\n3 epochs' in page
    gain = runs[1].mean - runs[0].mean
    assert f"| CutMix | {gain:+.3f} |" in page and "| at the fork | 2 cases | 1 |" in page


@pytest.mark.slow
def test_a_run_that_gets_nowhere_in_a_whole_call_fails(dataset, write, monkeypatch, capsys):
    # Of the two runs, each call's first one has all of its time; it is tried last in the next call.
    endless = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(Benchmark, "command", lambda self, run: endless)
    file = write()
    for first in ("vanilla", BCP):
        assert main(file, "--minutes", 0.02) == 3
        printed = capsys.readouterr().out
        assert f"{first}, 2 cases, seed 1: FAILED: nothing was saved in all the time" in printed
    assert main(file, "--minutes", 0.02) == 3


def test_a_plain_kill_stops_as_ctrl_c_does(dataset, write, monkeypatch, capsys):
    endless = [sys.executable, "-c", "import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)"]
    monkeypatch.setattr(Benchmark, "command", lambda self, run: endless)
    assert main(write()) == 130
    assert "interrupted. The same command continues\nReport: " in capsys.readouterr().out
    with lock(dataset / "benchmark_training.lock"):
        pass
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_one_benchmark_at_a_time(dataset, write, capsys):
    with lock(dataset / "benchmark.lock"):
        assert main(write()) == 2
    assert "Another benchmark of Dataset811_bench is running" in capsys.readouterr().err


def test_a_stopped_command_leaves_no_process(tmp_path):
    # A worker that a training leaves behind.
    code = "import os, time; pid = os.fork(); print(pid or 'worker', flush=True); time.sleep(600)"
    child = Child(Job("job", (sys.executable, "-c", code), tmp_path / "log"), tmp_path / "lock", "cpu")

    def look():
        if "worker" in (tmp_path / "log").read_text().splitlines():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        child.wait(time.monotonic() + 60, look)
    assert child.exit_code == -15
    # The worker had inherited the lock.
    with lock(tmp_path / "lock"):
        pass
    with pytest.raises(OutOfTime):
        Child(Job("job", ("sleep", "600"), tmp_path / "log"), tmp_path / "lock", "cpu").wait(time.monotonic())


@pytest.mark.parametrize("device, chosen, expected", [("cpu", None, "f"), ("cpu", "t", "t"), ("cuda", None, None)])
def test_a_cpu_training_is_not_compiled_unless_wanted(device, chosen, expected, tmp_path, monkeypatch):
    monkeypatch.delenv("nnUNet_compile")
    if chosen:
        monkeypatch.setenv("nnUNet_compile", chosen)
    command = (sys.executable, "-c", "import os; print(os.environ.get('nnUNet_compile'))")
    Child(Job("job", command, tmp_path / "log"), tmp_path / "lock", device).wait(float("inf"))
    header, *printed = (tmp_path / "log").read_text().splitlines()
    assert header.startswith("=== job job on ") and printed == [str(expected)]


@pytest.mark.parametrize(
    "epochs, kept", [(50, [3, 5, 8, 10, 13, 15, 18, 20, 23, 25, 28, 30, 33, 35, 38, 40, 43, 45, 48]), (4, [1, 2, 3])]
)
def test_snapshots_are_evenly_spaced_and_outlive_the_checkpoint(epochs, kept, tmp_path):
    snapshots = Snapshots(tmp_path, epochs)
    snapshots.look()
    # The last epoch is in checkpoint_final.
    for epoch in range(1, epochs):
        checkpoints.write({"current_epoch": epoch}, tmp_path / "checkpoint_latest.pth")
        if epoch == 6:
            snapshots = Snapshots(tmp_path, epochs)
        snapshots.look()
        snapshots.look()
    files = sorted((tmp_path / "snapshots").iterdir())
    assert [file.name for file in files] == [f"epoch_{epoch:03d}.pth" for epoch in kept]
    assert [checkpoints.read(file)["current_epoch"] for file in files] == kept


# Quality of pseudo labels


def test_every_network_that_segments_is_scored(make_trainer, work):
    trainer = make_trainer("nnUNetTrainerCPS_second_network=resenc")
    trainer.initialize()
    trainer.save_checkpoint(f"{trainer.output_folder}/checkpoint_final.pth")
    model = Path(trainer.output_folder)
    for name, content in (("plans", trainer.plans_manager.plans), ("dataset", trainer.dataset_json)):
        (model.parent / f"{name}.json").write_text(json.dumps(content))
    preprocessed = work / "preprocessed" / "Dataset801_labels"
    scorer = Scorer(model, preprocessed, ["lab_03"], "cpu")
    checkpoint = checkpoints.read(model / "checkpoint_final.pth")
    found = {name: scorer.dice(weights, plans) for name, weights, plans in scorer.networks(checkpoint)}
    assert set(found) == {"student", "second"}
    # By hand: the slices of this dataset fit into one patch.
    image, truth, *_ = scorer.data.load_case("lab_03")
    image, truth = torch.from_numpy(image[:]), truth[:][0]
    with torch.no_grad():
        for name, network in (("student", trainer.network), ("second", trainer.companions["second"])):
            network.eval().decoder.deep_supervision = False
            size = trainer.configuration_manager.patch_size
            before = [(s - n) // 2 for s, n in zip(size, image.shape[2:])]
            after = [s - n - b for s, n, b in zip(size, image.shape[2:], before)]
            padded = torch.nn.functional.pad(image, (before[1], after[1], before[0], after[0]))
            hard = network(padded.transpose(0, 1)).argmax(1).numpy()
            hard = hard[:, before[0] : hard.shape[1] - after[0], before[1] : hard.shape[2] - after[1]]
            for label in (1, 2):
                dice = 2 * ((hard == label) & (truth == label)).sum() / ((hard == label).sum() + (truth == label).sum())
                class_name = {value: key for key, value in LABELS.items()}[label]
                # nnU-Net adds tiles up in half precision.
                assert found[name][class_name] == pytest.approx(dice, abs=5e-3)
    shutil.rmtree(model.parent)


def test_minutes_and_memory_are_those_of_all_attempts(tmp_path):
    times = {"epoch_start_timestamps": [0.0, 500.0], "epoch_end_timestamps": [60.0, 620.0]}
    log = {**times, "mean_fg_dice": [0.1, 0.2], "semiseg/peak_memory_gib": [float("nan"), 1.5]}
    checkpoints.write({"logging": log}, tmp_path / "checkpoint_final.pth")
    update_record(tmp_path, split={"unlabeled": ["lab_03"]}, device="cuda")
    score(tmp_path, tmp_path, 8, "cpu")
    run = Run("vanilla", "nnUNetTrainer", "2 cases", 0, 1, tmp_path)
    assert run.record["training_minutes"] == 3 and run.peak_gib == 1.5


def test_the_student_is_scored_where_the_teacher_predicts():
    scorer = object.__new__(Scorer)
    scorer.plans = {}
    teacher = {"teacher.module.w": "average", "teacher._extra_state": {"updates": 1}}
    state = {"student": {"w": "student"}, "companions": teacher, "options": {}}
    checkpoint = {"network_weights": {"w": "average"}, checkpoints.STATE_KEY: state}
    scorer.configuration = "2d"
    networks = {name: weights for name, weights, _ in scorer.networks(checkpoint)}
    assert networks == {"student": {"w": "student"}, "teacher": {"w": "average"}}


def test_dice_of_labels_regions_and_ignored_voxels():
    truth = np.array([[[[0, 1, 1, 2, 3, -1]]]])
    labels = LabelAdapter(LabelManager({"background": 0, "a": 1, "b": 2, "ignore": 3}, None))
    a = np.array([[[[0, 1, 0, 0, 1, 0]]], [[[0, 0, 0, 0, 1, 0]]]], dtype=bool)
    assert class_dice(a, truth, labels) == [2 / 3, 0]
    nothing = np.where(truth == 2, 0, truth)
    assert np.isnan(class_dice(a, nothing, labels)[1])
    regions = LabelAdapter(LabelManager({"background": 0, "whole": [1, 2], "b": 2, "ignore": 3}, [1, 2]))
    assert class_dice(a, truth, regions) == [2 / 4, 0]


# The report


def make_results(runs):
    """Results as trainings leave them: Dice grows with the seed and the number of the run."""
    for i, run in enumerate(runs):
        mean = 0.5 + 0.01 * i + 0.1 * run.seed
        summary = {"foreground_mean": {"Dice": mean}, "mean": {"1": {"Dice": mean + 0.05}, "2": {"Dice": mean - 0.05}}}
        write_json(run.fold / "validation" / "summary.json", summary)
        rows = [(e, n, c, 0.1 * e) for e in (1, 2) for n in ("student", "teacher") for c in ("ball", "core")]
        write_csv(run.fold / QUALITY, QUALITY_COLUMNS, rows)


def test_report_of_what_is_done(dataset, write, tmp_path, capsys):
    file = write(budgets={"one": ["lab_00"], "three": ["lab_00", "lab_01", "lab_02"]}, seeds=[1, 2], all_labels=True)
    bench = Benchmark(file, "cpu")
    for run in bench.runs:
        gpu, cpu = {"device": "cuda", "peak_gpu_gib": 2.5}, {"device": "cpu", "peak_rss_gib": 0.75}
        memory = gpu if run.method == "vanilla" else cpu
        split = bench.folds[run.budget]
        update_record(run.fold, split=split, training_minutes=4.0, validation_dice=[0.1, 0.2], **memory)
    # Seed 1: 0.60, 0.61, 0.62, 0.63, and 0.64 of all labels; seed 2: 0.75, and the others are not done.
    make_results(bench.runs[:6])
    assert main(file, "--report") == 0
    page = (tmp_path / "out" / "results.md").read_text(encoding="utf-8")
    assert "| method | one (1 labeled) | three (3 labeled) | all labels (5 labeled) |" in page
    deviation = np.std([0.6, 0.75], ddof=1)
    assert f"| vanilla | 0.675 ± {deviation:.3f} | 0.620 (1 of 2 seeds) | 0.640 (1 of 2 seeds) |" in page
    assert f"| {BCP} | 0.610 (1 of 2 seeds) | 0.630 (1 of 2 seeds) | – |" in page
    assert "| vanilla | one | 1 | 0.650 | 0.550 | 0.600 | 4.00 | 2.50 |" in page
    assert f"| {BCP} | one | 1 | 0.660 | 0.560 | 0.610 | 4.00 | 0.75 |" in page
    assert "6 of 10 runs are done" in page and file.read_text().strip() in page
    with open(tmp_path / "out" / "results.csv") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 6 * 3
    assert [row["dice"] for row in rows if row["class"] == "mean"][:2] == ["0.6", "0.61"]
    assert {row["labeled_cases"] for row in rows} == {"1", "3", "5"}
    assert not list((tmp_path / "out").glob("*.tmp"))
    assert not (dataset / "splits_final.json").exists()


def test_the_report_has_vanillas_spread_and_gains_over_the_same_fork(dataset, write, tmp_path):
    file = write(seeds=[1, 2, 3], fork_after=1)
    bench = Benchmark(file, "cpu")
    runs = bench.runs
    # Seed 1: 0.60 at the fork, vanilla 0.61, BCP 0.62; seed 2: 0.73, 0.74, 0.75; seed 3: 0.86, 0.87, not done.
    make_results(runs[:8])
    for run in runs[:8]:
        update_record(run.fold, split=bench.folds["2 cases"], fork=run.fork, validation_dice=[0.1])
    assert main(file, "--report") == 0
    page = (tmp_path / "out" / "results.md").read_text(encoding="utf-8")
    deviation = np.std([0.61, 0.74, 0.87], ddof=1)
    spread = f"vanilla with other seeds: 2 cases 0.610 to 0.870 (standard deviation {deviation:.3f}, 3 seeds)"
    assert page.index(spread) < page.index("| vanilla |")
    assert f"| {BCP} | +0.010 ± 0.000 (2 of 3 seeds) |" in page
    assert '"at the fork": nnU-Net\'s own training on labels alone for 1 of the\n2 epochs' in page
    assert "\nnnunet_semiseg fork -d Dataset811_bench -c 2d -f 0 -tr nnUNetTrainer_1epochs" in page
    with open(tmp_path / "out" / "results.csv") as stream:
        rows = list(csv.DictReader(stream))
    assert {(row["method"], row["fork_after"]) for row in rows} == {("at the fork", "0"), ("vanilla", "1"), (BCP, "1")}


def test_curves_after_a_fork_go_on_from_it(dataset, write):
    from matplotlib.figure import Figure

    base, _, run = Benchmark(write(fork_after=3, epochs=5), "cpu").runs
    make_results([run])
    update_record(base.fold, validation_dice=[0.1, 0.2, 0.3])
    update_record(run.fold, validation_dice=[0.4, 0.5])
    for draw, runs, epochs in (
        (draw_validation, [base], [1, 2, 3]),
        (draw_validation, [run], [4, 5]),
        (draw_quality, [run], [4, 5]),
    ):
        axes = Figure().add_subplot()
        draw(axes, runs, {"color": "red", "label": "x"})
        assert list(axes.lines[0].get_xdata()) == epochs


def test_nothing_done_makes_an_empty_report(dataset, write, tmp_path):
    assert main(write(), "--report") == 0
    assert "0 of 2 runs are done" in (tmp_path / "out" / "results.md").read_text(encoding="utf-8")


def test_solid_is_the_network_that_labels(dataset, write):
    from matplotlib.figure import Figure

    runs = Benchmark(write(), "cpu").runs
    make_results(runs)
    for run, styles in zip(runs, (["-"], ["-", "--"])):
        axes = Figure().add_subplot()
        draw_quality(axes, [run], {"color": "red", "label": run.method})
        assert [line.get_linestyle() for line in axes.lines] == styles
        np.testing.assert_allclose(axes.lines[0].get_xydata(), [[1, 0.1], [2, 0.2]])
        assert axes.get_legend_handles_labels()[1] == [run.method]
