"""Tables and pictures of what a benchmark has done."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nnunet_semiseg.benchmark.quality import class_name, class_names
from nnunet_semiseg.benchmark.records import Run, read_quality
from nnunet_semiseg.benchmark.runs import Benchmark
from nnunet_semiseg.benchmark.suite import ALL, FORK, VANILLA
from nnunet_semiseg.evaluation.comparison import colors
from nnunet_semiseg.files import whole, write_csv, write_json, write_text
from nnunet_semiseg.trainers.registry import find_trainer

# {method: how its lines look}
Style = dict[str, dict[str, Any]]

PAGE = """\
# {title}

{spread}{overview}
Mean Dice over the foreground classes of {validation} whole validation cases (nnU-Net's own validation: final
checkpoint, sliding window, mirroring); {seeds}. vanilla is nnU-Net's own training. {state}
{fork}
![Dice against the number of labeled cases](label_efficiency.png)

## Runs

{runs}
Training: sum of the epochs, without the final validation. Peak memory: {memory}.

## How it was made

```
{command}
```

{name}:

```json
{content}
```

The runs, on the folds in `splits_final.json` beside this file:

```
{commands}
```
"""


FORKED = """
Every run starts from the network of the row "{row}": nnU-Net's own training on labels alone for {shared} of the
{epochs} epochs, one for all runs of a budget and seed. They have the other {own} epochs. Difference from vanilla of the
same seed:

{gains}"""


def _cell(values: list[float], wanted: int, sign: str = "") -> str:
    """Mean and standard deviation over the seeds. ``sign``: "+" writes that of a positive mean."""
    if not values:
        return "–"
    text = f"{np.mean(values):{sign}.3f}"
    if len(values) > 1:
        text += f" ± {np.std(values, ddof=1):.3f}"
    return text if len(values) == wanted else f"{text} ({len(values)} of {wanted} seeds)"


def _table(header: list[str], rows: Iterable[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def report(benchmark: Benchmark) -> None:
    """Write tables and pictures of what is done into the output folder."""
    folds, output = benchmark.folds, benchmark.output
    methods = list(dict.fromkeys(run.method for run in benchmark.runs))
    summaries = {run: summary for run in benchmark.runs if (summary := run.summary) is not None}
    names = class_names(benchmark.dataset.json)
    dice = {
        run: {class_name(names, label): values["Dice"] for label, values in summary["mean"].items()}
        for run, summary in summaries.items()
    }
    write_text(output / "results.md", results_page(benchmark, methods, dice))
    rows = []
    for run in summaries:
        start = [run.method, run.trainer, run.budget, len(folds[run.budget]["train"]), run.number, run.seed]
        start.append(run.shared_epochs)
        costs = [run.record.get("training_minutes", ""), "" if run.peak_gib is None else run.peak_gib]
        rows += [[*start, name, value, *costs] for name, value in {**dice[run], "mean": run.mean}.items()]
    header = ["method", "trainer", "budget", "labeled_cases", "fold", "seed", "fork_after", "class", "dice"]
    write_csv(output / "results.csv", [*header, "training_minutes", "peak_memory_gib"], rows)
    write_json(output / "splits_final.json", list(folds.values()))

    style: Style = {method: dict(color=color, label=method) for method, color in zip(methods, colors(len(methods)))}
    label_efficiency(benchmark, style)
    panels(benchmark, style, "validation_curves.png", "nnU-Net's validation pseudo Dice (0 to 1)", draw_validation)
    quality = "Dice of withheld cases (0 to 1)\nsolid: network that labels; dashed: student"
    panels(benchmark, style, "pseudo_label_quality.png", quality, draw_quality)


def results_page(benchmark: Benchmark, methods: list[str], dice: dict[Run, dict[str, float]]) -> str:
    """results.md. ``dice``: that of each class, for every validated run."""
    s, folds = benchmark.suite, benchmark.folds
    overview = [
        [method, *(_cell([run.mean for run in benchmark.finished(method, budget)], len(s.seeds)) for budget in folds)]
        for method in methods
    ]
    # All runs have the same validation cases, and so the same classes.
    classes = list(next(iter(dice.values()), {}))
    runs = []
    for run, values in dice.items():
        costs = ["–" if cost is None else f"{cost:.2f}" for cost in (run.record.get("training_minutes"), run.peak_gib)]
        numbers = [f"{value:.3f}" for value in (*(values[name] for name in classes), run.mean)]
        runs.append([run.method, run.budget, str(run.seed), *numbers, *costs])
    return PAGE.format(
        title=f"{benchmark.dataset.name}, {s.configuration}",
        spread=_spread(benchmark),
        fork=_forked(benchmark, methods),
        overview=_table(
            ["method", *(f"{name} ({len(fold['train'])} labeled)" for name, fold in folds.items())], overview
        ),
        validation=len(next(iter(folds.values()))["val"]),
        seeds=f"{len(s.seeds)} seeds ± their standard deviation" if len(s.seeds) > 1 else "one seed",
        state=f"{len(dice)} of {len(benchmark.runs)} runs are done.",
        runs=_table(["method", "budget", "seed", *classes, "mean Dice", "training, min", "peak memory, GiB"], runs),
        memory="of the GPU" if benchmark.profile == "gpu" else "resident, of the training process",
        command=f"nnunet_semiseg benchmark {benchmark.file.name} --profile {benchmark.profile}",
        name=benchmark.file.name,
        content=benchmark.file.read_text().strip(),
        commands="\n".join(line for run in benchmark.runs for line in benchmark.command_lines(run)),
    )


def _spread(benchmark: Benchmark) -> str:
    """How much runs of vanilla differ by their seed alone, where several are done."""
    found = []
    for budget in benchmark.folds:
        dice = [run.mean for run in benchmark.finished(VANILLA, budget)]
        if len(dice) > 1:
            found.append(
                f"{budget} {min(dice):.3f} to {max(dice):.3f} (standard deviation {np.std(dice, ddof=1):.3f}, "
                f"{len(dice)} seeds)"
            )
    return f"vanilla with other seeds: {'; '.join(found)}. A smaller difference says nothing.\n\n" if found else ""


def _forked(benchmark: Benchmark, methods: list[str]) -> str:
    """What runs have in common before a fork, and what a method gains after it; empty without a fork."""
    s = benchmark.suite
    if s.fork_after is None:
        return ""
    budgets, rows = [budget for budget in benchmark.folds if budget != ALL], []
    for method in methods:
        gains = []
        for budget in budgets:
            vanilla = {run.seed: run.mean for run in benchmark.finished(VANILLA, budget)}
            runs = [run for run in benchmark.finished(method, budget) if run.seed in vanilla]
            gains.append(_cell([run.mean - vanilla[run.seed] for run in runs], len(s.seeds), "+"))
        if method not in (VANILLA, FORK):
            rows.append([method, *gains])
    table = _table(["method", *budgets], rows)
    return FORKED.format(row=FORK, shared=s.shared_epochs, epochs=s.epochs, own=s.own_epochs, gains=table)


def label_efficiency(benchmark: Benchmark, style: Style) -> None:
    """Mean Dice against the number of labeled cases."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    sizes = {budget: len(fold["train"]) for budget, fold in benchmark.folds.items() if budget != ALL}
    several = len(benchmark.suite.seeds) > 1
    for method, look in style.items():
        points = []
        for budget in sorted(sizes, key=lambda budget: sizes[budget]):
            values = [run.mean for run in benchmark.finished(method, budget)]
            if values:
                points.append((sizes[budget], np.mean(values), np.std(values, ddof=1) if len(values) > 1 else 0.0))
        if points:
            x, mean, deviation = zip(*points)
            axes.errorbar(x, mean, deviation if several else None, marker="o", capsize=3, **look)
    ceiling = [run.mean for run in benchmark.finished(VANILLA, ALL)]
    if ceiling:
        number = len(benchmark.folds[ALL]["train"])
        axes.axhline(float(np.mean(ceiling)), color="black", linestyle=":", label=f"{VANILLA}, all {number} labels")
    ticks = sorted(set(sizes.values()))
    axes.set_xscale("log")
    axes.set_xticks(ticks, list(map(str, ticks)))
    axes.minorticks_off()
    axes.set(xlabel="labeled cases (logarithmic)", ylabel="mean foreground Dice (0 to 1)", title=benchmark.dataset.name)
    _save(figure, benchmark.output / "label_efficiency.png")


