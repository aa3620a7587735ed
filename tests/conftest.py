"""Tiny nnU-Net datasets, planned and preprocessed by nnU-Net itself, and trainers on them."""

import json
import locale
import multiprocessing
import os
from contextlib import contextmanager
from copy import deepcopy
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

# Before torch is imported anywhere: no augmentation processes, no compilation, one thread.
# nnUNetv2_train asks for a thread on every core; threads that wait for each other actively take the cores from the
# other tests, and a step takes seconds instead of milliseconds.
os.environ.update(
    OMP_WAIT_POLICY="PASSIVE",
    nnUNet_n_proc_DA="0",
    nnUNet_compile="f",
    nnUNet_def_n_proc="1",
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
)
os.environ.pop("nnUNet_wandb_enabled", None)

import SimpleITK as sitk  # noqa: E402
import torch  # noqa: E402

from nnunet_semiseg import cli  # noqa: E402
from nnunet_semiseg.trainers.frame import PretrainingOptions  # noqa: E402
from nnunet_semiseg.trainers.registry import TRAINERS, find_trainer  # noqa: E402

torch.set_num_threads(1)

# A machine whose locale is not installed, as in many containers: Python reads and writes ASCII.
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}

LABELS = {"background": 0, "ball": 1, "core": 2}
DATASETS = {
    "labels": (801, LABELS, None),
    "regions": (802, {"background": 0, "whole": [1, 2], "core": 2}, [1, 2]),
    "ignore": (803, {**LABELS, "ignore": 3}, None),
    "regions_ignore": (804, {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}, [1, 2]),
}


@contextmanager
def kept_language():
    """Some of SimpleITK's readers and writers (VTK, DICOM) set it to "C", with which Python reads and writes ASCII."""
    before = locale.setlocale(locale.LC_CTYPE)
    yield
    locale.setlocale(locale.LC_CTYPE, before)


@pytest.fixture(autouse=True)
def language():
    with kept_language():
        yield


def make_case(seed, shape=(16, 26, 24), ignore=False):
    """A noisy volume with a ball that has a core, and its label map."""
    random = np.random.RandomState(seed)
    center = [s / 2 + random.uniform(-2, 2) for s in shape]
    distance = np.sqrt(
        sum(
            (np.arange(s).reshape([-1 if i == d else 1 for i in range(3)]) - c) ** 2
            for d, (s, c) in enumerate(zip(shape, center))
        )
    )
    labels = (distance < 7).astype(np.uint8) + (distance < 4)
    image = 100 + 50.0 * labels + random.normal(0, 8, shape)
    if ignore:
        labels[:, :, :3] = 3
    return image.astype(np.float32), labels.astype(np.uint8)


def write_image(array, file, spacing=(1.0, 1.0, 1.0)):
    """(Z, Y, X) array as an image with spacing in mm, x first."""
    file.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing)
    sitk.WriteImage(image, str(file))


def write_raw_dataset(folder, labels, regions_order=None, num_labeled=6, num_unlabeled=4):
    ignore = "ignore" in labels
    for i in range(num_labeled):
        image, segmentation = make_case(i, ignore=ignore)
        write_image(image, folder / "imagesTr" / f"lab_{i:02d}_0000.nii.gz")
        write_image(segmentation, folder / "labelsTr" / f"lab_{i:02d}.nii.gz")
    for i in range(num_unlabeled):
        write_image(make_case(100 + i)[0], folder / "imagesUn" / f"unl_{i:02d}_0000.nii.gz")
    description = dict(channel_names={"0": "MRI"}, labels=labels, numTraining=num_labeled, file_ending=".nii.gz")
    if regions_order:
        description["regions_class_order"] = regions_order
    (folder / "dataset.json").write_text(json.dumps(description))


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    """nnU-Net's three folders."""
    root = tmp_path_factory.mktemp("nnunet")
    for name in ("raw", "preprocessed", "results"):
        (root / name).mkdir()
        os.environ[f"nnUNet_{name}"] = str(root / name)
    return root


def five_stages(configuration):
    """Of a configuration of ``prepared``, that with two stages more than plan_cpu makes of images as small as these."""
    return f"{configuration}_5stages"


def add_five_stages(file):
    """Plans get ``five_stages`` of each configuration: four outputs with deep supervision."""
    plans = json.loads(file.read_text())
    for configuration in ("2d", "3d_fullres"):
        of = deepcopy(plans["configurations"][configuration])
        architecture, patch = of["architecture"], [*of["patch_size"][:-2], 32, 32]
        kernels = architecture["arch_kwargs"]["kernel_sizes"]
        architecture["arch_kwargs"] |= dict(
            n_stages=5,
            features_per_stage=[4, 8, 8, 8, 8],
            kernel_sizes=5 * kernels[:1],
            strides=[[1] * len(patch), *4 * [[2] * len(patch)]],
            n_conv_per_stage=[1] * 5,
            n_conv_per_stage_decoder=[1] * 4,
        )
        plans["configurations"][five_stages(configuration)] = dict(
            inherits_from=configuration, patch_size=patch, architecture=architecture
        )
    file.write_text(json.dumps(plans))


