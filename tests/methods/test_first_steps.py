"""What the first steps of every trainer compute, recorded: a change that is not meant to change a method leaves it.

``RECORD=1 python -m pytest -n 0 tests/methods/test_first_steps.py`` writes ``first_steps.json`` anew; its diff then
shows, to six digits, what has changed. On another CPU, a voxel at the edge of a mask may fall on the other side of it:
the test leaves room for a few.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.remove_label import RemoveLabelTansform
from conftest import flat, make_case

from nnunet_semiseg.data.randomness import RandomStream
from nnunet_semiseg.trainers.registry import TRAINERS

FILE = Path(__file__).with_name("first_steps.json")
RECORDED = json.loads(FILE.read_text()) if FILE.is_file() else {}
RECORDING = os.environ.get("RECORD") == "1"

# A run of 100 steps of which a few are taken: labeled data alone, the start of phase 2 and an odd and an even step in
# the middle of the ramp, and full weights.
SCHEDULE = "_10epochs_num_iterations_per_epoch=10_seed=7"
STEPS = (0, 1, 50, 55, 58, 85, 86)
PRESETS = [f"{name}_preset={p}" for name, t in TRAINERS.items() for p in getattr(t.Options, "PRESETS", {})]
SETTINGS = [
    *("nnUNetTrainerBCP_unmixed=false", "nnUNetTrainerBCP_unmixed=false_origin_normalized=true"),
    *("nnUNetTrainerCPS_mixing=both_turns=true", "nnUNetTrainerCutMix_mixing=labeled_turns=true"),
]
MIXING = [f"nnUNetTrainer{method}" for method in ("MeanTeacher", "BCP", "CutMix", "CPS_mixing=both_turns=true")]
CASES = [(name, "labels", "2d") for name in (*TRAINERS, *PRESETS, *SETTINGS)]
CASES += [(name, "regions_ignore", "2d") for name in TRAINERS] + [(name, "labels", "3d_fullres") for name in MIXING]
# A method without a record is none of this test's business: a new one would need a second file.
CASES = [case for case in CASES if RECORDING or "-".join(case) in RECORDED]


def patches(trainer, seed, ignore=False):
    """(B, 1, *) normalized images with a ball each, and (B, 1, *) int16 labels."""
    patch = trainer.configuration_manager.patch_size
    cases = [make_case(seed + i, (16, *patch)[-3:], ignore=ignore) for i in range(trainer.batch_size)]
    images, labels = (np.stack(arrays)[:, None] for arrays in zip(*cases))
    if len(patch) == 2:
        images, labels = images[:, :, 8], labels[:, :, 8]
    return torch.from_numpy((images - 115) / 25).float(), torch.from_numpy(labels.astype(np.int16))


def labeled_batch(trainer, seed):
    """A batch with the targets that nnU-Net and the method make of its labels, without augmentation."""
    images, labels = patches(trainer, seed, ignore=trainer.label_manager.has_ignore_label)
    transforms = trainer.dataloader_train.data_loader.transforms.transforms
    start = [isinstance(t, RemoveLabelTansform) for t in transforms].index(True)
    to_target = ComposeTransforms(transforms[start:])
    targets = [to_target(image=i, segmentation=s)["segmentation"] for i, s in zip(images, labels)]
    return {"data": images, "target": [torch.stack(scale) for scale in zip(*targets)], "keys": ["labeled"]}


def unlabeled_batch(trainer, seed):
    weak, _ = patches(trainer, seed)
    return {"weak": weak, "strong": weak.sign() * weak.abs().pow(0.7) + 0.1, "keys": ["unlabeled"]}


def first_steps(trainer):
    """{name: values} of every term, weight and monitored value in STEPS, and how far each network is moved by them."""
    batches = [(labeled_batch(trainer, 1000 + 10 * i), unlabeled_batch(trainer, 2000 + 10 * i)) for i in range(2)]
    networks = {"student": trainer.network, **dict(trainer.companions)}
    networks = {name: network for name, network in networks.items() if [*network.parameters()]}
    # Apart from a start in which all classes are about as likely everywhere.
    with torch.no_grad():
        for parameter in (p for network in networks.values() for p in network.parameters()):
            generator = torch.Generator().manual_seed(parameter.numel())
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    before = {name: flat(network).clone() for name, network in networks.items()}
    losses = []
    for step in STEPS:
        # Recall has a test of its own.
        trainer.schedule.knows_classes = step >= 50
        trainer.global_step, trainer.current_epoch = step, step // 10
        labeled, unlabeled = batches[step % 2]
        trainer.draw_unlabeled = lambda unlabeled=unlabeled: {**unlabeled}
        # A step does not depend on how many numbers the one before has drawn.
        trainer.random_stream = RandomStream(step)
        torch.manual_seed(step)
        losses.append(float(trainer.train_step(labeled)["loss"]))
    assert trainer._non_finite_total == 0
    moved = {f"{name} moved": [float((flat(n) - before[name]).norm())] for name, n in networks.items()}
    return {"loss": losses, **trainer._epoch_sums, **moved}


@pytest.mark.parametrize("name, kind, configuration", [pytest.param(*case, id="-".join(case)) for case in CASES])
def test_first_steps_compute_what_they_computed(started, name, kind, configuration):
    found = first_steps(started(name + SCHEDULE, kind, configuration))
    found = {key: [float(f"{value:.6g}") for value in values] for key, values in found.items()}
    case = "-".join((name, kind, configuration))
    if RECORDING:
        RECORDED[case] = found
        FILE.write_text(json.dumps(RECORDED, indent=1, sort_keys=True) + "\n")
    expected = {key: pytest.approx(values, rel=5e-3, abs=1e-6) for key, values in RECORDED[case].items()}
    assert found == expected


def test_every_recorded_trainer_exists():
    for case in RECORDED:
        assert case.split("-")[0].split("_")[0] in TRAINERS
