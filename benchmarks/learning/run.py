"""Do the models learn? One task, every model, several seeds; at equal parameters, tokens, optimiser and schedule.

    python benchmarks/learning/run.py --task recall --json recall.json --plot recall.png
    python benchmarks/learning/run.py --task recall --models Hope --models Transformer --seeds 1
    python benchmarks/learning/run.py --task text --publish

Every model chooses its learning rate from one list, on a seed that no result comes from. ``--publish`` puts the report
into ``benchmarks/results`` and its table into the README beside this file.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # works from a checkout that is not installed

import typer  # noqa: E402

from benchmarks.learning import report as reporting  # noqa: E402
from benchmarks.learning.models import LEARNING_RATES, MODELS, Size, config_of, parameters_of  # noqa: E402
from benchmarks.learning.tasks import TASKS, Task  # noqa: E402
from benchmarks.learning.train import Recipe, Run, train  # noqa: E402
from hope_kernels.bench.machine import stamp  # noqa: E402
from hope_kernels.cli.output import console, fail, progress, write_json  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
README = Path(__file__).parent / "README.md"
SEARCH_SEED = 100  # results come from seeds 0, 1, ..


@dataclass(frozen=True)
class Plan:
    """How a task is run: sizes, the training, and the steps of each try of the search."""

    size: Size
    recipe: Recipe
    search_steps: int


PLANS = {
    "recall": Plan(Size(levels=(8, 16)), Recipe(steps=600, batch=16), search_steps=180),
    "text": Plan(
        Size(chunk_size=16, projection_chunk_size=64, levels=(16, 64)),
        Recipe(steps=400, batch=4),
        search_steps=200,
    ),
}


@dataclass(frozen=True)
class Job:
    """One training, as it is sent to a process."""

    name: str
    task: Task
    size: Size
    recipe: Recipe
    lr: float
    seed: int
    test: bool

    def run(self) -> Run:
        return train(self.name, self.task, self.size, self.recipe, self.lr, self.seed, test=self.test)


def experiment(task: Task, plan: Plan, models: Iterable[str], seeds: int, jobs: int) -> dict[str, Any]:
    """Search, then train every model with what it chose; the report.

    Raises:
        ArithmeticError: every setting of a model broke off.
    """
    models = list(models)
    tries = [
        Job(name, task, plan.size, replace(plan.recipe, steps=plan.search_steps), lr, SEARCH_SEED, False)
        for name in models
        for lr in LEARNING_RATES
    ]
    trainings = len(tries) + seeds * len(models)
    with (
        ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool,
        progress() as bar,
    ):
        shown = bar.add_task(task.name, total=trainings, detail="")

        def run_all(work: list[Job]) -> list[Run]:
            futures = {pool.submit(Job.run, job): i for i, job in enumerate(work)}
            found: list[Run | None] = [None] * len(work)
            for future in as_completed(futures):
                run = found[futures[future]] = future.result()
                told = "broke off" if run.final_loss is None else f"{run.final_loss:.3f} nats"
                bar.update(shown, advance=1, detail=f"{run.model}: {told}")
            return found  # type: ignore[return-value]

        searched: dict[str, list[Run]] = {name: [] for name in models}
        for run in run_all(tries):
            searched[run.model].append(run)
        chosen = {name: reporting.best(runs).lr for name, runs in searched.items()}
        finals = [
            Job(name, task, plan.size, plan.recipe, chosen[name], seed, True)
            for seed in range(seeds)
            for name in models
        ]
        runs = run_all(finals)
    return report_of(task, plan, seeds, searched, runs)


def report_of(task: Task, plan: Plan, seeds: int, searched: dict[str, list[Run]], runs: list[Run]) -> dict[str, Any]:
    """The report of what :func:`experiment` found, by model and seed."""
    entries = {}
    for name, tries in searched.items():
        config = config_of(name, task.vocab_size, plan.size)
        of_model = [run for run in runs if run.model == name]
        entries[name] = {
            "config": config.to_dict(),
            "parameters": parameters_of(config),
            "lr": reporting.best(tries).lr,
            "search": [dataclasses.asdict(run) for run in tries],
            "runs": [dataclasses.asdict(run) for run in of_model],
            "summary": reporting.summary(of_model),
        }
    return {
        **stamp("learning"),
        "task": dataclasses.asdict(task),  # type: ignore[call-overload]
        "size": dataclasses.asdict(plan.size),
        "recipe": dataclasses.asdict(plan.recipe),
        "search_steps": plan.search_steps,
        "search_seed": SEARCH_SEED,
        "seeds": list(range(seeds)),
        "tokens": plan.recipe.steps * plan.recipe.batch * task.length,
        "models": entries,
    }


def redraw(task: str) -> None:
    """Picture and table anew, from the committed report.

    Raises:
        FileNotFoundError: there is none.
    """
    report = json.loads((RESULTS / f"learning-{task}.json").read_text())
    reporting.plot(report, RESULTS / f"learning-{task}.png")
    reporting.publish(report, README)


def main(
    task: Annotated[str, typer.Option(help=f"One of {', '.join(TASKS)}.")],
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each model.")] = 3,
    models: Annotated[list[str] | None, typer.Option(help="Some of the models; without, all.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Of each run, in place of the task's own.")] = None,
    search_steps: Annotated[int | None, typer.Option(min=1, help="Of each try of the search.")] = None,
    own_bounds: Annotated[bool, typer.Option(help="The layers' own bounds of the inner step.")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Processes, one thread each.")] = min(2, os.cpu_count() or 1),
    json_path: Annotated[Path | None, typer.Option("--json", help="Where the report goes.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Where the picture goes.")] = None,
    publish: Annotated[bool, typer.Option(help="Report, picture and the README's table.")] = False,
    from_results: Annotated[bool, typer.Option(help="Only picture and table, from the committed report.")] = False,
) -> None:
    """Train every model on a task and say how well it does."""
    if task not in TASKS:
        raise fail(f"task is {task!r}; want one of {', '.join(TASKS)}")
    for name in models or ():
        if name not in MODELS:
            raise fail(f"models has {name!r}; want some of {', '.join(map(repr, MODELS))}")
    if from_results:
        redraw(task)
        return
    if publish and (models or own_bounds):
        raise fail("publish is for the usual run; want neither --models nor --own-bounds")
    plan = PLANS[task]
    if own_bounds:
        plan = replace(plan, size=replace(plan.size, own_bounds=True))
    if steps is not None:
        plan = replace(plan, recipe=replace(plan.recipe, steps=steps))
    if search_steps is not None:
        plan = replace(plan, search_steps=search_steps)
    # Each process computes with one thread; told before it starts, PyTorch makes no others.
    os.environ["OMP_NUM_THREADS"] = "1"
    report = experiment(TASKS[task](), plan, models or MODELS, seeds, jobs)
    console.print(reporting.table(report), soft_wrap=True, markup=False)
    for path in [json_path, RESULTS / f"learning-{task}.json" if publish else None]:
        if path is not None:
            write_json(report, path)
    if plot is not None:
        plot.parent.mkdir(parents=True, exist_ok=True)
        reporting.plot(report, plot)
        console.print(f"[dim]wrote {plot}[/]")
    if publish:
        redraw(task)


if __name__ == "__main__":
    typer.run(main)
