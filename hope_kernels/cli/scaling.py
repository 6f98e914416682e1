"""``hope-kernels scaling``: how time and memory grow with threads and with the length of a sequence."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table

from hope_kernels.bench.machine import stamp
from hope_kernels.bench.parity import DTYPES
from hope_kernels.bench.scaling import ScalingReport, measure_scaling, thread_counts
from hope_kernels.bench.shapes import MODES, SHAPES, get_shape
from hope_kernels.bench.speed import DisagreementError, implementations_here
from hope_kernels.cli.output import console, fail, new_table, progress, write_json

THREAD_SHAPES = ("S1", "S16", "S64", "L")
LENGTH_SHAPES = ("S16", "S64")
LENGTHS = (1024, 4096, 16384, 65536)


def scaling(
    shape: Annotated[
        list[str] | None,
        typer.Option(
            help=f"One of {', '.join(SHAPES)}; repeatable. Default: {', '.join(THREAD_SHAPES)} by threads, "
            f"{', '.join(LENGTH_SHAPES)} by length."
        ),
    ] = None,
    tokens: Annotated[
        list[int] | None,
        typer.Option(min=1, help=f"A length; repeatable. Default: {', '.join(map(str, LENGTHS))}."),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="The most threads; default: torch's.")] = None,
    backend: Annotated[str, typer.Option(help="The backend to time.")] = "cpu",
    dtype: Annotated[str, typer.Option(help=f"Of the tokens: one of {', '.join(DTYPES)}.")] = "float32",
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds.")] = 5,
    memory: Annotated[bool, typer.Option(help="Measure peak memory, in one fresh process per length.")] = True,
    seed: Annotated[int, typer.Option(help="Seed of the inputs.")] = 0,
    json: Annotated[Path | None, typer.Option(help="Also write the report to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw it into this PNG file.")] = None,
) -> None:
    """Time one backend on 1, 2, 4, .. threads and on sequences of growing length, results checked before.

    Exit 1 if results differ from the reference's, or depend on the number of threads or on later tokens.
    """
    try:
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}; want one of {', '.join(DTYPES)}")
        by_threads = [get_shape(name) for name in shape or THREAD_SHAPES]
        by_length = [get_shape(name) for name in shape or LENGTH_SHAPES]
        implementations_here([backend])
    except (ValueError, RuntimeError) as error:
        raise fail(str(error)) from error
    try:
        with progress() as bar:
            task = bar.add_task("measuring", total=len(MODES) * (len(by_threads) + len(by_length)), detail="")
            report = measure_scaling(
                by_threads,
                by_length,
                counts=thread_counts(threads or torch.get_num_threads()),
                lengths=tokens or LENGTHS,
                backend=backend,
                dtype=DTYPES[dtype],
                repeats=repeats,
                memory=memory,
                seed=seed,
                notify=lambda message: bar.update(task, detail=message, advance=0 if message else 1),
            )
    except DisagreementError as error:
        console.print(f"[bold red]wrong results[/]: {error}")
        raise typer.Exit(1) from error
    console.print(threads_table(report))
    console.print(lengths_table(report))
    limits = ", ".join(
        f"{count}: {bandwidth:.1f} GB/s"
        + (f" and {report.peak_gflops[count]:.0f} GFLOP/s" if count in report.peak_gflops else "")
        for count, bandwidth in report.copy_gbytes.items()
    )
    console.print(
        f"[dim]measured in this run, by threads: large copies (read and written) and multiply-adds: {limits}[/]"
    )
    if json is not None:
        write_json(stamp("scaling") | {"seed": seed, "repeats": repeats} | report.as_dict(), json)
    if plot is not None:
        from hope_kernels.bench.plots import plot_scaling

        plot.parent.mkdir(parents=True, exist_ok=True)
        plot_scaling(report, plot)
        console.print(f"[dim]wrote {plot}[/]")


def threads_table(report: ScalingReport) -> Table:
    """A row per shape, mode and number of threads."""
    table = new_table("By threads")
    for name in ("shape", "mode"):
        table.add_column(name, no_wrap=True)
    for name in ("threads", "ms", "speed-up", "GFLOP/s", "peak"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in report.threads:
        table.add_row(
            row.shape,
            row.mode,
            str(row.threads),
            f"{row.ms:.4g}",
            f"{row.speedup:.2f}x",
            f"{row.gflops:.1f}",
            "-" if row.peak_fraction is None else f"{100 * row.peak_fraction:.0f} %",
        )
    return table


def lengths_table(report: ScalingReport) -> Table:
    """A row per shape, mode and length."""
    table = new_table("By the length of a sequence")
    for name in ("shape", "mode"):
        table.add_column(name, no_wrap=True)
    for name in ("tokens", "ms", "ns per token and memory", "MiB"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in report.lengths:
        peak = "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.1f}"
        table.add_row(row.shape, row.mode, str(row.tokens), f"{row.ms:.4g}", f"{row.ns_per_head_token:.0f}", peak)
    return table
