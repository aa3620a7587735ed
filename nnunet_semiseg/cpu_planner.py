"""Plans that train on a laptop, made by nnU-Net's own planner."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner


class CPUPlanner(ExperimentPlanner):
    """nnU-Net's planner with fewer features and a memory target that fits two CPU cores.

    For trying things out: accuracy is below that of nnU-Net's default plans.
    """

    def __init__(
        self,
        dataset_name_or_id: str | int,
        features: int = 16,
        memory_gb: float = 0.5,
        plans_name: str = "nnUNetPlans_cpu",
        batch_size: int | None = None,
    ):
        super().__init__(dataset_name_or_id, gpu_memory_target_in_gb=memory_gb, plans_name=plans_name)
        self.batch_size = batch_size
        self.UNet_base_num_features = features
        self.UNet_max_features_2d = self.UNet_max_features_3d = 16 * features

    @staticmethod
    def static_estimate_VRAM_usage(*args: Any, **kwargs: Any) -> float:
        # nnU-Net takes the number of augmentation processes for a number of threads here, and torch refuses 0.
        before = os.environ.get("nnUNet_n_proc_DA")
        if before == "0":
            os.environ["nnUNet_n_proc_DA"] = "1"
        try:
            return ExperimentPlanner.static_estimate_VRAM_usage(*args, **kwargs)
        finally:
            if before == "0":
                os.environ["nnUNet_n_proc_DA"] = before

    def get_plans_for_configuration(self, spacing: Sequence[float], *args: Any, **kwargs: Any) -> dict:
        plan = super().get_plans_for_configuration(spacing, *args, **kwargs)
        # A CPU's time goes by samples, and a short training lacks steps more than it lacks samples in a step.
        plan["batch_size"] = self.batch_size or min(plan["batch_size"], 4 if len(spacing) == 2 else 2)
        return plan
