"""What the commands print: the console, JSON files and tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from hope_kernels.bench.parity import ParityReport, ParityRow
from hope_kernels.bench.speed import SpeedReport, SpeedRow

console = Console()


def fail(message: str) -> typer.Exit:
    """Print what is wrong with the request; raise the result."""
    console.print(Text.assemble(("error: ", "bold red"), message))
    return typer.Exit(2)


def write_json(report: object, path: Path | None) -> None:
    """Write a report to a file, or to standard output when there is none."""
    text = json.dumps(report, indent=2)
    if path is None:
        print(text)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")
    console.print(f"[dim]wrote {path}[/]")


def progress() -> Progress:
    """The progress bar of the longer commands; it leaves no line behind."""
    return Progress(
        SpinnerColumn(),
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("[dim]{task.fields[detail]}"),
        console=console,
        transient=True,
    )


def new_table(title: str) -> Table:
    """An empty table in the house style, narrow enough for 80 columns."""
    return Table(title=title, title_justify="left", title_style="italic", box=SIMPLE_HEAD, padding=(0, 1))


def parity_tables(report: ParityReport) -> list[Table]:
    """One table per backend: a row per case, a column per dtype, in it the error that uses most of its budget."""
    return [_parity_table(report, backend) for backend in dict.fromkeys(row.backend for row in report.rows)]


def _parity_table(report: ParityReport, backend: str) -> Table:
    rows = {(row.case, row.dtype): row for row in report.rows if row.backend == backend}
    dtypes = list(dict.fromkeys(dtype for _, dtype in rows))
    table = new_table(f"Parity of [bold]{backend}[/] with the token-by-token float64 oracle")
    table.add_column("case", overflow="fold")
    for dtype in dtypes:
        table.add_column(dtype, justify="right", no_wrap=True)
    for case in dict.fromkeys(case for case, _ in rows):
        cells = [_parity_cell(rows[case, dtype]) if (case, dtype) in rows else Text("-") for dtype in dtypes]
        table.add_row(case, *cells)
    return table


def _parity_cell(row: ParityRow) -> Text:
    mark = ("✓", "green") if row.passed else ("✗", "bold red")
    return Text.assemble(f"{row.worst_error:.1e} ", mark)


def print_parity(report: ParityReport, *, tables: bool = True) -> None:
    """The tables, every failure in full, and one closing line."""
    for table in parity_tables(report) if tables else ():
        console.print(table)
    for row in report.rows:
        for name in row.failures:
            console.print(
                f"[bold red]FAIL[/] {row.backend} {row.dtype}, {row.case}: error of [bold]{name}[/] is "
                f"{row.errors[name]:.2e}; the budget is {row.budgets[name]:.2e}"
            )
    for backend, reasons in report.refused.items():
        for reason in dict.fromkeys(reasons.values()):
            count = sum(1 for value in reasons.values() if value == reason)
            console.print(f"[yellow]{backend} does not run {count} of the cases:[/] {reason}")
    results = sum(len(row.errors) for row in report.rows)
    failed = sum(not row.passed for row in report.rows)
    if report.passed:
        console.print(
            f"[bold green]parity holds[/]: {len(report.rows)} runs, {results} outputs, states and gradients, "
            "all within budget"
        )
    else:
        console.print(f"[bold red]parity is broken[/]: {failed} of {len(report.rows)} runs over budget")


def speed_table(report: SpeedReport) -> Table:
    """A row per shape, mode and implementation."""
    table = new_table("Naive path and backends, side by side")
    table.add_column("shape", no_wrap=True)
    table.add_column("mode", no_wrap=True)
    table.add_column("backend", overflow="fold", min_width=9)
    with_memory = any(row.peak_bytes is not None for row in report.rows)
    for name in ("ms", "ratio", "GFLOP/s", "peak", "error", *(["MiB"] if with_memory else [])):
        table.add_column(name, justify="right", no_wrap=True)
    previous: SpeedRow | None = None
    for row in report.rows:
        first_of_shape = previous is None or previous.shape != row.shape
        first_of_mode = first_of_shape or previous.mode != row.mode  # type: ignore[union-attr]
        if first_of_shape and previous is not None:
            table.add_section()
        fast = row.ratio > 1.05 and row.implementation != "reference"
        table.add_row(
            row.shape if first_of_shape else "",
            row.mode.replace("forward+backward", "fwd+bwd") if first_of_mode else "",
            row.implementation,
            f"{row.ms:.4g}",
            Text(f"{row.ratio:.2f}x", "green" if fast else ""),
            f"{row.gflops:.1f}",
            "-" if row.peak_fraction is None else f"{100 * row.peak_fraction:.0f} %",
            f"{row.difference:.0e}" if row.difference else "0",
            *(["-" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.1f}"] if with_memory else []),
        )
        previous = row
    return table


def print_speed(report: SpeedReport) -> None:
    """The table, and what its columns mean."""
    console.print(speed_table(report))
    peak = (
        "no multiply-add peak: not on this device or dtype, or the core is not built (hope-kernels doctor)"
        if report.peak_gflops is None
        else f"peak: fraction of {report.peak_gflops:.0f} GFLOP/s, the float32 multiply-add peak measured in this run"
    )
    console.print(
        f"[dim]ms: median of {report.rows[0].repeats if report.rows else 0} alternating rounds; GFLOP/s: by the"
        f" convention, not what is executed; {peak}; error: relative difference to the reference, checked before"
        " timing; MiB: by which one call raises the peak memory of a fresh process beyond its inputs[/]"
    )


def pairs_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A small table whose first column is text and whose others are numbers."""
    table = new_table(title)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table
