"""Kill trainings with SIGKILL at random moments, continue them, and compare with trainings that nobody disturbed.

    python scripts/check_resume.py DATASET CONFIGURATION PLANS [--kills 4] [--trainers CoraNet CPS ...]

Every trainer is trained twice, with mixing, turns and strong views; the second training is killed ``--kills`` times.
Both have to end with the same checkpoint, bit for bit: networks, optimizers, random states, the schedule. The dataset
has to be preprocessed, unlabeled cases included; small plans make this a matter of minutes.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ["nnUNet_compile"] = "f"
# With processes, the batches after a restart are others than those of a training that goes on.
os.environ["nnUNet_n_proc_DA"] = "0"
os.environ["nnUNet_results"] = tempfile.mkdtemp()

import torch  # noqa: E402
from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint  # noqa: E402

from nnunet_semiseg.trainers.frame import PretrainingOptions, monitoring  # noqa: E402
from nnunet_semiseg.trainers.registry import TRAINERS  # noqa: E402

EPOCHS = 10
SETTINGS = f"_{EPOCHS}epochs_num_iterations_per_epoch=2_num_val_iterations_per_epoch=1_save_every=1_seed=1"
VIEWS = "_mixing=both_turns=true_strong_view=strong"
# Of what a checkpoint holds: wall-clock times, the last epoch's timing among them.
NOT_COMPARED = {"logging"}


def name_of(trainer: str) -> str:
    start = "_pretraining=0.2_min_recall=0" if issubclass(TRAINERS[trainer].Options, PretrainingOptions) else ""
    return f"{trainer}{SETTINGS}{VIEWS}{start}"


def started(args: argparse.Namespace, name: str, results: Path) -> int:
    """A training in a process of its own, continued if it was begun; its process id."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        # Not the file of the process that forks.
        with open(results / "log.txt", "a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        torch.set_num_threads(1)
        trainer = get_trainer_from_args(
            args.dataset, args.configuration, 0, name, args.plans, True, torch.device(args.device)
        )
        # As nnU-Net's trainer does with its results folder, which was read from the environment at import.
        trainer.output_folder_base = str(results)
        trainer.output_folder = str(results / "fold_0")
        os.makedirs(trainer.output_folder, exist_ok=True)
        trainer.log_file = str(results / "fold_0" / "training_log.txt")
        # Pictures would take most of the time of so small a training.
        trainer.logger.plot_progress_png = lambda folder: None
        monitoring.plot_panel = lambda *arguments: None
        maybe_load_checkpoint(trainer, True, False)
        trainer.run_training()
        status = 0
    except Exception:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def difference(a, b, where: str = "") -> str | None:
    """Where two checkpoints differ first, or None."""
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return f"{where}: {sorted(map(str, a.keys() ^ b.keys()))}"
        pairs = [(f"{where}/{key}", a[key], b[key]) for key in a if key not in NOT_COMPARED]
    elif isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return f"{where}: {len(a)} and {len(b)} values"
        pairs = [(f"{where}/{i}", *values) for i, values in enumerate(zip(a, b))]
    elif isinstance(a, torch.Tensor):
        return None if torch.equal(a, b) else where
    else:
        return None if repr(a) == repr(b) else where
    return next((found for name, *values in pairs if (found := difference(*values, name))), None)


def final(results: Path) -> dict:
    return torch.load(results / "fold_0" / "checkpoint_final.pth", map_location="cpu", weights_only=False)


def check(args: argparse.Namespace, trainer: str, folder: Path) -> bool:
    name = name_of(trainer)
    quiet, killed = folder / "quiet", folder / "killed"
    for results in (quiet, killed):
        results.mkdir(parents=True)
    begin = time.monotonic()
    _, status = os.waitpid(started(args, name, quiet), 0)
    duration = time.monotonic() - begin
    if status:
        print(f"{trainer}: failed, see {quiet / 'log.txt'}")
        return False
    epochs = []
    for _ in range(args.kills):
        pid = started(args, name, killed)
        time.sleep(random.uniform(0.3, 0.9) * duration)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        log = killed / "fold_0" / "training_log.txt"
        begun = re.findall(r"Epoch (\d+)", log.read_text()) if log.exists() else []
        epochs.append(begun[-1] if begun else "start")
        if (killed / "fold_0" / "checkpoint_final.pth").exists():
            break
    # A training that had ended before it was killed is not run again.
    status = 0
    if not (killed / "fold_0" / "checkpoint_final.pth").exists():
        _, status = os.waitpid(started(args, name, killed), 0)
    if status:
        print(f"{trainer}: failed after it was killed, see {killed / 'log.txt'}")
        return False
    found = difference(final(quiet), final(killed))
    print(f"{trainer}: killed in epochs {', '.join(epochs)}: {'the same' if found is None else f'differs: {found}'}")
    return found is None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("configuration")
    parser.add_argument("plans")
    parser.add_argument("--kills", type=int, default=4)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--trainers", nargs="+", default=list(TRAINERS))
    args = parser.parse_args()
    names = ["nnUNetTrainer" + name.removeprefix("nnUNetTrainer") for name in args.trainers]
    folder = Path(os.environ["nnUNet_results"])
    same = [check(args, name, folder / name) for name in names]
    print(f"{sum(same)} of {len(same)} trainers continue bit for bit")
    return 0 if all(same) else 1


if __name__ == "__main__":
    sys.exit(main())
