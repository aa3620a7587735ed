"""The commands that rounds run, and those that would do the same as a step that runs here."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from nnunet_semiseg.executors import LocalExecutor, SlurmExecutor
from nnunet_semiseg.jobs import Job
from pseudo_label.rounds.settings import Member
from pseudo_label.rounds.setup import Setup


def training(setup: Setup, number: int, dataset: str, member: Member) -> Job:
    s = setup.settings
    command = ["nnUNetv2_train", dataset, s.configuration, str(member.fold)]
    # Starts anew where there is nothing to continue.
    command += ["-tr", member.trainer, "-p", s.plans, "--c"]
    name = f"train_{member.name}"
    return Job(name, tuple(command), setup.work.round(number).log(name))


def predictions(setup: Setup, number: int, trained_on: str, member: Member) -> list[Job]:
    """The jobs that share a member's prediction.

    Args:
        trained_on: The dataset of the round before.
    """
    s, folder = setup.settings, setup.work.round(number)
    command = ["nnUNetv2_predict", "-i", str(folder.images), "-o", str(folder.predictions(member.name))]
    command += ["-d", trained_on, "-c", s.configuration, "-tr", member.trainer, "-p", s.plans, "-f", str(member.fold)]
    command += ["--continue_prediction"]
    command += ["--save_probabilities"] if s.needs_probabilities else []
    command += ["--disable_tta"] if s.disable_tta else []
    # nnU-Net's own number is 3 for each.
    command += [f for flag in ("-npp", "-nps") for f in (flag, str(min(3, setup.processes)))]
    jobs = []
    for part in range(setup.parts):
        name = f"predict_{member.name}" + (f"_part{part}" if setup.parts > 1 else "")
        own = ("-num_parts", str(setup.parts), "-part_id", str(part)) if setup.parts > 1 else ()
        jobs.append(Job(name, (*command, *own), folder.log(name)))
    return jobs


def scoring(setup: Setup, number: int) -> str:
    s, folder = setup.settings, setup.work.round(number)
    command = ["pseudo_label", "score", "-d", s.dataset, "--labeled", str(setup.work.labeled), "--metric", s.metric]
    command += ["-o", str(folder.scores), "-i", *(str(folder.predictions(member.name)) for member in setup.members)]
    command += ["--consensus", s.consensus] if s.consensus else []
    command += ["--per-slice"] if s.per_slice else []
    return shlex.join(command)


def selecting(setup: Setup, number: int) -> str:
    s, folder = setup.settings, setup.work.round(number)
    rules = s.rules
    command = ["pseudo_label", "select", "-i", str(folder.scores), "-o", str(folder.selection)]
    numbers = {
        "--threshold": rules.threshold,
        "--max-volume-zscore": rules.max_volume_zscore,
        "--top": rules.top,
        "--fraction": rules.fraction,
    }
    for flag, value in numbers.items():
        command += [] if value is None else [flag, str(value)]
    pairs = {"--class-threshold": rules.class_thresholds, "--max-components": rules.max_components}
    for flag, values in pairs.items():
        command += [flag, *(f"{name}={value}" for name, value in values.items())] if values else []
    command += ["--balanced"] if rules.balanced else []
    command += ["--presence", "off" if rules.presence is None else str(rules.presence)]
    command += ["--may-be-absent", *rules.may_be_absent] if rules.may_be_absent else []
    command += ["--min-agreement", str(s.min_agreement)] if s.min_agreement else []
    command += ["--annotate", str(s.annotate), "--images", str(folder.images)] if s.annotate else []
    return shlex.join(command)


def all_of_them(setup: Setup, datasets: Sequence[str], executor: LocalExecutor | SlurmExecutor) -> list[str]:
    """The lines of all rounds, in their order, as if no round stopped them early.

    Args:
        datasets: Their names, from round 0 on.
    """
    members = setup.members
    lines = executor.describe([training(setup, 0, datasets[0], member) for member in members])
    lines.append(f"# Link the labels of the training cases in {setup.work.labeled}")
    for number, (before, dataset) in enumerate(zip(datasets, datasets[1:]), 1):
        lines.append(f"# Round {number}: link the images of the unlabeled cases in {setup.work.round(number).images}")
        lines += executor.describe([job for m in members for job in predictions(setup, number, before, m)])
        lines += [scoring(setup, number), selecting(setup, number), f"# Link and preprocess {dataset}"]
        if setup.settings.finetune:
            lines.append(f"# Start each member from its checkpoint of {before}")
        lines += executor.describe([training(setup, number, dataset, member) for member in members])
    return lines
