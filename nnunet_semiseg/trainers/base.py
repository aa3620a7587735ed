"""What every semi-supervised trainer needs and no single method owns.

A method subclasses SemiSupervisedTrainer and states an ``Options`` dataclass, ``build_companions()``,
``unsupervised_loss()`` and, where it differs from nnU-Net's, ``supervised_loss()``. Everything around these is here.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from batchgenerators.dataloading.multi_threaded_augmenter import MultiThreadedAugmenter
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.collate_outputs import collate_outputs
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import autocast, nn

import nnunet_semiseg
from nnunet_semiseg import checkpoints
from nnunet_semiseg.data.randomness import RandomStream, global_state, seed_everything, set_global_state
from nnunet_semiseg.data.splits import check_fold, check_trained_on, hidden_cases
from nnunet_semiseg.data.unlabeled import (
    ForegroundLocations,
    UnlabeledDataLoader,
    UnlabeledDataset,
    check_store,
    store_folder,
)
from nnunet_semiseg.data.views import TwoViewTransform, fix_transform_arithmetic
from nnunet_semiseg.data.workers import augmenter, no_workers
from nnunet_semiseg.files import write_csv
from nnunet_semiseg.labels import LabelAdapter
from nnunet_semiseg.losses.pseudo_labels import DeeplySupervised, WeightedSegmentationLoss
from nnunet_semiseg.losses.ramps import ramp_up_between
from nnunet_semiseg.networks.ema import EMATeacher, unwrap
from nnunet_semiseg.networks.features import full_resolution
from nnunet_semiseg.trainers.options import build_options, check_folder_name, option
from nnunet_semiseg.trainers.panel import plot_panel

# nnU-Net's own value for the student; the companions are clipped apart from it.
GRADIENT_CLIP = 12
# So many steps in a row with a loss that is not a number end the training.
MAX_NON_FINITE_STEPS = 20
# Predicted foreground: cases predicted anew per epoch, the latest cases that are kept, and voxels per case and class.
# With 2000 cases and 13 classes that is 2 MB, in memory, in a checkpoint and in the file that the loaders read.
FOREGROUND_CASES_PER_EPOCH = 8
FOREGROUND_CASES = 200
FOREGROUND_VOXELS = 50
_KEY = "semiseg/"
_PREVIOUS = "checkpoint_previous.pth"
# The loaders of a training.
STREAMS = ("labeled", "validation", "unlabeled")


class Term(NamedTuple):
    """One term of a loss: an unweighted scalar tensor, and its weight."""

    value: torch.Tensor
    weight: float = 1.0


class Unlabeled(NamedTuple):
    """Two views of the same unlabeled patches, (B, C, *) each, voxel by voxel in correspondence."""

    weak: torch.Tensor
    strong: torch.Tensor


@dataclass(frozen=True)
class FrameOptions:
    """Options that every method has."""

    seed: int = option(-1, "seed of all random numbers, those of the augmentation processes included; -1: none", low=-1)
    unlabeled_foreground_sampling: float = option(
        0.0, "probability of centering an unlabeled patch on predicted foreground", low=0.0, high=1.0
    )
    joint_backward: bool = option(False, "one backward pass over both halves: same gradients, more memory")
    allow_absent_classes: bool = option(False, "train although a class is in no labeled training case")


@dataclass(frozen=True)
class RampOptions(FrameOptions):
    """Options of methods whose unsupervised weight rises over the run."""

    warm_up: float = option(0.1, "share of the run without unlabeled data, at the start", low=0.0, high=1.0)
    ramp_up: float = option(
        0.3, "share of the run over which the unsupervised weight rises, after warm-up", low=0.0, high=1.0
    )


# As in the papers: the weight rises over the whole run.
WHOLE_RUN = dict(warm_up=0.0, ramp_up=1.0)


class SemiSupervisedTrainer(nnUNetTrainer):
    """nnU-Net's trainer with a second, unlabeled stream.

    A step runs the supervised loss on nnU-Net's labeled batch and, where the method asks for it, the unsupervised loss
    on an unlabeled batch of the same size, in two backward passes whose gradients add up: peak memory stays that of
    one batch. While ``uses_unlabeled`` is False, a step is nnU-Net's own, bit for bit.
    """

    Options = FrameOptions
    # What the trainer's name gets in the name of a second network's model folder.
    SECOND_FOLDER = ""
    # Set by the class that a name with options makes (registry.find_trainer).
    chosen_options: dict = {}
    chosen_schedule: dict = {}

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 (nnU-Net's signature)
    ):
        self._refuse_cascade(plans, configuration)
        # Before anything is made, and whatever this trainer is to do: train, fine-tune or validate.
        check_fold(Path(str(nnUNet_preprocessed)) / plans["dataset_name"] / "splits_final.json", fold)
        check_folder_name(type(self).__name__ + self.SECOND_FOLDER, plans["plans_name"], configuration)
        try:
            super().__init__(plans, configuration, fold, dataset_json, device)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.ENOTDIR, errno.ENOENT):
                raise
            raise OSError(
                f"The results folder cannot be written ({error}). Set nnUNet_results to a folder that you can write to"
            ) from error
        if self.is_ddp and device.type == "cpu":
            # nnU-Net assumes a GPU per rank.
            self.device, self.grad_scaler = device, None
        self.options = build_options(self.Options, self.chosen_options)
        for name, value in self.chosen_schedule.items():
            setattr(self, name, value)
        self.labels = LabelAdapter(self.label_manager)
        self.companions = nn.ModuleDict()
        self.dataloader_unlabeled = None
        self.global_step = 0
        self.random_stream: RandomStream | None = None
        self.foreground_locations: dict = {}
        self.absent_classes: set[str] = set()
        # Also before a restart.
        self.trained_on: set[str] = set()
        self._resumed_random_state = None
        self._is_resumed = False
        self._non_finite_in_a_row = self._non_finite_total = 0
        self._last_loss = np.zeros((), dtype=np.float32)
        self._epoch_sums: dict[str, list[float]] = {}
        self._step_monitors: dict[str, torch.Tensor] = {}

    # ------------------------------------------------------------------------------------------------ for methods

    def build_companions(self) -> dict[str, nn.Module]:
        """Networks beside the student, by name; those with trainable parameters join the optimizer.

        Called once after the student exists. A teacher is an EMATeacher under the name ``teacher``.
        """
        return {}

    def needs_unlabeled(self) -> bool:
        """Whether any step of the run can have unlabeled data; if not, a dataset needs no unlabeled cases."""
        return True

    def uses_unlabeled(self) -> bool:
        """Whether this step has an unsupervised loss; a function of ``self.progress``, the same on all ranks."""
        return self.needs_unlabeled() and self.ramp() > 0

    def losses(self, data: torch.Tensor, target) -> Iterator[dict[str, Term]]:
        """The terms of a step, in groups with a backward pass each; names are unique in a step.

        A method with another order of things (several networks, labeled and unlabeled data in one image) overrides
        this instead of the three below.
        """
        yield self.supervised_loss(data, target)
        if self.uses_unlabeled():
            yield self.unsupervised_loss(self.next_unlabeled())

    def supervised_loss(self, data: torch.Tensor, target) -> dict[str, Term]:
        """nnU-Net's loss on the labeled batch. ``target`` as nnU-Net's loss takes it."""
        with self.autocast():
            return {"supervised": Term(self.loss(self.student(data), target))}

    def unsupervised_loss(self, unlabeled: Unlabeled) -> dict[str, Term]:
        """The method's terms on the unlabeled batch, computed in float32 outside of autocast."""
        raise NotImplementedError

    def next_unlabeled(self) -> Unlabeled:
        """The unlabeled batch of this step, on the device."""
        batch = self.draw_unlabeled()
        self._unlabeled_keys = batch["keys"]
        return Unlabeled(self.to_device(batch["weak"]), self.to_device(batch["strong"]))

    def before_step(self) -> None:
        """Called before every training step."""

    def after_step(self) -> None:
        """Called after every optimizer step, also one that the gradient scaler of mixed precision left out."""
        if self.teacher is not None:
            self.teacher.update(self.student)

    def target_transforms(self) -> list:
        """Transforms that follow nnU-Net's own on labeled training patches."""
        return []

    def foreground_of(self, hard: torch.Tensor) -> torch.Tensor:
        """The part of a hard prediction of a whole case, (1, 1 or R, Z, Y, X), that patches may be centered on."""
        return hard

    def take_pretrained_weights(self) -> None:
        """Called at the start of a training whose network has got weights by nnU-Net's ``-pretrained_weights``."""
        if self.teacher is not None:
            self.teacher.copy_from(self.network)

    def method_state(self) -> dict:
        """What a method has to remember over a restart beside its companions; plain Python values."""
        return {}

    def load_method_state(self, state: dict) -> None:
        """Inverse of ``method_state``."""

    def predicting(self) -> str:
        """Which of ``networks`` predicts: it is what the checkpoint's ``network_weights`` hold."""
        return "student"

    # ------------------------------------------------------------------------------------------- helpers of methods

    @property
    def progress(self) -> float:
        """Share of all training steps that is done, in [0, 1)."""
        return self.global_step / self._total_steps

    @property
    def _total_steps(self) -> int:
        return self.num_epochs * self.num_iterations_per_epoch

    @property
    def student(self) -> nn.Module:
        """The network that is trained, compiled if nnU-Net compiles. Gradients are averaged over ranks by the step."""
        return self.network.module if self.is_ddp else self.network

    @property
    def trained_networks(self) -> tuple[nn.Module, ...]:
        """The networks that learn to segment, as they are run: the student, and a second network beside it."""
        return (self.student,)

    @property
    def teacher(self) -> EMATeacher | None:
        return dict(self.companions).get("teacher")

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The networks that segment, each with the plans' outputs: ``student``, and ``teacher`` or ``second``."""
        companions = dict(self.companions)
        networks = {"student": self.network}
        if "teacher" in companions:
            networks["teacher"] = companions["teacher"].module
        if "second" in companions:
            networks["second"] = companions["second"]
        return networks

    def ramp(self) -> float:
        """exp(-5 (1 - s)^2), s from 0 to 1 over ``ramp_up`` of the run, after ``warm_up`` of it; 0 before."""
        return ramp_up_between(self.progress, self.options.warm_up, self.options.ramp_up)

    def segmentation_loss(self) -> DeeplySupervised:
        """nnU-Net's loss with a weight for every voxel, at every resolution that nnU-Net supervises."""
        return self.deeply_supervised(WeightedSegmentationLoss(self.labels, self.configuration_manager.batch_dice))

    def deeply_supervised(self, loss) -> DeeplySupervised:
        """A loss of (logits, hard, weight) at every resolution that nnU-Net supervises, with nnU-Net's weights."""
        return DeeplySupervised(loss, self.loss.weight_factors if self.enable_deep_supervision else (1.0,))

    def student_input(self, unlabeled: Unlabeled) -> torch.Tensor:
        """The view that the option ``student_view`` names."""
        return unlabeled.strong if self.options.student_view == "strong" else unlabeled.weak

    def autocast(self):
        """nnU-Net's mixed precision: float16 on CUDA, nothing elsewhere."""
        return autocast(self.device.type) if self.device.type == "cuda" else contextlib.nullcontext()

    def logits(self, network: nn.Module, data: torch.Tensor) -> torch.Tensor:
        """Full-resolution (B, C, *) logits of a network."""
        with self.autocast():
            return full_resolution(network(data))

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device, non_blocking=True)

    def draw_unlabeled(self) -> dict:
        """The next batch of the unlabeled loader, on the CPU."""
        with self.random_stream:
            return next(self.dataloader_unlabeled)

    def monitor(self, name: str, value) -> None:
        """Log a scalar that is no loss (a mask's utilization, say) as its mean over the epoch."""
        self._step_monitors[name] = torch.as_tensor(value, dtype=torch.float32, device=self.device).detach()

    def compiled(self, function):
        """``torch.compile`` where nnU-Net compiles its network."""
        return torch.compile(function) if self._do_i_compile() else function

    # ---------------------------------------------------------------------------------------------------- start-up

    @staticmethod
    def _refuse_cascade(plans: dict, configuration: str) -> None:
        if PlansManager(plans).get_configuration(configuration).previous_stage_name is not None:
            raise NotImplementedError(
                f"{configuration} is the second stage of a cascade: it reads the first stage's segmentation of every "
                "case, which unlabeled cases do not have. Train 3d_lowres or 3d_fullres instead"
            )

    def initialize(self):
        seed = None
        if self.options.seed >= 0:
            seed = self.options.seed + self.local_rank
            seed_everything(seed)
        super().initialize()
        self.random_stream = RandomStream(seed)
        with self.random_stream:
            self.companions = nn.ModuleDict(self.build_companions()).to(self.device)
        if self.teacher is not None:
            self.teacher_network = self.compiled(self.teacher.module)
        trainable = [p for p in self.companions.parameters() if p.requires_grad]
        if trainable:
            self.optimizer.add_param_group({"params": trainable})
        if self.is_ddp:
            for tensor in (*self.companions.parameters(), *self.companions.buffers()):
                dist.broadcast(tensor.detach(), 0)
        self._initial_sums = self._weight_sums()

    def _weight_sums(self) -> torch.Tensor:
        return torch.stack([p.detach().double().sum() for p in self.network.parameters()])

    def get_training_transforms(self, *args, **kwargs):
        """nnU-Net's, and what the method adds."""
        transforms = super().get_training_transforms(*args, **kwargs)
        transforms.transforms.extend(self.target_transforms())
        if self.options.seed >= 0:
            fix_transform_arithmetic(transforms)
        return transforms

    @property
    def _preprocess_command(self) -> str:
        plans = self.plans_manager
        return f"nnunet_semiseg preprocess -d {plans.dataset_name} -c {self.configuration_name} -p {plans.plans_name}"

    def unlabeled_dataset(self) -> UnlabeledDataset:
        """All unlabeled cases of this fold: the store, and the labeled cases whose labels the fold hides.

        Raises:
            ValueError: if there are none, or they do not fit to this training.
        """
        labeled_folder = Path(self.preprocessed_dataset_folder)
        store = store_folder(labeled_folder)
        labeled_cases = self.dataset_class.get_identifiers(str(labeled_folder))
        hidden = self._hidden_cases()
        stored = check_store(store, self.plans_manager, self.configuration_manager, self._preprocess_command)
        twice = sorted(set(stored) & set(labeled_cases))
        if twice:
            raise ValueError(
                f"Case {twice[0]} is both labeled and unlabeled. Remove or rename it in imagesUn, and delete its files "
                f"in {store}"
            )
        if not stored and not hidden:
            raise ValueError(
                f"There are no unlabeled cases for {self.configuration_name}: {store} has none, and "
                f"fold {self.fold} of splits_final.json hides none. Put images into imagesUn and run: "
                f"{self._preprocess_command}"
            )
        self.print_to_log_file(
            f"Unlabeled cases: {len(stored)} from {store.name}, {len(hidden)} with hidden labels", add_timestamp=False
        )
        locations = ForegroundLocations(self._foreground_file) if self.options.unlabeled_foreground_sampling else None
        return UnlabeledDataset([(str(store), stored), (str(labeled_folder), hidden)], locations)

    @property
    def _splits_file(self) -> Path:
        return Path(self.preprocessed_dataset_folder_base) / "splits_final.json"

    def _hidden_cases(self) -> list[str]:
        """Labeled cases whose labels this fold hides, after a check of the fold."""
        known = self.dataset_class.get_identifiers(self.preprocessed_dataset_folder)
        return hidden_cases(self._splits_file, self.fold, known)

    def do_split(self):
        """nnU-Net's, after a check of the fold: labels are read through here, and not otherwise."""
        self._hidden_cases()
        return super().do_split()

    @property
    def _foreground_file(self) -> Path:
        return Path(self.output_folder) / f"unlabeled_foreground_{self.local_rank}.npz"

    @property
    def class_names(self) -> list[str]:
        """Names of the K foreground classes or regions, as in dataset.json."""
        names = {_as_key(value): name for name, value in self.dataset_json["labels"].items()}
        return [names.get(_as_key(label), str(label)) for label in self.labels.foreground_names]

    def _check_labeled_classes(self) -> None:
        """Find the classes that are in none of the labeled training cases.

        Raises:
            ValueError: if there are any, and ``allow_absent_classes`` is off.
        """
        dataset, _ = self.get_tr_and_val_datasets()
        if not dataset.identifiers:
            raise ValueError(f"Fold {self.fold} has no labeled training cases. Write it with nnunet_semiseg split")
        self.trained_on.update(map(str, dataset.identifiers))
        absent = dict(zip(self.class_names, map(_as_key, self.labels.foreground_names)))
        for case in dataset.identifiers:
            locations = dataset.load_case(case)[3]["class_locations"]
            absent = {name: key for name, key in absent.items() if len(locations.get(key, ())) == 0}
            if not absent:
                break
        self.absent_classes = set(absent)
        if not absent:
            return
        named = ", ".join(absent)
        message = f"No labeled training case of fold {self.fold} contains {named}, so it cannot be learned"
        if not self.options.allow_absent_classes:
            raise ValueError(
                f"{message}. Choose labeled cases that contain it (nnunet_semiseg split --labeled-cases ...), or train "
                f"{self.__class__.__name__}_allow_absent_classes=true"
            )
        self.print_to_log_file(f"WARNING: {message}.")

    def on_train_start(self):
        if not self.was_initialized:
            self.initialize()
        dataset = self._unlabeled_cases = self.unlabeled_dataset() if self.needs_unlabeled() else None
        self._check_labeled_classes()
        # nnU-Net does not tell its trainer of pretrained weights.
        if not self._is_resumed and not torch.equal(self._weight_sums(), self._initial_sums):
            self.take_pretrained_weights()
        self._publish_foreground_locations()
        super().on_train_start()
        resumed, self._resumed_random_state = self._resumed_random_state, None
        if resumed is not None:
            self.random_stream.set_state(resumed["unlabeled"])
        if dataset is not None:
            self.dataloader_unlabeled = self._unlabeled_loader(dataset)
            # As nnU-Net does for its own: the processes start, and a file that cannot be read is noticed, now.
            self.draw_unlabeled()
        if resumed is not None:
            set_global_state(resumed["global"])
            self.random_stream.set_state(resumed["unlabeled"])
        self.print_to_log_file(f"{self.__class__.__name__} options: {asdict(self.options)}", add_timestamp=False)
        self.print_to_log_file(f"The {self.predicting()} predicts: it is what checkpoints hold as network_weights.")

    def _unlabeled_loader(self, dataset: UnlabeledDataset):
        rotation, dummy_2d, initial_patch_size, mirror_axes = (
            self.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        )
        patch_size = self.configuration_manager.patch_size
        transforms = self.get_training_transforms(
            patch_size,
            rotation,
            None,
            mirror_axes,
            dummy_2d,
            use_mask_for_norm=self.configuration_manager.use_mask_for_norm,
        )
        loader = UnlabeledDataLoader(
            dataset,
            self.batch_size,
            initial_patch_size,
            patch_size,
            self.label_manager,
            oversample_foreground_percent=self.options.unlabeled_foreground_sampling,
            transforms=TwoViewTransform(transforms),
        )
        # The labeled loader keeps nnU-Net's number of processes; a step with both halves takes twice as long, so half
        # of it keeps up.
        return self._augmenter(loader, "unlabeled", 0.5)

    def get_dataloaders(self):
        """nnU-Net's; with a seed, their processes are seeded, which nnU-Net's are not."""
        if self.options.seed < 0:
            return super().get_dataloaders()
        with no_workers():
            train, val = (single.data_loader for single in super().get_dataloaders())
        return self._augmenter(train, "labeled", 1.0), self._augmenter(val, "validation", 0.5)

    def _augmenter(self, loader, stream: str, share: float):
        """Batches of a loader.

        Args:
            stream: One of STREAMS; each has seeds of its own.
            share: Of nnU-Net's number of augmentation processes.
        """
        processes = get_allowed_n_proc_DA()
        if processes > 0:
            processes = max(1, int(processes * share))
        entropy = None
        if self.options.seed >= 0:
            # Other seeds after a restart, or the processes would draw the first patches once more.
            entropy = (self.options.seed, self.local_rank, self.current_epoch, STREAMS.index(stream))
        seeds = [int(seed) for seed in np.random.SeedSequence(entropy).generate_state(processes)]
        return augmenter(loader, seeds, pin_memory=self.device.type == "cuda")

    def on_train_end(self):
        super().on_train_end()
        if self.local_rank == 0:
            (Path(self.output_folder) / _PREVIOUS).unlink(missing_ok=True)
        if isinstance(self.dataloader_unlabeled, MultiThreadedAugmenter):
            self.dataloader_unlabeled._finish()
        self._foreground_file.unlink(missing_ok=True)

    # -------------------------------------------------------------------------------------------------- a training step

    def train_step(self, batch: dict) -> dict:
        self.before_step()
        data = self.to_device(batch["data"])
        target = batch["target"]
        target = [self.to_device(t) for t in target] if isinstance(target, list) else self.to_device(target)
        self._unlabeled_keys: list[str] = []

        self.optimizer.zero_grad(set_to_none=True)
        terms: dict[str, Term] = {}
        loss, waiting = 0.0, []
        for group in self.losses(data, target):
            part = _weighted_sum(group)
            loss = loss + part.detach()
            terms |= group
            if self.options.joint_backward:
                waiting.append(part)
            elif part.requires_grad:
                self._backward(part)
        if waiting:
            self._backward(sum(waiting))

        if self._step_is_finite(terms, [*batch["keys"], *self._unlabeled_keys]) and self._optimizer_step():
            self.after_step()
            self._last_loss = loss.cpu().numpy()
        self.global_step += 1
        # A skipped step repeats the loss of the one before, so that the epoch's mean stays a number.
        return {"loss": self._last_loss}

    def _backward(self, loss: torch.Tensor) -> None:
        (loss if self.grad_scaler is None else self.grad_scaler.scale(loss)).backward()

    def _step_is_finite(self, terms: dict[str, Term], keys: list[str]) -> bool:
        """Log the step's terms, and say whether all of them are finite on all ranks.

        Raises:
            RuntimeError: after MAX_NON_FINITE_STEPS in a row that are not.
        """
        names = [*terms, *self._step_monitors]
        values = torch.stack(
            [t.value.detach().float() for t in terms.values()] + list(self._step_monitors.values())
        ).tolist()
        self._step_monitors.clear()
        bad = [name for name, value in zip(terms, values) if not math.isfinite(value)]
        any_bad = bool(bad)
        if self.is_ddp:
            flag = torch.tensor(float(any_bad), device=self.device)
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            any_bad = bool(flag.item())
        if any_bad:
            if self.is_ddp:
                gathered = [None] * dist.get_world_size()
                dist.all_gather_object(gathered, (bad, keys if bad else []))
                bad, keys = (sorted({str(item) for rank in gathered for item in rank[i]}) for i in range(2))
            self._count_skipped_step(bad, keys)
            return False
        self._non_finite_in_a_row = 0
        for name, value in zip(names, values):
            self._epoch_sums.setdefault(name, []).append(value)
        for name, term in terms.items():
            if name != "supervised":
                self._epoch_sums.setdefault(f"{name}_weight", []).append(float(term.weight))
        return True

    def _count_skipped_step(self, bad: list[str], keys: list[str]) -> None:
        self._non_finite_in_a_row += 1
        self._non_finite_total += 1
        where = f" (cases {', '.join(map(str, keys))})" if keys else ""
        self.print_to_log_file(f"Step {self.global_step} is skipped: {', '.join(bad)} is not finite{where}")
        if self._non_finite_in_a_row >= MAX_NON_FINITE_STEPS:
            raise RuntimeError(
                f"{MAX_NON_FINITE_STEPS} steps in a row were not finite ({', '.join(bad)}{where}). Look at the images "
                "of these cases, or lower initial_lr"
            )

    def _optimizer_step(self) -> bool:
        """Clip and step; False if the gradient is not finite. (On CUDA the gradient scaler sees to that.)"""
        if self.is_ddp:
            self._average_gradients()
        if self.grad_scaler is not None:
            self.grad_scaler.unscale_(self.optimizer)
        norms = [torch.nn.utils.clip_grad_norm_(self.network.parameters(), GRADIENT_CLIP)]
        trainable = [p for p in self.companions.parameters() if p.grad is not None]
        if trainable:
            norms.append(torch.nn.utils.clip_grad_norm_(trainable, GRADIENT_CLIP))
        if self.grad_scaler is not None:
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()
        elif all(torch.isfinite(norm) for norm in norms):
            self.optimizer.step()
        else:
            self._count_skipped_step(["the gradient"], [])
            return False
        return True

    def _average_gradients(self) -> None:
        """Mean gradient over ranks, of the student and the companions.

        DDP itself averages during one backward pass of one wrapped network; here two passes and several networks
        contribute to a step.
        """
        parameters = (p for p in (*self.network.parameters(), *self.companions.parameters()) if p.grad is not None)
        gradients = [p.grad for p in parameters]
        for work in [dist.all_reduce(g, async_op=True) for g in gradients]:
            work.wait()
        torch._foreach_div_(gradients, dist.get_world_size())

    # ------------------------------------------------------------------------------------------------------- an epoch

    def on_train_epoch_start(self):
        super().on_train_epoch_start()
        self.companions.train()
        self.global_step = self.current_epoch * self.num_iterations_per_epoch
        self._epoch_sums = {}
        if self.options.unlabeled_foreground_sampling and self.uses_unlabeled():
            self._refresh_foreground_locations()

    def on_train_epoch_end(self, train_outputs):
        super().on_train_epoch_end(train_outputs)
        values = {name: float(np.mean(v)) for name, v in self._epoch_sums.items()}
        values["non_finite_steps"] = float(self._non_finite_total)
        if self.device.type == "cuda":
            values["peak_memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        self._log(values)

    def on_validation_epoch_start(self):
        super().on_validation_epoch_start()
        self.companions.eval()

    @contextlib.contextmanager
    def _as_network(self, network: nn.Module):
        """nnU-Net's own code, run on another network than the student."""
        student, self.network = self.network, network
        try:
            yield
        finally:
            self.network = student

    def set_deep_supervision_enabled(self, enabled: bool):
        unwrap(self.network).decoder.deep_supervision = enabled

    def validation_step(self, batch: dict) -> dict:
        """nnU-Net's, of the network that predicts; where there is another one, that is counted as well."""
        networks = self.networks
        if len(networks) == 1:
            return super().validation_step(batch)
        results = {}
        for name, network in networks.items():
            target = batch["target"]
            # nnU-Net overwrites ignored voxels of the target in place.
            copied = [t.clone() for t in target] if isinstance(target, list) else target.clone()
            with self._as_network(network):
                results[name] = super().validation_step({**batch, "target": copied})
        return {
            **results[self.predicting()],
            **{
                f"{other}_{key}": results[other][key]
                for other in networks
                if other != self.predicting()
                for key in ("tp_hard", "fp_hard", "fn_hard")
            },
        }

    def on_validation_epoch_end(self, val_outputs):
        super().on_validation_epoch_end(val_outputs)
        networks = self.networks
        if len(networks) == 1:
            return
        outputs = collate_outputs(val_outputs)
        dice = {f"{self.predicting()}_val_dice": float(self.logger.get_value("mean_fg_dice", step=-1))}
        for other in networks:
            if other == self.predicting():
                continue
            counts = np.stack([np.sum(outputs[f"{other}_{key}"], 0) for key in ("tp_hard", "fp_hard", "fn_hard")])
            if self.is_ddp:
                gathered = [None] * dist.get_world_size()
                dist.all_gather_object(gathered, counts)
                counts = np.sum(gathered, 0)
            tp, fp, fn = counts.astype(float)
            with np.errstate(invalid="ignore"):
                dice[f"{other}_val_dice"] = float(np.nanmean(2 * tp / (2 * tp + fp + fn)))
        self._log(dice)

    def on_epoch_end(self):
        logged = self._logged()
        epoch = self.current_epoch
        for name, values in logged.items():
            # nnU-Net's logger wants one value per key and epoch.
            if len(values) <= epoch:
                self._log({name: math.nan})
        latest = ", ".join(
            f"{name} {values[epoch]:.4f}" for name, values in logged.items() if np.isfinite(values[epoch])
        )
        self.print_to_log_file(f"Semi-supervised: {latest}")
        super().on_epoch_end()
        if self.local_rank == 0:
            self._write_csv()
            plot_panel(self._logged(), Path(self.output_folder) / "progress_semiseg.png")

    def _logged(self) -> dict[str, list[float]]:
        """Our values per epoch, as they stand in nnU-Net's logger."""
        log = self.logger.local_logger.my_fantastic_logging
        return {key[len(_KEY) :]: values for key, values in log.items() if key.startswith(_KEY)}

    def _log(self, values: dict[str, float]) -> None:
        """Into nnU-Net's logger, and from there into W&B where a user turned it on; mean over ranks."""
        if self.is_ddp:
            gathered = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, values)
            values = {name: float(np.mean([rank[name] for rank in gathered if name in rank])) for name in values}
        log = self.logger.local_logger.my_fantastic_logging
        for name, value in values.items():
            log.setdefault(_KEY + name, [math.nan] * self.current_epoch)
            self.logger.log(_KEY + name, value, self.current_epoch)

    def _write_csv(self) -> None:
        logged = self._logged()
        rows = [["" if math.isnan(v) else f"{v:.6g}" for v in row] for row in zip(*logged.values())]
        file = Path(self.output_folder) / "progress_semiseg.csv"
        write_csv(file, ["epoch", *logged], [[epoch, *row] for epoch, row in enumerate(rows)])

    # --------------------------------------------------------------------------------------- predicted foreground

    def predicting_network(self) -> nn.Module:
        return self.networks[self.predicting()]

    @torch.no_grad()
    def _refresh_foreground_locations(self) -> None:
        """Predict the next few unlabeled cases coarsely and remember where foreground is."""
        network = self.predicting_network()
        dataset = self._unlabeled_cases
        cases = [
            c
            for i, c in enumerate(dataset.identifiers)
            if i % (dist.get_world_size() if self.is_ddp else 1) == self.local_rank
        ]
        start = self.current_epoch * FOREGROUND_CASES_PER_EPOCH
        chosen = {cases[i % len(cases)] for i in range(start, start + FOREGROUND_CASES_PER_EPOCH)} if cases else set()
        predictor = nnUNetPredictor(
            tile_step_size=1.0, use_mirroring=False, device=self.device, allow_tqdm=False, verbose=False
        )
        found: dict[str, dict] = {}
        network.eval()
        with self._as_network(network), self.random_stream:
            self.set_deep_supervision_enabled(False)
            predictor.manual_initialization(
                network,
                self.plans_manager,
                self.configuration_manager,
                None,
                self.dataset_json,
                self.__class__.__name__,
                self.inference_allowed_mirroring_axes,
            )
            for case in sorted(chosen):
                data = torch.from_numpy(np.asarray(dataset.load_case(case)[0][:]))
                logits = predictor.predict_sliding_window_return_logits(data).cpu()
                hard = self.foreground_of(self.labels.hard(logits[None]))
                found[case] = {}
                for k in range(self.labels.num_foreground):
                    voxels = self.labels.is_class(hard, k)[0].nonzero().numpy()
                    if len(voxels):
                        keep = np.random.permutation(len(voxels))[:FOREGROUND_VOXELS]
                        voxels = np.pad(voxels[keep], ((0, 0), (1, 0))).astype(np.int32)
                        found[case][k + 1] = voxels
            self.set_deep_supervision_enabled(self.enable_deep_supervision)
        network.train()
        gathered = [found]
        if self.is_ddp:
            gathered = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, found)
        self._remember_foreground({case: locations for part in gathered for case, locations in part.items()})
        self._publish_foreground_locations()

    def _remember_foreground(self, found: dict[str, dict]) -> None:
        """Add the locations of cases, the latest last, and forget those of the oldest."""
        kept = {case: by for case, by in self.foreground_locations.items() if case not in found} | found
        self.foreground_locations = dict(list(kept.items())[-FOREGROUND_CASES:])

    def _publish_foreground_locations(self) -> None:
        """Make the file that the loader reads what this trainer knows; nothing of an earlier run stays."""
        if self.foreground_locations:
            ForegroundLocations(self._foreground_file).write(self.foreground_locations)
        else:
            self._foreground_file.unlink(missing_ok=True)

    # -------------------------------------------------------------------------------------------------- checkpoints

    def save_checkpoint(self, filename: str) -> None:
        """nnU-Net's checkpoint with ``semiseg_state`` added, written atomically.

        ``network_weights`` is the network that predicts and nothing else, so that stock nnU-Net can use it.
        """
        random_states = [{"global": global_state(), "unlabeled": self.random_stream.state()}]
        if self.is_ddp:
            gathered = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, random_states[0])
            random_states = gathered
        if self.local_rank != 0 or self.disable_checkpointing:
            super().save_checkpoint(filename)
            return
        checkpoint = checkpoints.as_written_by(super().save_checkpoint)
        state = {
            "version": nnunet_semiseg.__version__,
            "options": asdict(self.options),
            "predicts": self.predicting(),
            "companions": self.companions.state_dict(),
            "random": random_states,
            "non_finite_steps": self._non_finite_total,
            "trained_on": sorted(self.trained_on),
            "method": self.method_state(),
            "foreground_locations": {
                case: {k: torch.from_numpy(v) for k, v in by_class.items()}
                for case, by_class in self.foreground_locations.items()
            },
        }
        if self.predicting() != "student":
            state["student"] = checkpoint["network_weights"]
            checkpoint["network_weights"] = self.predicting_network().state_dict()
        checkpoint[checkpoints.STATE_KEY] = state
        file = Path(filename)
        # The last but one stays, in case the last is damaged later.
        former = file.with_name(_PREVIOUS) if file.name == "checkpoint_latest.pth" else None
        checkpoints.write(checkpoint, file, former)

    def load_checkpoint(self, filename_or_checkpoint) -> None:
        """Continue exactly where the checkpoint was written.

        A damaged checkpoint is reported, and the newest readable one of the same fold is taken instead.

        Raises:
            CheckpointError: if no checkpoint can be read, or it is of another trainer.
            ValueError: if it was trained on labels that the fold now hides.
        """
        if not self.was_initialized:
            self.initialize()
        file, checkpoint = self._readable_checkpoint(Path(filename_or_checkpoint))
        state = checkpoint.get(checkpoints.STATE_KEY)
        if state is None:
            raise checkpoints.CheckpointError(
                f"{file} was not written by a trainer of nnunet_semiseg, so there is nothing to continue. To start "
                f"from its weights use nnUNetv2_train ... -pretrained_weights {file}"
            )
        self.trained_on = set(state.get("trained_on", ()))
        cure = "Train anew, without --c, or restore the splits that it was trained with"
        check_trained_on(self._splits_file, self.fold, self.trained_on, file, cure)
        super().load_checkpoint(str(file))
        self._is_resumed = True
        if "student" in state:
            unwrap(self.network).load_state_dict(state["student"])
        self.companions.load_state_dict(state["companions"])
        if len(state["random"]) == (dist.get_world_size() if self.is_ddp else 1):
            self._resumed_random_state = state["random"][self.local_rank]
        self._non_finite_total = state["non_finite_steps"]
        self.load_method_state(state["method"])
        self._remember_foreground(
            {
                case: {k: v.cpu().numpy()[:FOREGROUND_VOXELS] for k, v in by_class.items()}
                for case, by_class in state["foreground_locations"].items()
            }
        )

    def _readable_checkpoint(self, file: Path) -> tuple[Path, dict]:
        try:
            return file, checkpoints.read(file, self.device)
        except checkpoints.CheckpointError as error:
            if file.name == "checkpoint_final.pth":
                raise checkpoints.CheckpointError(
                    f"{error}. Delete it and run nnUNetv2_train ... --c to train on from an earlier checkpoint"
                ) from None
            candidates = [file.with_name(_PREVIOUS), file.with_name("checkpoint_best.pth")]
            readable = []
            for candidate in candidates:
                if candidate != file and candidate.is_file():
                    with contextlib.suppress(checkpoints.CheckpointError):
                        readable.append((candidate, checkpoints.read(candidate, self.device)))
            if not readable:
                raise
            if self.local_rank == 0:
                # Kept to look at, and out of the way: the next checkpoint must not make it the last but one.
                os.replace(file, file.with_name(file.name + ".damaged"))
            best = max(readable, key=lambda pair: pair[1]["current_epoch"])
            self.print_to_log_file(
                f"WARNING: {error}. Continuing from {best[0].name} instead, at epoch {best[1]['current_epoch']}."
            )
            return best

    def perform_actual_validation(self, save_probabilities: bool = False):
        with self._as_network(self.predicting_network()):
            super().perform_actual_validation(save_probabilities)


def _weighted_sum(terms: dict[str, Term]) -> torch.Tensor:
    total = None
    for value, weight in terms.values():
        weighted = value if weight == 1.0 else weight * value
        total = weighted if total is None else total + weighted
    return total


def _as_key(label):
    """A label or region as it stands as key in ``class_locations``."""
    return tuple(label) if isinstance(label, (list, tuple)) else label
