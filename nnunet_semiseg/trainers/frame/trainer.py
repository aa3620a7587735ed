"""nnU-Net's trainer with a second, unlabeled stream."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from batchgenerators.dataloading.multi_threaded_augmenter import MultiThreadedAugmenter
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

from nnunet_semiseg.data.randomness import RandomStream, set_global_state
from nnunet_semiseg.data.splits import check_fold
from nnunet_semiseg.labels import LabelAdapter
from nnunet_semiseg.networks.ema import EMATeacher
from nnunet_semiseg.trainers.frame.checkpointing import PREVIOUS, Checkpointing
from nnunet_semiseg.trainers.frame.foreground import ForegroundSampling
from nnunet_semiseg.trainers.frame.hooks import TEACHERS, MethodHooks
from nnunet_semiseg.trainers.frame.mixing import Mixing
from nnunet_semiseg.trainers.frame.monitoring import Monitoring
from nnunet_semiseg.trainers.frame.options import PseudoLabelOptions, TeacherOptions
from nnunet_semiseg.trainers.frame.schedule import schedule_of
from nnunet_semiseg.trainers.frame.second_network import SUFFIX, SecondNetwork
from nnunet_semiseg.trainers.frame.settings import SettingsFromName
from nnunet_semiseg.trainers.frame.step import Step
from nnunet_semiseg.trainers.frame.streams import Streams


class SemiSupervisedTrainer(
    MethodHooks, Mixing, Step, Streams, ForegroundSampling, Monitoring, Checkpointing, SettingsFromName, nnUNetTrainer
):
    """nnU-Net's trainer with a second, unlabeled stream.

    A step runs the supervised loss on nnU-Net's labeled batch and, once the schedule has begun, the unsupervised losses
    on an unlabeled batch of the same size, in backward passes whose gradients add up: peak memory stays that of one
    batch. While ``uses_unlabeled`` is False, a step is nnU-Net's own, bit for bit.
    """

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
        super().__init__(plans, configuration, fold, dataset_json, device)
        if self.is_ddp and device.type == "cpu":
            # nnU-Net assumes a GPU per rank.
            self.device, self.grad_scaler = device, None
        self.labels = LabelAdapter(self.label_manager)
        self.companions = nn.ModuleDict()
        # The second network as it is run, if there is one.
        self.second = None
        self.schedule = schedule_of(self)
        self.companion_optimizers: dict[str, torch.optim.Optimizer] = {}
        self.dataloader_unlabeled = None
        self.global_step = 0
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

    @staticmethod
    def _refuse_cascade(plans: dict, configuration: str) -> None:
        if PlansManager(plans).get_configuration(configuration).previous_stage_name is not None:
            raise NotImplementedError(
                f"{configuration} is the second stage of a cascade: it reads the first stage's segmentation of every "
                "case, which unlabeled cases do not have. Train 3d_lowres or 3d_fullres instead"
            )

    def initialize(self) -> None:
        super().initialize()
        trained = len(self.trained_resolutions)
        if trained < self.min_resolutions:
            raise ValueError(
                f"{type(self).__name__} needs {self.min_resolutions} resolutions that deep supervision trains; with "
                f"{self.plans_manager.plans_name}, {self.configuration_name}, there are {trained}. Leave "
                "enable_deep_supervision on, or use plans with more stages"
            )
        self.random_stream = RandomStream(self.seed_of_rank)
        with self.random_stream:
            if self.has_second_network():
                self._second = SecondNetwork(self)
                self.companions["second"] = self._second.module
                self.second = self.compiled(self._second.module)
            if isinstance(self.options, TeacherOptions) and (self.needs_unlabeled() or self.predicting() == "teacher"):
                for name, student in zip(TEACHERS, self.students):
                    teacher = EMATeacher(student, self.options.ema_decay, warm_up=not self.teacher_starts_pretrained)
                    teacher.compile_with(self.compiled)
                    self.companions[name] = teacher
            if isinstance(self.options, PseudoLabelOptions):
                self.pseudo_label_loss = self.segmentation_loss()
            self.companions.update(self.build_companions())
            self.companions.to(self.device)
        self.companion_optimizers = self.build_optimizers()
        elsewhere = {p for name in self.companion_optimizers for p in self.companions[name].parameters()}
        trainable = [p for p in self.companions.parameters() if p.requires_grad and p not in elsewhere]
        if trainable:
            self.optimizer.add_param_group({"params": trainable})
        if self.is_ddp:
            for tensor in (*self.companions.parameters(), *self.companions.buffers()):
                dist.broadcast(tensor.detach(), 0)
        self._initial_sums = self._weight_sums()

    def _weight_sums(self) -> torch.Tensor:
        return torch.stack([p.detach().double().sum() for p in self.network.parameters()])

    def on_train_start(self) -> None:
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

    @classmethod
    def folder_suffix(cls) -> str:
        return SUFFIX if cls.has_second_network() else ""

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self.companions.train()
        self.global_step = self.current_epoch * self.num_iterations_per_epoch
        self._epoch_sums = {}
        self.schedule.start_epoch()
        if self.options.unlabeled_foreground_sampling and self.uses_unlabeled():
            self._refresh_foreground_locations()

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        self.schedule.end_epoch()
        super().on_train_epoch_end(train_outputs)

    def on_train_end(self) -> None:
        super().on_train_end()
        self.schedule.end()
        if self.second is not None and self.local_rank == 0 and not self.disable_checkpointing and self.writes_second():
            self._second.write()
        if self.local_rank == 0:
            (Path(self.output_folder) / PREVIOUS).unlink(missing_ok=True)
        if isinstance(self.dataloader_unlabeled, MultiThreadedAugmenter):
            self.dataloader_unlabeled._finish()
        self._foreground_file.unlink(missing_ok=True)
