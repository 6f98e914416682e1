"""Pictures of the reports: speed, parity, training. Needs matplotlib, imported on first use, and no display."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from hope_kernels.bench.parity import ParityReport
from hope_kernels.bench.scaling import LengthRow, ScalingReport
from hope_kernels.bench.shapes import MODES
from hope_kernels.bench.speed import SpeedReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT = "#22303c", "#8a99a6"
# The reference is grey, engines are coloured: the eye goes to what is compared with it.
COLOURS = {
    "reference": "#9aa7b1",
    "reference + torch.compile": "#c9a227",
    "cpu": "#1f77b4",
    "triton": "#2a9d5c",
    "cuda": "#7a4fbf",
}
DTYPE_COLOURS = {"float64": "#22303c", "float32": "#1f77b4", "bfloat16": "#e07b39", "float16": "#2a9d5c"}
_STYLE = {
    "figure.facecolor": "white",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titleweight": "bold",
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6eaee",
    "xtick.color": INK,
    "ytick.color": INK,
    "font.size": 9,
    "legend.frameon": False,
}


@contextmanager
def figure(path: Path, *, rows: int = 1, columns: int = 1, size: tuple[float, float]) -> Iterator[list[Axes]]:
    """Axes in the house style; the figure is written to ``path`` when the block ends."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        drawing: Figure = Figure(figsize=size, layout="constrained")
        yield list(drawing.subplots(rows, columns, squeeze=False).flat)
        drawing.savefig(path, dpi=150)


def plot_speed(report: SpeedReport, path: Path) -> None:
    """GFLOP/s of every implementation with the measured peak as a line, and how many times faster than the reference.

    One row of panels per mode that was run.
    """
    modes = [mode for mode in MODES if any(row.mode == mode for row in report.rows)]
    with figure(path, rows=len(modes), columns=2, size=(11, 3.4 * len(modes))) as axes:
        for index, mode in enumerate(modes):
            rows = [row for row in report.rows if row.mode == mode]
            shapes = list(dict.fromkeys(row.shape for row in rows))
            names = list(dict.fromkeys(row.implementation for row in rows))
            rate, ratio = axes[2 * index], axes[2 * index + 1]
            _grouped_bars(rate, shapes, names, {(r.shape, r.implementation): r.gflops for r in rows}, number="{:.3g}")
            if report.peak_gflops is not None:
                rate.axhline(report.peak_gflops, color="#c0392b", linewidth=1.2, linestyle="--")
                rate.annotate(
                    f"peak measured in this run: {report.peak_gflops:.0f}",
                    (0, report.peak_gflops),
                    xycoords=("axes fraction", "data"),
                    xytext=(3, 3),
                    textcoords="offset points",
                    color="#c0392b",
                    fontsize=8,
                )
                # bfloat16 products may pass the peak of float32 multiply-adds.
                rate.set_ylim(top=1.12 * max(report.peak_gflops, *(row.gflops for row in rows)))
            rate.set_ylabel("GFLOP/s")
            rate.set_title(f"{mode}, {rows[0].dtype}")
            others = [name for name in names if name != "reference"]
            if others:
                _grouped_bars(
                    ratio,
                    shapes,
                    others,
                    {(r.shape, r.implementation): r.ratio for r in rows},
                    number="{:.1f}x",
                )
            ratio.axhline(1, color=COLOURS["reference"], linewidth=1.2)
            ratio.set_ylabel("times faster than the reference")
            ratio.set_title("same rounds, alternating")
            rate.legend(loc="upper left", bbox_to_anchor=(0, 0.9), fontsize=8)


MODE_COLOURS = {"forward": "#1f77b4", "forward+backward": "#e07b39"}


def plot_scaling(report: ScalingReport, path: Path) -> None:
    """Speed-up by threads beside the ideal one; nanoseconds per token and peak memory by the length of a sequence."""
    with figure(path, columns=3, size=(13, 3.6)) as (threads, time, memory):
        counts = sorted({row.threads for row in report.threads})
        groups = list(dict.fromkeys((row.shape, row.mode) for row in report.threads))
        for shape, mode in groups:
            rows = [row for row in report.threads if (row.shape, row.mode) == (shape, mode)]
            threads.plot(
                [row.threads for row in rows],
                [row.speedup for row in rows],
                marker="o",
                markersize=3.5,
                linestyle="-" if mode == "forward" else (0, (4, 3)),
                label=f"{shape} {mode}",
            )
        threads.plot(counts, counts, color=FAINT, linewidth=1, label="ideal")
        threads.set_xticks(counts)
        threads.set_xlabel("threads")
        threads.set_title("times faster than one thread")
        threads.legend(fontsize=7)
        _by_length(time, report, lambda row: row.ns_per_head_token)
        time.set_ylim(bottom=0)
        time.set_title("nanoseconds per token and memory")
        _by_length(memory, report, lambda row: None if row.peak_bytes is None else row.peak_bytes / 2**20)
        memory.set_yscale("log")
        memory.set_title("peak memory beyond the inputs (MiB)")


