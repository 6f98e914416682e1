"""The CUDA engine's backward scan, run on the CPU: gradients against float64, exact equalities, refusals, barriers."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hope_kernels import MemorySpec, memory_read, memory_scan, memory_write
from hope_kernels.backends.interface import ScanGradients
from tests.cases import Evaluation, Problem, assert_within_budget, evaluate, evaluate_package, make_problem
from tests.cuda_host import build, scan
from tests.cuda_host.forward_cases import (
    FORMS,
    HALVES,
    ONE_FORM,
    ONE_HALF,
    assert_identical,
    exact,
    needs_host_layer,
    needs_thread_sanitizer,
    slow,
    small,
    with_mild_retention,
)
from tests.golden_cases import GOLDEN, load_golden

pytestmark = needs_host_layer
QUICK_GOLDEN = ["mlp_carried_state", "mlp_gd_momentum", "glu_gd_dot_momentum", "mlp_dgd_retention"]
KERNEL = [build.ROOT / "csrc/cuda" / f"backward_{part}.h" for part in ("block", "products", "scan")]
DELTA_RULE = [build.ROOT / "csrc/cuda/backward_delta_rule.h"]
SUMS = build.ROOT / "csrc/cuda/scan_sum.h"
# Momentum, or the other rule, in problems of `small`; the steps of dgd make its corrections as large as the errors.
MOMENTUM = ("gd", {"momentum": True})
DELTA = ("dgd", {"max_lr": 0.4})
# A memory of an mlp that two blocks hold together.
SPREAD = ("gd", {"dim": 72, "hidden": 136})


def assert_close_to_truth(problem: Problem, dtype: torch.dtype, **options) -> None:
    """Values and gradients within twice the eager reference's error and one rounding, both against float64."""
    problem = problem.cast(dtype)
    parts = [(problem, "cpu"), (problem, "reference"), (exact(problem), "reference")]
    assert_within_budget(*(evaluate_package(part, name, **options) for part, name in parts), dtype)


def flat(gradients: ScanGradients) -> dict[str, Tensor]:
    named = {name: x for name, x in gradients._asdict().items() if isinstance(x, Tensor)}
    for name in ("weights", "momentum"):
        named |= {f"{name}{i}": x for i, x in enumerate(getattr(gradients, name))}
    return named


# ---- values ----------------------------------------------------------------------------------------------------------

SIZES = [
    # form, dim, hidden, chunk_size, tokens
    ("mlp", 64, 256, 16, 53),
    ("mlp", 64, 256, 40, 85),
    ("mlp", 64, 256, 64, 133),  # what threads keep of a chunk is in the workspace
    ("mlp", 32, 128, 16, 83),  # five chunks, two checkpoints
    ("mlp", 32, 128, 90, 91),
    ("mlp", 64, 128, 40, 85),
    ("mlp", 64, 128, 64, 65),
    ("mlp", 5, 6, 4, 11),
    ("mlp", 17, 129, 7, 24),
    ("mlp", 33, 20, 1, 5),
    ("mlp", 128, 128, 16, 53),  # one block, and clusters of 2, 4 and 8
    ("mlp", 128, 256, 40, 85),
    ("mlp", 128, 256, 64, 67),  # what threads keep of a chunk is in the workspace
    ("mlp", 128, 512, 16, 37),
    ("mlp", 65, 10, 7, 24),
    ("mlp", 20, 300, 5, 11),  # one block has no hidden units of its own
    ("mlp", 64, 1024, 16, 17),
    ("glu", 32, 128, 16, 83),
    ("glu", 64, 128, 40, 85),
    ("glu", 64, 128, 64, 133),  # what threads keep of a chunk is in the workspace
    ("glu", 5, 6, 4, 11),
    ("glu", 17, 100, 7, 24),
    ("glu", 33, 20, 1, 5),
]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("rule", "momentum"), [("gd", False), ("gd", True), ("dgd", False)])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_any_size_that_fits_stays_within_twice_the_eager_error(host, sizes, rule, momentum, dtype):
    form, dim, hidden, chunk_size, tokens = sizes
    sizes = {"dim": dim, "hidden": hidden, "chunk_size": chunk_size, "tokens": tokens}
    sizes |= {"batch": 1, "heads": 1 if dim * hidden > 4096 else 2, "max_lr": 0.1 if rule == "gd" else 0.4}
    spec = MemorySpec(form, rule=rule)
    problem = make_problem(spec, retention=True, momentum=momentum, initial_momentum=momentum, **sizes)
    large = momentum and dim > 32 if form == "glu" else (momentum or rule == "dgd") and (hidden > 128 or dim > 64)
    if large:
        with pytest.raises(scan.Refused, match="no registers for momentum"):
            evaluate_package(problem.cast(dtype), "cpu")
    else:
        assert_close_to_truth(with_mild_retention(problem), dtype)