def fitting(name, configuration):
    """A configuration that a trainer can train: with five stages if it needs several resolutions."""
    trainer = find_trainer(name)
    enough = getattr(trainer, "min_resolutions", 1) == 1 or configuration.endswith("stages")
    return configuration if enough else five_stages(configuration)


@pytest.fixture(scope="session")
def prepared(work):
    """``prepared(kind)``: the name of a dataset that is planned and preprocessed, 2d and 3d_fullres."""
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprint_dataset, preprocess_dataset

    class Fingerprint(DatasetFingerprintExtractor):
        """nnU-Net's, of fewer voxels: it draws 100 million of however few there are."""

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.num_foreground_voxels_for_intensitystats = 10**5

    done = {}

    def prepare(kind):
        if kind not in done:
            number, labels, order = DATASETS[kind]
            name = f"Dataset{number}_{kind}"
            write_raw_dataset(work / "raw" / name, labels, order)
            with pytest.MonkeyPatch.context() as patch:
                # In a process, nnU-Net would import torch once more for each of its pools: 15 seconds for nothing.
                patch.setattr(multiprocessing, "get_context", lambda method: SimpleNamespace(Pool=ThreadPool))
                extract_fingerprint_dataset(number, Fingerprint, 1, show_progress_bar=False, verbose=False)
                assert cli.main(["plan_cpu", "-d", str(number), "-features", "4", "-memory", "0.01"]) == 0
                preprocess_dataset(number, "nnUNetPlans_cpu", ("2d", "3d_fullres"), (1, 1), show_progress_bar=False)
            assert cli.main(["preprocess", "-d", str(number), "-p", "nnUNetPlans_cpu", "-np", "1"]) == 0
            add_five_stages(work / "preprocessed" / name / "nnUNetPlans_cpu.json")
            split = [{"train": ["lab_00", "lab_01", "lab_02"], "val": ["lab_05"], "unlabeled": ["lab_03", "lab_04"]}]
            (work / "preprocessed" / name / "splits_final.json").write_text(json.dumps(split))
            done[kind] = name
        return done[kind]

    return prepare


@pytest.fixture
def splits(prepared, work):
    """``splits(content, kind)``: another splits_final.json, text or folds, until the test ends."""
    kept = {}

    def write(content, kind="labels"):
        file = work / "preprocessed" / prepared(kind) / "splits_final.json"
        kept.setdefault(file, file.read_text())
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        return file

    yield write
    for file, text in kept.items():
        file.write_text(text)


EVERYWHERE = [(kind, configuration) for kind in ("labels", "regions") for configuration in ("2d", "3d_fullres")]

# Of every method and preset, a term that there is as soon as it uses unlabeled data.
_SUPERVISED = {"supervised", "supervised_second", "conservative", "radical", "mask", "distance", "consistency_labeled"}
UNLABELED_TERMS = {term for trainer in TRAINERS.values() for term in trainer.terms} - _SUPERVISED | {
    "mixed_out",
    "mixed_pseudo",
    "mixed_pseudo_out",
}

TWO_PHASES = "_pretraining=0_min_recall=0"
CHEAP = {"nnUNetTrainerUAMT": "_passes=2"}


def from_start(name):
    """The trainer as one that uses unlabeled data from the first step on, and is cheap to run."""
    start = TWO_PHASES if issubclass(find_trainer(name).Options, PretrainingOptions) else "_warm_up=0"
    return name + start + CHEAP.get(name.split("_")[0], "")


def short(name):
    return from_start(name) + SHORT


def perturb(module, amount=0.05):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(amount * torch.randn_like(parameter))


SHORT = "_2epochs_num_iterations_per_epoch=3_num_val_iterations_per_epoch=1_save_every=1_seed=7"


@pytest.fixture
def make_trainer(prepared, monkeypatch):
    """``make_trainer(name, kind, configuration)``: a trainer made as nnUNetv2_train makes it."""
    from nnunetv2.run.run_training import get_trainer_from_args
    from nnunetv2.training.logging.nnunet_logger import LocalLogger

    # nnU-Net's own figure takes seconds.
    monkeypatch.setattr(LocalLogger, "plot_progress_png", lambda self, folder: None)

    def make(name, kind="labels", configuration="2d", fold=0, continue_training=False, fit=True):
        configuration = fitting(name, configuration) if fit else configuration
        return get_trainer_from_args(
            prepared(kind), configuration, fold, name, "nnUNetPlans_cpu", continue_training, torch.device("cpu")
        )

    return make


@pytest.fixture
def started(make_trainer):
    """A trainer after ``on_train_start``."""

    def start(*args, **kwargs):
        trainer = make_trainer(*args, **kwargs)
        trainer.on_train_start()
        trainer.on_train_epoch_start()
        return trainer

    return start


def train_steps(trainer, steps):
    for _ in range(steps):
        trainer.train_step(next(trainer.dataloader_train))


def flat(network):
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def slow_unless(cases, fast):
    """Cases of a parametrized test, those for which ``fast(*case)`` is False marked as slow."""
    return [pytest.param(*case, marks=() if fast(*case) else pytest.mark.slow) for case in cases]


REPOSITORY = Path(__file__).resolve().parent.parent
