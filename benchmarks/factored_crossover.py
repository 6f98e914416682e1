"""Both sides of the crossover of docs/factored.md: the dense and the factored plan side by side on the CPU.

``python benchmarks/factored_crossover.py`` times ``memory_scan`` (forward, also with q = k, and forward+backward) over
ever more tokens and ``memory_read`` of one token (decode) from states that have written them, with ``backend="cpu"``
(dense) and ``"cpu:factored"``, and prints the measured ratio beside the one that counts of operations (decode: of
bytes) predict.
Both plans' results, gradients included, are equal to the reference's before anything is timed.

Every size, mode and number of sequences is a slice of the report ``benchmarks/results/factored-crossover.json``, with
its own machine, versions, command and date; ``--size``, ``--mode`` and ``--sequences`` run some and leave the others as
they are. The picture of the same name is drawn from the report again each time.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout that is not installed

from hope_kernels import MemorySpec, memory_read
from hope_kernels.bench.implementations import AGREEMENT, Implementation, Results, difference, make_call, scan
from hope_kernels.bench.machine import stamp
from hope_kernels.bench.problems import Problem, make_problem
from hope_kernels.bench.shapes import MODES, Shape, products_per_token
from hope_kernels.bench.timing import time_side_by_side
from hope_kernels.memory.factors import merge_after

REPORT = Path(__file__).parent / "results" / "factored-crossover.json"
DENSE, FACTORED = "cpu", "cpu:factored"
DECODE, SHARED = "decode", "forward, q = k"
KINDS = (SHARED, *MODES, DECODE)
READS = 20  # reads in a row that count as one sample of decode: one alone is too short to time

SIZES = {
    "256x1024": Shape("256x1024", "weights of a sequence in cache", 4, 256, 1, 256, 1024, 128),
    "768x3072": Shape("768x3072", "the layers of a small pre-trained model", 4, 256, 1, 768, 3072, 128),
    "2048x8192": Shape("2048x8192", "those of a model of a billion parameters", 4, 512, 1, 2048, 8192, 512),
}
# Tokens of a call; two chunks at least, because a backward wants something that reads what was written.
SCANNED = {
    "256x1024": (256, 384, 512, 1024),
    "768x3072": (256, 384, 640, 896),
    "2048x8192": (1024, 1536, 2048),
}
READ_AFTER = {
    "256x1024": (32, 64, 128, 192, 256, 512),
    "768x3072": (32, 128, 256, 512, 768, 1024),
    "2048x8192": (128, 512, 1024, 2048),
}
SEQUENCES = (4, 1)


# ----------------------------------------------------------------------------------------------------------------
# Predictions, for mlp memories


def dense_flops(shape: Shape, mode: str) -> int:
    """Operations of a dense scan over whole chunks by the convention of :func:`products_per_token`.

    The engine reads with the keys' own pass where q = k: 2 products fewer. The backward of an output's loss skips the
    last chunk's write, 13 of the convention's 18 products: nothing reads it.
    """
    backward = mode == "forward+backward"
    each = products_per_token("mlp", mode if backward else "forward") - (2 if mode == SHARED else 0)
    products = each * shape.tokens
    if backward:
        products -= 13 * shape.chunk_size
    return 2 * shape.dim * shape.hidden * products * shape.batch * shape.heads


def factored_flops(shape: Shape, mode: str) -> int:
    """Operations of the matrix products of a factored scan over whole chunks.

    A read passes 2 shared layers, a write 3 (the key's own 2 and the error's way back through W_out); a chunk with S
    pairs before it multiplies each token with S inputs and S errors for each of these. The backward has two products
    for each of the forward's and forms the scores again. Where q = k the key's pass is the read.
    """
    d, h, c = shape.dim, shape.hidden, shape.chunk_size
    chunks, backward = shape.tokens // c, mode == "forward+backward"
    total = 0
    for index in range(chunks):
        pairs, last = index * c, index == chunks - 1
        read, write = (2 * d * h, 2 * (d + h) * pairs), (3 * d * h, 3 * (d + h) * pairs)
        total += sum(write) + (0 if mode == SHARED else sum(read))
        if backward:
            total += 2 * sum(read) + (d + h) * pairs
            if not last:
                total += 2 * sum(write) + (2 * d + h) * pairs
    return 2 * total * c * shape.batch * shape.heads


def dense_bytes(shape: Shape) -> int:
    """Bytes of float32 that reading one token of every sequence loads: the weights of each."""
    return 4 * shape.batch * shape.heads * 2 * shape.dim * shape.hidden


def factored_bytes(shape: Shape) -> int:
    """The same of factored states with ``shape.tokens`` pairs: the shared weights once, the pairs of each sequence."""
    d, h = shape.dim, shape.hidden
    return 4 * shape.heads * (2 * d * h + shape.batch * shape.tokens * 2 * (d + h))


def predicted_ratio(shape: Shape, mode: str) -> float:
    """How many times faster than the dense plan the factored one is where only operations (decode: bytes) count."""
    if mode == DECODE:
        return dense_bytes(shape) / factored_bytes(shape)
    return dense_flops(shape, mode) / factored_flops(shape, mode)


# ----------------------------------------------------------------------------------------------------------------
# Measurement


@dataclass(frozen=True)
class Row:
    """One comparison: median milliseconds of a call (decode: of one read) and what they were measured with.

    ``spread``: the larger of both plans' interquartile range over the median; ``difference``: the larger relative
    difference to the reference's results; ``crossover``: ``D H / (D + H)`` tokens.
    """

    size: str
    mode: str
    sequences: int
    tokens: int
    chunk_size: int
    crossover: int
    dense_ms: float
    factored_ms: float
    measured: float
    predicted: float
    spread: float
    repeats: int
    difference: float


def measure(shape: Shape, mode: str, repeats: int) -> Row:
    """Both plans side by side, after both agree with the reference.

    Raises:
        RuntimeError: a plan's results are not the reference's.
    """
    calls = _read_calls(shape) if mode == DECODE else _scan_calls(shape, mode)
    expected = calls.pop("reference")()
    apart = {name: difference(call(), expected) for name, call in calls.items()}
    for name, distance in apart.items():
        if not distance <= AGREEMENT[torch.float32]:
            raise RuntimeError(f"{name} differs from the reference by {distance:.1e} at {shape.sizes}, {mode}")
    inner = READS if mode == DECODE else 1

    def repeated(call: Callable[[], Results]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(inner):
                call()

        return run

    timings = time_side_by_side({name: repeated(call) for name, call in calls.items()}, repeats=repeats)
    dense, factored = timings[DENSE], timings[FACTORED]
    return Row(
        size=shape.name,
        mode=mode,
        sequences=shape.batch,
        tokens=shape.tokens,
        chunk_size=shape.chunk_size,
        crossover=merge_after(shape.spec, shape.dim, shape.hidden),
        dense_ms=1e3 * dense.median / inner,
        factored_ms=1e3 * factored.median / inner,
        measured=dense.median / factored.median,
        predicted=predicted_ratio(shape, mode),
        spread=max(dense.spread, factored.spread),
        repeats=repeats,
        difference=max(apart.values()),
    )


def problem_of(shape: Shape) -> Problem:
    """Random inputs of a call; retention as a memory of a long stream has it."""
    sizes = {name: getattr(shape, name) for name in ("batch", "tokens", "heads", "dim", "hidden", "chunk_size")}
    return make_problem(MemorySpec(form="mlp"), **sizes, retention=True)


def _scan_calls(shape: Shape, mode: str) -> dict[str, Callable[[], Results]]:
    problem = problem_of(shape)
    if mode == SHARED:
        problem, mode = replace(problem, q=problem.k), "forward"
    return {name: make_call(Implementation(name), problem, mode) for name in ("reference", DENSE, FACTORED)}


def _read_calls(shape: Shape) -> dict[str, Callable[[], Results]]:
    """One token's read from a state that each plan has written itself."""
    problem = problem_of(shape)
    token = problem.q[:, :1].contiguous()

    def reads(backend: str) -> Callable[[], Results]:
        with torch.no_grad():
            state = scan(problem, backend)[1]

        def call() -> Results:
            with torch.no_grad():
                return {"output": memory_read(token, state, spec=problem.spec, backend=backend)}

        return call

    return {name: reads(name) for name in ("reference", DENSE, FACTORED)}


