"""Hypothesis strategies: specs, problems of odd sizes, and splits of a sequence into calls."""

from __future__ import annotations

from hypothesis import strategies as st

from hope_kernels import MemorySpec
from tests.cases import Problem, make_problem

specs = st.builds(
    MemorySpec,
    form=st.sampled_from(["linear", "mlp", "glu"]),
    activation=st.sampled_from(["gelu_tanh", "gelu", "silu", "relu2"]),
    residual=st.booleans(),
    objective=st.sampled_from(["l2", "dot", "error", "self"]),
    rule=st.sampled_from(["gd", "dgd"]),
)


@st.composite
def problems(
    draw: st.DrawFn,
    min_batch: int = 1,
    max_batch: int = 3,
    max_heads: int = 3,
    max_tokens: int = 14,
    zero_gates: bool = True,
) -> Problem:
    """Any spec, any gates it allows, odd sizes. Some gates are exactly 0."""
    spec = draw(specs)
    momentum = spec.rule == "gd" and draw(st.booleans())
    problem = make_problem(
        spec,
        chunk_size=draw(st.integers(1, 6)),
        batch=draw(st.integers(min_batch, max_batch)),
        tokens=draw(st.integers(0, max_tokens)),
        heads=draw(st.integers(1, max_heads)),
        dim=draw(st.integers(1, 7)),
        hidden=draw(st.integers(1, 9)),
        retention=draw(st.booleans()),
        momentum=momentum,
        initial_momentum=momentum and draw(st.booleans()),
        shared=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )
    if zero_gates and draw(st.booleans()):
        # Every third entry, starting somewhere else in each gate: zeros meet non-zeros of the other gates.
        shift = draw(st.integers(0, 2))

        def with_zeros(name, t):
            offset = {"lr": 0, "retention": 1, "momentum": 2}.get(name)
            if offset is None:
                return t
            t = t.clone()
            t.view(-1)[(shift + offset) % 3 :: 3] = 0
            return t

        problem = problem.map(with_zeros)
    return problem


@st.composite
def splits(draw: st.DrawFn, tokens: int, chunk_size: int) -> list[int]:
    """Lengths of calls that add up to `tokens`: single tokens, ragged, straddling chunks, shorter than one, empty
    calls."""
    kind = draw(st.sampled_from(["ones", "ragged", "straddling", "short"]))
    if kind == "ones":
        lengths = [1] * tokens
    elif kind == "ragged":
        cuts = sorted(draw(st.lists(st.integers(0, tokens), max_size=5)))
        lengths = [b - a for a, b in zip([0, *cuts], [*cuts, tokens], strict=True)]
    else:
        step = chunk_size + draw(st.integers(1, chunk_size)) if kind == "straddling" else max(1, chunk_size - 1)
        lengths = [step] * (tokens // step) + ([tokens % step] if tokens % step else [])
    if draw(st.booleans()):
        lengths.insert(draw(st.integers(0, len(lengths))), 0)
    return lengths or [0]


@st.composite
def split_problems(draw: st.DrawFn, **options) -> tuple[Problem, list[int]]:
    problem = draw(problems(**options))
    return problem, draw(splits(problem.tokens, problem.chunk_size))
