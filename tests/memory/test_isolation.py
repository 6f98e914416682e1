"""NaN and inf in one sequence stay in its outputs, states and gradients, and are not hidden there either."""

from __future__ import annotations

import pytest
import torch

from hope_kernels import MemorySpec, memory_scan
from tests.cases import BACKENDS, PENDING, Problem, device_of, evaluate, make_problem, package_results

SPECS = [
    MemorySpec("mlp", "gelu_tanh"),
    MemorySpec("mlp", "gelu", rule="dgd"),
    MemorySpec("glu", "silu", objective="self", rule="dgd"),
    MemorySpec("mlp", "relu2", False, "dot"),
    MemorySpec("linear", objective="self"),
]
BAD_ROW, CLEAN_ROWS = 1, [0, 2]
NAN, INF = float("nan"), float("inf")


def spec_id(spec: MemorySpec) -> str:
    return spec.key.replace("/", "-")


def problem_of(spec: MemorySpec) -> Problem:
    momentum = spec.rule == "gd"
    problem = make_problem(
        spec,
        chunk_size=4,
        batch=3,
        tokens=14,
        retention=True,
        momentum=momentum,
        initial_momentum=momentum,
        shared=False,
    )
    return problem.cast(torch.float32)


def spoil(problem: Problem, name: str, value: float) -> Problem:
    """One bad number in the middle row, in the second of three complete chunks (or in its initial state)."""
    t = problem[name].clone()
    t[(BAD_ROW, 5) if t.shape[1] == problem.tokens else BAD_ROW].view(-1)[0] = value
    return problem.with_tensors(**{name: t})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize(
    ("spec", "name"),
    [
        pytest.param(spec, name, id=f"{spec_id(spec)}-{name}")
        for spec in SPECS
        for name in ("q", "k", "v", "lr", "retention", "weight0")
        + (("momentum", "initial_momentum0") if spec.rule == "gd" else ())
    ],
)
def test_a_bad_number_stays_in_its_sequence(spec, name, value, backend):
    problem = problem_of(spec).to(device_of(backend))

    def results(p):
        return package_results(p, backend=backend)

    found, clean = evaluate(spoil(problem, name, value), results).named(), evaluate(problem, results).named()
    for result, want in clean.items():
        got = found[result]
        assert torch.isfinite(got[CLEAN_ROWS]).all(), f"{result} of another row is not finite"
        assert torch.equal(got[CLEAN_ROWS], want[CLEAN_ROWS]), f"{result} of another row changed"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["k", "v", "lr", "retention"])
@pytest.mark.parametrize("spec", [s for s in SPECS if s.objective != "dot"], ids=spec_id)
def test_nan_reaches_everything_written_after_it(spec, name, backend):
    """A diverged memory must be seen to be one: no clamp, maximum or comparison may swallow the NaN."""
    problem = spoil(problem_of(spec), name, NAN).to(device_of(backend))
    values = evaluate(problem, lambda p: package_results(p, backend=backend)).values
    assert torch.isfinite(values["output"][BAD_ROW, :8]).all(), "a write was seen inside its own chunk"
    assert torch.isnan(values["output"][BAD_ROW, 8:, 0]).all()
    for i in range(spec.weight_count):
        assert torch.isnan(values[f"weight{i}"][BAD_ROW, 0]).any(), f"weight{i}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu", "silu", "relu2"])
@pytest.mark.parametrize("form", ["mlp", "glu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_every_activation_passes_nan_on_and_is_right_for_large_numbers(form, activation, dtype, backend):
    if dtype == torch.float64 and backend not in ("reference", "cpu"):
        pytest.skip(f"{backend} has no float64")
    spec = MemorySpec(form, activation, residual=False)
    problem = make_problem(spec, chunk_size=32, batch=1, tokens=9, heads=1, dim=1, hidden=1).cast(dtype)
    inputs = torch.tensor([NAN, -1e4, -100.0, -12.0, 0.0, 12.0, 100.0, 1e4, 1.0], dtype=dtype)
    ones = {f"weight{i}": torch.ones_like(w) for i, w in enumerate(problem.weights)}
    problem = problem.with_tensors(q=inputs.view(1, 9, 1, 1), **ones).to(device_of(backend))
    output = package_results(problem, backend=backend)["output"].flatten().cpu().double()
    assert torch.isnan(output[0]) and torch.isfinite(output[1:]).all()
    negative, zero, positive = output[1:4], output[4], output[5:8]
    exact = inputs[5:8].double() ** (2 if activation == "relu2" else 1) * (inputs[5:8].double() if form == "glu" else 1)
    assert zero == 0 and (negative.abs() <= (1.3e-3 if form == "glu" else 1e-4)).all()
    # 12 * sigmoid(12) is 7e-5 short of 12; low precision rounds the squares.
    assert ((positive - exact).abs() <= (1e-5 + 2 * torch.finfo(dtype).eps) * exact).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [NAN, INF], ids=str)
@pytest.mark.parametrize("name", ["q", "k", "v", "lr", "retention"])
def test_a_bad_number_stays_in_its_packed_sequence(name, value, backend):
    problem = make_problem(MemorySpec("mlp", "silu"), chunk_size=4, batch=1, tokens=21, retention=True)
    problem = problem.cast(torch.float32).to(device_of(backend))
    offsets = torch.tensor([0, 7, 14, 21], device=problem["q"].device)
    own = {f"weight{i}": w.expand(3, *w.shape).clone() for i, w in enumerate(problem.weights)}
    problem = problem.with_tensors(**own)
    clean_tokens = [*range(7), *range(14, 21)]

    def results(p):
        output, state = memory_scan(
            *(p[n] for n in ("q", "k", "v", "lr")),
            p.weights,
            spec=p.spec,
            chunk_size=4,
            retention=p["retention"],
            cu_seqlens=offsets,
            backend=backend,
        )
        pending = {n: getattr(state, n)[:, :3] for n in PENDING if getattr(state, n) is not None}
        return {"output": output, **{f"weight{i}": w for i, w in enumerate(state.weights)}, **pending}

    bad = problem[name].clone()
    bad[0, 9].view(-1)[0] = value
    found = evaluate(problem.with_tensors(**{name: bad}), results).named()
    clean = evaluate(problem, results).named()
    for result, want in clean.items():
        index = (0, clean_tokens) if want.shape[0] == 1 else (CLEAN_ROWS,)
        assert torch.isfinite(found[result][index]).all(), f"{result} of another sequence is not finite"
        assert torch.equal(found[result][index], want[index]), f"{result} of another sequence changed"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bad_outer_gradient_stays_in_its_sequence(backend):
    problem = problem_of(SPECS[0]).to(device_of(backend))

    def gradients(value: float) -> dict[str, torch.Tensor]:
        leaves = problem.map(lambda _, t: t.clone().requires_grad_())
        output = package_results(leaves, backend=backend)["output"]
        d_output = torch.linspace(-1, 1, output.numel(), device=output.device).view_as(output).clone()
        d_output[BAD_ROW, 6, 0, 0] += value
        found = torch.autograd.grad(output, list(leaves.tensors.values()), d_output, allow_unused=True)
        return dict(zip(leaves.tensors, found, strict=True))

    found, clean = gradients(NAN), gradients(0.0)
    for name, want in clean.items():
        assert torch.equal(found[name][CLEAN_ROWS], want[CLEAN_ROWS]), name
    assert torch.isnan(found["k"][BAD_ROW, :4]).any() and torch.isnan(found["weight0"][BAD_ROW]).any()
