"""What a call takes beside its arithmetic: one token through memories so small that there is nothing to compute.

One sequence, one head, 16 features and 16 hidden units: 512 multiply-adds a read, which take the core a fraction of a
microsecond. The rest is Python: checks, the choice of an engine, describing the call to it, the new state.

Beside that, reads of one token from memories so large that their weights come from main memory: how near they are to
the time it takes to look at those weights once; and tokens that are kept behind many others of a long chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from hope_kernels import CMS, CMSLevel, MemorySpec, MemoryState, memory_read, memory_scan, memory_write
from hope_kernels.backends.core_problem import CoreProblem
from hope_kernels.backends.interface import ScanProblem
from hope_kernels.bench.implementations import AGREEMENT, difference
from hope_kernels.bench.machine import compiled_core
from hope_kernels.bench.problems import make_problem
from hope_kernels.bench.timing import time_side_by_side

SPEC = MemorySpec()
DIM = HIDDEN = 16
CHUNK = 64
STACK = (1, 16, 64, None)
CALLS_IN_A_ROW = 64  # as one sample: a call alone is too short for the clock, and a stream completes each of its chunks

# Sequences, heads, D, H of memories whose weights exceed most caches.
LARGE_READS = ((1, 1, 768, 3072), (8, 1, 768, 3072), (1, 1, 2048, 8192), (256, 4, 64, 256))

# Sequences, heads, D, H, C of streams that go on a token at a time from half a chunk.
LONG_CHUNKS = ((1, 16, 64, 256, 512), (8, 16, 64, 256, 512), (8, 1, 768, 3072, 512))

# What is timed: each returns its output, or the weights it wrote.
Call = Callable[[], Tensor]


@dataclass(frozen=True)
class OverheadRow:
    """One call: median and least microseconds over samples of ``CALLS_IN_A_ROW`` calls."""

    call: str
    median_us: float
    minimum_us: float
    spread: float
    samples: int


def calls(backend: str | None = None) -> dict[str, Call]:
    """The calls by name, to be made without gradients, each with its own memories; streams go on from call to call."""
    found: dict[str, Call] = {}
    problem = make_problem(SPEC, batch=1, tokens=1, heads=1, dim=DIM, hidden=HIDDEN, chunk_size=CHUNK, retention=True)
    q, k, v, lr = problem.q, problem.k, problem.v, problem.lr
    state = MemoryState.initial(problem.weights, spec=SPEC, chunk_size=CHUNK, batch_size=1)
    found["memory_read"] = lambda: memory_read(q, state, spec=SPEC, backend=backend)

    def scan(chunk_size: int, retention: Tensor | None) -> Call:
        carried = MemoryState.initial(problem.weights, spec=SPEC, chunk_size=chunk_size, batch_size=1)

        def call() -> Tensor:
            nonlocal carried
            output, carried = memory_scan(
                q, k, v, lr, carried, spec=SPEC, chunk_size=chunk_size, retention=retention, backend=backend
            )
            return output

        return call

    found[f"memory_scan, C = {CHUNK}"] = scan(CHUNK, None)
    found[f"memory_scan, C = {CHUNK}, retention"] = scan(CHUNK, problem.retention)
    found["memory_scan, C = 1"] = scan(1, None)
    found["memory_write"] = lambda: memory_write(k, v, lr, state, spec=SPEC, backend=backend).weights[0]
    for name, sizes in (
        (f"one level, C = {CHUNK}", (CHUNK,)),
        ("four levels, C = " + ", ".join(map(str, STACK)), STACK),
    ):
        found[f"CMS.step, {name}"], found[f"CMS.stream, {name}"] = _layer_calls(sizes, backend)
    return found


def _layer_calls(sizes: Iterable[int | None], backend: str | None) -> tuple[Call, Call]:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        cms = CMS(DIM, [CMSLevel(chunk_size=size, expansion=1) for size in sizes], heads=1, backend=backend)
        x = torch.randn(1, 1, DIM)
    buffer, state = cms.make_buffer(1), cms.init_state(1).detach()

    def stream() -> Tensor:
        nonlocal state
        output, state = cms.stream(x, state)
        return output

    return lambda: cms.step(x, buffer), stream


def core_alone() -> Callable[[], None]:
    """What of ``memory_read`` is not Python: the compiled core on a call that was described to it before.

    Raises:
        RuntimeError: there is no compiled core.
    """
    core = compiled_core()
    if core is None:
        raise RuntimeError("the compiled core hope_kernels._core is missing; hope-kernels doctor says why")
    problem = make_problem(SPEC, batch=1, tokens=1, heads=1, dim=DIM, hidden=HIDDEN, chunk_size=CHUNK)
    described = CoreProblem(
        ScanProblem(problem.q, *[None] * 10, problem.weights, (), None, SPEC, 1, 0, 0, 0)  # a read
    )
    results, arguments = described.forward_results([])

    def run(kept: object = results) -> None:
        core.scan_forward(*described.arguments, arguments, 1)

    return run


@torch.inference_mode()
def check_agreement() -> None:
    """That the calls of the compiled engine give what the reference does, over a whole chunk of each.

    Raises:
        RuntimeError: one does not; the message names it.
    """
    found, expected = calls("cpu"), calls("reference")
    for name, call in found.items():
        for _ in range(CHUNK + 1):
            apart = difference({"output": call()}, {"output": expected[name]()})
            if not apart <= AGREEMENT[torch.float32]:
                raise RuntimeError(f"{name} differs from the reference by {apart:.1e}")


@torch.inference_mode()
def measure(samples: int = 100) -> list[OverheadRow]:
    """All calls on the CPU, sample by sample one after the other, and the core alone.

    Raises:
        RuntimeError: there is no compiled core, or a call does not give what the reference does.
    """
    core = core_alone()
    check_agreement()

    def repeated(call: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(CALLS_IN_A_ROW):
                call()

        return run

    timed = {"the core alone, memory_read": core, **calls("cpu")}
    timings = time_side_by_side({name: repeated(call) for name, call in timed.items()}, repeats=samples, warmup=3)
    return [
        OverheadRow(
            name,
            1e6 * timing.median / CALLS_IN_A_ROW,
            1e6 * timing.minimum / CALLS_IN_A_ROW,
            timing.spread,
            samples,
        )
        for name, timing in timings.items()
    ]


@dataclass(frozen=True)
class ReadRow:
    """``memory_read`` of one token for each of ``batch`` sequences, every one with weights of its own (``sizes``).

    ``gbytes`` are GB/s of weights; ``summed`` the same of PyTorch's sum over those very weights, in the same rounds.
    """

    sizes: str
    weight_bytes: int
    median_us: float
    spread: float
    gbytes: float
    summed: float
    samples: int


@torch.inference_mode()
def measure_reads(samples: int = 25, shapes: Iterable[tuple[int, int, int, int]] = LARGE_READS) -> list[ReadRow]:
    """One-token reads of large memories on all of torch's threads, each beside a sum over its weights.

    Raises:
        RuntimeError: a read does not give what the reference does.
    """
    rows = []
    for batch, heads, dim, hidden in shapes:
        problem = make_problem(SPEC, batch=batch, tokens=1, heads=heads, dim=dim, hidden=hidden, chunk_size=1)
        state = MemoryState.initial(problem.weights, spec=SPEC, chunk_size=1, batch_size=batch)
        _, state = memory_scan(  # a write: from now on each sequence has weights of its own
            problem.q, problem.k, problem.v, problem.lr, state, spec=SPEC, chunk_size=1, backend="cpu"
        )

        def read(backend: str = "cpu", q: Tensor = problem.q, state: MemoryState = state) -> Tensor:
            return memory_read(q, state, spec=SPEC, backend=backend)

        sizes = f"B{batch} N{heads} D{dim} H{hidden}"
        apart = difference({"output": read()}, {"output": read("reference")})
        if not apart <= AGREEMENT[torch.float32]:
            raise RuntimeError(f"memory_read at {sizes} differs from the reference by {apart:.1e}")

        def look(weights: tuple[Tensor, ...] = state.weights) -> None:
            for weight in weights:
                weight.sum()

        timings = time_side_by_side({"read": read, "sum": look}, repeats=samples, warmup=3)
        size = sum(weight.numel() * weight.element_size() for weight in state.weights)
        rows.append(
            ReadRow(
                sizes=sizes,
                weight_bytes=size,
                median_us=1e6 * timings["read"].median,
                spread=timings["read"].spread,
                gbytes=size / timings["read"].median / 1e9,
                summed=size / timings["sum"].median / 1e9,
                samples=samples,
            )
        )
    return rows


@dataclass(frozen=True)
class PendingRow:
    """``memory_scan`` of one token for each of ``batch`` sequences behind ``pending`` tokens of its chunk and more
    (``sizes``), which is kept too; ``read_us`` is ``memory_read`` of the same token in the same rounds."""

    sizes: str
    pending: int
    median_us: float
    spread: float
    read_us: float
    samples: int


@torch.inference_mode()
def measure_pending(
    samples: int = 50, shapes: Iterable[tuple[int, int, int, int, int]] = LONG_CHUNKS
) -> list[PendingRow]:
    """One-token calls in the middle of a long chunk, each beside the read alone.

    Raises:
        RuntimeError: the tokens kept are not those that came.
        ValueError: there are more ``samples`` than half of a chunk has tokens.
    """
    return [_pending_row(samples, *shape) for shape in shapes]


def _pending_row(samples: int, batch: int, heads: int, dim: int, hidden: int, chunk_size: int) -> PendingRow:
    sizes, half, warmup = f"B{batch} N{heads} D{dim} H{hidden} C{chunk_size}", chunk_size // 2, 3
    if samples + warmup >= half:
        raise ValueError(f"samples: got {samples}; want fewer than {half - warmup} at {sizes}")
    problem = make_problem(
        SPEC, batch=batch, tokens=chunk_size, heads=heads, dim=dim, hidden=hidden, chunk_size=chunk_size
    )
    state, done = MemoryState.initial(problem.weights, spec=SPEC, chunk_size=chunk_size, batch_size=batch), 0

    def scan(count: int = 1) -> Tensor:
        nonlocal state, done
        q, k, v, lr = (x[:, done : done + count] for x in (problem.q, problem.k, problem.v, problem.lr))
        output, state = memory_scan(q, k, v, lr, state, spec=SPEC, chunk_size=chunk_size, backend="cpu")
        done += count
        return output

    def read() -> Tensor:
        return memory_read(problem.q[:, :1], state, spec=SPEC, backend="cpu")

    scan(half)
    timings = time_side_by_side({"scan": scan, "read": read}, repeats=samples, warmup=warmup)
    kept = ((state.pending_k, problem.k), (state.pending_v, problem.v), (state.pending_lr, problem.lr))
    if not all(torch.equal(a, b[:, :done]) for a, b in kept):
        raise RuntimeError(f"memory_scan at {sizes} did not keep the tokens that came")
    return PendingRow(
        sizes=sizes,
        pending=half,
        median_us=1e6 * timings["scan"].median,
        spread=timings["scan"].spread,
        read_us=1e6 * timings["read"].median,
        samples=samples,
    )