ALL_SPECS = [
    MemorySpec(form, activation, residual=activation in ("gelu_tanh", "relu2"), objective=objective)
    for form in ("mlp", "glu")
    for objective in ("l2", "dot", "error", "self")
    for activation in ("gelu_tanh", "gelu", "silu", "relu2")
]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("spec", ALL_SPECS, ids=lambda spec: f"{spec.form}-{spec.objective}-{spec.activation}")
def test_every_objective_and_activation(host, spec, dtype):
    for rule, options in (("gd", {}), MOMENTUM, DELTA, *([SPREAD] if spec.form == "mlp" else [])):
        # With seed 0 a product is 3e-5 before the second write of dgd, and relu2's second derivative jumps at 0.
        seed = int(rule == "dgd" and spec.activation == "relu2")
        assert_close_to_truth(small(replace(spec, rule=rule), batch=1, seed=seed, **options), dtype)


@pytest.mark.parametrize(
    ("spec", "momentum", "dtype"),
    [
        (MemorySpec("mlp"), False, torch.float16),
        (MemorySpec("mlp", "silu", residual=False, objective="self"), True, torch.bfloat16),
        (MemorySpec("mlp", "gelu", objective="dot"), True, torch.float16),
        (MemorySpec("mlp", "relu2", objective="error"), False, torch.bfloat16),
        (MemorySpec("glu"), False, torch.bfloat16),
        (MemorySpec("glu", "silu", residual=False, objective="self"), True, torch.float16),
        (MemorySpec("mlp", rule="dgd"), False, torch.float16),
        (MemorySpec("mlp", "silu", residual=False, objective="self", rule="dgd"), False, torch.bfloat16),
        (MemorySpec("mlp", "gelu", objective="dot", rule="dgd"), False, torch.bfloat16),
        (MemorySpec("glu", "relu2", objective="error", rule="dgd"), False, torch.float16),
    ],
    ids=[
        *("l2", "self", "dot", "error", "glu-l2", "glu-self"),
        *("dgd-l2", "dgd-self", "dgd-dot", "dgd-glu-error"),
    ],
)
def test_an_objective_with_some_activation(host, spec, momentum, dtype):
    max_lr = 0.1 if spec.rule == "gd" else 0.4
    assert_close_to_truth(small(spec, batch=1, momentum=momentum, initial_momentum=momentum, max_lr=max_lr), dtype)


def test_a_memory_that_two_blocks_hold(host):
    problem = small(MemorySpec("mlp"), batch=1, chunk_size=12, tokens=26, **SPREAD[1])
    assert_close_to_truth(problem, torch.float16)


@pytest.mark.parametrize("dtype", ONE_HALF, ids=str)
@pytest.mark.parametrize(
    "name",
    [n if n in QUICK_GOLDEN else slow(n) for n in GOLDEN if n.startswith(("mlp", "glu"))],
)
def test_golden_cases(host, name, dtype):
    """The truth is the stored one: tokens and weights are rounded to `dtype` first for the eager path as for this one,
    so what rounding the inputs does to the gradients is in the budget."""
    case = load_golden(name)
    problem = case.problem.cast(dtype)

    def run(backend: str) -> Evaluation:
        def compute(part: Problem) -> dict[str, Tensor]:
            output, state = memory_scan(
                *(part[name] for name in ("q", "k", "v", "lr")),
                part.memory(),
                spec=part.spec,
                chunk_size=part.chunk_size,
                retention=part.get("retention"),
                momentum=part.get("momentum"),
                backend=backend,
            )
            named = {f"weight{i}": w for i, w in enumerate(state.weights)}
            named |= {f"momentum{i}": m for i, m in enumerate(state.momentum or ())}
            return {"output": output} | named

        found = evaluate(problem, compute, case.cotangents)
        return Evaluation(*({key: part[key] for key in want} for part, want in zip(found, case.expected, strict=True)))

    assert_within_budget(run("cpu"), run("reference"), case.expected, dtype)


