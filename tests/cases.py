"""Problems, results and comparisons that the tests of the memory contract share.

A `Problem` is one uniform call of `memory_scan`. `evaluate` turns a function from a problem to named results into an
`Evaluation`: the results, and the gradient of `sum_r <result_r, cotangent_r>` for every tensor of the problem. The
cotangent of a result depends on its name and shape alone, so two ways to compute one thing are compared by comparing
their evaluations. Results are the output, the final weights and momentum, and the pending tokens: everything a caller
can differentiate.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from hope_kernels import MemorySpec, MemoryState, available_backends, memory_scan
from hope_kernels.backends.interface import ScanRequest
from tests import oracle

STATUS = available_backends()
PENDING = ("pending_k", "pending_v", "pending_lr", "pending_retention", "pending_momentum")
GATES = ("lr", "retention", "momentum")


def _parameters(names: Iterable[str]) -> list:
    # `reference` and `cpu` are part of every install worth testing: missing, they are reported as skipped with the
    # reason.
    return [pytest.param(n, marks=pytest.mark.skipif(not STATUS[n], reason=f"{n}: {STATUS[n].reason}")) for n in names]


# `cuda` takes 16-bit tokens alone, most tests have others: it has the same ones of its own, in backends/test_cuda.py.
_accelerators = [name for name in ("triton",) if STATUS[name]]
BACKENDS = _parameters(["reference", "cpu", *_accelerators])
COMPILED_BACKENDS = _parameters(["cpu", *_accelerators])
FLOAT64_BACKENDS = _parameters(["reference", "cpu"])


def device_of(backend: str | None) -> torch.device:
    """Where a backend's tests run: an accelerator's on it if there is one, all others on the processor."""
    on_gpu = backend is not None and backend.startswith("triton") and torch.cuda.is_available()
    return torch.device("cuda" if on_gpu else "cpu")


_PLAIN = MemorySpec()


def make_request(spec: MemorySpec = _PLAIN, **changes) -> ScanRequest:
    """What a backend is asked for a plain scan of float32 tokens on the processor, but for ``changes``."""
    usual = {"operation": "scan", "dtype": torch.float32, "device": torch.device("cpu"), "heads": 2, "dim": 32}
    usual |= {"hidden": 128, "chunk_size": 16}
    usual |= dict.fromkeys(("retention", "momentum", "table", "gradients"), False)
    return ScanRequest(key=spec.key, **(usual | changes))


@dataclass(frozen=True)
class Problem:
    """Inputs of one call: `q, k, v [B, T, N, D]`, gates `[B, T, N]`, `weight{i}`, and `initial_momentum{i}` where
    given."""

    spec: MemorySpec
    chunk_size: int
    tensors: dict[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def get(self, name: str) -> Tensor | None:
        return self.tensors.get(name)

    def numbered(self, prefix: str) -> tuple[Tensor, ...]:
        return tuple(
            self.tensors[f"{prefix}{i}"] for i in range(self.spec.weight_count) if f"{prefix}{i}" in self.tensors
        )

    @property
    def weights(self) -> tuple[Tensor, ...]:
        return self.numbered("weight")

    @property
    def initial_momentum(self) -> tuple[Tensor, ...] | None:
        return self.numbered("initial_momentum") or None

    @property
    def tokens(self) -> int:
        return self["k"].shape[1]

    @property
    def batch(self) -> int:
        return self["k"].shape[0]

    def with_tensors(self, **tensors: Tensor) -> Problem:
        return replace(self, tensors={**self.tensors, **tensors})

    def map(self, function: Callable[[str, Tensor], Tensor]) -> Problem:
        return replace(self, tensors={name: function(name, t) for name, t in self.tensors.items()})

    def span(self, start: int, stop: int) -> Problem:
        """The tokens `start .. stop` of every row."""
        return self.map(lambda name, t: t[:, start:stop] if name in ("q", "k", "v", *GATES) else t)

    def row(self, b: int) -> Problem:
        """Batch row `b` alone. Shared weights stay shared."""
        return self.map(lambda name, t: t if name.startswith("weight") and t.dim() == 3 else t[b : b + 1])

    def memory(self) -> tuple[Tensor, ...] | MemoryState:
        """What the first call of a stream takes as its memory."""
        if self.initial_momentum is None:
            return self.weights
        batch = None if self.weights[0].dim() == 4 else self.batch
        return MemoryState.initial(
            self.weights, self.initial_momentum, spec=self.spec, chunk_size=self.chunk_size, batch_size=batch
        )

    def cast(self, dtype: torch.dtype, weight_dtype: torch.dtype | None = None) -> Problem:
        """Tokens in `dtype`, gates and momentum in its state dtype, weights in `weight_dtype` (default: the state
        dtype)."""
        state = torch.float64 if dtype == torch.float64 else torch.float32

        def convert(name: str, t: Tensor) -> Tensor:
            if name in ("q", "k", "v"):
                return t.to(dtype)
            return t.to(weight_dtype or state) if name.startswith("weight") else t.to(state)

        return self.map(convert)

    def to(self, device: torch.device) -> Problem:
        return self.map(lambda _, t: t.to(device))


def make_problem(
    spec: MemorySpec,
    *,
    chunk_size: int,
    batch: int = 2,
    tokens: int = 11,
    heads: int = 2,
    dim: int = 5,
    hidden: int = 6,
    retention: bool = False,
    momentum: bool = False,
    initial_momentum: bool = False,
    shared: bool = True,
    max_lr: float = 0.4,
    seed: int = 0,
) -> Problem:
    """A random float64 problem: unit queries and keys, gates in the middle of their ranges, weights `randn /
    sqrt(in)`."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(batch, tokens, heads, generator=random, dtype=torch.float64)

    def unit(x: Tensor) -> Tensor:
        return x / x.norm(dim=-1, keepdim=True)

    token_shape = (batch, tokens, heads, dim)
    tensors = {"q": unit(normal(*token_shape)), "k": unit(normal(*token_shape)), "v": 0.5 * normal(*token_shape)}
    tensors["lr"] = uniform(0.0, max_lr)
    if retention:
        tensors["retention"] = uniform(0.6, 1.0)
    if momentum:
        tensors["momentum"] = uniform(0.1, 0.9)
    leading = (heads,) if shared else (batch, heads)
    for i, shape in enumerate(spec.weight_shapes(dim, hidden)):
        tensors[f"weight{i}"] = normal(*leading, *shape) / shape[0] ** 0.5
    if initial_momentum:
        for i, shape in enumerate(spec.weight_shapes(dim, hidden)):
            tensors[f"initial_momentum{i}"] = 0.1 * normal(batch, heads, *shape) / shape[0] ** 0.5
    return Problem(spec, chunk_size, tensors)


