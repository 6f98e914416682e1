"""At which inner step does training a Hope stop being finite? A sweep of its bound, everything else the same.

    python benchmarks/learning/inner_step.py --json inner-step.json --plot inner-step.png
    python benchmarks/learning/inner_step.py --publish

The bound of the mixer's step, ``lr_max``, is multiplied by each of :data:`FACTORS`; ``--levels`` multiplies those of
the CMS levels too. ``--publish`` puts the report into ``benchmarks/results`` and its table into the README beside this
file.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # works from a checkout that is not installed

import typer  # noqa: E402

from benchmarks.learning import report as reporting  # noqa: E402
from benchmarks.learning.models import Size, config_of, parameters_of  # noqa: E402
from benchmarks.learning.tasks import Text  # noqa: E402
from benchmarks.learning.train import Recipe, Run, train  # noqa: E402
from hope_kernels.bench.machine import stamp  # noqa: E402
from hope_kernels.bench.plots import INK, figure  # noqa: E402
from hope_kernels.cli.output import console, fail, progress, write_json  # noqa: E402
from hope_kernels.layers.titans import DELTA_LR_MAX  # noqa: E402
from hope_kernels.models import HopeConfig  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
README = Path(__file__).parent / "README.md"
NAME = "inner-step"
FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)  # of the layers' own bounds
SIZE = Size(chunk_size=16, projection_chunk_size=64, levels=(16, 64), own_bounds=True)  # that of the text task
PEAK = 1e-2  # the optimiser's learning rate, the higher of the two that models choose from


COLOUR = "#1f77b4"
NEXT_TO = {"xytext": (-6, 0), "textcoords": "offset points", "ha": "right", "va": "center"}


def config_for(factor: float, vocab_size: int, levels: bool = False) -> HopeConfig:
    """A Hope with the mixer's bound multiplied by ``factor``, and with ``levels`` those of the CMS levels."""
    config = config_of("Hope", vocab_size, SIZE)
    of_cms = tuple(
        replace(level, lr_max=factor * level.step_bound) if levels and level.chunk_size else level
        for level in config.levels
    )
    return replace(config, lr_max=factor * DELTA_LR_MAX, levels=of_cms)


def experiment(task: Text, recipe: Recipe, seeds: int, levels: bool) -> list[dict[str, Any]]:
    """Train at every factor: an entry for each, with its runs."""
    entries = []
    with progress() as bar:
        shown = bar.add_task("inner step", total=len(FACTORS) * seeds, detail="")
        for factor in FACTORS:
            config, runs = config_for(factor, task.vocab_size, levels), []
            for seed in range(seeds):
                run = train("Hope", task, SIZE, recipe, PEAK, seed, config=config)
                runs.append(dataclasses.asdict(run))
                bar.update(shown, advance=1, detail=f"x{factor:g}: {told(run)}")
            entries.append({"factor": factor, "config": config.to_dict(), "runs": runs})
    return entries


def report_of(task: Text, recipe: Recipe, levels: bool, entries: list[dict[str, Any]]) -> dict[str, Any]:
    """The report of what :func:`experiment` found."""
    return {
        **stamp(NAME),
        "task": dataclasses.asdict(task),
        "recipe": dataclasses.asdict(recipe),
        "lr": PEAK,
        "levels": levels,
        "seeds": [run["seed"] for run in entries[0]["runs"]],
        "parameters": parameters_of(config_of("Hope", task.vocab_size, SIZE)),
        "entries": entries,
    }


def told(run: Run) -> str:
    """How a run ended, in a word."""
    return f"broke off at step {run.broke_off}" if run.broke_off is not None else f"{run.final_loss:.3f} nats"


def table(report: dict[str, Any]) -> str:
    """The report as Markdown: a row per factor, bits per byte at the trained length and up to four times that."""
    shown = columns(report)
    head = ["times the default", "`lr_max`", "steps of each seed", *(f"bytes {condition}" for condition in shown)]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for entry in report["entries"]:
        runs = entry["runs"]
        ended = ", ".join(str(run["steps"] if run["broke_off"] is None else run["broke_off"]) for run in runs)
        scores = ["; ".join(said(run, condition) for run in runs) for condition in shown]
        cells = [f"{entry['factor']:g}", f"{entry['config']['lr_max']:g}", ended, *scores]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def columns(report: dict[str, Any]) -> tuple[str, ...]:
    """The conditions that are shown: the length that was trained on, up to twice that, up to four times."""
    length, longest = report["task"]["length"], report["task"]["longest"]
    return f"0-{length}", f"{length}-{longest // 2}", f"{longest // 2}-{longest}"


def said(run: dict[str, Any], condition: str) -> str:
    """A score as the table has it."""
    if run["broke_off"] is not None:
        return "broke off"
    score = run["scores"][condition]
    return "not finite" if score is None else f"{score:.3f}"


def plot(report: dict[str, Any], path: Path) -> None:
    """Bits per byte by factor, a mark for each seed and a line where all have one; a cross: seeds that have none."""
    shown = columns(report)
    with figure(path, columns=len(shown), size=(12, 3.6)) as axes:
        for axis, condition in zip(axes, shown, strict=True):
            scores = [[run["scores"].get(condition) for run in entry["runs"]] for entry in report["entries"]]
            finite = [[score for score in row if score is not None] for row in scores]
            values = [score for row in finite for score in row]
            top = max(values) + 0.15 * (max(values) - min(values))
            for factor, row in zip(FACTORS, finite, strict=True):
                axis.plot([factor] * len(row), row, "o", color=COLOUR, markersize=4, alpha=0.6)
                if lost := len(report["seeds"]) - len(row):
                    axis.plot([factor], [top], "x", color=INK, markersize=7)
                    axis.annotate(f"{lost} not finite", (factor, top), color=INK, fontsize=8, **NEXT_TO)
            means = [float("nan") if len(row) < len(report["seeds"]) else statistics.fmean(row) for row in finite]
            axis.plot(FACTORS, means, color=COLOUR, linewidth=1.2)
            axis.set_xscale("log")
            axis.set_xticks(FACTORS, [f"{factor:g}" for factor in FACTORS])
            axis.minorticks_off()
            axis.set_xlabel("bound of the inner step, times the default")
            axis.set_ylabel("bits per byte")
            axis.set_title(f"bytes {condition}")


def main(
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each factor.")] = 2,
    steps: Annotated[int, typer.Option(min=1, help="Of each run.")] = 250,
    levels: Annotated[bool, typer.Option("--levels", help="Multiply the bounds of the CMS levels too.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Where the report goes.")] = None,
    plot_path: Annotated[Path | None, typer.Option("--plot", help="Where the picture goes.")] = None,
    publish: Annotated[bool, typer.Option(help="Report, picture and the README's table.")] = False,
) -> None:
    """Train a Hope at several bounds of its inner step and say which runs stay finite."""
    os.environ["OMP_NUM_THREADS"] = "1"
    if publish and levels:
        raise fail("publish is for the mixer's bound alone; want no --levels")
    task, recipe = Text(), Recipe(steps=steps, batch=4)
    report = report_of(task, recipe, levels, experiment(task, recipe, seeds, levels))
    console.print(table(report), soft_wrap=True, markup=False)
    for path in [json_path, RESULTS / f"{NAME}.json" if publish else None]:
        if path is not None:
            write_json(report, path)
    for path in [plot_path, RESULTS / f"{NAME}.png" if publish else None]:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            plot(report, path)
    if publish:
        reporting.put(README, NAME, table(report))


if __name__ == "__main__":
    typer.run(main)
