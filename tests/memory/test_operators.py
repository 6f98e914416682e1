"""The registered operators in PyTorch's machinery: opcheck, torch.compile, any strides, autocast."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from hope_kernels import MemorySpec, MemoryState, memory_read, memory_scan, memory_write
from tests.cases import (
    BACKENDS,
    COMPILED_BACKENDS,
    FLOAT64_BACKENDS,
    Problem,
    assert_equal_to_rounding,
    assert_within_budget,
    cotangent,
    device_of,
    evaluate,
    evaluate_oracle,
    make_problem,
    oracle_results,
    package_results,
    scan_stream,
    state_results,
)

# What is compiled in earnest is the operator; eager code, unrolled over the chunks, takes the compiler longest.
COMPILED = [pytest.param("reference", marks=pytest.mark.slow), *COMPILED_BACKENDS]


class RecordedCalls(TorchDispatchMode):
    """Calls of the package's operators, as they reach the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "hope_kernels":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def _whole_scan(problem: Problem, backend: str) -> torch.Tensor:
    return sum(r.sum() for r in package_results(problem, backend=backend, lengths=[5, 9]).values())


def _packed_scan(problem: Problem, backend: str) -> torch.Tensor:
    row = problem.row(0)
    tokens = (row["q"], row["k"], row["v"], row["lr"])
    gates = {"retention": row.get("retention"), "momentum": row.get("momentum")}
    bounds = torch.tensor([0, 5, 5, 14], device=row["q"].device)
    options = {"spec": row.spec, "chunk_size": row.chunk_size, "backend": backend, **gates}
    output, state = memory_scan(*tokens, row.weights, cu_seqlens=bounds, **options)
    return output.sum() + sum(w.sum() for w in state.weights)


def _read(problem: Problem, backend: str) -> torch.Tensor:
    return memory_read(problem["q"], problem.weights, spec=problem.spec, backend=backend).sum()


def _write(problem: Problem, backend: str) -> torch.Tensor:
    tokens = (problem["k"], problem["v"], problem["lr"])
    gates = {"retention": problem.get("retention"), "momentum": problem.get("momentum")}
    state = memory_write(*tokens, problem.weights, spec=problem.spec, backend=backend, **gates)
    return sum(w.sum() for w in state.weights)


@pytest.mark.parametrize("backend", COMPILED_BACKENDS)
@pytest.mark.parametrize("call", [_whole_scan, _packed_scan, _read, _write], ids=lambda f: f.__name__.strip("_"))
@pytest.mark.parametrize(
    ("spec", "gates"),
    [
        (MemorySpec(), {"retention": True, "momentum": True}),
        (MemorySpec("glu", "silu", rule="dgd"), {"retention": True}),
    ],
    ids=["gd", "dgd"],
)
def test_opcheck_passes_on_every_call_the_public_functions_make(spec, gates, call, backend):
    problem = make_problem(spec, chunk_size=4, tokens=14, **gates).cast(torch.float32).to(device_of(backend))
    leaves = problem.map(lambda _, t: t.requires_grad_())
    with RecordedCalls() as recorded:
        call(leaves, backend).backward()
    names = [func.name() for func, _, _ in recorded.calls]
    assert "hope_kernels::scan" in names and "hope_kernels::scan_backward" in names
    for func, args, kwargs in recorded.calls:
        forward = func.name() == "hope_kernels::scan"

        def fresh(t, forward=forward):
            return t.detach().clone().requires_grad_(forward and t.is_floating_point())

        torch.library.opcheck(func, tree_map_only(torch.Tensor, fresh, args), kwargs)


# One object: a compiled function is guarded by the identity of its spec.
COMPILED_SPEC = MemorySpec("mlp", "silu")


def _problem_of_length(tokens: int, backend: str, seed: int, **options) -> Problem:
    options = {"retention": True, **options}
    problem = make_problem(COMPILED_SPEC, chunk_size=4, tokens=tokens, dim=8, hidden=12, seed=seed, **options)
    return problem.cast(torch.float32).to(device_of(backend))


