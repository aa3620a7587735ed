"""Check on one GPU, in about 8 minutes, what a CPU cannot show.

    python scripts/check_gpu.py -o FOLDER [--minutes 8]

* training: every trainer, 2d and 3d_fullres, as it is and under torch.compile, in mixed precision. It is stopped after
  an epoch and continued: the checkpoint has to come back bit for bit, and all losses have to be finite. Stock nnU-Net's
  predictor then predicts on the GPU as it does on the CPU.
* size: a step of every trainer at the patch and batch sizes of nnU-Net's own plans, with 32 features. Its time is
  compared with the stock step and with what its passes through networks cost, its peak memory with stock's.
* augmentation: how long a step at these sizes waits for nnU-Net's augmentation processes.
* ranks: nnUNetv2_train -num_gpus 2, which communicates through NCCL, where there are two GPUs.

Images, plans and splits are made in a temporary folder; nothing is downloaded. Results are kept in FOLDER/results.json:
the same command goes on with what is left, and repeats what failed. FOLDER/log.txt has nnU-Net's output and tracebacks.
With ``--device cpu``, the script tries itself at tiny sizes.

Exit code: 0 if everything passed that can run here, 1 if something failed, 75 if the time was up: run it again. Times
and memory are reported; they do not fail.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import math
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

# The two scripts set it to 0.
PROCESSES = os.environ.get("nnUNet_n_proc_DA")

import numpy as np  # noqa: E402
import SimpleITK as sitk  # noqa: E402
import torch  # noqa: E402
from benchmark_step import TRAINERS, second_passes, start, timed  # noqa: E402
from check_resume import difference  # noqa: E402
from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props  # noqa: E402
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor  # noqa: E402
from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint  # noqa: E402
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA  # noqa: E402
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager  # noqa: E402
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets  # noqa: E402

from nnunet_semiseg.checkpoints import STATE_KEY  # noqa: E402
from nnunet_semiseg.cpu_planner import CPUPlanner  # noqa: E402
from nnunet_semiseg.files import read_json, write_json  # noqa: E402
from nnunet_semiseg.markdown import table  # noqa: E402
from nnunet_semiseg.trainers.frame import monitoring  # noqa: E402
from nnunet_semiseg.trainers.registry import TRAINERS as METHODS  # noqa: E402

PLANS = "nnUNetPlans_check"
CONFIGURATIONS = ("2d", "3d_fullres")
NAMES = [name.removeprefix("nnUNetTrainer") for name in METHODS]
# At full size also under torch.compile and with augmentation processes; on two GPUs.
EXAMPLES = ("CutMix", "CoraNet", "CPS")
EPOCHS = "_2epochs_num_iterations_per_epoch=4_num_val_iterations_per_epoch=1_save_every=1_seed=1"
# 2d trains on labels, 3d_fullres on regions and an area to ignore.
SMALL = {"2d": "Dataset801_Small", "3d_fullres": "Dataset802_SmallRegions"}
LARGE = "Dataset803_Large"
LABELS = {"background": 0, "ball": 1, "core": 2}
REGIONS = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}
SMALL_PLANS = {"2d": ([32, 32], 2), "3d_fullres": ([16, 32, 32], 2)}
LARGE_PLANS = {"2d": ([512, 512], 12), "3d_fullres": ([128, 128, 128], 2)}
# Probabilities in half precision.
TOLERANCE = 0.05
# Seconds after which a case is taken to hang.
LONGEST = 240
# Of augmentation: before its processes have used up what they prepared, and of the measurement.
SECONDS = (5, 8)
UNFINISHED = 75
# Exit code of a process that may not add to these results.
REFUSED = 2
TIME_IS_UP = "the time was up"


class NotRun(Exception):
    """Why this machine cannot run a case."""


class Stopped(Exception):
    """Ends a training after an epoch."""


class Case(NamedTuple):
    check: str
    configuration: str
    network: str
    trainer: str

    @property
    def key(self) -> str:
        return " ".join(self)

    @property
    def is_compiled(self) -> bool:
        return self.network == "compiled"


def cases_of(args: argparse.Namespace) -> list[Case]:
    """All cases, those first that need a GPU most."""
    examples = [name for name in EXAMPLES if name in args.trainers]
    kinds = [
        ("training", "eager", ["stock", *args.trainers], CONFIGURATIONS),
        ("size", "eager", ["stock", *args.trainers], CONFIGURATIONS),
        ("training", "compiled", ["stock", *args.trainers], CONFIGURATIONS),
        ("augmentation", "eager", ["stock", *examples[:1]], CONFIGURATIONS),
        ("size", "compiled", ["stock", *examples], CONFIGURATIONS),
        ("ranks", "eager", examples, CONFIGURATIONS[:1]),
    ]
    return [
        Case(check, configuration, network, name)
        for check, network, names, configurations in kinds
        if check in args.checks
        for configuration in configurations
        for name in names
    ]


def make_dataset(name: str, labels: dict, plans: dict, features: int, shape: tuple, num_cases: int) -> None:
    """A preprocessed dataset of balls; in its one fold the last case is for validation, the one before has no label."""
    raw, preprocessed = (Path(os.environ[f"nnUNet_{kind}"]) / name for kind in ("raw", "preprocessed"))
    for folder in (raw / "imagesTr", raw / "labelsTr", preprocessed):
        folder.mkdir(parents=True)
    cases = [f"case_{i}" for i in range(num_cases)]
    random = np.random.default_rng(0)
    squares = sum((2 * axis / size - 1) ** 2 for axis, size in zip(np.ogrid[tuple(map(slice, shape))], shape))
    segmentation = (squares < 0.6**2).astype(np.uint8) + (squares < 0.3**2)
    if "ignore" in labels:
        segmentation[:, :, :3] = labels["ignore"]
    for case in cases:
        image = (100 + 50 * segmentation + random.normal(0, 8, shape)).astype(np.int16)
        sitk.WriteImage(sitk.GetImageFromArray(image), str(raw / "imagesTr" / f"{case}_0000.mha"))
        sitk.WriteImage(sitk.GetImageFromArray(segmentation), str(raw / "labelsTr" / f"{case}.mha"))
    description = dict(channel_names={"0": "MRI"}, labels=labels, numTraining=num_cases, file_ending=".mha")
    if "whole" in labels:
        description["regions_class_order"] = [1, 2]
    write_json(raw / "dataset.json", description)
    # Small, or the planner would look for plans that are replaced here anyway.
    fingerprint = dict(
        spacings=[[1, 1, 1]],
        shapes_after_crop=[[16, 40, 40]],
        median_relative_size_after_cropping=1,
        foreground_intensity_properties_per_channel={"0": {}},
    )
    write_json(preprocessed / "dataset_fingerprint.json", fingerprint)
    CPUPlanner(name, features, 0.01, PLANS).plan_experiment()
    content = read_json(preprocessed / f"{PLANS}.json")
    for configuration, (patch, batch_size) in plans.items():
        # 32 features are nnU-Net's; the small networks are to have resolutions enough for every trainer.
        smallest, convolutions = (4, 2) if features == 32 else (2, 1)
        _, strides, kernels, *_ = get_pool_and_conv_props([1.0] * len(patch), patch, smallest, 999)
        stages = len(strides)
        widest = features * (16 if len(patch) == 2 else 10)
        plan = content["configurations"][configuration]
        plan |= dict(patch_size=patch, batch_size=batch_size)
        plan["architecture"]["arch_kwargs"] |= dict(
            n_stages=stages,
            features_per_stage=[min(features * 2**i, widest) for i in range(stages)],
            kernel_sizes=np.asarray(kernels).tolist(),
            strides=np.asarray(strides).tolist(),
            n_conv_per_stage=[convolutions] * stages,
            n_conv_per_stage_decoder=[convolutions] * (stages - 1),
        )
    write_json(preprocessed / f"{PLANS}.json", content)
    manager = PlansManager(content)
    files = get_filenames_of_train_images_and_targets(str(raw), description)
    for configuration in CONFIGURATIONS:
        of = manager.get_configuration(configuration)
        folder = preprocessed / of.data_identifier
        folder.mkdir()
        for case in cases:
            of.preprocessor_class(verbose=False).run_case_save(
                str(folder / case), files[case]["images"], files[case]["label"], manager, of, description
            )
    shutil.copytree(raw / "labelsTr", preprocessed / "gt_segmentations")
    split = dict(train=cases[:-2], unlabeled=cases[-2:-1], val=cases[-1:])
    write_json(preprocessed / "splits_final.json", [split])


def need(args: argparse.Namespace, name: str) -> str:
    """The name of a dataset, which is made if this process has not made it."""
    folders = [Path(os.environ[f"nnUNet_{kind}"]) / name for kind in ("preprocessed", "raw")]
    if not (folders[0] / "splits_final.json").exists():
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        if name == LARGE and args.device == "cuda":
            make_dataset(name, LABELS, LARGE_PLANS, 32, (64, 512, 512), 3)
        else:
            make_dataset(name, REGIONS if name == SMALL["3d_fullres"] else LABELS, SMALL_PLANS, 4, (16, 40, 40), 4)
    return name


def full_name(trainer: str) -> str:
    return f"nnUNetTrainer{EPOCHS}" if trainer == "stock" else f"nnUNetTrainer{trainer}{EPOCHS}{TRAINERS[trainer][0]}"


def training(args: argparse.Namespace, case: Case) -> dict:
    dataset = need(args, SMALL[case.configuration])

    def made(resume: bool):
        trainer = get_trainer_from_args(
            dataset, case.configuration, 0, full_name(case.trainer), PLANS, resume, torch.device(args.device)
        )
        # Pictures would take most of the time of so small a training.
        trainer.logger.plot_progress_png = lambda folder: None
        maybe_load_checkpoint(trainer, resume, False)
        return trainer

    first = made(False)
    end_epoch = first.on_epoch_end

    def stop() -> None:
        end_epoch()
        raise Stopped

    first.on_epoch_end = stop
    with contextlib.suppress(Stopped):
        first.run_training()
    if args.device == "cuda" and first.grad_scaler is None:
        raise AssertionError("there is no mixed precision")
    if case.is_compiled and not isinstance(first.network, torch._dynamo.OptimizedModule):
        raise AssertionError("the network is not compiled")
    folder = Path(first.output_folder)
    second = made(True)
    second.save_checkpoint(str(folder / "again.pth"))
    if where := difference(*(saved_state(folder / name) for name in ("checkpoint_latest.pth", "again.pth"))):
        raise AssertionError(f"after a restart, {where} is not what the checkpoint holds")
    second.run_training()
    skipped = getattr(second, "_non_finite_total", 0)
    losses = second.logger.get_value("train_losses", step=None)
    if skipped or not all(map(math.isfinite, losses)):
        raise AssertionError(f"losses are not finite: {losses}, {skipped} steps were skipped")
    if case.trainer != "stock" and not second.uses_unlabeled():
        raise AssertionError("unlabeled data are not used")
    return {"error": prediction_error(args, folder.parent)}


def saved_state(checkpoint: Path) -> dict:
    """What of a checkpoint does not change when it is loaded and written again."""
    content = torch.load(checkpoint, map_location="cpu", weights_only=False)
    ours = content.get(STATE_KEY, {})
    return {name: content[name] for name in ("network_weights", "optimizer_state", "grad_scaler_state")} | {
        name: ours.get(name) for name in ("student", "companions", "optimizers", "schedule")
    }


def prediction_error(args: argparse.Namespace, model: Path) -> float:
    """Largest difference of a probability that is predicted on the device from that on the CPU."""
    image = np.random.default_rng(1).normal(120, 30, (1, 16, 40, 40)).astype(np.float32)
    probabilities = []
    for device in (args.device, "cpu"):
        predictor = nnUNetPredictor(
            perform_everything_on_device=device == "cuda", device=torch.device(device), allow_tqdm=False
        )
        predictor.initialize_from_trained_model_folder(str(model), (0,))
        _, found = predictor.predict_single_npy_array(
            image, {"spacing": [1.0, 1.0, 1.0]}, save_or_return_probabilities=True
        )
        probabilities.append(found)
    error = float(np.abs(probabilities[0] - probabilities[1]).max())
    # Not a number is no smaller than anything.
    if not error < TOLERANCE:
        raise AssertionError(f"probabilities that the device predicts differ from the CPU's by {error:.3g}")
    return error


def started(args: argparse.Namespace, case: Case):
    """A trainer at full size, on its first epoch."""
    at = dict(dataset=need(args, LARGE), configuration=case.configuration, plans=PLANS, device=args.device)
    return start(SimpleNamespace(**at), case.trainer)


def size(args: argparse.Namespace, case: Case) -> dict:
    on_gpu = args.device == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else 0
    # Batches are made without processes here, and a GPU's are large.
    torch.set_num_threads(os.cpu_count() if on_gpu else 1)
    trainer = started(args, case)
    batch = next(trainer.dataloader_train)
    parts, measured = {"step": lambda: trainer.train_step(batch)}, {}
    if case.trainer == "stock":
        data = batch["data"].to(args.device)

        def forward() -> None:
            with torch.no_grad(), torch.autocast(args.device, enabled=on_gpu):
                trainer.network(data)

        parts["forward"] = forward
    else:
        drawn = trainer.draw_unlabeled()
        trainer.draw_unlabeled = lambda: drawn
        companions = sum(p.numel() * p.element_size() for p in trainer.companions.parameters())
        measured["companions_gib"] = companions / 2**30
        if "second" in trainer.networks:
            passes = second_passes("", trainer, batch, drawn["weak"].to(args.device))
            parts |= dict(zip(("second_gradient", "second_forward"), passes.values()))
    for name, part in parts.items():
        for _ in range(3):
            part()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        measured[f"{name}_ms"] = 1000 * statistics.median(timed(part, args.device) for _ in range(args.steps))
        if on_gpu and name == "step":
            measured["peak_gib"] = (torch.cuda.max_memory_allocated() - before) / 2**30
    return measured


def augmentation(args: argparse.Namespace, case: Case) -> dict:
    os.environ.pop("nnUNet_n_proc_DA")
    if PROCESSES or args.device == "cpu":
        os.environ["nnUNet_n_proc_DA"] = PROCESSES or "1"
    processes = get_allowed_n_proc_DA()
    waited = 0.0

    def timer(function):
        def wait():
            nonlocal waited
            begin = time.perf_counter()
            result = function()
            waited += time.perf_counter() - begin
            return result

        return wait

    trainer = started(args, case)
    draw_labeled = timer(lambda: next(trainer.dataloader_train))
    if case.trainer != "stock":
        trainer.draw_unlabeled = timer(trainer.draw_unlabeled)
    for seconds in SECONDS if args.device == "cuda" else (0, 1):
        waited, steps, begin = 0.0, 0, time.perf_counter()
        while steps < 2 or time.perf_counter() - begin < seconds:
            trainer.train_step(draw_labeled())
            steps += 1
        duration = time.perf_counter() - begin
    for name in ("dataloader_train", "dataloader_val", "dataloader_unlabeled"):
        if hasattr(getattr(trainer, name, None), "_finish"):
            getattr(trainer, name)._finish()
    return {"step_ms": 1000 * duration / steps, "waiting": waited / duration, "processes": processes}


def ranks(args: argparse.Namespace, case: Case) -> dict:
    count = torch.cuda.device_count()
    if count < 2:
        raise NotRun(f"NCCL needs two GPUs, one for each rank, and there {'is' if count == 1 else 'are'} {count}")
    dataset, name = need(args, SMALL[case.configuration]), full_name(case.trainer)
    train = [dataset, case.configuration, "0", "-tr", name, "-p", PLANS, "-num_gpus", "2"]
    subprocess.run([sys.executable, "-m", "nnunetv2.run.run_training", *train], check=True)
    fold = Path(os.environ["nnUNet_results"]) / dataset / f"{name}__{PLANS}__{case.configuration}" / "fold_0"
    weights = saved_state(fold / "checkpoint_final.pth")["network_weights"].values()
    if not all(torch.isfinite(weight).all() for weight in weights):
        raise AssertionError("weights are not finite")
    return {}


CHECKS = {check.__name__: check for check in (training, size, augmentation, ranks)}


def run(args: argparse.Namespace, case: Case) -> dict:
    """The result of a case."""
    begin = time.monotonic()
    result = {"status": "ok"}
    os.environ |= {"nnUNet_compile": "f", "nnUNet_n_proc_DA": "0"}
    if case.is_compiled:
        # By default, nnU-Net compiles for training and not for prediction.
        del os.environ["nnUNet_compile"]
    try:
        if case.is_compiled and args.device == "cpu":
            raise NotRun("nnU-Net does not compile on the CPU")
        result |= CHECKS[case.check](args, case)
    except NotRun as reason:
        result |= {"status": "not run", "note": str(reason)}
    except Exception as error:
        traceback.print_exc()
        message = str(error).strip().partition("\n")[0]
        result |= {"status": "failed", "note": message if type(error) is AssertionError else repr(error)[:300]}
    shutil.rmtree(os.environ["nnUNet_results"], ignore_errors=True)
    torch._dynamo.reset()
    gc.collect()
    if args.device == "cuda":
        torch.cuda.empty_cache()
    return {**result, "seconds": round(time.monotonic() - begin, 1)}


def machine(device: str) -> dict:
    """What results depend on.

    Raises:
        ValueError: if there is no such device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("torch finds no GPU (torch.cuda.is_available() is False). Use --device cpu to try the script")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if device == "cuda" else []
    return {
        "device": ", ".join(gpus) or "CPU",
        "torch": torch.__version__,
        "cuda": torch.version.cuda if gpus else None,
        "python": platform.python_version(),
        **{package: version(package) for package in ("nnunetv2", "nnunet-semiseg")},
    }


