"""At which inner step does training a Hope stop being finite? A sweep of its bound, everything else the same.

    python benchmarks/learning/inner_step.py --json inner-step.json --plot inner-step.png
    python benchmarks/learning/inner_step.py --publish

The bounds of the step, ``lr_max``, are multiplied, in three series: that of the mixer alone; those of the CMS levels
too; and the mixer's at its default in a model whose memories' initial weights have no bound (``weight_norm_max``
None). ``--publish`` puts the report into ``benchmarks/results`` and its table into the README beside this file.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # works from a checkout that is not installed

import typer  # noqa: E402

from benchmarks.learning import report as reporting  # noqa: E402
from benchmarks.learning.models import Size, config_of, parameters_of  # noqa: E402
from benchmarks.learning.tasks import Text  # noqa: E402
from benchmarks.learning.train import Recipe, train  # noqa: E402
from hope_kernels.bench.machine import stamp  # noqa: E402
from hope_kernels.bench.plots import INK, figure  # noqa: E402
from hope_kernels.cli.output import console, progress, write_json  # noqa: E402
from hope_kernels.layers.titans import DELTA_LR_MAX  # noqa: E402
from hope_kernels.models import HopeConfig  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
README = Path(__file__).parent / "README.md"
NAME = "inner-step"
SIZE = Size(chunk_size=16, projection_chunk_size=64, levels=(16, 64), own_bounds=True)  # that of the text task
PEAK = 1e-2  # the optimiser's learning rate, the higher of the two that models choose from


SERIES = {  # what is multiplied, and its colour
    "mixer": "#1f77b4",
    "mixer, initial weights not bounded": "#e07b39",
    "mixer and CMS levels": "#2a9d5c",
}
BELOW = {"xytext": (0, -7), "textcoords": "offset points", "ha": "center", "va": "top"}


@dataclass(frozen=True)
class Case:
    """One row of the sweep: a series and the factor of its bounds."""

    series: str
    factor: float

    def config(self, vocab_size: int) -> HopeConfig:
        """A Hope with these bounds and everything else the same.

        Raises:
            ValueError: there is no such series.
        """
        if self.series not in SERIES:
            raise ValueError(f"series: got {self.series!r}; want one of {', '.join(map(repr, SERIES))}")
        config = replace(config_of("Hope", vocab_size, SIZE), lr_max=self.factor * DELTA_LR_MAX)
        if "not bounded" in self.series:
            return replace(config, weight_norm_max=None)
        if "levels" in self.series:
            wider = (replace(x, lr_max=self.factor * x.step_bound) if x.chunk_size else x for x in config.levels)
            return replace(config, levels=tuple(wider))
        return config

    def seeds(self, usual: int) -> range:
        """Twice as many at the default bounds, which most will read with."""
        return range(usual * (2 if self.factor == 1 else 1))


CASES = (
    *(Case("mixer", factor) for factor in (1.0, 3.0, 10.0, 100.0, 1000.0)),
    Case("mixer, initial weights not bounded", 1.0),
    *(Case("mixer and CMS levels", factor) for factor in (3.0, 10.0, 30.0)),
)


def trained(case: Case, seed: int, task: Text, recipe: Recipe, kept: Path | None) -> dict[str, Any]:
    """One run; where ``kept`` is a folder, taken from there, or left there."""
    config = case.config(task.vocab_size)
    key = {"recipe": dataclasses.asdict(recipe), "seed": seed, "config": config.to_dict()}
    path = None if kept is None else kept / f"{case.series}-{case.factor:g}-{seed}.json".replace(" ", "-")
    if path is not None and path.exists():
        found = json.loads(path.read_text())
        if {name: found[name] for name in key} != key:
            raise ValueError(f"kept: {path} is of another configuration or recipe; want another folder")
        return found["run"]
    run = dataclasses.asdict(train("Hope", task, SIZE, recipe, PEAK, seed, config=config))
    if path is not None:
        write_json(key | {"run": run}, path)
    return run


def experiment(task: Text, recipe: Recipe, seeds: int, jobs: int, kept: Path | None) -> list[dict[str, Any]]:
    """Train every case: an entry for each, with its runs."""
    runs = sorted(((seed, case) for case in CASES for seed in case.seeds(seeds)), key=lambda run: run[0])
    with progress() as bar, ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting = {pool.submit(trained, case, seed, task, recipe, kept): (case, seed) for seed, case in runs}
        shown = bar.add_task("inner step", total=len(waiting), detail="")
        found = {}
        for future in as_completed(waiting):
            found[waiting[future]] = future.result()
            bar.update(shown, advance=1, detail=f"x{waiting[future][0].factor:g}: {told(future.result())}")
    return [
        {
            **dataclasses.asdict(case),
            "config": case.config(task.vocab_size).to_dict(),
            "runs": [found[case, seed] for seed in case.seeds(seeds)],
        }
        for case in CASES
    ]


def report_of(task: Text, recipe: Recipe, entries: list[dict[str, Any]]) -> dict[str, Any]:
    """The report of what :func:`experiment` found."""
    return {
        **stamp(NAME),
        "task": dataclasses.asdict(task),
        "recipe": dataclasses.asdict(recipe),
        "lr": PEAK,
        "parameters": parameters_of(config_of("Hope", task.vocab_size, SIZE)),
        "entries": entries,
    }


def told(run: dict[str, Any]) -> str:
    """How a run ended, in a word."""
    return f"broke off at step {run['broke_off']}" if run["broke_off"] is not None else f"{run['final_loss']:.3f} nats"


def table(report: dict[str, Any]) -> str:
    """The report as Markdown: a row per case, bits per byte at the trained length and up to four times that."""
    shown = columns(report)
    head = ["multiplied", "times the default", "`lr_max`", "steps of each seed", *(f"bytes {name}" for name in shown)]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for entry in report["entries"]:
        runs = entry["runs"]
        ended = ", ".join(str(run["steps"] if run["broke_off"] is None else run["broke_off"]) for run in runs)
        scores = ["; ".join(said(run, condition) for run in runs) for condition in shown]
        cells = [entry["series"], f"{entry['factor']:g}", f"{entry['config']['lr_max']:g}", ended, *scores]
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
    factors = sorted({entry["factor"] for entry in report["entries"]})
    with figure(path, columns=len(shown), size=(12, 3.6)) as axes:
        for axis, condition in zip(axes, shown, strict=True):
            scores = [[run["scores"].get(condition) for run in entry["runs"]] for entry in report["entries"]]
            values = [score for row in scores for score in row if score is not None]
            top = max(values) + 0.15 * (max(values) - min(values))
            for series, colour in SERIES.items():
                places, means = [], []
                for entry, row in zip(report["entries"], scores, strict=True):
                    if entry["series"] != series:
                        continue
                    factor, finite = entry["factor"], [score for score in row if score is not None]
                    axis.plot([factor] * len(finite), finite, "o", color=colour, markersize=4, alpha=0.6)
                    if lost := len(row) - len(finite):
                        axis.plot([factor], [top], "x", color=colour, markersize=7)
                        axis.annotate(f"{lost} of {len(row)}", (factor, top), color=INK, fontsize=8, **BELOW)
                    places.append(factor)
                    means.append(float("nan") if len(finite) < len(row) else statistics.fmean(finite))
                axis.plot(places, means, color=colour, linewidth=1.2, label=series)
            axis.set_xscale("log")
            axis.set_xticks(factors, [f"{factor:g}" for factor in factors])
            axis.minorticks_off()
            axis.set_xlabel("bound over its default (cross: seeds not finite)")
            axis.set_ylabel("bits per byte")
            axis.set_title(f"bytes {condition}")
        axes[0].legend(fontsize=7)


def main(
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each factor; twice as many at the default.")] = 2,
    steps: Annotated[int, typer.Option(min=1, help="Of each run.")] = 250,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, a thread each.")] = 1,
    kept: Annotated[Path | None, typer.Option(help="A folder of runs: none is trained twice.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Where the report goes.")] = None,
    plot_path: Annotated[Path | None, typer.Option("--plot", help="Where the picture goes.")] = None,
    publish: Annotated[bool, typer.Option(help="Report, picture and the README's table.")] = False,
) -> None:
    """Train a Hope at several bounds of its inner step and say which runs stay finite."""
    os.environ["OMP_NUM_THREADS"] = "1"
    task, recipe = Text(), Recipe(steps=steps, batch=4)
    report = report_of(task, recipe, experiment(task, recipe, seeds, jobs, kept))
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