@pytest.mark.parametrize("zeros", [0, 2])
def test_delta_gradient_descent_without_retention_and_with_retention_of_zero(host, zeros):
    problem = small(MemorySpec("mlp", rule="dgd"), batch=1, max_lr=0.4, retention=zeros > 0)
    if zeros:
        problem["retention"][:, 5], problem["retention"][:, 27] = 0.0, 0.0
    assert_close_to_truth(problem, torch.bfloat16)


def test_delta_gradient_descent_on_keys_that_are_all_the_same(host):
    """Every token corrects the others' errors: little is left of them."""
    problem = small(MemorySpec("mlp", rule="dgd"), batch=1, tokens=40, max_lr=0.4)
    problem.tensors["k"] = problem["k"][:, :1].expand_as(problem["k"]).clone()
    assert_close_to_truth(problem, torch.bfloat16)


# ---- ways to call ----------------------------------------------------------------------------------------------------

WAYS = [
    *(("mlp", *MOMENTUM), ("mlp", *DELTA)),
    *(slow("glu", *MOMENTUM), slow("glu", *DELTA), slow("mlp", *SPREAD)),
]


@pytest.mark.parametrize(("form", "rule", "options"), WAYS)
@pytest.mark.parametrize("bptt_chunks", [1, 2])
def test_gradients_stop_where_the_state_is_detached(host, bptt_chunks, form, rule, options):
    problem = small(MemorySpec(form, rule=rule), batch=1, tokens=86, **options)
    assert_close_to_truth(problem, torch.bfloat16, bptt_chunks=bptt_chunks)


@pytest.mark.parametrize(("form", "rule", "options"), WAYS)
def test_gradients_flow_through_carried_states_and_pending_tokens(host, form, rule, options):
    problem = small(MemorySpec(form, rule=rule), batch=2, **options)
    assert_close_to_truth(problem, torch.bfloat16, lengths=[3, 7, 1, 35])


@pytest.mark.parametrize("form", ONE_FORM)
def test_tokens_of_any_stride_and_alignment(host, form):
    problem = small(MemorySpec(form), batch=2).cast(torch.bfloat16)

    def spread(name: str, t: Tensor) -> Tensor:
        if name not in ("q", "k", "v"):
            return t
        wide = torch.full((*t.shape[:3], 3 * t.shape[3]), torch.nan, dtype=t.dtype)
        return wide[..., 3 : 3 + t.shape[3]].copy_(t)

    evaluate_package(problem, "cpu")
    (expected,) = map(flat, host.gradients)
    problem, saved, grad_output, *rest = host.arguments
    for name in ("q", "k", "v"):
        setattr(problem, name, spread(name, getattr(problem, name)))
    host.arguments = problem, saved, spread("q", grad_output), *rest
    assert_identical(flat(host.again()), expected)