def work(args: argparse.Namespace, todo: list[Case], folder: Path, screen: int) -> None:
    """Run cases one after the other; the file of results says which one is running."""
    results, found = read_results(args), machine(args.device)
    if results.setdefault("machine", found) != found:
        raise ValueError(f"{args.results} is of {results['machine']}, this is {found}. Choose another folder (-o)")
    # Pictures would take most of the time of so small a training.
    monitoring.plot_panel = lambda *arguments: None
    if hasattr(torch._dynamo.config, "fail_on_recompile_limit_hit"):
        # Otherwise, torch goes on without compiling.
        torch._dynamo.config.fail_on_recompile_limit_hit = True
    # As nnUNetv2_train does.
    torch.set_num_threads(1)
    torch.backends.cudnn.benchmark = True
    for kind in ("raw", "preprocessed", "results"):
        os.environ[f"nnUNet_{kind}"] = str(folder / kind)
    for case in todo:
        print(f"\n##### {case.key}", flush=True)
        results["cases"][case.key] = {"status": "running", "begin": time.time()}
        write_json(args.results, results)
        result = results["cases"][case.key] = run(args, case)
        write_json(args.results, results)
        if result["status"] != "not run":
            line = f"{case.key}: {result['status']}, {result['seconds']} s. {result.get('note', '')}"
            os.write(screen, f"{line.strip()}\n".encode())
        if "CUDA error" in result.get("note", ""):
            # After which nothing works in this process.
            return