@pytest.mark.parametrize("backend", COMPILED)
def test_compiled_scan_equals_eager_at_two_dynamic_lengths_forward_and_backward(backend):
    """All of PyTorch's default compiler. The lengths have one complete chunk, so that the reference's loop has one
    graph."""

    def scan(q, k, v, lr, retention, w_in, w_out):
        out = memory_scan(
            q,
            k,
            v,
            lr,
            (w_in, w_out),
            spec=COMPILED_SPEC,
            chunk_size=8,
            retention=retention,
            backend=backend,
        )
        return out.output, *out.state.weights, out.state.pending_k, out.state.pending_retention

    torch._dynamo.reset()
    compiled = torch.compile(scan, fullgraph=True, dynamic=True)
    order = ("q", "k", "v", "lr", "retention", "weight0", "weight1")
    names = ("output", "weight0", "weight1", "pending_k", "pending_retention")
    for tokens in (11, 14):
        problem = _problem_of_length(tokens, backend, seed=tokens)

        def results(function, p):
            return dict(zip(names, function(*(p[n] for n in order)), strict=True))

        found = evaluate(problem, lambda p: results(compiled, p))
        # To what a fused elementwise pass may reorder in float32.
        assert_equal_to_rounding(found, evaluate(problem, lambda p: results(scan, p)), 5e-6)


@pytest.mark.interpreted_cases(0)
@pytest.mark.parametrize("backend", COMPILED)
def test_a_compiled_stream_of_two_calls_equals_eager(backend):
    """The state and its pending tokens pass from call to call inside one graph."""

    def stream(q, k, v, lr, retention, w_in, w_out):
        spec, options = COMPILED_SPEC, {"chunk_size": 4, "backend": backend}
        half = q.shape[1] // 2
        a, b = slice(0, half), slice(half, None)
        first = memory_scan(
            q[:, a], k[:, a], v[:, a], lr[:, a], (w_in, w_out), spec=spec, retention=retention[:, a], **options
        )
        second = memory_scan(
            q[:, b], k[:, b], v[:, b], lr[:, b], first.state, spec=spec, retention=retention[:, b], **options
        )
        return torch.cat([first.output, second.output], 1), *second.state.weights, second.state.pending_k

    torch._dynamo.reset()
    compiled = torch.compile(stream, fullgraph=True, dynamic=True, backend="aot_eager")
    order = ("q", "k", "v", "lr", "retention", "weight0", "weight1")
    names = ("output", "weight0", "weight1", "pending_k")
    for tokens in (13, 22):
        problem = _problem_of_length(tokens, backend, seed=tokens)

        def results(function, p):
            return dict(zip(names, function(*(p[n] for n in order)), strict=True))

        found = evaluate(problem, lambda p: results(compiled, p))
        assert_equal_to_rounding(found, evaluate(problem, lambda p: results(stream, p)), 1e-6)


