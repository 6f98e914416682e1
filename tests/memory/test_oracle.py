"""The oracle against the golden cases and finite differences: the truth is checked before it judges anything."""

from __future__ import annotations

import pytest
import torch

from hope_kernels import MemorySpec
from tests import oracle
from tests.cases import evaluate, evaluate_oracle, make_problem, oracle_results
from tests.golden_cases import GOLDEN, load_golden


@pytest.mark.parametrize("name", GOLDEN)
def test_oracle_reproduces_the_golden_values_and_gradients(name):
    case = load_golden(name)
    found = case.evaluate(oracle_results)
    case.assert_matches(found, tolerance=1e-12)


@pytest.mark.parametrize(
    ("spec", "gates"),
    [
        (
            MemorySpec("mlp", "gelu_tanh", True, "l2", "gd"),
            {"momentum": True, "retention": True, "initial_momentum": True},
        ),
        (MemorySpec("glu", "silu", False, "self", "gd"), {"momentum": True}),
        (MemorySpec("glu", "gelu", True, "self", "dgd"), {"retention": True}),
        (MemorySpec("linear", "gelu", True, "self", "dgd"), {}),
    ],
    ids=lambda x: x.key.replace("/", "-") if isinstance(x, MemorySpec) else "+".join(x) or "plain",
)
def test_oracle_gradients_agree_with_finite_differences_where_no_golden_case_reaches(spec, gates):
    problem = make_problem(spec, chunk_size=2, batch=1, tokens=5, heads=1, dim=2, hidden=3, **gates)
    names = list(problem.tensors)

    def results(*tensors):
        return tuple(oracle_results(problem.with_tensors(**dict(zip(names, tensors, strict=True)))).values())

    inputs = [t.clone().requires_grad_() for t in problem.tensors.values()]
    assert torch.autograd.gradcheck(results, inputs)


def test_oracle_bptt_of_one_chunk_equals_restarting_from_detached_weights_every_chunk():
    spec = MemorySpec()
    problem = make_problem(spec, chunk_size=3, tokens=9)

    def restarted(p):
        state, outputs = p.weights, []
        for start in range(0, 9, 3):
            part = p.span(start, start + 3)
            output, state, _ = oracle.scan(part["q"], part["k"], part["v"], part["lr"], state, spec=spec, chunk_size=3)
            state = tuple(w.detach() for w in state)
            outputs.append(output)
        return {"output": torch.cat(outputs, 1), **{f"weight{i}": w for i, w in enumerate(state)}}

    cut, expected = evaluate_oracle(problem, bptt_chunks=1), evaluate(problem, restarted)
    for name, want in expected.named().items():
        assert torch.equal(cut.named()[name], want), name
    assert cut.gradients["k"].abs().max() == 0  # n = 1 trains only reads and the initial state
    assert cut.gradients["weight0"].abs().max() > 0