def forked(args: argparse.Namespace, todo: list[Case], folder: Path) -> int:
    """A process that works on cases, which keeps what CUDA and torch.compile leave behind to itself; its id."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.setsid()
        screen = os.dup(1)
        with open(args.results.with_name("log.txt"), "a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        work(args, todo, folder, screen)
        status = 0
    except ValueError as error:
        os.write(screen, f"Error: {error}\n".encode())
        status = REFUSED
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def read_results(args: argparse.Namespace) -> dict:
    return read_json(args.results, ["cases"]) if args.results.is_file() else {"cases": {}}


def watch(args: argparse.Namespace, pid: int, deadline: float) -> int | str:
    """Wait for a process: its exit code, or why it was killed."""
    longest = min(LONGEST, 0.9 * 60 * args.minutes)
    try:
        while True:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
            begun = [case["begin"] for case in read_results(args)["cases"].values() if case["status"] == "running"]
            if begun and time.time() - begun[0] > longest:
                return f"took more than {longest:.0f} s"
            if time.time() > deadline:
                return TIME_IS_UP
            time.sleep(0.2)
    finally:
        # With its augmentation processes.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)


def check(args: argparse.Namespace, folder: Path) -> None:
    """Run the cases that are left until the time is up, those that failed last.

    Raises:
        RuntimeError: if no case can be run.
    """
    deadline = time.time() + 60 * args.minutes
    results = read_results(args)
    failed = {key for key, case in results["cases"].items() if case["status"] == "failed"}
    results["cases"] = {key: case for key, case in results["cases"].items() if case["status"] in ("ok", "not run")}
    write_json(args.results, results)
    todo = [case for case in cases_of(args) if case.key not in results["cases"]]
    todo.sort(key=lambda case: case.key in failed)
    while todo and time.time() < deadline:
        # A process for each kind of case: the threads and the compiled code of one do not reach the next.
        now = [case for case in todo if (case.check, case.network) == (todo[0].check, todo[0].network)]
        ended = watch(args, forked(args, now, folder), deadline)
        if ended == REFUSED:
            raise SystemExit(1)
        results = read_results(args)
        running = [key for key, case in results["cases"].items() if case["status"] == "running"]
        for key in running:
            note = ended if isinstance(ended, str) else f"ended its process with code {ended}"
            results["cases"][key] = {"status": "failed", "note": note}
            if ended == TIME_IS_UP:
                del results["cases"][key]
            else:
                print(f"{key}: failed, {note}", flush=True)
        write_json(args.results, results)
        before, todo = todo, [case for case in todo if case.key not in results["cases"]]
        if len(todo) == len(before) and ended != TIME_IS_UP:
            raise RuntimeError(f"Nothing can be run here: {args.results.with_name('log.txt')} says why")


def number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def ratio(value: float | None, of: float | None) -> float | None:
    return value / of if value and of else None


def size_row(name: str, result: dict, stock: dict) -> list[str]:
    """A step's time and memory beside stock's, which may not have been measured."""
    step, peak = result.get("step_ms"), result.get("peak_gib")
    row = [name, number(step, 1), number(ratio(step, stock.get("step_ms")))]
    if name == "stock" or "step_ms" not in stock:
        return [*row, "", "", number(peak), ""]
    passes = zip(
        TRAINERS[name][1:],
        (stock["step_ms"], stock["forward_ms"], result.get("second_gradient_ms"), result.get("second_forward_ms")),
    )
    expected = sum(count * (cost or 0) for count, cost in passes)
    memory = ratio(peak and peak - result["companions_gib"], stock.get("peak_gib"))
    return [*row, *map(number, (expected / stock["step_ms"], ratio(step, expected), peak, memory))]


def report(args: argparse.Namespace) -> int:
    """Print all results; the exit code."""
    results = read_results(args)
    cases = {case: results["cases"].get(case.key, {"status": ""}) for case in cases_of(args)}
    print(f"\n{', '.join(f'{name}: {value}' for name, value in results.get('machine', {}).items())}")
    kinds = [(configuration, network) for network in ("eager", "compiled") for configuration in CONFIGURATIONS]
    if "training" in args.checks:
        names = ["stock", *args.trainers]
        rows = [[name, *(cases[Case("training", *kind, name)]["status"] for kind in kinds)] for name in names]
        print("\nTraining, restart and prediction\n")
        print(table(["trainer", *map(" ".join, kinds)], rows))
        errors = [result["error"] for result in cases.values() if "error" in result]
        print(f"\nProbabilities differ from those of the CPU by at most {max(errors, default=math.nan):.2g}")
    for kind in kinds:
        of_kind = {case.trainer: cases[case] for case in cases if case[:3] == ("size", *kind)}
        rows = [size_row(name, result, of_kind["stock"]) for name, result in of_kind.items() if "step_ms" in result]
        if rows:
            print(f"\nA step, {' '.join(kind)}\n")
            header = ["trainer", "ms", "/ stock", "its passes / stock", "/ its passes"]
            print(table([*header, "peak, GiB", "without companions / stock"], rows))
    rows = [
        [*case[1::2], str(result["processes"]), number(result["step_ms"], 1), f"{100 * result['waiting']:.0f} %"]
        for case, result in cases.items()
        if "waiting" in result
    ]
    if rows:
        print("\nA step with augmentation processes\n")
        print(table(["configuration", "trainer", "nnUNet_n_proc_DA", "ms", "waits for batches"], rows))
    by_status = {
        status: [case for case in cases if cases[case]["status"] == status]
        for status in ("ok", "failed", "not run", "")
    }
    reasons: dict[str, list[Case]] = {}
    for case in by_status["not run"]:
        reasons.setdefault(f"{case.check}, {case.network}: {cases[case]['note']}", []).append(case)
    print(f"\n{len(by_status['ok'])} passed, {len(by_status['failed'])} failed")
    for case in by_status["failed"]:
        print(f"FAILED {case.key}: {cases[case]['note']}")
    for reason, which in reasons.items():
        print(f"NOT RUN {reason} ({len(which)} cases)")
    if args.device == "cpu":
        print("NOT RUN mixed precision, memory and full size: they need a GPU")
    if by_status[""]:
        print(f"LEFT {len(by_status[''])} cases: the time was up. The same command goes on")
        return UNFINISHED
    return 1 if by_status["failed"] else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", dest="output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--minutes", type=float, default=8, help="end this call after so many (default %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="steps that are timed (default %(default)s)")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--trainers", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help="default: all")
    parser.add_argument("--checks", nargs="+", choices=list(CHECKS), default=list(CHECKS), help="default: all")
    args = parser.parse_args()
    args.results = args.output / "results.json"
    try:
        with tempfile.TemporaryDirectory() as folder:
            check(args, Path(folder))
        return report(args)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
