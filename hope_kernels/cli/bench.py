"""``hope-kernels bench``: the naive path against every backend, on the named shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from hope_kernels.bench.machine import copy_bandwidth, stamp
from hope_kernels.bench.parity import DTYPES
from hope_kernels.bench.shapes import CPU_SHAPES, MODES, SHAPES, Shape, get_shape
from hope_kernels.bench.speed import (
    DisagreementError,
    Implementation,
    SpeedReport,
    compare_speed,
    implementations_here,
)
from hope_kernels.cli.output import console, fail, print_speed, progress, write_json


def bench(
    shape: Annotated[
        list[str] | None,
        typer.Option(help=f"One of {', '.join(SHAPES)}; repeatable. Default: {', '.join(CPU_SHAPES)}."),
    ] = None,
    backend: Annotated[
        list[str] | None, typer.Option(help="A backend to time; repeatable. Default: all that run here.")
    ] = None,
    dtype: Annotated[str, typer.Option(help=f"Of the tokens: one of {', '.join(DTYPES)}.")] = "float32",
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds; each runs every implementation once.")] = 5,
    warmup: Annotated[int, typer.Option(min=0, help="Rounds before that.")] = 1,
    forward: Annotated[bool, typer.Option("--forward", help="Only the forward pass.")] = False,
    backward: Annotated[bool, typer.Option("--backward", help="Only forward and backward.")] = False,
    compile: Annotated[bool, typer.Option("--compile", help="Also the reference through torch.compile.")] = False,
    memory: Annotated[bool, typer.Option(help="Measure peak memory, in one fresh process per row.")] = True,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; default: torch's.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the inputs.")] = 0,
    json: Annotated[Path | None, typer.Option(help="Also write the report to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw it into this PNG file.")] = None,
) -> None:
    """Time the naive path and every backend side by side; outputs are checked to be equal before a time is reported.

    Exit 1 if a backend's results differ from the reference's.
    """
    modes = [mode for mode, only in zip(MODES, (forward, backward), strict=True) if only or forward == backward]
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}; want one of {', '.join(DTYPES)}")
        shapes = [get_shape(name) for name in shape or CPU_SHAPES]
        implementations = implementations_here(backend, compiled=compile)
    except (ValueError, RuntimeError) as error:
        raise fail(str(error)) from error
    try:
        report = run_speed(
            shapes,
            implementations,
            modes=modes,
            dtype=DTYPES[dtype],
            repeats=repeats,
            warmup=warmup,
            memory_modes=modes if memory else (),
            seed=seed,
        )
    except DisagreementError as error:
        console.print(f"[bold red]wrong results[/]: {error}")
        raise typer.Exit(1) from error
    print_speed(report)
    copy = copy_bandwidth() / 1e9
    console.print(f"[dim]large copies in this run: {copy:.1f} GB/s, read and written together[/]")
    if json is not None:
        write_json(stamp("bench") | {"seed": seed, "copy_gbytes": copy} | report.as_dict(), json)
    if plot is not None:
        from hope_kernels.bench.plots import plot_speed

        plot.parent.mkdir(parents=True, exist_ok=True)
        plot_speed(report, plot)
        console.print(f"[dim]wrote {plot}[/]")


def run_speed(
    shapes: list[Shape], implementations: list[Implementation], *, modes: list[str], **options
) -> SpeedReport:
    """:func:`~hope_kernels.bench.speed.compare_speed` with a progress bar."""
    with progress() as bar:
        task = bar.add_task("measuring", total=len(shapes) * len(modes), detail="")

        def notify(message: str) -> None:
            bar.update(task, detail=message, advance=0 if message else 1)

        return compare_speed(shapes, implementations, modes=modes, notify=notify, **options)
