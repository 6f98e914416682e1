"""Microseconds that one-token calls take beside their arithmetic, on the CPU: ``hope_kernels/bench/call_overhead.py``.

``python benchmarks/call_overhead.py`` prints them and writes ``benchmarks/results/call-overhead.json``, with machine,
versions, command and date. Only a quiet machine gives numbers worth keeping: ``spread``, the interquartile range over
the median, tells how quiet it was.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout that is not installed

from hope_kernels.bench.call_overhead import (
    OverheadRow,
    PendingRow,
    ReadRow,
    measure,
    measure_pending,
    measure_reads,
)
from hope_kernels.bench.decode import DECODE, DecodeRow, measure_decode
from hope_kernels.bench.machine import stamp

REPORT = Path(__file__).parent / "results" / "call-overhead.json"


def measure_stacks() -> dict[str, list[DecodeRow]]:
    """One token through four levels of 16 memories, in one call of the core and eagerly, by dtype.

    Raises:
        RuntimeError: the two do not agree.
    """
    return {
        str(dtype).removeprefix("torch."): [
            row
            for batch in (1, 8)
            for row in measure_decode(DECODE, batch, ["reference", "cpu"], dtype=dtype, device="cpu", problems=[])
        ]
        for dtype in (torch.float32, torch.bfloat16)
    }


def show(
    rows: list[OverheadRow], reads: list[ReadRow], pending: list[PendingRow], stacks: dict[str, list[DecodeRow]]
) -> None:
    """The rows as tables."""
    from rich.console import Console
    from rich.table import Table

    table = Table("call", "median us", "least us", "spread", title=f"one token, {torch.get_num_threads()} threads")
    for row in rows:
        table.add_row(row.call, f"{row.median_us:.1f}", f"{row.minimum_us:.1f}", f"{row.spread:.0%}")
    large = Table("memory_read", "MB of weights", "median us", "GB/s", "GB/s of their sum", title="large memories")
    for row in reads:
        numbers = (row.weight_bytes / 1e6, row.median_us, row.gbytes, row.summed)
        large.add_row(row.sizes, *(f"{number:.1f}" for number in numbers))
    long = Table("memory_scan", "pending", "median us", "memory_read us", title="behind many tokens of a long chunk")
    for row in pending:
        long.add_row(row.sizes, f"{row.pending} and more", f"{row.median_us:.0f}", f"{row.read_us:.0f}")
    decode = Table("CMS.step", "batch", "median us", "worst us", "GB/s", title="C = 1, 16, 64, None; N16 D64 H256")
    for dtype, found in stacks.items():
        for row in found:
            numbers = (row.us_median, row.us_worst, row.bytes_per_token / row.us_median / 1e3)
            decode.add_row(f"{row.backend}, {dtype}", str(row.batch), *(f"{number:.1f}" for number in numbers))
    Console().print(table, large, long, decode)


def main(
    samples: Annotated[int, typer.Option(min=1, help="Samples of 64 calls each, after the warm-up.")] = 100,
    report: Annotated[Path, typer.Option(help="JSON to write.")] = REPORT,
) -> None:
    """Time one-token calls of memories so small that their arithmetic is nothing, and reads of large ones."""
    rows, reads, pending, stacks = measure(samples), measure_reads(), measure_pending(), measure_stacks()
    show(rows, reads, pending, stacks)
    found = {
        "rows": [asdict(row) for row in rows],
        "reads": [asdict(row) for row in reads],
        "pending": [asdict(row) for row in pending],
        "stacks": {dtype: [asdict(row) for row in found] for dtype, found in stacks.items()},
    }
    report.write_text(json.dumps(stamp("call overhead") | found, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