def slices(
    sizes: Sequence[str], modes: Sequence[str], batches: Sequence[int]
) -> Iterator[tuple[str, str, list[Shape]]]:
    """What is measured together: its name, a mode, and shapes from few tokens to many."""
    for size in sizes:
        for mode in modes:
            base, lengths = SIZES[size], SCANNED[size]
            if mode == DECODE:  # how a state was written is nothing to its reads
                base, lengths = replace(base, chunk_size=32), READ_AFTER[size]
            elif mode == "forward+backward":
                lengths = lengths[:-1]  # minutes
            for b in batches:
                yield f"{size} {mode} B={b}", mode, [replace(base, batch=b, tokens=t) for t in lengths]


# ----------------------------------------------------------------------------------------------------------------
# Report


def show(rows: list[Row]) -> None:
    """The rows as a table."""
    from rich.console import Console
    from rich.table import Table

    headings = ("size", "mode", "B", "tokens", "of S*", "dense ms", "factored ms", "measured", "predicted")
    table = Table(*headings, title=f"dense against factored, {torch.get_num_threads()} threads, S* = D H / (D + H)")
    for row in rows:
        times = (f"{row.dense_ms:.3g}", f"{row.factored_ms:.3g}", f"{row.measured:.2f}x", f"{row.predicted:.2f}x")
        share = f"{row.tokens / row.crossover:.2f}"
        table.add_row(row.size, row.mode, str(row.sequences), str(row.tokens), share, *times)
    Console().print(table)