def panels(
    benchmark: Benchmark, style: Style, file: str, ylabel: str, draw: Callable[[Axes, list[Run], dict[str, Any]], None]
) -> None:
    """A picture with one panel for each budget; ``draw(axes, runs, look)`` draws a method's line."""
    budgets = [budget for budget in benchmark.folds if budget != ALL]
    figure = Figure(figsize=(3 + 4.5 * len(budgets), 4.5), layout="constrained")
    for axes, budget in zip(np.ravel(figure.subplots(1, len(budgets), sharey=True)), budgets):
        for method, look in style.items():
            draw(axes, benchmark.finished(method, budget), look)
        axes.set_xlabel(f"epoch ({benchmark.suite.iterations} training steps each)")
        axes.set_title(f"{budget} ({len(benchmark.folds[budget]['train'])} labeled)")
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.axes[0].set_ylabel(ylabel)
    _save(figure, benchmark.output / file)


def draw_validation(axes: Axes, runs: list[Run], look: dict[str, Any]) -> None:
    """Mean over the seeds."""
    curves = [curve for run in runs if (curve := run.record.get("validation_dice"))]
    if curves:
        mean = np.mean(curves, axis=0)
        axes.plot(np.arange(1, len(mean) + 1) + runs[0].shared_epochs, mean, **look)


def draw_quality(axes: Axes, runs: list[Run], look: dict[str, Any]) -> None:
    """Mean over classes and seeds; solid for the network that makes the labels, dashed for the student beside it."""
    found: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        for epoch, network, _, dice in read_quality(run.fold):
            found[network][epoch].append(dice)
    if not found:
        return
    # Only methods of this package have others.
    by_student = getattr(find_trainer(runs[0].trainer), "labeled_by", "student") == "student"
    order = ("student",) if by_student else ("teacher", "second", "student")
    labeling = next(network for network in order if network in found)
    for network in dict.fromkeys((labeling, "student")):
        # Epochs that all seeds have.
        most = max(map(len, found[network].values()))
        shared = runs[0].shared_epochs
        points = sorted(
            (shared + epoch, np.nanmean(dice)) for epoch, dice in found[network].items() if len(dice) == most
        )
        dashed: dict[str, Any] = {} if network == labeling else {"label": None, "linestyle": "--"}
        axes.plot(*zip(*points), marker=".", **{**look, **dashed})


def _save(figure: Figure, file: Path) -> None:
    """Add grids and one legend for all panels, and write."""
    entries: dict[str, Artist] = {}
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        entries |= dict(zip(*axes.get_legend_handles_labels()[::-1]))
    if entries:
        figure.legend(entries.values(), entries.keys(), loc="outside right upper")
    with whole(file) as temporary:
        figure.savefig(temporary, dpi=100)
