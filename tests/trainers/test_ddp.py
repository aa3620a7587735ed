"""Two processes on the CPU: the same weights on both ranks, learned from different patches."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, short
from test_losses import adapter

from nnunet_semiseg.losses.pseudo_labels import WeightedSegmentationLoss

WORKER = """
import functools, sys
import torch, torch.distributed as dist
torch.set_num_threads(1)
import nnunetv2.training.nnUNetTrainer.nnUNetTrainer as stock
from nnunetv2.run.run_training import get_trainer_from_args
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from nnunetv2.training.logging.nnunet_logger import LocalLogger

dataset, name, output = sys.argv[1:]
dist.init_process_group("gloo")
# nnU-Net's launcher is for GPUs alone: it names one to DistributedDataParallel.
ddp = stock.DDP
stock.DDP = lambda network, device_ids: ddp(network)
LocalLogger.plot_progress_png = lambda self, folder: None
trainer = get_trainer_from_args(dataset, "2d", 0, name, "nnUNetPlans_cpu", False, torch.device("cpu"))
keys = []
trainer.initialize()
start = torch.cat([p.detach().flatten() for p in trainer.network.parameters()])
step = trainer.train_step
trainer.train_step = lambda batch: keys.extend(map(str, batch["data"].flatten()[:3].tolist())) or step(batch)
trainer.run_training()
torch.save({
    "start": start,
    "student": torch.cat([p.detach().flatten() for p in trainer.network.parameters()]),
    "companions": trainer.companions.state_dict(),
    "batches": keys,
    "batch_size": trainer.batch_size,
    "log": trainer._logged(),
    "own_dices": [x.ddp for x in vars(trainer).values() if isinstance(x, MemoryEfficientSoftDiceLoss)],
}, f"{output}/rank{dist.get_rank()}.pt")
dist.destroy_process_group()
"""

# A Dice over the batch of both ranks, the second of which has no voxel that counts.
LOSS_WORKER = """
import sys
import torch, torch.distributed as dist
sys.path.insert(0, sys.argv[2])
from test_losses import adapter
from nnunet_semiseg.losses.pseudo_labels import WeightedSegmentationLoss

dist.init_process_group("gloo")
half = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
logits, hard, weight = (t[half] for t in torch.load(sys.argv[1] + "/batch.pt"))
logits.requires_grad_()
loss = WeightedSegmentationLoss(adapter(3), True, ce_weight=0)(logits, hard, weight)
(gradient,) = torch.autograd.grad(loss, logits)
torch.save((loss.detach(), gradient), f"{sys.argv[1]}/rank{dist.get_rank()}.pt")
dist.destroy_process_group()
"""

# One of each kind: a teacher, heads and a pool, pasted images, mixed images, a second network and decisions taken
# together, a loss of its own.
DISTRIBUTED = {
    "nnUNetTrainerMeanTeacher": "consistency",
    "nnUNetTrainerCoraNet": "certain",
    "nnUNetTrainerBCPBURL": "mixed",
    "nnUNetTrainerCPS_mixing=both_turns=true_strong_view=strong": "cross_second",
    "nnUNetTrainerDualStream": "pseudo_second",
    "nnUNetTrainerDTML": "mask",
}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def on_two_ranks(worker, *arguments):
    environment = {**os.environ, "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", worker, *map(str, arguments)],
            env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    for process in ranks:
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, output[-3000:]


@pytest.mark.slow
def test_dice_over_the_batch_is_one_over_all_ranks(tmp_path):
    logits, hard = torch.randn(4, 3, 5, 6, requires_grad=True), torch.randint(0, 3, (4, 1, 5, 6))
    weight = torch.rand(4, 1, 5, 6)
    weight[2:] = 0
    torch.save((logits.detach(), hard, weight), tmp_path / "batch.pt")
    on_two_ranks(LOSS_WORKER, tmp_path, REPOSITORY / "tests" / "losses")
    whole = WeightedSegmentationLoss(adapter(3), True, ce_weight=0)(logits, hard, weight)
    (gradient,) = torch.autograd.grad(whole, logits)
    losses, gradients = zip(*(torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)))
    torch.testing.assert_close(losses, (whole.detach(),) * 2)
    # The training step takes the mean over both ranks.
    torch.testing.assert_close(torch.cat(gradients) / 2, gradient)


@pytest.mark.slow
@pytest.mark.parametrize("name, term", DISTRIBUTED.items())
def test_two_ranks_stay_equal(prepared, tmp_path, name, term):
    dataset = prepared("labels")
    trainer = short(name)
    on_two_ranks(WORKER, dataset, trainer, tmp_path)
    one, two = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in range(2))
    assert torch.equal(one["start"], two["start"])
    assert torch.equal(one["student"], two["student"])
    assert not torch.equal(one["start"], one["student"])
    for key, value in one["companions"].items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, two["companions"][key]), key
    assert one["batches"] != two["batches"]
    assert one["batch_size"] + two["batch_size"] >= 2
    assert one["log"][term] == two["log"][term]
    # Over the batch of all ranks. DTML has one.
    assert one["own_dices"] == [True] * (term == "mask")
    folder = Path(os.environ["nnUNet_results"]) / dataset / f"{trainer}__nnUNetPlans_cpu__2d" / "fold_0"
    assert (folder / "checkpoint_final.pth").is_file()
