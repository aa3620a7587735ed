"""``report.html`` and ``report.json``: what rounds did, for people and for programs."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from nnunet_semiseg.files import read_table, write_json, write_text
from nnunet_semiseg.jobs import HEADER
from nnunet_semiseg.segmentations import find_files
from nnunet_semiseg.trainers.options import build_options
from nnunet_semiseg.trainers.registry import find_trainer
from pseudo_label import pictures
from pseudo_label.rounds.manifest import Manifest
from pseudo_label.rounds.settings import Member
from pseudo_label.rounds.work_folder import RoundFolder, WorkFolder
from pseudo_label.score_files import read_labeled_volumes, read_scores, scored_classes, scored_reader

# Cases of each kind that are shown as pictures.
SHOWN = 2
_ATTEMPT = re.compile(rf"^{re.escape(HEADER)}(?P<job>.+?) on (?P<machine>\S+), (?P<time>[-\d]+ [:\d]+): (?P<line>.+)$")


def collect(folder: Path) -> dict:
    """Everything that is told about the rounds in a work folder: the content of report.json.

    Raises:
        FileNotFoundError, ValueError: naming the file that is missing or damaged.
    """
    work = WorkFolder(folder)
    manifest = Manifest.read(work.manifest)
    rounds: list[dict] = []
    volumes: dict[str, dict[str, float]] = {}
    for number, of in enumerate(manifest.rounds):
        found, volumes = _round(work.round(number), number, of, volumes)
        rounds.append(found)
    return {
        "work_folder": str(folder),
        "dataset": manifest.arguments["dataset"],
        "stopped": manifest.stopped,
        "members": [_member(i, text) for i, text in enumerate(manifest.arguments["members"], 1)],
        "rounds": rounds,
        "arguments": manifest.arguments,
        "versions": manifest.versions,
        "calls": manifest.calls,
    }


def _member(number: int, text: str) -> dict:
    member = Member.of(text)
    trainer = find_trainer(member.trainer)
    # nnU-Net's own trainers have no seed.
    seed = -1 if trainer is None else build_options(trainer.Options, trainer.chosen_options).seed
    # Names with options are too long for a chart.
    return {"short": f"M{number}", "name": member.name, **asdict(member), "seed": seed if seed >= 0 else None}


def _round(folder: RoundFolder, number: int, of: dict, volumes: dict) -> tuple[dict, dict]:
    """What is told about a round, and {case: volumes of its newest consensus} of this and earlier rounds.

    Means are over all cases, the accepted ones of earlier rounds as well: those that are left are other cases.
    """
    found = {
        "number": number,
        "dataset": of["dataset"],
        "minutes": {step: done["minutes"] for step, done in of["steps"].items()},
        "validation_dice": of.get("validation"),
        "mean_score": of.get("mean_score"),
        "drift": of.get("drift", []),
        "accepted": of.get("accepted"),
        "remaining": of.get("remaining"),
        "reused": of.get("reused", []),
        "annotate": of.get("annotate", []),
        "commands": _commands(folder, of),
        "cases": [],
    }
    if "score" in of["steps"]:
        scores = read_scores(folder.scores)
        decisions = _decisions(folder.selection / "selection.csv")
        found["cases"] = [
            {**asdict(scores[case]), **decisions.get(case, {"accepted": None, "reasons": None})}
            for case in sorted(scores, key=lambda case: (-(scores[case].score or 0), case))
        ]
        volumes = volumes | {case: {k: own.volume_mm3 for k, own in s.classes.items()} for case, s in scores.items()}
    names: dict[str, float] = next(iter(volumes.values()), {})
    found["volumes_mm3"] = {name: sum(v[name] for v in volumes.values()) / len(volumes) for name in names}
    return found, volumes


def _decisions(file: Path) -> dict[str, dict]:
    """{case: accepted and reasons} of selection.csv; empty while nothing is selected."""
    if not file.is_file():
        return {}
    rows = read_table(file, ("case", "accepted", "reasons"), "Remove it, and run pseudo_label rounds or select again")
    return {row["case"]: {"accepted": row["accepted"] == "yes", "reasons": row["reasons"]} for row in rows}


def _commands(folder: RoundFolder, of: dict) -> list[dict]:
    """What ran in a round, in its order: the jobs as their logs tell, every attempt, and scoring and selection."""
    jobs = []
    for log in sorted(folder.logs.glob("*.log")):
        with open(log, encoding="utf-8", errors="replace") as stream:
            jobs += [match.groupdict() for match in map(_ATTEMPT.match, stream) if match]
    jobs.sort(key=lambda job: job["time"])
    own = [
        {"job": step, "machine": None, "time": of["steps"][step]["finished"], "line": of[f"{step}_command"]}
        for step in ("score", "select")
        if step in of["steps"]
    ]
    predictions = [job for job in jobs if job["job"].startswith("predict_")]
    return predictions + own + [job for job in jobs if job not in predictions]


def write_report(folder: Path) -> Path:
    """Write report.html and report.json into a work folder; returns the former.

    Raises:
        FileNotFoundError, ValueError: naming the file that is missing or damaged.
    """
    folder = folder.resolve()
    content = collect(folder)
    write_json(folder / "report.json", content)
    environment = Environment(
        loader=PackageLoader("pseudo_label", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters["number"] = _number
    page = environment.get_template("report.html.j2").render(**content, **_pictures(folder, content))
    write_text(folder / "report.html", page)
    return folder / "report.html"


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _pictures(folder: Path, content: dict) -> dict:
    """The pictures of a report, and what the page says beside them."""
    rounds, threshold = content["rounds"], content["arguments"]["rules"]["threshold"]
    work = WorkFolder(folder)
    trained = [of for of in rounds if of["validation_dice"]]
    dice = {m["short"]: [of["validation_dice"][m["name"]] for of in trained] for m in content["members"]}
    result: dict[str, Any] = {
        "dice": pictures.lines(dice, _ticks(trained), "validation Dice", mean=True) if trained else None,
        "volumes": None,
        "rounds_pictures": [],
    }
    scored = [of for of in rounds if of["cases"]]
    if scored:
        ticks, means = _ticks(scored), [of["volumes_mm3"] for of in scored]
        labeled = list(read_labeled_volumes(work.round(1).scores).values())
        if labeled:
            ticks = ["labeled", *ticks]
            means = [{name: sum(v[name] for v in labeled) / len(labeled) for name in labeled[0]}, *means]
        # Small classes could not be seen beside large ones.
        relative = {n: [m[n] / means[0][n] if means[0][n] else None for m in means] for n in means[0]}
        result["volumes"] = pictures.lines(relative, ticks, f"mean volume / that of {ticks[0]}")
    for of in rounds:
        result["rounds_pictures"].append(_round_pictures(work.round(of["number"]), of, threshold))
    return result


def _ticks(rounds: list[dict]) -> list[str]:
    return [f"round {of['number']}" for of in rounds]


def _round_pictures(folder: RoundFolder, of: dict, threshold: float | None) -> dict | None:
    if not of["cases"]:
        return None
    defined = [case for case in of["cases"] if case["score"] is not None]
    names = list(of["cases"][0]["classes"])
    by_class = {
        n: [c["classes"][n]["score"] for c in of["cases"] if c["classes"][n]["score"] is not None] for n in names
    }
    scores = {accepted: [c["score"] for c in defined if c["accepted"] is accepted] for accepted in (True, False)}
    return {
        "histogram": pictures.histogram(scores[True], scores[False], threshold) if defined else None,
        "classes": pictures.boxes(by_class, "score") if defined else None,
        "colors": dict(zip(names, pictures.class_colors(len(names)))),
        "shown": _case_pictures(folder, defined),
    }


def _case_pictures(folder: RoundFolder, cases: list[dict]) -> list[dict]:
    """Pictures of the best, the borderline, and the worst cases of a round, each case once."""
    accepted = [case for case in cases if case["accepted"]]
    rejected = [case for case in cases if not case["accepted"]]
    # Best first, so these are the last that were accepted and the first that were not.
    groups = {
        "Best": cases[:SHOWN],
        "Borderline": [*accepted[-SHOWN:], *rejected[:SHOWN]] if accepted and rejected else [],
        "Worst": cases[-SHOWN:],
    }
    classes, reader = scored_classes(folder.scores), scored_reader(folder.scores)
    consensus, disagreement = (find_files(folder.scores / kind) for kind in ("consensus", "disagreement"))
    images = find_files(folder.images)
    seen, shown = set(), []
    for title, group in groups.items():
        for case in group:
            name = case["case"]
            if name not in seen:
                seen.add(name)
                files = (images[f"{name}_0000"], consensus[name], disagreement[name])
                picture = pictures.case_picture(*files, classes, reader)
                shown.append({"title": title, "case": case, "picture": picture})
    return shown
