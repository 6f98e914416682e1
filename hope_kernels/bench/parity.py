"""Every backend against the token-by-token oracle: output, final state, momentum and every gradient.

The error of a result ``x`` with truth ``t`` is ``max|x - t| / max|t|``: relative to the largest element of that very
tensor, so that a small gradient is held to the same standard as a large output. Its budget:

* float64: ``1e-10``;
* float32, bfloat16, float16: twice the error of the eager reference in the same dtype, plus four units in the last
  place of that dtype (``4 eps``, the rounding band: two correct computations that round in different places differ by
  that much even where the reference happens to be exact);
* float32 with tf32 products (on a GPU): the same, with the last place of tf32;
* the reference itself in those dtypes: :data:`REFERENCE_CEILING` eps, so that a broken reference cannot lend its
  error to everybody else.

Anything that is not finite fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from hope_kernels.bench.implementations import Results
from hope_kernels.bench.parity_cases import Case, Trial, make_trial, named_results

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# What a row of float32 whose products are rounded to tf32 is called, and the distance of 1 from the next such number.
TF32 = "tf32"
TF32_EPS = 2.0**-10
FLOAT64_BUDGET = 1e-10
ROUNDING_BAND = 4  # eps
REFERENCE_CEILING = 16  # eps


@dataclass
class ParityRow:
    """One case on one backend in one dtype.

    Attributes:
        case, backend, dtype: what ran.
        errors, budgets: of every result by name; an error is inf when the result is not finite.
        worst: name of the result that uses most of its budget.
        failures: names of the results over budget.
    """

    case: str
    backend: str
    dtype: str
    errors: dict[str, float]
    budgets: dict[str, float]
    worst: str
    failures: list[str]

    @property
    def passed(self) -> bool:
        return not self.failures

    @property
    def worst_error(self) -> float:
        return self.errors[self.worst]

    @property
    def used(self) -> float:
        """Part of its budget that the worst result uses."""
        return self.worst_error / self.budgets[self.worst]


@dataclass
class ParityReport:
    """All rows, and the cases a backend refuses with its reason (``{backend: {case: reason}}``)."""

    rows: list[ParityRow]
    refused: dict[str, dict[str, str]]

    @property
    def passed(self) -> bool:
        return bool(self.rows) and all(row.passed for row in self.rows)

    def as_dict(self) -> dict[str, object]:
        rows = [asdict(row) | {"passed": row.passed, "used": row.used} for row in self.rows]
        return {"passed": self.passed, "rows": rows, "refused": self.refused}


def check_parity(
    trials: Iterable[Case | Trial],
    backends: Iterable[str],
    dtypes: Iterable[str],
    *,
    device: torch.device | str = "cpu",
    seed: int = 0,
    tf32: bool = False,
    notify: Callable[[str], None] = lambda message: None,
) -> ParityReport:
    """Run every case on every backend in every dtype and judge the errors.

    Args:
        trials: cases (inputs and truth are made here) or finished trials (golden files).
        backends: names of available backends.
        dtypes: of :data:`DTYPES`.
        device: where the backends run, the reference too; the truth stays on the CPU.
        seed: of the inputs of cases.
        tf32: whether float32 products may be rounded to tf32, which PyTorch then does on a GPU; such rows have the
            dtype :data:`TF32`.
        notify: told the name of each case before it runs.

    Raises:
        ValueError: unknown dtype.
    """
    dtypes = list(dtypes)
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}; want one of {', '.join(DTYPES)}")
    # The reference first: its errors are part of everybody's budget.
    backends = sorted(backends, key=lambda name: name != "reference")
    report = ParityReport([], {})
    for item in trials:
        notify(item.name)
        trial = item if isinstance(item, Trial) else make_trial(item, seed)
        for dtype in dtypes:
            with _float32_products("high" if tf32 else torch.get_float32_matmul_precision()):
                _check_trial(report, trial, backends, dtype, torch.device(device), tf32=tf32)
    return report


def _check_trial(
    report: ParityReport, trial: Trial, backends: list[str], dtype: str, device: torch.device, *, tf32: bool
) -> None:
    """The rows of one trial in one dtype."""
    name = TF32 if tf32 and dtype == "float32" else dtype
    reference_errors = None
    if DTYPES[dtype] != torch.float64:
        reference_errors = errors(backend_results(trial, "reference", DTYPES[dtype], device), trial.truth)
    for backend in backends:
        if backend == "reference" and reference_errors is not None:
            report.rows.append(_judge(trial, backend, name, reference_errors, None))
            continue
        reason = _refusal(backend, trial, DTYPES[dtype], device)
        if reason is not None:
            report.refused.setdefault(backend, {})[f"{trial.name} {name}"] = reason
            continue
        measured = errors(backend_results(trial, backend, DTYPES[dtype], device), trial.truth)
        report.rows.append(_judge(trial, backend, name, measured, reference_errors))


@contextmanager
def _float32_products(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def backend_results(trial: Trial, backend: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> Results:
    """Every result of a trial by ``memory_scan`` with tokens of ``dtype``, fed in the trial's calls and layout."""
    from hope_kernels import memory_scan

    leaves = trial.problem.to(dtype).map(lambda x: x.to(device)).requires_grad()
    layout: dict[str, Tensor] = {}
    if trial.layout == "packed":
        ends = [start + length for _, start, length in trial.segments]
        layout["cu_seqlens"] = torch.tensor([0, *ends], dtype=torch.int32, device=device)
    elif trial.layout == "valid":
        windows = [(start, start + length) for _, start, length in trial.segments]
        layout["valid"] = torch.tensor(windows, dtype=torch.int32, device=device)
    memory = leaves.weights
    outputs = []
    start = 0
    for length in trial.calls:
        tokens = slice(start, start + length)
        start += length

        def part(x: Tensor | None, tokens: slice = tokens) -> Tensor | None:
            return None if x is None else x[:, tokens]

        output, memory = memory_scan(
            part(leaves.q),
            part(leaves.k),
            part(leaves.v),
            part(leaves.lr),
            memory,
            spec=leaves.spec,
            chunk_size=leaves.chunk_size,
            retention=part(leaves.retention),
            momentum=part(leaves.momentum),
            bptt_chunks=trial.bptt_chunks,
            backend=backend,
            **layout,
        )
        outputs.append(output)
    return named_results(trial, leaves, torch.cat(outputs, 1), memory.weights, memory.momentum or ())


