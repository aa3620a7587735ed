"""``nnunet_semiseg plan_cpu``."""

from __future__ import annotations

import argparse

from nnunet_semiseg.datasets import Dataset, dataset_name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-d", required=True, help="dataset id or name")
    parser.add_argument("-features", type=int, default=16, help="features of the first stage (default %(default)s)")
    parser.add_argument("-memory", type=float, default=0.5, help="memory target in GB, sets the patch size")
    parser.add_argument("-batch_size", type=int, help="default: what fits the memory target, at most 4 in 2D, 2 in 3D")
    parser.add_argument("-plans_name", default="nnUNetPlans_cpu", help="name of the plans (default %(default)s)")


def run(args: argparse.Namespace) -> None:
    from nnunet_semiseg.cpu_planner import CPUPlanner

    name = dataset_name(args.d)
    planner = CPUPlanner(name, args.features, args.memory, args.plans_name, args.batch_size)
    plans = planner.plan_experiment()
    for configuration, plan in plans["configurations"].items():
        if "patch_size" in plan:
            print(f"{configuration}: patch {list(map(int, plan['patch_size']))}, batch size {plan['batch_size']}")
    print(f"Next: nnUNetv2_preprocess -d {Dataset(name).number} -plans_name {args.plans_name} -c 2d")