Results = dict[str, Tensor]


def momentum_of(state: MemoryState, in_use: bool) -> tuple[Tensor, ...]:
    """The state's momentum; a stream with momentum that has written nothing yet may have None, which stands for
    zero."""
    if state.momentum is None and in_use:
        return tuple(torch.zeros_like(w) for w in state.weights)
    return state.momentum or ()


def state_results(state: MemoryState, momentum_in_use: bool = False) -> Results:
    """Everything differentiable that a state holds."""
    results = {f"weight{i}": w for i, w in enumerate(state.weights)}
    results |= {f"momentum{i}": s for i, s in enumerate(momentum_of(state, momentum_in_use))}
    results |= {name: getattr(state, name) for name in PENDING if getattr(state, name) is not None}
    return results


def scan_stream(
    problem: Problem, lengths: Sequence[int], *, backend: str | None, bptt_chunks: int | None = None
) -> tuple[Tensor, MemoryState]:
    """The problem's tokens in calls of the given lengths, the state carried. Returns all outputs and the last state."""
    assert sum(lengths) == problem.tokens
    memory, outputs, start = problem.memory(), [], 0
    for length in lengths:
        part = problem.span(start, start + length)
        output, memory = memory_scan(
            part["q"],
            part["k"],
            part["v"],
            part["lr"],
            memory,
            spec=problem.spec,
            chunk_size=problem.chunk_size,
            retention=part.get("retention"),
            momentum=part.get("momentum"),
            bptt_chunks=bptt_chunks,
            backend=backend,
        )
        outputs.append(output)
        start += length
    return torch.cat(outputs, dim=1), memory


