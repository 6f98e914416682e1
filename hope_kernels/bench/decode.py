"""Serving measured: one token at a time through a sequential Continuum Memory System, on a GPU or (to try it) a CPU.

The state moves on with every token, and which levels are due changes from token to token, so a whole period of the
slowest level's chunk is measured: the median token and the worst one, at which every level is written.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hope_kernels.bench.gpu import capture
from hope_kernels.bench.implementations import AGREEMENT, difference
from hope_kernels.bench.timing import Timer

if TYPE_CHECKING:
    from hope_kernels import CMS


@dataclass(frozen=True)
class DecodeShape:
    """Heads, features and hidden units of a memory; tokens per write of each level, None for one never written."""

    heads: int = 16
    dim: int = 64
    hidden: int = 256
    chunk_sizes: tuple[int | None, ...] = (1, 16, 64, None)

    @property
    def period(self) -> int:
        """Tokens after which the same levels are due again."""
        return max(size for size in self.chunk_sizes if size is not None)

    def bytes_per_token(self, batch: int, plain_bytes: int = 2) -> float:
        """Bytes that one token of every sequence has to move, averaged over a period.

        A written level is read as float32 once per token; its write reads and writes it once more every C tokens, but
        at C = 1 the read is the write's own. A level that is never written is one network over the full width, of
        ``plain_bytes`` a number, read once for all sequences.
        """
        memory = 2 * self.dim * self.hidden * 4  # both weights
        total = 0.0
        for size in self.chunk_sizes:
            if size is None:
                total += 2 * self.heads * self.dim * self.heads * self.hidden * plain_bytes
            else:
                total += batch * self.heads * memory * (2 if size == 1 else 1 + 2 / size)
        return total


DECODE = DecodeShape()


@dataclass(frozen=True)
class DecodeRow:
    """One way to serve, at one batch size.

    Attributes:
        batch, backend, graph: what ran; ``graph`` says whether each token was a replayed CUDA graph.
        us_median, us_worst: microseconds of the median and of the worst token of a period, each token the median of
            ``rounds``.
        bytes_per_token: as :meth:`DecodeShape.bytes_per_token` counts.
        launches: kernels of a token on average as the profiler counts them; None where it counts none.
        difference: relative difference of a period's outputs to the reference's.
    """

    batch: int
    backend: str
    graph: bool
    us_median: float
    us_worst: float
    rounds: int
    bytes_per_token: float
    launches: int | None
    difference: float


def _system(shape: DecodeShape, backend: str, dtype: torch.dtype, device: torch.device | str) -> CMS:
    from hope_kernels import CMS, CMSLevel

    levels = [CMSLevel(size, expansion=shape.hidden // shape.dim) for size in shape.chunk_sizes]
    return CMS(shape.heads * shape.dim, levels, heads=shape.heads, backend=backend).to(device=device, dtype=dtype)


def refusal(shape: DecodeShape, backend: str, dtype: torch.dtype, device: torch.device | str) -> str | None:
    """Why a backend does not step through the system, or None."""
    try:
        _system(shape, backend, dtype, device).make_buffer(1)
    except RuntimeError as error:
        return str(error)
    return None


class Decoder:
    """A CMS with its buffer and the tokens of one period, served by one backend.

    Raises:
        RuntimeError: the outputs of the first period are not finite, or not those of ``expected``.
    """

    def __init__(
        self,
        shape: DecodeShape,
        batch: int,
        backend: str,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        expected: Tensor | None = None,
    ) -> None:
        torch.manual_seed(0)  # the same parameters and tokens whatever the backend
        self.cms = _system(shape, backend, dtype, device)
        self.tokens = torch.randn(shape.period, batch, self.cms.dim).to(device=device, dtype=dtype)
        self.buffer = self.cms.make_buffer(batch)
        self.outputs = torch.stack([self.step(t) for t in range(shape.period)])
        want = self.outputs if expected is None else expected
        self.difference = difference({"output": self.outputs}, {"output": want})
        if not self.difference <= AGREEMENT[dtype]:
            raise RuntimeError(
                f"{backend} at batch {batch}: relative difference to the reference is {self.difference:.2e}; "
                f"want at most {AGREEMENT[dtype]:.0e}. It was not timed."
            )

    def step(self, t: int) -> Tensor:
        return self.cms.step(self.tokens[t], self.buffer)

    def graphs(self) -> list[torch.cuda.CUDAGraph]:
        """A graph per token of a period: the position is the host's, so each token has its own launches."""
        pool = torch.cuda.graph_pool_handle()
        # No warm-up: it would move the buffer on, and a whole period has run already.
        return [capture(lambda t=t: self.step(t), warmup=0, pool=pool)[1] for t in range(len(self.tokens))]


