"""What the runs of a task say together: means and spreads over seeds, a Markdown table, a picture."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.learning.train import Run
from hope_kernels.bench.plots import INK, figure

COLOURS = {
    "Hope": "#1f77b4",
    "Hope without CMS": "#7fb3d9",
    "Titans": "#2a9d5c",
    "Hope-Attention": "#e07b39",
    "Transformer": "#5b6770",
}


def best(runs: Sequence[Run]) -> Run:
    """The run that ended at the lowest training loss, the first of equals; one that broke off is none.

    Raises:
        ArithmeticError: all broke off.
    """
    whole = [run for run in runs if run.broke_off is None]
    if not whole:
        raise ArithmeticError(f"all learning rates of {runs[0].model} broke off; try lower ones")
    return min(whole, key=lambda run: run.final_loss or 0.0)


def summary(runs: Sequence[Run]) -> dict[str, dict[str, float]]:
    """By condition, ``mean``, ``deviation`` (of a sample, 0 for one run), ``lowest`` and ``highest`` over runs.

    Runs that broke off are left out; nothing is left where all did. A condition is where the scores of all others are
    finite.
    """
    whole = [run for run in runs if run.broke_off is None]
    found = {}
    for condition in whole[0].scores if whole else ():
        values = [score for run in whole if (score := run.scores[condition]) is not None]
        if len(values) < len(whole):
            continue
        found[condition] = {
            "mean": statistics.fmean(values),
            "deviation": statistics.stdev(values) if len(values) > 1 else 0.0,
            "lowest": min(values),
            "highest": max(values),
        }
    return found


def _conditions(report: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(c for entry in report["models"].values() for c in entry["summary"]))


def table(report: dict[str, Any]) -> str:
    """The report as Markdown: a row per model, mean and standard deviation over whole runs; the best mean is bold."""
    percent = report["task"]["metric"] == "accuracy"
    models = report["models"]
    conditions = _conditions(report)
    head = ["model", "parameters", "width", *conditions, "learning rate", "CPU s"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    means = {c: [entry["summary"][c]["mean"] for entry in models.values() if c in entry["summary"]] for c in conditions}
    for name, entry in models.items():
        cells = []
        for condition in conditions:
            if condition not in entry["summary"]:
                cells.append("not finite")
                continue
            mean, deviation = (entry["summary"][condition][key] for key in ("mean", "deviation"))
            text = f"{100 * mean:.1f} ± {100 * deviation:.1f}" if percent else f"{mean:.3f} ± {deviation:.3f}"
            wins = mean == (max if percent else min)(means[condition])
            cells.append(f"**{text}**" if wins else text)
        seconds = statistics.median(run["seconds"] for run in entry["runs"])
        parameters, width = f"{entry['parameters']:,}", str(entry["config"]["dim"])
        broken = sum(run["broke_off"] is not None for run in entry["runs"])
        lr = f"{entry['lr']:g}" + (f"; {broken} of {len(entry['runs'])} broke off" if broken else "")
        lines.append(f"| {' | '.join([name, parameters, width, *cells, lr, f'{seconds:.0f}'])} |")
    return "\n".join(lines)


def publish(report: dict[str, Any], document: Path) -> None:
    """Put the table into a document, at the place of the report's task: see :func:`put`."""
    put(document, report["task"]["name"], table(report))


def put(document: Path, name: str, lines: str) -> None:
    """Put a table between the marks ``<!-- NAME: begin -->`` and ``<!-- NAME: end -->`` of a document.

    Raises:
        ValueError: the document has no such marks.
    """
    text = document.read_text()
    marks = re.compile(rf"(<!-- {name}: begin -->\n).*?(\n<!-- {name}: end -->)", re.DOTALL)
    if len(marks.findall(text)) != 1:
        raise ValueError(f"document: {document} has no place for {name}; want <!-- {name}: begin --> and end once")
    document.write_text(marks.sub(lambda found: f"{found[1]}\n{lines}\n{found[2]}", text))


def plot(report: dict[str, Any], path: Path) -> None:
    """Scores by condition, bars from the lowest to the highest seed, and the training losses' means over seeds."""
    percent = report["task"]["metric"] == "accuracy"
    models = report["models"]
    conditions = _conditions(report)
    kinds = [name.split()[0] if " " in name else "" for name in conditions]
    with figure(path, columns=2, size=(11, 4)) as (scores, losses):
        for offset, (name, entry) in enumerate(models.items()):
            if len(entry["summary"]) < len(conditions):
                continue  # the table says why
            scale = 100 if percent else 1
            middle, low, high = (
                [scale * entry["summary"][c][key] for c in conditions] for key in ("mean", "lowest", "highest")
            )
            spread = [
                [m - x for m, x in zip(middle, low, strict=True)],
                [x - m for m, x in zip(middle, high, strict=True)],
            ]
            places = [i + 0.05 * (offset - (len(models) - 1) / 2) for i in range(len(conditions))]
            colour = COLOURS.get(name, INK)
            # A line joins the conditions of one kind: "mqar 4", "mqar 8"; not these and "needle 1x".
            for _, members in groupby(range(len(conditions)), key=lambda i: kinds[i]):
                part = list(members)
                scores.errorbar(
                    [places[i] for i in part],
                    [middle[i] for i in part],
                    [[side[i] for i in part] for side in spread],
                    label=name if part[0] == 0 else None,
                    color=colour,
                    marker="o",
                    markersize=4,
                    capsize=2,
                    linewidth=1.4,
                )
            curves = [run["losses"] for run in entry["runs"] if run["broke_off"] is None]
            curve = [statistics.fmean(values) for values in zip(*curves, strict=True)]
            steps = report["recipe"]["steps"]
            losses.plot([steps * (i + 0.5) / len(curve) for i in range(len(curve))], curve, color=colour, linewidth=1.4)
        scores.set_xticks(range(len(conditions)), conditions, rotation=20)
        scores.set_ylabel("right answers (%)" if percent else "bits per byte")
        if percent:
            scores.set_ylim(0, 102)
        scores.set_title(f"{report['task']['name']}: mean and range over {len(report['seeds'])} seeds")
        scores.legend(fontsize=8)
        losses.set_xlabel("step")
        losses.set_ylabel("nats per label")
        losses.set_title("training loss")