def package_results(
    problem: Problem,
    *,
    backend: str | None,
    lengths: Sequence[int] | None = None,
    bptt_chunks: int | None = None,
) -> Results:
    output, state = scan_stream(problem, lengths or [problem.tokens], backend=backend, bptt_chunks=bptt_chunks)
    return {"output": output, **state_results(state, "momentum" in problem.tensors)}


def oracle_results(problem: Problem, *, bptt_chunks: int | None = None) -> Results:
    """The same results by the token-by-token oracle."""
    output, weights, momentum = oracle.scan(
        problem["q"],
        problem["k"],
        problem["v"],
        problem["lr"],
        problem.weights,
        spec=problem.spec,
        chunk_size=problem.chunk_size,
        retention=problem.get("retention"),
        momentum=problem.get("momentum"),
        initial_momentum=problem.initial_momentum,
        bptt_chunks=bptt_chunks,
    )
    results = {"output": output}
    results |= {f"weight{i}": w for i, w in enumerate(weights)}
    results |= {f"momentum{i}": s for i, s in enumerate(momentum)}
    pending = problem.tokens % problem.chunk_size
    if pending:
        tail = problem.span(problem.tokens - pending, problem.tokens)
        results |= {f"pending_{name}": tail[name] for name in ("k", "v", *GATES) if name in tail.tensors}
    return results


class Evaluation(NamedTuple):
    values: dict[str, Tensor]
    gradients: dict[str, Tensor]

    def named(self) -> dict[str, Tensor]:
        return self.values | {f"gradient of {name}": g for name, g in self.gradients.items()}


def cotangent(name: str, like: Tensor) -> Tensor:
    """A fixed random tensor of the result's shape. Multiples of 1/32 are exact in bfloat16 and float16."""
    random = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    values = torch.randn(like.shape, generator=random, dtype=torch.float64)
    return ((values.clamp(-3, 3) * 32).round() / 32).to(like.device)


def evaluate(
    problem: Problem, compute: Callable[[Problem], Results], cotangents: dict[str, Tensor] | None = None
) -> Evaluation:
    """Results and gradients. With `cotangents` given, a result that has none adds nothing to the gradient."""
    leaves = problem.map(lambda _, t: t.detach().clone().requires_grad_())
    results = compute(leaves)
    if cotangents is None:
        cotangents = {name: cotangent(name, value) for name, value in results.items()}
    names = list(leaves.tensors)
    loss = sum((results[name].double() * c).sum() for name, c in cotangents.items())
    gradients = [None] * len(names)
    if loss.requires_grad:  # it does not where there is nothing to differentiate, as in a read of no tokens
        gradients = torch.autograd.grad(loss, [leaves[n] for n in names], allow_unused=True)
    found = {n: torch.zeros_like(leaves[n]) if g is None else g for n, g in zip(names, gradients, strict=True)}
    return Evaluation({name: value.detach() for name, value in results.items()}, found)


def evaluate_oracle(problem: Problem, *, bptt_chunks: int | None = None) -> Evaluation:
    """The oracle on exactly the numbers of `problem`, in float64."""
    exact = problem.map(lambda _, t: t.double().cpu())
    return evaluate(exact, lambda p: oracle_results(p, bptt_chunks=bptt_chunks))


