"""``hope-kernels profile``: where the time of one call goes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table

from hope_kernels.bench.implementations import Implementation, make_call
from hope_kernels.bench.parity import DTYPES
from hope_kernels.bench.problems import shape_problem
from hope_kernels.bench.shapes import MODES, SHAPES, Shape, get_shape
from hope_kernels.bench.speed import implementations_here
from hope_kernels.cli.output import console, fail, new_table


def profile(
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "S64",
    backend: Annotated[str, typer.Option(help="The backend to look into.")] = "cpu",
    dtype: Annotated[str, typer.Option(help=f"Of the tokens: one of {', '.join(DTYPES)}.")] = "float32",
    backward: Annotated[bool, typer.Option("--backward", help="Forward and backward, not only forward.")] = False,
    calls: Annotated[int, typer.Option(min=1, help="Profiled calls, after one that is not.")] = 3,
    top: Annotated[int, typer.Option(min=1, help="Lines of the table.")] = 15,
    trace: Annotated[Path | None, typer.Option(help="Write a Chrome trace (chrome://tracing, Perfetto).")] = None,
) -> None:
    """Run one scan under torch's profiler; table of the operators by the time they take themselves."""
    try:
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}; want one of {', '.join(DTYPES)}")
        chosen = get_shape(shape)
        implementations_here([backend])
    except (ValueError, RuntimeError) as error:
        raise fail(str(error)) from error
    mode = MODES[1] if backward else MODES[0]
    table, profiler = profile_call(chosen, backend, mode, DTYPES[dtype], calls=calls, top=top)
    console.print(table)
    if trace is not None:
        trace.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(trace))
        console.print(f"[dim]wrote {trace}[/]")


def profile_call(
    shape: Shape, backend: str, mode: str, dtype: torch.dtype, *, calls: int, top: int
) -> tuple[Table, torch.profiler.profile]:
    """Profile ``calls`` calls after one that is not; the table of the ``top`` operators and the profiler itself.

    "self" is the time of an operator without that of the operators it calls, per call of the scan; the shares add up
    to the time in which any operator ran. A compiled backend is one operator, ``hope_kernels::...``.
    """
    call = make_call(Implementation(backend), shape_problem(shape, dtype=dtype), mode)
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(calls):
            call()
    events = sorted(profiler.key_averages(), key=lambda event: event.self_cpu_time_total, reverse=True)
    total = sum(event.self_cpu_time_total for event in events) or 1.0
    table = new_table(
        f"{shape.name} ({shape.sizes}), {backend}, {mode}, {str(dtype).removeprefix('torch.')}: "
        f"{total / calls / 1e3:.2f} ms per call"
    )
    table.add_column("operator", overflow="fold")
    for name in ("times", "self ms", "share", "with callees ms"):
        table.add_column(name, justify="right", no_wrap=True)
    for event in events[:top]:
        table.add_row(
            event.key,
            f"{event.count / calls:g}",
            f"{event.self_cpu_time_total / calls / 1e3:.3f}",
            f"{100 * event.self_cpu_time_total / total:.1f} %",
            f"{event.cpu_time_total / calls / 1e3:.3f}",
        )
    rest = sum(event.self_cpu_time_total for event in events[top:])
    if rest:
        table.add_row(f"{len(events) - top} more", "", f"{rest / calls / 1e3:.3f}", f"{100 * rest / total:.1f} %", "")
    return table, profiler