@pytest.mark.parametrize(("form", "rule", "options"), WAYS)
@pytest.mark.parametrize("kind", ["packed", slow("padded")])
def test_packed_and_padded_sequences_are_what_they_are_alone(host, kind, form, rule, options):
    problem = small(MemorySpec(form, rule=rule), batch=4, shared=False, **options).cast(torch.bfloat16)
    rows = [(0, 46), (3, 22), (40, 46), (7, 7)]
    weight_names = [name for name in problem.tensors if name.startswith("weight")]
    names = [name for name in problem.tensors if name not in weight_names]

    def loss(output: Tensor, state) -> Tensor:
        return output.float().square().sum() + sum(w.square().sum() for w in (*state.weights, *(state.momentum or ())))

    def gradients(tensors: dict[str, Tensor], weights, **layout) -> dict[str, Tensor]:
        leaves = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}
        weights = [w.detach().clone().requires_grad_() for w in weights]
        output, state = memory_scan(
            *(leaves[name] for name in ("q", "k", "v", "lr")),
            weights,
            spec=problem.spec,
            chunk_size=problem.chunk_size,
            retention=leaves["retention"],
            momentum=leaves.get("momentum"),
            backend="cpu",
            **layout,
        )
        found = torch.autograd.grad(loss(output, state), [*leaves.values(), *weights], materialize_grads=True)
        return dict(zip([*leaves, *weight_names], found, strict=True))

    tensors = {name: problem[name] for name in names}
    if kind == "padded":
        found = gradients(tensors, problem.weights, valid=torch.tensor(rows, dtype=torch.int32))
    else:
        tensors = {
            name: torch.cat([t[b : b + 1, s:e] for b, (s, e) in enumerate(rows)], 1) for name, t in tensors.items()
        }
        ends = torch.tensor([0, *(end - start for start, end in rows)]).cumsum(0)
        found = gradients(tensors, problem.weights, cu_seqlens=ends)
    first = 0
    for b, (start, end) in enumerate(rows):
        if start == end:
            continue
        part = {name: problem[name][b : b + 1, start:end] for name in names}
        alone = gradients(part, [w[b : b + 1] for w in problem.weights])
        for name in names:
            if kind == "padded":
                outside = torch.cat([found[name][b, :start], found[name][b, end:]])
                assert torch.equal(outside, torch.zeros_like(outside)), name
            here = found[name][b, start:end] if kind == "padded" else found[name][0, first : first + end - start]
            assert torch.equal(here, alone[name][0]), f"{name} of sequence {b}"
        for name in weight_names:
            if end - start < problem.chunk_size:
                # Alone such a sequence writes nothing, and what reaches its final state is added outside the kernel.
                torch.testing.assert_close(found[name][b], alone[name][0], rtol=1e-5, atol=1e-6)
            else:
                assert torch.equal(found[name][b], alone[name][0]), f"{name} of sequence {b}"
        first += end - start


@pytest.mark.parametrize(
    ("form", "rule", "options"),
    [("mlp", "gd", {}), ("mlp", "dgd", {}), slow("glu", "gd", {}), slow("glu", "dgd", {}), slow("mlp", *SPREAD)],
)
def test_reads_alone_and_writes_alone(host, form, rule, options):
    problem = small(MemorySpec(form, rule=rule), batch=1, tokens=150, **options).cast(torch.bfloat16)

    def read(part: Problem, backend: str) -> Evaluation:
        return evaluate(part, lambda p: {"output": memory_read(p["q"], p.weights, spec=p.spec, backend=backend)})

    def write(part: Problem, backend: str) -> Evaluation:
        def compute(p: Problem) -> dict[str, Tensor]:
            gates = {"retention": p["retention"]}
            state = memory_write(p["k"], p["v"], p["lr"], p.weights, spec=p.spec, backend=backend, **gates)
            return {f"weight{i}": w for i, w in enumerate(state.weights)}

        return evaluate(part.span(0, 20), compute)

    for run in (read, write):
        assert_within_budget(
            run(problem, "cpu"), run(problem, "reference"), run(exact(problem), "reference"), torch.bfloat16
        )