@pytest.mark.interpreted_cases(0)
@pytest.mark.parametrize("backend", COMPILED_BACKENDS)
@pytest.mark.parametrize("gates", [{}, {"momentum": True}], ids=["plain", "momentum"])
def test_one_compiled_graph_serves_many_lengths(backend, gates):
    """Between 17 and 64 chunks the interval between checkpoints stays the same: no length costs a compilation."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(memory_scan, fullgraph=True, dynamic=True, backend=counter)
    for tokens in (74, 131, 250):
        problem = _problem_of_length(tokens, backend, seed=tokens, **gates)

        def results(function, p):
            out = function(
                *(p[n] for n in ("q", "k", "v", "lr")),
                p.weights,
                spec=p.spec,
                chunk_size=4,
                retention=p["retention"],
                momentum=p.get("momentum"),
                backend=backend,
            )
            return {"output": out.output, **state_results(out.state)}

        found = evaluate(problem, lambda p: results(compiled, p))
        assert_equal_to_rounding(found, evaluate(problem, lambda p: results(memory_scan, p)), 1e-6)
    assert counter.frame_count == 1, "recompiled for another length"


@pytest.mark.interpreted_cases(0)
@pytest.mark.parametrize("backend", COMPILED_BACKENDS)
def test_a_state_crosses_the_border_of_a_compiled_function(backend):
    """One compiled call per step, the state carried outside of it, gradients through all of them."""

    def step(q, k, v, lr, state):
        return memory_scan(q, k, v, lr, state, spec=COMPILED_SPEC, chunk_size=4, backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")

    def results(function, p):
        state = MemoryState.initial(p.weights, spec=p.spec, chunk_size=4, batch_size=2)
        outputs = []
        for start, stop in ((0, 6), (6, 13), (13, 22)):
            part = p.span(start, stop)
            output, state = function(*(part[n] for n in ("q", "k", "v", "lr")), state)
            outputs.append(output)
        assert state.position == 22
        return {"output": torch.cat(outputs, 1), **state_results(state)}

    problem = _problem_of_length(22, backend, seed=0, retention=False)
    found, expected = evaluate(problem, lambda p: results(compiled, p)), evaluate(problem, lambda p: results(step, p))
    assert_equal_to_rounding(found, expected, 1e-6)


@pytest.mark.parametrize("backend", COMPILED_BACKENDS)
@pytest.mark.parametrize("layout", ["cu_seqlens", "valid"])
def test_compiled_packed_and_padded_calls_equal_eager(backend, layout):
    def packed(q, k, v, lr, retention, w_in, w_out, where):
        out = memory_scan(
            q,
            k,
            v,
            lr,
            (w_in, w_out),
            spec=COMPILED_SPEC,
            chunk_size=4,
            retention=retention,
            backend=backend,
            **{layout: where},
        )
        return out.output, *out.state.weights, out.state.pending_k

    torch._dynamo.reset()
    compiled = torch.compile(packed, fullgraph=True, dynamic=True, backend="aot_eager")
    order, names = (
        ("q", "k", "v", "lr", "retention", "weight0", "weight1"),
        ("output", "weight0", "weight1", "pending_k"),
    )
    for tokens in (13, 22):
        problem = _problem_of_length(tokens, backend, seed=tokens, batch=1 if layout == "cu_seqlens" else 2)
        where = [0, 5, 5, tokens] if layout == "cu_seqlens" else [[0, tokens], [3, tokens - 1]]
        where = torch.tensor(where, dtype=torch.int32, device=problem["q"].device)

        def results(function, p, where=where):
            return dict(zip(names, function(*(p[n] for n in order), where), strict=True))

        found, expected = (
            evaluate(problem, lambda p: results(compiled, p)),
            evaluate(problem, lambda p: results(packed, p)),
        )
        assert_equal_to_rounding(found, expected, 1e-6)


# What autograd may hand to a backward: each view of a result gives the result's gradient other strides.
VIEWS = {
    "expanded": lambda x: x.sum().reshape(1),
    "expanded over tokens": lambda x: x.sum(1),
    "transposed": lambda x: x.transpose(-1, -2).contiguous() if x.dim() > 3 else x.transpose(0, 1).contiguous(),
    "permuted": lambda x: x.permute(*reversed(range(x.dim()))).reshape(-1),
    "sliced": lambda x: x[:, ::2],
    "cat": lambda x: torch.cat([x, x.flip(0)], dim=-1),
}


@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("rule", ["gd", "dgd"])
def test_gradients_of_any_strides(rule, view, backend):
    gates = {"retention": True, "momentum": rule == "gd"}
    problem = make_problem(MemorySpec(rule=rule), chunk_size=3, tokens=11, **gates)

    def viewed(results):
        return {name: VIEWS[view](value) for name, value in results.items()}

    found = evaluate(problem, lambda p: viewed(package_results(p, backend=backend)))
    assert_equal_to_rounding(found, evaluate(problem, lambda p: viewed(oracle_results(p))))


@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
@pytest.mark.parametrize("used", ["output", "weight0", "weight1", "momentum0", "pending_k", "pending_lr"])
def test_a_loss_of_one_result_alone(used, backend):
    problem = make_problem(MemorySpec(), chunk_size=3, tokens=11, retention=True, momentum=True)

    def only(results):
        return {used: results[used]}

    found = evaluate(problem, lambda p: only(package_results(p, backend=backend)))
    assert_equal_to_rounding(found, evaluate(problem, lambda p: only(oracle_results(p))))


LAYOUTS = {
    "heads first in memory": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "features first in memory": lambda t: t.transpose(1, -1).contiguous().transpose(1, -1),
    "slice of a fused projection": lambda t: torch.cat([t, t, t], dim=-1)[..., t.shape[-1] : 2 * t.shape[-1]],
    "every second token": lambda t: torch.stack([t, torch.full_like(t, float("nan"))], dim=2).flatten(1, 2)[:, ::2],
    "batch last in memory": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
}


@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokens_and_gates_of_any_strides(layout, backend):
    problem = make_problem(MemorySpec(), chunk_size=3, tokens=11, retention=True, momentum=True)
    arranged = problem.map(lambda name, t: LAYOUTS[layout](t) if not name.startswith("weight") else t)
    assert any(not t.is_contiguous() for t in arranged.tensors.values())
    for name, t in arranged.tensors.items():
        assert torch.equal(t, problem[name])

    def results(p):  # arranged inside the graph: gradients come back through the views
        return package_results(
            p.map(lambda name, t: LAYOUTS[layout](t) if not name.startswith("weight") else t), backend=backend
        )

    assert_equal_to_rounding(evaluate(problem, results), evaluate_oracle(problem))


@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
def test_one_tensor_as_query_key_and_value_and_gates_expanded_over_everything(backend):
    problem = make_problem(MemorySpec(objective="self"), chunk_size=3, tokens=11)
    one = Problem(problem.spec, 3, {"q": problem["q"], "lr": torch.full((1, 1, 1), 0.3).double(), **_weights(problem)})

    def spread(p):
        return p.with_tensors(k=p["q"], v=p["q"], lr=p["lr"].expand(2, 11, 2))

    found = evaluate(one, lambda p: package_results(spread(p), backend=backend))
    assert_equal_to_rounding(found, evaluate(one, lambda p: oracle_results(spread(p))))


def _weights(problem: Problem) -> dict[str, torch.Tensor]:
    return {f"weight{i}": w for i, w in enumerate(problem.weights)}


@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("batch", "tokens"), [(0, 9), (0, 0), (2, 0), (2, 1), (2, 3), (2, 4)])
def test_no_rows_no_tokens_one_token_and_less_than_a_chunk(batch, tokens, shared, backend):
    problem = make_problem(
        MemorySpec(), chunk_size=4, batch=batch, tokens=tokens, shared=shared, retention=True, momentum=True
    )
    found = evaluate(problem, lambda p: package_results(p, backend=backend))
    assert_equal_to_rounding(found, evaluate_oracle(problem), 1e-12)
    _, state = scan_stream(problem, [tokens], backend=backend)
    assert state.position == tokens and state.batch_size == batch


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_tokens_and_leaves_gates_and_state_in_float32(dtype, backend):
    device = device_of(backend)
    problem = make_problem(MemorySpec(), chunk_size=4, tokens=11, retention=True, momentum=True)
    problem = problem.cast(torch.float32).to(device)

    def under_autocast(p):
        with torch.autocast(device.type, dtype=dtype):
            results = package_results(p, backend=backend)
        assert results["output"].dtype == dtype and results["pending_k"].dtype == dtype
        assert all(
            r.dtype == torch.float32 for n, r in results.items() if n.startswith(("weight", "momentum", "pending_lr"))
        )
        return results

    def by_hand(p):
        return package_results(p.map(lambda n, t: t.to(dtype) if n in ("q", "k", "v") else t), backend=backend)

    found, expected = evaluate(problem, under_autocast).named(), evaluate(problem, by_hand).named()
    for name, want in expected.items():
        assert found[name].dtype == want.dtype, name
        assert torch.equal(found[name], want), name


@pytest.mark.parametrize("backend", COMPILED_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)
def test_autocast_with_low_precision_inputs_and_float32_rates_from_a_linear_layer(dtype, backend):
    """Under autocast a projection of the tokens gives its gates in low precision: they are brought back to float32."""
    device = device_of(backend)
    problem = make_problem(MemorySpec(), chunk_size=4, tokens=11, max_lr=0.1).cast(dtype).to(device)
    low = problem.with_tensors(lr=problem["lr"].to(dtype))

    def under_autocast(p, name=backend):
        with torch.autocast(device.type, dtype=dtype):
            return package_results(p, backend=name)

    truth = evaluate_oracle(low)
    eager = evaluate(low, lambda p: under_autocast(p, "reference"))
    assert_within_budget(evaluate(low, under_autocast), eager, truth, dtype)


@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
def test_a_backward_may_run_twice_and_accumulate(backend):
    problem = make_problem(MemorySpec(), chunk_size=3, tokens=11)
    leaves = problem.map(lambda _, t: t.clone().requires_grad_())
    results = package_results(leaves, backend=backend)
    loss = sum((value * cotangent(name, value)).sum() for name, value in results.items())
    loss.backward(retain_graph=True)
    once = {name: t.grad.clone() for name, t in leaves.tensors.items()}
    loss.backward()
    for name, t in leaves.tensors.items():
        assert torch.equal(t.grad, 2 * once[name]), name