def measure_decode(
    shape: DecodeShape,
    batch: int,
    backends: list[str],
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    rounds: int = 7,
    problems: list[str],
) -> list[DecodeRow]:
    """Rows of each backend, launched by the host and (on a GPU) as replayed graphs, alternating period by period.

    The first backend gives the results that the others must agree with. What could not be measured, and why, is
    appended to ``problems``.
    """
    on_gpu = torch.device(device).type == "cuda"
    expected = None
    runs: dict[tuple[str, bool], list[Callable[[], object]]] = {}
    agreement: dict[str, float] = {}
    for backend in backends:
        decoder = Decoder(shape, batch, backend, dtype=dtype, device=device, expected=expected)
        expected = decoder.outputs if expected is None else expected
        agreement[backend] = decoder.difference
        runs[backend, False] = [lambda t=t, decoder=decoder: decoder.step(t) for t in range(shape.period)]
    # The first backend last: a capture that fails may leave the allocator in a state that no later one survives.
    for backend in reversed(backends if on_gpu else []):
        try:
            # Another decoder: a graph keeps using the buffer it was captured with.
            decoder = Decoder(shape, batch, backend, dtype=dtype, device=device, expected=expected)
            replays = [graph.replay for graph in decoder.graphs()]
            _check_replay(decoder, replays, dtype)
            runs[backend, True] = replays
        except RuntimeError as error:
            problems.append(f"batch {batch}, {backend} as a graph: {str(error).splitlines()[0]}")
    timer = Timer(device)
    samples: dict[tuple[str, bool], list[list[float]]] = {key: [[] for _ in calls] for key, calls in runs.items()}
    for round_index in range(rounds + 1):  # the first warms up
        for key, calls in runs.items():
            for t, call in enumerate(calls):
                seconds = timer(call)
                if round_index:
                    samples[key][t].append(seconds)
    rows = []
    for (backend, graph), tokens in samples.items():
        times = [statistics.median(times) * 1e6 for times in tokens]
        rows.append(
            DecodeRow(
                batch=batch,
                backend=backend,
                graph=graph,
                us_median=statistics.median(times),
                us_worst=max(times),
                rounds=rounds,
                bytes_per_token=shape.bytes_per_token(batch, plain_bytes=torch.finfo(dtype).bits // 8),
                launches=None,
                difference=agreement[backend],
            )
        )
    if on_gpu:
        try:
            rows = [replace(row, launches=count_launches(runs[row.backend, row.graph])) for row in rows]
        except RuntimeError as error:  # no profiler here: the times are still worth having
            problems.append(f"launches: {str(error).splitlines()[0]}")
    return rows


def _check_replay(decoder: Decoder, replays: list[Callable[[], object]], dtype: torch.dtype) -> None:
    """That a period of replayed graphs leaves the state that the same tokens leave when launched one by one."""
    twin_state = decoder.buffer.to_state()
    # A capture runs nothing, so the buffer is where the first period left it; only the host's position moved on.
    twin = decoder.cms.make_buffer(twin_state)
    for t in range(len(decoder.tokens)):
        decoder.cms.step(decoder.tokens[t], twin)
    for replay in replays:
        replay()
    torch.cuda.synchronize()
    named = [
        {f"level {i} weight {j}": w for i, level in enumerate(b.levels) if level for j, w in enumerate(level.weights)}
        for b in (decoder.buffer, twin)
    ]
    found = difference(*named)
    if not found <= AGREEMENT[dtype]:
        raise RuntimeError(f"replayed, the state after a period differs by {found:.2e}; it was not timed")


def count_launches(calls: list[Callable[[], object]]) -> int | None:
    """Kernels of a call on average, copies and clears included, as the profiler counts them; None if it sees none."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for call in calls:
            call()
        torch.cuda.synchronize()
    count = sum(1 for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA)
    return round(count / len(calls)) or None