def errors(results: Results, truth: Results) -> dict[str, float]:
    """``max|x - t| / max|t|`` of every result by name (``max|x|`` where the truth is 0); inf if any is not finite.

    Raises:
        ValueError: a result is missing, unexpected or of another shape.
    """
    if results.keys() != truth.keys():
        raise ValueError(f"results hold {sorted(results)}, the truth holds {sorted(truth)}")
    measured = {}
    for name, true in truth.items():
        got = results[name].to("cpu", torch.float64)
        if got.shape != true.shape:
            raise ValueError(f"{name} has shape {tuple(got.shape)}, the truth has {tuple(true.shape)}")
        if not torch.isfinite(got).all():
            measured[name] = float("inf")
            continue
        scale = true.abs().max().item() if true.numel() else 0.0
        distance = (got - true).abs().max().item() if true.numel() else 0.0
        measured[name] = distance / scale if scale > 0 else distance
    return measured


def _judge(
    trial: Trial,
    backend: str,
    dtype: str,
    measured: dict[str, float],
    reference_errors: dict[str, float] | None,
) -> ParityRow:
    eps = TF32_EPS if dtype == TF32 else torch.finfo(DTYPES[dtype]).eps
    if dtype == "float64":
        budgets = dict.fromkeys(measured, FLOAT64_BUDGET)
    elif reference_errors is None:
        budgets = dict.fromkeys(measured, REFERENCE_CEILING * eps)
    else:
        budgets = {name: 2 * reference_errors[name] + ROUNDING_BAND * eps for name in measured}
    used = {name: measured[name] / budgets[name] for name in measured}
    return ParityRow(
        case=trial.name,
        backend=backend,
        dtype=dtype,
        errors=measured,
        budgets=budgets,
        worst=max(used, key=used.__getitem__),
        failures=[name for name, part in used.items() if not part <= 1],
    )


def _refusal(backend: str, trial: Trial, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why a backend cannot run this trial in this dtype on this device, None if it can."""
    from hope_kernels import MemoryState
    from hope_kernels.backends import FACTORED, refusal
    from hope_kernels.memory.plan import refuses

    problem = trial.problem
    request = problem.request(dtype, device, table=trial.layout in ("packed", "valid"))
    reason = refusal(backend, request)
    if reason is None and backend.endswith(FACTORED):
        state = MemoryState.initial(problem.weights, spec=problem.spec, chunk_size=problem.chunk_size)
        reason = refuses(request, state, trial.bptt_chunks)
    return reason
