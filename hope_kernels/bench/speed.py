"""The comparison: the naive path against every backend that runs here, over the named shapes.

For every shape and mode the outputs (and gradients) of all implementations are checked to be finite and equal to the
reference's before anything is timed; then all are timed side by side. FLOPs are the convention's
(:func:`~hope_kernels.bench.shapes.products_per_token`), so GFLOP/s compare useful work; what an implementation executes
beyond that is given apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from hope_kernels.backends import FACTORED
from hope_kernels.bench.gpu import gemm_peak, peak_memory
from hope_kernels.bench.implementations import (
    AGREEMENT,
    REFERENCE,
    Implementation,
    difference,
    make_call,
)
from hope_kernels.bench.machine import fma_peak
from hope_kernels.bench.peak_memory import measure_peak_memory
from hope_kernels.bench.problems import Problem, shape_problem
from hope_kernels.bench.shapes import MODES, SHAPES, Shape, rebuilt_products_per_token
from hope_kernels.bench.timing import time_side_by_side

Notify = Callable[[str], None]


class DisagreementError(RuntimeError):
    """An implementation that was to be timed does not compute what the reference computes."""


@dataclass
class SpeedRow:
    """One line of the comparison.

    Attributes:
        shape, sizes, mode, implementation, dtype: what ran.
        ms, ms_min: median and least milliseconds of one call; ``spread``: interquartile range over the median.
        repeats: timed calls.
        ratio: how many times faster than the reference in the same rounds.
        gflop: the call's operations by the convention, in 1e9.
        executed_gflop: least and most operations of matrix products it executes, in 1e9; the reference's are counted.
            A compiled backend's backward is bounded: from below by the reference, which recomputes nothing, from
            above by the convention plus rebuilding every chunk state. None where nothing is known (factored plans too).
        gflops: ``gflop`` over the median time.
        peak_fraction: ``gflops`` over the peak measured in this run: of float32 multiply-adds on a CPU, of dense matrix
            products in the same dtype on a GPU; None in float64 on a CPU and without the compiled core.
        peak_bytes: peak memory of one call (on a CPU in a process of its own), None where it was not measured.
        difference: relative difference to the reference's results.
    """

    shape: str
    sizes: str
    mode: str
    implementation: str
    dtype: str
    ms: float
    ms_min: float
    spread: float
    repeats: int
    ratio: float
    gflop: float
    executed_gflop: tuple[float, float] | None
    gflops: float
    peak_fraction: float | None
    peak_bytes: int | None
    difference: float


@dataclass
class SpeedReport:
    """All rows, and the highest rate of multiply-adds (GPU: of dense matrix products) the probe reached in the run.

    ``peak_gflops`` is None where no peak applies: on a CPU in float64 or without the compiled core.
    """

    rows: list[SpeedRow]
    peak_gflops: float | None

    def as_dict(self) -> dict[str, object]:
        return {"peak_gflops": self.peak_gflops, "rows": [asdict(row) for row in self.rows]}

    def find(self, shape: str, mode: str, implementation: str) -> SpeedRow:
        """The row of that shape, mode and implementation.

        Raises:
            KeyError: there is none.
        """
        for row in self.rows:
            if (row.shape, row.mode, row.implementation) == (shape, mode, implementation):
                return row
        raise KeyError((shape, mode, implementation))


def implementations_here(backends: Iterable[str] | None = None, *, compiled: bool = False) -> list[Implementation]:
    """The reference, the reference through ``torch.compile`` if asked for, and the backends named.

    Args:
        backends: names; None takes every one that is available here and takes float32 tokens on the CPU, but for
            interpreted ones.
        compiled: whether to add the compiled reference.

    Raises:
        ValueError: a name is no backend.
        RuntimeError: a named backend does not run here; the message says why.
    """
    from hope_kernels import available_backends
    from hope_kernels.backends import refusal

    known = available_backends()
    plain = shape_problem(SHAPES["S16"].scaled(batch=1, tokens=1, heads=1)).request()
    usual = [name for name, status in known.items() if not status.interpreted and refusal(name, plain) is None]
    wanted = usual if backends is None else list(backends)
    for name in wanted:
        if name not in known:
            raise ValueError(f"backend is {name!r}; want one of {', '.join(known)}")
        if not known[name]:
            raise RuntimeError(f"backend {name!r} does not run here: {known[name].reason}")
    others = [Implementation(name) for name in wanted if name != REFERENCE.backend]
    return [REFERENCE, *([Implementation("reference", compiled=True)] if compiled else []), *others]


def compare_speed(
    shapes: Iterable[Shape],
    implementations: list[Implementation],
    *,
    modes: Iterable[str] = MODES,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    repeats: int = 5,
    warmup: int = 1,
    memory_modes: Iterable[str] = MODES,
    seed: int = 0,
    problem: Problem | None = None,
    notify: Notify = lambda message: None,
) -> SpeedReport:
    """Check, then time, every implementation on every shape.

    Args:
        shapes: what to run.
        implementations: from :func:`implementations_here`; the reference comes first.
        modes: of ``"forward"``, ``"forward+backward"``.
        dtype, device: of the tokens.
        repeats, warmup: rounds of :func:`~hope_kernels.bench.timing.time_side_by_side`.
        memory_modes: the modes whose peak memory is measured as well (on a CPU one fresh process per row, and not for
            ``torch.compile``).
        seed: of the inputs.
        problem: the inputs themselves, where they were made already: for one shape, in ``dtype``, on ``device``.
        notify: told what starts now, for a progress bar.

    Raises:
        DisagreementError: results are not finite or differ from the reference's by more than
            :data:`~hope_kernels.bench.implementations.AGREEMENT`.
    """
    rows: list[SpeedRow] = []
    peaks: list[float] = []
    modes, memory_modes = list(modes), list(memory_modes)
    on_gpu = torch.device(device).type == "cuda"
    for shape in shapes:
        inputs = shape_problem(shape, dtype=dtype, device=device, seed=seed) if problem is None else problem
        for mode in modes:
            notify(f"{shape.name} {mode}: checking")
            calls = {item: make_call(item, inputs, mode) for item in implementations}
            differences = _check(shape, mode, calls, dtype)
            counted = _counted_gflop(calls[REFERENCE])
            executed = {item: _executed_gflop(item, counted, shape, mode) for item in calls}
            notify(f"{shape.name} {mode}: timing")
            peak = _peak(device, dtype)
            if peak is not None:
                peaks.append(peak / 1e9)
            timings = time_side_by_side(
                {item.name: call for item, call in calls.items()},
                repeats=repeats,
                warmup=warmup,
                device=device,
            )
            gflop = shape.flops(mode) / 1e9
            for item in implementations:
                timing, peak_bytes = timings[item.name], None
                if mode in memory_modes and on_gpu:
                    peak_bytes = peak_memory(calls[item], device)
                elif mode in memory_modes and not item.compiled:
                    notify(f"{shape.name} {mode}: peak memory of {item.name}")
                    peak_bytes = measure_peak_memory(shape, item.backend, mode, dtype=dtype, device=device, seed=seed)
                rows.append(
                    SpeedRow(
                        shape=shape.name,
                        sizes=shape.sizes,
                        mode=mode,
                        implementation=item.name,
                        dtype=str(dtype).removeprefix("torch."),
                        ms=timing.median * 1e3,
                        ms_min=timing.minimum * 1e3,
                        spread=timing.spread,
                        repeats=repeats,
                        ratio=timings[REFERENCE.name].median / timing.median,
                        gflop=gflop,
                        executed_gflop=executed[item],
                        gflops=gflop / timing.median,
                        peak_fraction=None,
                        peak_bytes=peak_bytes,
                        difference=differences[item],
                    )
                )
            notify("")
    peak_gflops = max(peaks, default=None)
    if peak_gflops is not None:
        for row in rows:
            row.peak_fraction = row.gflops / peak_gflops
    return SpeedReport(rows, peak_gflops)


def _peak(device: str, dtype: torch.dtype) -> float | None:
    if torch.device(device).type == "cuda":
        return gemm_peak(dtype, device)
    return None if dtype == torch.float64 else fma_peak()


def _check(shape: Shape, mode: str, calls: dict, dtype: torch.dtype) -> dict[Implementation, float]:
    expected = calls[REFERENCE]()
    differences = {}
    for item, call in calls.items():
        differences[item] = difference(call(), expected) if item != REFERENCE else difference(expected, expected)
        if not differences[item] <= AGREEMENT[dtype]:
            raise DisagreementError(
                f"{item.name} at {shape.name} ({shape.sizes}), {mode}: relative difference to the reference is "
                f"{differences[item]:.2e}; want at most {AGREEMENT[dtype]:.0e}. It was not timed."
            )
    return differences


def _counted_gflop(call: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / 1e9


def _executed_gflop(
    implementation: Implementation, counted: float, shape: Shape, mode: str
) -> tuple[float, float] | None:
    """``counted``: what the reference executes."""
    if implementation.compiled or implementation.backend.endswith(FACTORED):
        return None
    if implementation == REFERENCE:
        return counted, counted
    convention = shape.flops(mode) / 1e9
    if mode == "forward":
        return convention, convention
    weight_size = shape.dim * (shape.dim if shape.form == "linear" else shape.hidden)
    rebuilt = 2 * rebuilt_products_per_token(shape.form) * weight_size * shape.head_tokens / 1e9
    return counted, convention + rebuilt