def _by_length(axes: Axes, report: ScalingReport, value: Callable[[LengthRow], float | None]) -> None:
    groups = list(dict.fromkeys((row.shape, row.mode) for row in report.lengths))
    shapes = list(dict.fromkeys(shape for shape, _ in groups))
    for shape, mode in groups:
        rows = [row for row in report.lengths if (row.shape, row.mode) == (shape, mode) and value(row) is not None]
        if not rows:
            continue
        axes.plot(
            [row.tokens for row in rows],
            [value(row) for row in rows],
            marker="osD^v"[shapes.index(shape) % 5],
            markersize=4,
            color=MODE_COLOURS[mode],
            label=f"{shape} {mode}",
        )
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens of a sequence")
    if axes.lines:
        axes.legend(fontsize=7)


def _grouped_bars(
    axes: Axes,
    groups: Sequence[str],
    names: Sequence[str],
    values: dict[tuple[str, str], float],
    *,
    number: str,
) -> None:
    width = 0.8 / len(names)
    for offset, name in enumerate(names):
        positions = [i - 0.4 + width * (offset + 0.5) for i in range(len(groups))]
        heights = [values[group, name] for group in groups]
        bars = axes.bar(positions, heights, width * 0.94, label=name, color=COLOURS.get(name, "#b5651d"))
        axes.bar_label(bars, [number.format(height) for height in heights], fontsize=7, padding=1, color=INK)
    axes.set_xticks(range(len(groups)), groups)
    axes.grid(axis="x", visible=False)


def plot_parity(report: ParityReport, path: Path) -> None:
    """The worst error of every case beside its budget: a panel per backend, a colour per dtype."""
    backends = list(dict.fromkeys(row.backend for row in report.rows))
    cases = list(dict.fromkeys(row.case for row in report.rows))
    height = max(3.0, 1.2 + 0.19 * len(cases))
    with figure(path, columns=len(backends), size=(2.6 + 4.2 * len(backends), height)) as axes:
        for column, (panel, backend) in enumerate(zip(axes, backends, strict=True)):
            for dtype, colour in DTYPE_COLOURS.items():
                rows = [row for row in report.rows if row.backend == backend and row.dtype == dtype]
                if not rows:
                    continue
                places = [len(cases) - 1 - cases.index(row.case) for row in rows]
                # An error of exactly 0 has no place on a logarithmic scale; half an ulp of float64 stands for it.
                panel.scatter(
                    [max(row.worst_error, 1.1e-16) for row in rows],
                    places,
                    s=14,
                    color=colour,
                    label=dtype,
                    zorder=3,
                )
                panel.scatter(
                    [row.budgets[row.worst] for row in rows],
                    places,
                    s=34,
                    color=colour,
                    marker="|",
                    linewidths=1.2,
                )
            panel.set_xscale("log")
            panel.set_title(f"{backend}: error (dot) and budget (bar)")
            panel.set_xlabel("worst relative error of output, state and gradients")
            labels = cases[::-1] if column == 0 else [""] * len(cases)
            panel.set_yticks(range(len(cases)), labels, fontsize=7)
            panel.set_ylim(-0.8, len(cases) - 0.2)
        handles, labels = axes[0].get_legend_handles_labels()
        axes[0].figure.legend(handles, labels, loc="outside lower right", ncols=len(labels), fontsize=8)


def plot_losses(losses: dict[str, list[float]], pair: tuple[str, str], tolerance: float, path: Path) -> None:
    """Training loss of every model, and how far the two of ``pair`` are apart at each step, with the tolerance.

    Steps at which they are exactly equal are drawn at 1e-8.
    """
    colours = dict(zip(losses, ("#9aa7b1", "#e07b39", "#1f77b4"), strict=False))
    with figure(path, columns=2, size=(11, 3.8)) as (curves, distance):
        for name, values in losses.items():
            dashed = name == pair[1]
            curves.plot(
                values,
                label=name,
                color=colours[name],
                linewidth=1.6 if not dashed else 1.4,
                linestyle=(0, (4, 3)) if dashed else "-",
            )
        curves.set_xlabel("training step")
        curves.set_ylabel("loss (nats per byte)")
        curves.set_title("training loss")
        curves.legend()
        first, second = (losses[name] for name in pair)
        apart = [max(abs(a - b), 1e-8) for a, b in zip(first, second, strict=True)]
        distance.semilogy(apart, color=INK, linestyle="none", marker="o", markersize=2.5)
        distance.axhline(tolerance, color="#c0392b", linewidth=1.2, linestyle="--")
        distance.annotate(
            "tolerance",
            (0.01, tolerance),
            xycoords=("axes fraction", "data"),
            color="#c0392b",
            xytext=(0, 3),
            textcoords="offset points",
            fontsize=8,
        )
        distance.set_xlabel("training step")
        distance.set_title(f"|{pair[0]} - {pair[1]}|")


def plot_throughput(tokens_per_second: dict[str, float], path: Path) -> None:
    """Training throughput of every model."""
    names = list(tokens_per_second)
    with figure(path, size=(6.4, 0.9 + 0.55 * len(names))) as (axes,):
        values = [tokens_per_second[name] for name in names]
        bars = axes.barh(names[::-1], values[::-1], color=["#1f77b4", "#e07b39", "#9aa7b1"][-len(names) :], height=0.6)
        axes.bar_label(bars, [f"{value:,.0f}" for value in values[::-1]], padding=3, color=INK, fontsize=8)
        axes.set_title("training throughput (tokens per second)")
        axes.grid(axis="y", visible=False)
        axes.margins(x=0.12)