# ---- exact equalities ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("form", "rule"), [("mlp", "gd"), ("mlp", "dgd"), ("glu", "gd"), ("glu", "dgd")])
def test_what_is_absent_counts_as_zero_and_what_is_unwanted_changes_nothing(host, form, rule):
    momentum = rule == "gd"
    problem = small(MemorySpec(form, rule=rule), batch=1, momentum=momentum, initial_momentum=momentum, tokens=86)
    problem = problem.cast(torch.bfloat16)
    evaluate_package(problem, "cpu", lengths=[3, 83])
    assert len(host.gradients) == 2
    host.gradients.clear()
    evaluate_package(problem, "cpu")
    problem, saved, *upstream = host.arguments
    expected = flat(host.gradients[0])
    assert_identical(flat(host.again()), expected)
    gates = ("decay", "momentum_carry", "momentum") if momentum else ("retention",)
    for unwanted in ("q", "k", "v", "step", "weights", *gates):
        found = flat(host.again(unwanted=(unwanted,)))
        matrices = len(problem.weights) if unwanted in ("weights", "momentum") else 0
        names = {f"{unwanted}{i}" for i in range(matrices)} or {unwanted}
        for name, x in found.items():
            assert x.isnan().all() if name in names else torch.equal(x, expected[name]), (unwanted, name)
    output, weights, speeds = upstream
    for absent in range(3 if momentum else 2):
        without = [[None] * len(g) if isinstance(g, list) else None for g in upstream]
        zeros = [
            [torch.zeros_like(x) for x in weights] if absent == 1 else weights,
            [torch.zeros_like(x) for x in speeds] if absent == 2 else speeds,
        ]
        host.arguments = problem, saved, torch.zeros_like(output) if absent == 0 else output, *zeros
        expected_without = flat(host.again())
        given = [output, weights, speeds]
        given[absent] = without[absent]
        host.arguments = problem, saved, *given
        assert_identical(flat(host.again()), expected_without)


@pytest.mark.parametrize(
    ("form", "rule", "least"),
    [("mlp", "gd", 64_000), ("glu", "gd", 67_000), ("mlp", "dgd", 78_000), slow("glu", "dgd", 88_000)],
)
def test_two_runs_stages_and_places_give_the_same_bits(host, form, rule, least):
    """The device decides how many sets of partial sums there are and where threads keep what."""
    problem = small(MemorySpec(form, objective="self", rule=rule), batch=1, momentum=rule == "gd").cast(torch.float16)
    evaluate_package(problem, "cpu")
    expected = flat(host.gradients[0])
    for device in ({}, {"architecture": 80}, {"shared_memory": 3 * least // 2}, {"shared_memory": least}):
        assert_identical(flat(host.again(**device)), expected)


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "place"), [("l2", 156_000), ("self", 165_000)])
def test_two_runs_and_places_of_a_cluster_give_the_same_bits(host, objective, place):
    """The last device leaves what threads keep of a chunk to the workspace."""
    problem = small(MemorySpec("mlp", objective=objective), batch=1, **SPREAD[1]).cast(torch.float16)
    evaluate_package(problem, "cpu")
    expected = flat(host.gradients[0])
    for device in ({}, {"shared_memory": place}):
        assert_identical(flat(host.again(**device)), expected)


@pytest.mark.slow
def test_a_memory_of_one_block_has_the_same_gradients_where_there_are_no_clusters(host):
    problem = small(MemorySpec("mlp"), dim=128, hidden=128, batch=1).cast(torch.bfloat16)
    evaluate_package(problem, "cpu")
    assert_identical(flat(host.again(architecture=80)), flat(host.gradients[0]))


