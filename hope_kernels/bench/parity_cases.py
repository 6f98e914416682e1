"""What parity is checked on: small scans over every form, objective, rule, gate and layout, and the truth about each.

The truth is :func:`hope_kernels.memory.reference.recurrent_scan` in float64: one token at a time, inner gradients by
automatic differentiation of the inner loss. Golden files bring a truth of their own, computed outside this project.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from hope_kernels.bench.implementations import Results
from hope_kernels.bench.problems import Problem, make_problem
from hope_kernels.memory.spec import MemorySpec

LAYOUTS = ("whole", "split", "packed", "valid")

# One ragged split of the tokens into calls: one token, shorter than a chunk, straddling several, nothing, the rest.
_SPLIT = (1, 2, 6, 0)
# Lengths of packed sequences: shorter than a chunk, one chunk, an empty one, several chunks and a piece.
_PACKED = (3, 4, 0, 9)


@dataclass(frozen=True)
class Case:
    """One small scan.

    Attributes:
        spec: the memory.
        retention, momentum: whether these gates are given.
        layout: ``"whole"`` (one call), ``"split"`` (several calls, the state carried between them, pending tokens
            included), ``"packed"`` (``cu_seqlens``), ``"valid"`` (padded rows).
        bptt_chunks: as in ``memory_scan``.
    """

    spec: MemorySpec
    retention: bool = False
    momentum: bool = False
    layout: str = "whole"
    bptt_chunks: int | None = None

    @property
    def name(self) -> str:
        """``mlp gd l2 retention, split``."""
        words = [self.spec.form, self.spec.rule, self.spec.objective]
        if self.spec.form != "linear" and self.spec.activation != "gelu_tanh":
            words.append(self.spec.activation)
        if not self.spec.residual:
            words.append("no residual")
        if self.retention:
            words.append("retention")
        if self.momentum:
            words.append("momentum")
        if self.bptt_chunks:
            words.append(f"bptt {self.bptt_chunks}")
        return " ".join(words) + (f", {self.layout}" if self.layout != "whole" else "")


@dataclass(frozen=True)
class Trial:
    """A case with numbers: inputs, the gradients given to the final state, and what must come out.

    Attributes:
        name: for the table.
        problem: inputs in float64, every number exactly representable in float32, bfloat16 and float16 (not so for
            golden files), so that one truth serves every dtype.
        segments: ``(row, first token, length)`` of each sequence.
        calls: lengths of the calls the tokens are fed in.
        layout, bptt_chunks: as in :class:`Case`.
        d_weights, d_momentum: gradient of the loss for each final weight and momentum, ``[S, N, in, out]``; empty
            for none.
        truth: every result by name: ``output``, ``final W``, ``momentum W``, ``d q``, ...
    """

    name: str
    problem: Problem
    segments: tuple[tuple[int, int, int], ...]
    calls: tuple[int, ...]
    layout: str
    bptt_chunks: int | None
    d_weights: tuple[Tensor, ...]
    d_momentum: tuple[Tensor, ...]
    truth: Results


def cases(form: str | None = None, *, small: bool = False) -> list[Case]:
    """The cases of ``hope-kernels verify``.

    Every form with every objective and rule, the gates switching from one to the next so that each form meets each
    gate under each rule; then every layout, truncated backpropagation, the other activations and a memory without
    residual.

    Args:
        form: only memories of this form.
        small: a dozen cases that still hold each form, rule, objective, gate and layout once.

    Raises:
        ValueError: ``form`` is none of the forms.
    """
    forms = ("linear", "mlp", "glu")
    if form is not None and form not in forms:
        raise ValueError(f"form is {form!r}; want one of {', '.join(map(repr, forms))}")
    chosen = [case for case in (_small_cases() if small else _all_cases()) if form in (None, case.spec.form)]
    return chosen


def _all_cases() -> Iterator[Case]:
    for form in ("linear", "mlp", "glu"):
        for objective in ("l2", "dot", "error", "self"):
            spec = MemorySpec(form=form, objective=objective)
            yield Case(spec, retention=objective in ("dot", "self"))
            yield Case(replace(spec, rule="dgd"), retention=objective in ("l2", "self"))
        yield Case(MemorySpec(form=form), momentum=True)
        yield Case(MemorySpec(form=form, objective="dot"), momentum=True, retention=True)
        for layout in ("split", "packed", "valid"):
            yield Case(MemorySpec(form=form), retention=True, momentum=True, layout=layout)
            yield Case(MemorySpec(form=form, rule="dgd"), retention=True, layout=layout)
        yield Case(MemorySpec(form=form, residual=False), bptt_chunks=2, layout="split")
    for form in ("mlp", "glu"):
        for activation in ("gelu", "silu", "relu2"):
            yield Case(MemorySpec(form=form, activation=activation), retention=True)


def _small_cases() -> Iterator[Case]:
    yield Case(MemorySpec(form="linear", rule="dgd"), retention=True)
    yield Case(MemorySpec(form="linear"), layout="packed")
    yield Case(MemorySpec())
    yield Case(MemorySpec(), retention=True, momentum=True, layout="split")
    yield Case(MemorySpec(objective="self", rule="dgd"), retention=True, layout="valid")
    yield Case(MemorySpec(objective="dot", activation="silu"), momentum=True)
    yield Case(MemorySpec(objective="error", activation="gelu"), bptt_chunks=2)
    yield Case(MemorySpec(form="glu"), retention=True)
    yield Case(MemorySpec(form="glu", activation="relu2", residual=False), layout="packed")
    yield Case(MemorySpec(form="glu", rule="dgd"), layout="split")


def _representable(x: Tensor) -> Tensor:
    """The nearest number that float16 and bfloat16 both hold (rounding to the coarser of both, one after the other)."""
    return x.to(torch.bfloat16).to(torch.float16).to(torch.float64)


def make_trial(
    case: Case, seed: int = 0, *, chunk_size: int = 4, dim: int = 6, hidden: int = 10, tokens: int = 14
) -> Trial:
    """Inputs for a case, and its truth (slow: token by token in float64).

    ``tokens`` does not hold for packed cases, whose lengths are fixed; ``valid`` ones use up to 14 of them.
    """
    batch, tokens = (1, sum(_PACKED)) if case.layout == "packed" else (2, tokens)
    if case.layout == "packed":
        starts = [sum(_PACKED[:i]) for i in range(len(_PACKED))]
        segments = tuple((0, start, length) for start, length in zip(starts, _PACKED, strict=True))
    elif case.layout == "valid":
        segments = ((0, 0, 9), (1, 3, 11))  # right padding, left padding
    else:
        segments = tuple((row, 0, tokens) for row in range(batch))
    problem = make_problem(
        case.spec,
        batch=batch,
        tokens=tokens,
        heads=2,
        dim=dim,
        hidden=hidden,
        chunk_size=chunk_size,
        retention=case.retention,
        momentum=case.momentum,
        dtype=torch.float64,
        seed=seed,
    ).map(_representable)
    generator = torch.Generator().manual_seed(seed + 1)
    d_state = [
        tuple(
            _representable(torch.randn((len(segments), *weight.shape), generator=generator, dtype=torch.float64))
            for weight in problem.weights
        )
        for _ in range(2)
    ]
    trial = Trial(
        name=case.name,
        problem=problem,
        segments=segments,
        calls=(*_SPLIT, tokens - sum(_SPLIT)) if case.layout == "split" else (tokens,),
        layout=case.layout,
        bptt_chunks=case.bptt_chunks,
        d_weights=d_state[0],
        d_momentum=d_state[1] if case.momentum else (),
        truth={},
    )
    return replace(trial, truth=oracle_results(trial))


def oracle_results(trial: Trial) -> Results:
    """Every result of a trial by the token-by-token oracle, each sequence on its own."""
    from hope_kernels.memory.reference import recurrent_scan

    leaves = trial.problem.requires_grad()
    output = torch.zeros_like(leaves.q)
    finals: list[list[Tensor]] = []
    speeds: list[list[Tensor]] = []
    for row, start, length in trial.segments:
        tokens = (slice(row, row + 1), slice(start, start + length))

        def part(x: Tensor | None, tokens: tuple[slice, slice] = tokens) -> Tensor | None:
            return None if x is None else x[tokens]

        read, weights, momentum = recurrent_scan(
            part(leaves.q),
            part(leaves.k),
            part(leaves.v),
            part(leaves.lr),
            [weight if weight.dim() == 3 else weight[row : row + 1] for weight in leaves.weights],
            spec=leaves.spec,
            chunk_size=leaves.chunk_size,
            retention=part(leaves.retention),
            momentum=part(leaves.momentum),
            bptt_chunks=trial.bptt_chunks,
        )
        output = output.index_put((torch.tensor([row]), torch.arange(start, start + length)), read.squeeze(0))
        finals.append(list(weights))
        speeds.append(list(momentum or ()))
    weights = tuple(torch.cat(each) for each in zip(*finals, strict=True))
    momentum = tuple(torch.cat(each) for each in zip(*speeds, strict=True))
    return named_results(trial, leaves, output, weights, momentum)


def named_results(
    trial: Trial, leaves: Problem, output: Tensor, weights: tuple[Tensor, ...], momentum: tuple[Tensor, ...]
) -> Results:
    """Output, final state and the gradients of the loss.

    The loss is ``<output, d_output> + <weights, d_weights> + <momentum, d_momentum>``.
    """
    names = leaves.spec.weight_names
    results = {"output": output}
    results |= {f"final {name}": tensor for name, tensor in zip(names, weights, strict=True)}
    results |= {f"momentum {name}": tensor for name, tensor in zip(names, momentum, strict=False)}
    given = [(output, leaves.d_output)]
    given += [(final, d.to(final)) for final, d in zip(weights, trial.d_weights, strict=True)]
    if trial.d_momentum:
        given += [(final, d.to(final)) for final, d in zip(momentum, trial.d_momentum, strict=True)]
    given = [(value, gradient) for value, gradient in given if value.requires_grad]
    inputs = leaves.inputs()
    gradients = torch.autograd.grad(
        [value for value, _ in given],
        list(inputs.values()),
        [gradient for _, gradient in given],
        allow_unused=True,
        materialize_grads=True,
    )
    results |= {f"d {name}": gradient for name, gradient in zip(inputs, gradients, strict=True)}
    return {name: value.detach() for name, value in results.items()}


def load_golden(folder: Path) -> list[Trial]:
    """Every ``*.npz`` of a folder as a trial (see the README beside the files for their contents).

    Raises:
        FileNotFoundError: there is none.
    """
    import numpy

    paths = sorted(folder.glob("*.npz"))
    if not paths:
        raise FileNotFoundError(f"no .npz file in {folder}; want a folder of golden cases such as tests/golden")
    return [_golden_trial(path, numpy.load(path)) for path in paths]


def _golden_trial(path: Path, arrays) -> Trial:
    meta = json.loads(str(arrays["meta"]))
    chunk_size = meta.pop("chunk_size")
    spec = MemorySpec(**meta)

    def tensor(name: str) -> Tensor:
        return torch.from_numpy(arrays[name])

    def optional(name: str) -> Tensor | None:
        return tensor(name) if name in arrays else None

    count = spec.weight_count
    problem = Problem(
        spec=spec,
        chunk_size=chunk_size,
        q=tensor("in.q"),
        k=tensor("in.k"),
        v=tensor("in.v"),
        lr=tensor("in.lr"),
        retention=optional("in.retention"),
        momentum=optional("in.momentum"),
        weights=tuple(tensor(f"in.weight{i}") for i in range(count)),
        d_output=tensor("in.d_output"),
    )
    truth = {"output": tensor("out.output")}
    truth |= {f"final {name}": tensor(f"out.final{i}") for i, name in enumerate(spec.weight_names)}
    if problem.momentum is not None:
        truth |= {f"momentum {name}": tensor(f"out.momentum{i}") for i, name in enumerate(spec.weight_names)}
    gates = [name for name in ("retention", "momentum") if getattr(problem, name) is not None]
    truth |= {f"d {name}": tensor(f"grad.{name}") for name in ("q", "k", "v", "lr", *gates)}
    truth |= {f"d {name}": tensor(f"grad.weight{i}") for i, name in enumerate(spec.weight_names)}
    batch, tokens = problem.q.shape[:2]
    return Trial(
        name=path.stem,
        problem=problem,
        segments=tuple((row, 0, tokens) for row in range(batch)),
        calls=(tokens,),
        layout="whole",
        bptt_chunks=None,
        d_weights=tuple(tensor(f"in.d_final{i}") for i in range(count)),
        d_momentum=(),
        truth=truth,
    )