def evaluate_package(problem: Problem, backend: str, **options) -> Evaluation:
    return on_cpu(evaluate(problem.to(device_of(backend)), lambda p: package_results(p, backend=backend, **options)))


def on_cpu(evaluation: Evaluation) -> Evaluation:
    return Evaluation(*({name: t.cpu() for name, t in part.items()} for part in evaluation))


def assert_equal_to_rounding(actual: Evaluation, expected: Evaluation, tolerance: float = 1e-10) -> None:
    """Every value and gradient within `tolerance * max(1, largest expected entry)`; the names and shapes are the
    same."""
    actual_named, expected_named = actual.named(), expected.named()
    assert sorted(actual_named) == sorted(expected_named)
    wrong = []
    for name, want in expected_named.items():
        got = actual_named[name]
        assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, want {tuple(want.shape)}"
        if want.numel() == 0:
            continue
        error = (got.double() - want.double()).abs().max().item()
        bound = tolerance * max(1.0, want.abs().max().item())
        if not error <= bound:  # written so that NaN is wrong
            wrong.append(f"{name}: error {error:.2e}, allowed {bound:.2e}")
    assert not wrong, "; ".join(wrong)


class Precision(NamedTuple):
    """The dtype of a computation, and how far its results may be from float64's (:func:`assert_equal_to_rounding`)."""

    dtype: torch.dtype
    tolerance: float

    def compare(
        self,
        backend: str,
        problem: Problem,
        compute: Callable[[Problem], Results],
        truth: Callable[[Problem], Results],
    ) -> Evaluation:
        """Evaluates ``compute`` where the backend runs, in this dtype, and ``truth`` on those numbers in float64."""
        given = problem.cast(self.dtype)
        found = on_cpu(evaluate(given.to(device_of(backend)), compute))
        assert_equal_to_rounding(found, evaluate(given.map(lambda _, t: t.double()), truth), self.tolerance)
        return found


EXACT = Precision(torch.float64, 1e-10)


def rounding_band(dtype: torch.dtype, summation: float) -> float:
    """What a budget allows beside twice the eager error, relative to a tensor's largest, or typical, entry.

    One rounding of the result to the dtype of the tokens (half an eps), and `summation` eps of float32, the dtype of
    the state, for the order of summation: the eager reference may happen to be nearly exact.
    """
    return 0.5 * torch.finfo(dtype).eps + summation * torch.finfo(torch.float32).eps


def relative_errors(got: Tensor, truth: Tensor) -> tuple[float, float]:
    """Maximum error over the largest entry, root mean square error over the root mean square entry."""
    difference, truth = got.double() - truth.double(), truth.double()
    scale, rms = truth.abs().max().item(), truth.square().mean().sqrt().item()
    if scale == 0.0:
        return difference.abs().max().item(), difference.square().mean().sqrt().item()
    return difference.abs().max().item() / scale, difference.square().mean().sqrt().item() / rms


def assert_within_budget(
    actual: Evaluation, eager: Evaluation, truth: Evaluation, dtype: torch.dtype, summation: float = 2
) -> None:
    """Every value and gradient is finite, its error at most twice the eager reference's in that dtype plus the band."""
    got, reference, exact = actual.named(), eager.named(), truth.named()
    assert sorted(got) == sorted(exact) == sorted(reference)
    band = rounding_band(dtype, summation)
    wrong = []
    for name, want in exact.items():
        assert torch.isfinite(got[name]).all(), f"{name} is not finite"
        if want.numel() == 0:
            continue
        for norm, error, allowed in zip(
            ("maximum", "rms"), relative_errors(got[name], want), relative_errors(reference[name], want), strict=True
        ):
            if not error <= 2 * allowed + band:
                wrong.append(f"{name}: {norm} error {error:.2e}, eager {allowed:.2e}, band {band:.2e}")
    assert not wrong, "; ".join(wrong)