@pytest.mark.parametrize(("form", "rule"), [("mlp", "gd"), ("mlp", "dgd"), slow("glu", "gd"), slow("glu", "dgd")])
def test_a_row_does_not_depend_on_its_neighbours_even_if_they_are_nan(host, form, rule):
    problem = small(MemorySpec(form, rule=rule), batch=2, shared=False).cast(torch.bfloat16)
    whole = evaluate_package(problem, "cpu")
    problem["k"][1, 5] = torch.nan
    spoiled = evaluate_package(problem, "cpu")
    assert not torch.isfinite(spoiled.gradients["k"][1]).all()
    for name, gradient in whole.gradients.items():
        assert torch.equal(spoiled.gradients[name][0], gradient[0]), name


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_a_table_with_wild_values_reaches_nothing_outside_the_tensors(host, library, form):
    """Every tensor lies between NaN: a number read from outside spoils a result."""
    problem = small(MemorySpec(form), batch=2).cast(torch.bfloat16)
    with torch.enable_grad():
        leaves = problem.map(lambda _, t: t.requires_grad_())
        gates = {"retention": leaves["retention"], "valid": torch.tensor([[0, 46], [3, 40]], dtype=torch.int32)}
        options = {"spec": problem.spec, "chunk_size": 20, "backend": "cpu"}
        output, _ = memory_scan(*(leaves[n] for n in ("q", "k", "v", "lr")), leaves.weights, **gates, **options)
        output.float().sum().backward()
    problem, saved, *upstream = host.arguments
    for name in ("q", "k", "v", "step", "decay"):
        x = getattr(problem, name)
        setattr(problem, name, torch.full((3, *x.shape), torch.nan, dtype=x.dtype)[1].copy_(x))
    wild = [-(10**12), -1, 0, 1, 7, 10**12]
    random = torch.Generator().manual_seed(0)
    for _ in range(6):
        picked = torch.randint(len(wild), problem.sequences.shape, generator=random)
        problem.sequences = torch.tensor(wild)[picked]
        # The forward had another table: what it did not save is not its checkpoint.
        saved = [torch.zeros_like(x) for x in saved]
        for x in flat(scan.scan_backward(library, problem, saved, *upstream)).values():
            assert torch.isfinite(x).all()


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_what_is_not_covered_is_refused_with_the_reason(host):
    problem = small(MemorySpec("mlp"), batch=1, tokens=66).cast(torch.bfloat16)
    evaluate_package(problem, "cpu")
    for device, reason in [
        ({"architecture": 75, "shared_memory": 60_000}, "sm_80 or newer"),
        ({"shared_memory": 40_000}, "chunk_size is too large"),
    ]:
        with pytest.raises(scan.Refused, match=reason):
            host.again(**device)
    problem, saved, *upstream = host.arguments
    host.arguments = problem, [], *upstream
    with pytest.raises(scan.Refused, match="needs the forward's checkpoints"):
        host.again()
    host.arguments = problem, saved, upstream[0], [x.double() for x in upstream[1]], upstream[2]
    with pytest.raises(scan.Refused, match="gradients of the state in float32"):
        host.again()


@pytest.mark.parametrize(
    ("spec", "sizes", "reason"),
    [
        (MemorySpec("mlp"), {"dim": 65, "momentum": True}, "no registers for momentum or dgd at this size: dim"),
        (MemorySpec("mlp"), {"hidden": 129, "momentum": True}, "no registers for momentum or dgd at this size: dim"),
        (MemorySpec("mlp", rule="dgd"), {"dim": 65}, "at this size: dim at most 64, hidden at most 128"),
        (MemorySpec("mlp", rule="dgd"), {"hidden": 129}, "at this size: dim at most 64, hidden at most 128"),
        (MemorySpec("mlp", rule="dgd"), {"hidden": 257}, "at this size: dim at most 64, hidden at most 128"),
        (MemorySpec("glu"), {"dim": 65}, "adjoint of a glu in the registers of one block: dim at most 64"),
        (MemorySpec("glu"), {"hidden": 129}, "one block: dim at most 64, hidden at most 128"),
        (MemorySpec("glu"), {"dim": 33, "momentum": True}, "no registers for momentum at this size: of a glu dim"),
    ],
    ids=str,
)
def test_what_only_the_forward_covers_is_refused_with_the_reason(host, spec, sizes, reason):
    problem = small(spec, **({"batch": 1, "tokens": 23} | sizes)).cast(torch.bfloat16)
    with pytest.raises(scan.Refused, match=reason):
        evaluate_package(problem, "cpu")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hidden", "objective", "architecture", "largest"),
    [(128, "l2", 80, 32), (128, "self", 80, 32), (128, "l2", 90, 80), (256, "l2", 90, 80), (256, "self", 90, 64)],
)
def test_the_largest_chunk_of_large_memories_is_the_documented_one(host, hidden, objective, architecture, largest):
    host.architecture = architecture
    spec, sizes = MemorySpec("mlp", objective=objective), {"dim": 128, "hidden": hidden, "batch": 1}
    assert_close_to_truth(small(spec, chunk_size=largest, tokens=largest + 1, **sizes), torch.bfloat16)
    with pytest.raises(scan.Refused, match="chunk_size is too large"):
        evaluate_package(small(spec, chunk_size=largest + 1, tokens=largest + 2, **sizes).cast(torch.bfloat16), "cpu")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "dim", "objective", "architecture", "largest"),
    [
        *(("mlp", 32, "l2", 80, 80), ("mlp", 32, "self", 80, 64), ("mlp", 32, "self", 90, 96)),
        *(("mlp", 64, "self", 80, 48), ("mlp", 64, "self", 90, 64)),
        *(
            ("glu", 32, "self", 80, 64),
            ("glu", 32, "self", 90, 96),
            ("glu", 64, "self", 80, 32),
            ("glu", 64, "l2", 90, 64),
        ),
    ],
)
def test_the_largest_chunk_of_dgd_is_the_documented_one(host, form, dim, objective, architecture, largest):
    host.architecture = architecture
    spec = MemorySpec(form, objective=objective, rule="dgd")
    sizes = {"dim": dim, "hidden": 128, "batch": 1, "max_lr": 0.4}
    assert_close_to_truth(small(spec, chunk_size=largest, tokens=largest + 1, **sizes), torch.bfloat16)
    with pytest.raises(scan.Refused, match="chunk_size is too large"):
        evaluate_package(small(spec, chunk_size=largest + 1, tokens=largest + 2, **sizes).cast(torch.bfloat16), "cpu")


