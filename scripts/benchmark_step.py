"""Ratios of training-step times and memory, all measured in one run.

    python scripts/benchmark_step.py DATASET CONFIGURATION PLANS [--steps 20] [--device cpu]

The dataset has to be preprocessed, unlabeled cases included. Batches are taken from the loaders before the clock runs,
so that the figures are of the step itself. Steps of the trainers take turns, and medians are compared, so that a change
in the machine's load falls on all of them.

* Every trainer's step against the stock step, and against what its passes through networks cost: so many forward and
  backward passes (a stock step each), and so many forward passes without a gradient. A second network counts with its
  own times.
* Mean Teacher's step against the sum of its parts: stock step on the labeled patches + stock step on unlabeled patches
  + one teacher forward pass.
* CoraNet's step, with its heads, against Mean Teacher's.
* EMA update against Mean Teacher's step.
* A step with the frame's mixing against one without.
* What two augmentation processes need for the batches of a step against the step: less than 1 where they keep up.
* Peak memory against stock, as whole processes (one each): added memory is compared with the companions' weights.
* Inference time of the checkpoint's network against stock's.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time

os.environ.setdefault("nnUNet_compile", "f")
os.environ["nnUNet_n_proc_DA"] = "0"

import torch  # noqa: E402
from nnunetv2.run.run_training import get_trainer_from_args  # noqa: E402
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer  # noqa: E402

from nnunet_semiseg.trainers.frame import PretrainingOptions  # noqa: E402
from nnunet_semiseg.trainers.registry import TRAINERS as METHODS  # noqa: E402

SETTINGS = "_num_iterations_per_epoch=100000_1epochs_seed=1"
TWO_PHASES = "_pretraining=0_min_recall=0"


def _described(trainer) -> tuple:
    """Options with which a trainer uses unlabeled data at once, and its ``passes``."""
    start = TWO_PHASES if issubclass(trainer.Options, PretrainingOptions) else "_warm_up=0"
    return (start, *trainer.passes)


TRAINERS = {name.removeprefix("nnUNetTrainer"): _described(trainer) for name, trainer in METHODS.items()}
# The frame's mixing is measured on and off.
MIXED = {"MeanTeacher": "MeanTeacher_mixing=both_turns=true", "CutMix": "CutMix_mixing=none"}
TRAINERS |= {setting: TRAINERS[name] for name, setting in MIXED.items()}
STOCK = f"nnUNetTrainer{SETTINGS}"


def start(args, name):
    full_name = STOCK if name == "stock" else f"nnUNetTrainer{name}{SETTINGS}{TRAINERS[name][0]}"
    trainer = get_trainer_from_args(
        args.dataset, args.configuration, 0, full_name, args.plans, False, torch.device(args.device)
    )
    trainer.print_to_log_file = lambda *a, **k: None
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    return trainer


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def timed(function, device):
    synchronize(device)
    begin = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - begin


def peak_of(args, name):
    """Peak memory in MB of a process that takes four steps, and of the companions' weights."""
    trainer = start(args, name)
    for _ in range(4):
        trainer.train_step(next(trainer.dataloader_train))
    companions = 0
    if name != "stock":
        companions = sum(p.numel() * p.element_size() for p in trainer.companions.parameters())
    if args.device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print("PEAK", json.dumps([peak / 2**20, companions / 2**20]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("configuration")
    parser.add_argument("plans")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--trainers", nargs="+", choices=list(TRAINERS), default=list(TRAINERS))
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.trainers = list(dict.fromkeys(["MeanTeacher", "CoraNet", *MIXED, *MIXED.values(), *args.trainers]))
    if args.peak_of:
        peak_of(args, args.peak_of)
        return

    os.environ["nnUNet_results"] = tempfile.mkdtemp()
    trainers = {name: start(args, name) for name in ("stock", *args.trainers)}
    stock, mean_teacher, coranet = (trainers[name] for name in ("stock", "MeanTeacher", "CoraNet"))
    labeled = {name: next(trainer.dataloader_train) for name, trainer in trainers.items()}
    drawn = mean_teacher.draw_unlabeled()
    loading = {name: loading_time(trainers[name], args) for name in ("MeanTeacher", "CutMix")}
    # A stock step on unlabeled patches: the same work as on labeled ones, whatever the target.
    as_labeled = {**labeled["stock"], "data": drawn["strong"]}
    for trainer in trainers.values():
        trainer.draw_unlabeled = lambda: drawn
    weak = drawn["weak"].to(args.device)

    def teacher_forward():
        with torch.no_grad(), mean_teacher.autocast():
            mean_teacher.teacher(weak)

    pieces = {
        "stock step, labeled": lambda: nnUNetTrainer.train_step(stock, labeled["stock"]),
        "stock step, unlabeled": lambda: nnUNetTrainer.train_step(stock, as_labeled),
        "teacher forward": teacher_forward,
        "EMA update": lambda: mean_teacher.teacher.update(mean_teacher.student),
    }
    for name in args.trainers:
        trainer = trainers[name]
        pieces[f"{name} step"] = lambda trainer=trainer, batch=labeled[name]: trainer.train_step(batch)
        if "second" in trainer.networks:
            pieces |= second_passes(name, trainer, labeled["stock"], weak)
    times = {name: [] for name in pieces}
    for i in range(args.steps + 2):
        for name, function in pieces.items():
            elapsed = timed(function, args.device)
            if i >= 2:
                times[name].append(elapsed)
    median = {name: statistics.median(values) for name, values in times.items()}
    print("\n| part | median, ms |\n|---|---|")
    for name, value in median.items():
        print(f"| {name} | {1000 * value:.1f} |")
    parts = sum(median[name] for name in list(pieces)[:3])
    print("\n| trainer | passes: with gradient + without | step / stock | the passes' share | step / passes |")
    print("|---|---|---|---|---|")
    for name in args.trainers:
        _, gradient, forward, second_gradient, second_forward = TRAINERS[name]
        expected = gradient * median["stock step, labeled"] + forward * median["teacher forward"]
        passes = f"{gradient} + {forward}"
        if second_gradient:
            expected += second_gradient * median[f"{name}, second network: gradient"]
            expected += second_forward * median[f"{name}, second network: forward"]
            passes += f"; second {second_gradient} + {second_forward}"
        step, base = median[f"{name} step"], median["stock step, labeled"]
        print(f"| {name} | {passes} | {step / base:.2f} | {expected / base:.2f} | {step / expected:.3f} |")
    rows = [
        ("Mean Teacher step / sum of its parts", median["MeanTeacher step"] / parts, 1.05),
        ("CoraNet step / Mean Teacher step", median["CoraNet step"] / median["MeanTeacher step"], 1.10),
        ("EMA update / Mean Teacher step", median["EMA update"] / median["MeanTeacher step"], 0.02),
        (
            "Mean Teacher step with mixing and turns / without",
            median[f"{MIXED['MeanTeacher']} step"] / median["MeanTeacher step"],
            1.02,
        ),
        ("CutMix step / without mixing", median["CutMix step"] / median[f"{MIXED['CutMix']} step"], 1.02),
    ]
    rows += [
        (f"two augmentation processes / {name} step", loading[name] / 2 / median[f"{name} step"], 1.0)
        for name in loading
    ]
    rows += inference(args, stock, coranet) + memory(args)
    print("\n| ratio | measured | at most |\n|---|---|---|")
    for name, ratio, limit in rows:
        print(f"| {name} | {ratio:.3f} | {limit or ''} |")


def loading_time(trainer, args):
    """Seconds in which one process makes the labeled and the unlabeled batch of a step."""
    batches = (lambda: next(trainer.dataloader_train), trainer.draw_unlabeled)
    return sum(statistics.median(timed(batch, args.device) for _ in range(args.steps)) for batch in batches)


def second_passes(name, trainer, batch, data):
    """A supervised step's passes through a trainer's second network, and a forward pass without a gradient."""
    target = [t.to(trainer.device) for t in batch["target"]]
    image = batch["data"].to(trainer.device)

    def gradient():
        trainer.optimizer.zero_grad(set_to_none=True)
        with trainer.autocast():
            loss = trainer.loss(trainer.second(image), target)
        loss.backward()

    def forward():
        with torch.no_grad(), trainer.autocast():
            trainer.second(data)

    return {f"{name}, second network: gradient": gradient, f"{name}, second network: forward": forward}


def inference(args, stock, coranet):
    """The network that a checkpoint holds is the plans' own, so it costs what stock's costs."""
    data = torch.rand(1, stock.num_input_channels, *stock.configuration_manager.patch_size, device=args.device)
    times = {"stock": [], "CoraNet": []}
    networks = {"stock": stock.network, "CoraNet": coranet.predicting_network()}
    for network in networks.values():
        network.eval()
        network.decoder.deep_supervision = False
    with torch.no_grad():
        for _ in range(max(args.steps, 20)):
            for name, network in networks.items():
                times[name].append(timed(lambda network=network: network(data), args.device))
    sizes = {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}
    return [
        (
            "inference time, CoraNet / stock",
            statistics.median(times["CoraNet"]) / statistics.median(times["stock"]),
            None,
        ),
        ("inference weights, CoraNet / stock", sizes["CoraNet"] / sizes["stock"], None),
    ]


def memory(args):
    peaks = {}
    for name in ("stock", "MeanTeacher", "CoraNet"):
        output = subprocess.run(
            [sys.executable, *sys.argv, "--peak-of", name], capture_output=True, text=True, check=True
        )
        line = next(line for line in output.stdout.splitlines() if line.startswith("PEAK"))
        peaks[name] = json.loads(line.split(maxsplit=1)[1])
    stock = peaks["stock"][0]
    return [
        (f"peak memory, {name} without its companions' weights / stock", (peak - companions) / stock, 1.2)
        for name, (peak, companions) in peaks.items()
        if name != "stock"
    ]


if __name__ == "__main__":
    main()