def plot(rows: list[Row], path: Path) -> None:
    """Measured ratio (dots) and predicted (lines) over written tokens: a row of panels per size, a panel per mode."""
    from hope_kernels.bench.plots import INK, figure

    sizes, modes = (list(dict.fromkeys(getattr(row, name) for row in rows)) for name in ("size", "mode"))
    colours = dict(zip(SEQUENCES, ("#1f77b4", "#e07b39"), strict=True))
    with figure(path, rows=len(sizes), columns=len(modes), size=(3.8 * len(modes), 3.2 * len(sizes))) as axes:
        panels = iter(axes)
        for size in sizes:
            for mode in modes:
                panel = next(panels)
                here = [row for row in rows if (row.size, row.mode) == (size, mode)]
                for sequences, colour in colours.items():
                    line = [row for row in here if row.sequences == sequences]
                    share = [row.tokens / row.crossover for row in line]
                    label = f"B = {sequences}"
                    panel.plot(share, [row.measured for row in line], "o-", color=colour, markersize=4, label=label)
                    panel.plot(share, [row.predicted for row in line], "--", color=colour, label=f"{label}, predicted")
                panel.axhline(1, color=INK, linewidth=1)
                panel.set_title(f"{size}, {mode}")
                panel.set_xlabel("tokens written / (D H / (D + H))")
                panel.set_ylabel("times faster than dense")
        axes[0].legend(fontsize=7)


def main(
    size: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(SIZES)}; all by default.")] = None,
    mode: Annotated[list[str] | None, typer.Option(help=f"Of {'; '.join(KINDS)}; all by default.")] = None,
    sequences: Annotated[list[int] | None, typer.Option(help="Of 4, 1; both by default.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds.")] = 5,
    report: Annotated[Path, typer.Option(help="JSON to update; the picture lies beside it.")] = REPORT,
) -> None:
    """Time the dense and the factored plan of a memory on both sides of their crossover."""
    options = (("--size", size, SIZES), ("--mode", mode, KINDS), ("--sequences", sequences, SEQUENCES))
    for name, given, known in options:
        for value in given or ():
            if value not in known:
                raise typer.BadParameter(f"got {value}; want one of {'; '.join(map(str, known))}", param_hint=name)
    held = json.loads(report.read_text())["slices"] if report.exists() else {}
    for name, what, shapes in slices(size or list(SIZES), mode or KINDS, sequences or SEQUENCES):
        rows = [measure(shape, what, repeats) for shape in shapes]
        show(rows)
        held[name] = stamp("factored crossover") | {"rows": [asdict(row) for row in rows]}
    held = {name: held[name] for name, *_ in slices(list(SIZES), KINDS, SEQUENCES) if name in held}
    report.write_text(json.dumps({"kind": "factored crossover", "slices": held}, indent=1) + "\n")
    plot([Row(**row) for part in held.values() for row in part["rows"]], report.with_suffix(".png"))


if __name__ == "__main__":
    typer.run(main)