# ---- barriers --------------------------------------------------------------------------------------------------------

CASES = ["small short backward", "small single backward", "small self backward", "small momentum backward"]
GLU_CASES = [f"glu {case}" for case in CASES]
DELTA_CASES = ["small dgd backward", "small single dgd backward", "small self dgd backward"]
GLU_DELTA_CASES = [f"glu {case}" for case in DELTA_CASES]
CLUSTER_CASES = ["cluster short backward", "cluster self backward"]


def written_barriers(headers: list[Path] = KERNEL) -> list[str]:
    lines = [(path.name, *line) for path in headers for line in enumerate(path.read_text().splitlines(), 1)]
    return [f"{name}:{number}" for name, number, line in lines if re.search(r"\b(__syncthreads|cluster_sync)\(", line)]


@pytest.mark.slow
@needs_thread_sanitizer
@pytest.mark.parametrize("case", [*CASES, *GLU_CASES, *DELTA_CASES, *GLU_DELTA_CASES, "backward", *CLUSTER_CASES])
def test_no_thread_sees_what_no_barrier_has_ordered(sanitized, case):
    assert build.races(sanitized, case) == []


@needs_thread_sanitizer
def test_the_smallest_case_is_free_of_races_and_the_last_barrier_is_missed(sanitized):
    assert build.races(sanitized, CASES[0]) == []
    assert build.races(sanitized, CASES[0], without=written_barriers()[-1])
    assert build.races(sanitized, DELTA_CASES[0]) == []
    assert build.races(sanitized, DELTA_CASES[0], without=written_barriers(DELTA_RULE)[-1])


@pytest.mark.slow
@needs_thread_sanitizer
@pytest.mark.parametrize(
    ("cases", "headers"),
    [
        *((CASES, KERNEL), (GLU_CASES, KERNEL), (DELTA_CASES, DELTA_RULE), (GLU_DELTA_CASES, DELTA_RULE)),
        (CLUSTER_CASES, [*KERNEL, SUMS]),
    ],
    ids=[*FORMS, *(f"{form} dgd" for form in FORMS), "cluster"],
)
def test_without_any_one_of_its_barriers_the_kernel_races(sanitized, tmp_path, cases, headers):
    passed = {case: build.barriers(sanitized, tmp_path / "barriers", case) for case in cases}
    written = written_barriers(headers)
    reached = {barrier for barriers in passed.values() for barrier in barriers}
    if cases == CLUSTER_CASES:  # its barrier stands for two of the block's, and there is always room for two stages
        written = [barrier for barrier in written if barrier in reached]
        assert len(written) == len(written_barriers(headers)) - 3
    assert set(written) <= reached
    for barrier in written:
        through = [case for case, barriers in passed.items() if barrier in barriers]
        assert any(build.races(sanitized, case, without=barrier) for case in through), (
            f"taking out {barrier} goes unnoticed"
        )
