"""Delta gradient descent in the forward scan of the CUDA engine, run on the CPU."""

from __future__ import annotations

import pytest
import torch

from hope_kernels import MemorySpec
from tests.cases import Evaluation, Problem, assert_within_budget, make_problem, oracle_results
from tests.cuda_host import build, scan
from tests.cuda_host.forward_cases import (
    DELTA_RULE,
    FORMS,
    HALVES,
    ONE_HALF,
    assert_close_to_truth,
    assert_identical,
    exact,
    needs_host_layer,
    needs_thread_sanitizer,
    pieces,
    results,
    scan_with,
    slow,
    small,
    with_mild_retention,
    written_barriers,
)
from tests.golden_cases import GOLDEN, load_golden

pytestmark = needs_host_layer


def problem_of(form: str = "mlp", **options) -> Problem:
    """A small problem, with steps that make the corrections as large as the errors."""
    spec = MemorySpec(form, rule="dgd", objective=options.pop("objective", "l2"))
    return small(spec, **({"max_lr": 0.4} | options))


# ---- values ----------------------------------------------------------------------------------------------------------

SIZES = [
    # form, dim, hidden, chunk_size, tokens
    ("mlp", 32, 128, 16, 33),
    ("mlp", 64, 128, 48, 100),
    ("mlp", 64, 256, 16, 37),
    ("mlp", 64, 256, 64, 70),
    ("mlp", 17, 129, 7, 24),
    ("mlp", 33, 20, 1, 5),
    ("mlp", 128, 128, 32, 33),
    ("mlp", 128, 512, 16, 33),
    ("glu", 32, 128, 90, 91),
    ("glu", 64, 128, 32, 64),
    ("glu", 5, 6, 4, 11),
    ("glu", 64, 256, 20, 46),
    ("glu", 128, 64, 16, 33),
    ("glu", 100, 130, 40, 41),
]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("retention", [False, True], ids=["plain", "retention"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_any_size_stays_within_twice_the_eager_error(host, sizes, retention, dtype):
    form, dim, hidden, chunk_size, tokens = sizes
    options = {"dim": dim, "hidden": hidden, "chunk_size": chunk_size, "tokens": tokens, "batch": 1, "heads": 1}
    problem = make_problem(MemorySpec(form, rule="dgd"), retention=retention, **options)
    assert_close_to_truth(with_mild_retention(problem), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu", "silu", "relu2"])
@pytest.mark.parametrize("objective", ["l2", "dot", "error", "self"])
@pytest.mark.parametrize("form", FORMS)
def test_every_objective_and_activation(host, form, objective, activation, dtype):
    residual = activation in ("gelu_tanh", "relu2")
    spec = MemorySpec(form, activation, residual=residual, objective=objective, rule="dgd")
    assert_close_to_truth(small(spec, batch=1, max_lr=0.4), dtype)


@pytest.mark.parametrize("dtype", ONE_HALF, ids=str)
@pytest.mark.parametrize("name", [name for name in GOLDEN if name.startswith("mlp_dgd")])
def test_golden_cases(host, name, dtype):
    case = load_golden(name)
    problem = case.problem.cast(dtype)
    stored = case.expected.values
    chosen = [{key: part[key] for key in stored} for part in (results(problem), results(problem, "reference"))]
    assert_within_budget(*(Evaluation(part, {}) for part in (*chosen, stored)), dtype)


@pytest.mark.parametrize(("form", "objective"), [("mlp", "l2"), ("glu", "self")])
def test_the_oracle_agrees(host, form, objective):
    """Token by token and with inner gradients by automatic differentiation, not in closed form."""
    problem = problem_of(form, objective=objective, batch=1).cast(torch.bfloat16)
    assert_close_to_truth(problem, torch.bfloat16, oracle_results(exact(problem)))


def test_one_key_after_another_leaves_little_of_an_error_unsolved(host):
    """Keys that are all the same: without the correction every token would add its step to those before it."""
    problem = problem_of(batch=1, retention=False, tokens=40, max_lr=1.0)
    problem.tensors["k"] = problem["k"][:, :1].expand_as(problem["k"]).clone()
    assert_close_to_truth(problem, torch.bfloat16)
    plain = small(MemorySpec("mlp"), batch=1, retention=False, tokens=40, max_lr=1.0)
    plain.tensors["k"] = problem["k"]
    change = [results(p.cast(torch.bfloat16))["weight0"][0] - p["weight0"].float() for p in (problem, plain)]
    assert change[0].norm() < 0.8 * change[1].norm()


def test_a_retention_of_zero_forgets_what_was_before(host):
    problem = problem_of(batch=1, tokens=40)
    problem["retention"][:, 5], problem["retention"][:, 27] = 0.0, 0.0
    assert_close_to_truth(problem, torch.bfloat16)


# ---- exact equalities ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_a_call_of_any_length_gives_the_same_bits(host, form):
    problem = problem_of(form).cast(torch.bfloat16)
    whole = results(problem)
    for lengths in ([20, 20, 6], [3, 7, 1, 35]):
        split = results(problem, lengths=lengths)
        for name in ("output", *(n for n in whole if n.startswith("weight"))):
            assert torch.equal(split[name], whole[name]), (lengths, name)


@pytest.mark.slow
def test_a_row_does_not_depend_on_its_neighbours_even_if_they_are_nan(host):
    problem = problem_of(batch=3).cast(torch.bfloat16)
    whole = results(problem)
    problem["k"][1, 5], problem["v"][1, 30] = torch.nan, torch.inf
    spoiled = results(problem)
    assert not torch.isfinite(spoiled["output"][1]).all()
    for b in (0, 2):
        alone = results(problem.row(b))
        for name in ("output", "weight0", "weight1"):
            assert torch.equal(spoiled[name][b], whole[name][b]) and torch.equal(alone[name][0], whole[name][b])


@pytest.mark.parametrize("kind", ["packed", slow("padded")])
def test_packed_and_padded_sequences_are_what_they_are_alone(host, kind):
    problem = problem_of(batch=3).cast(torch.bfloat16)
    rows = [(0, 46), (3, 22), (40, 46)]
    parts = pieces(problem, rows)
    ends = torch.tensor([0, *(end - start for start, end in rows)]).cumsum(0)
    if kind == "padded":
        found = scan_with(problem, problem.tensors, valid=torch.tensor(rows, dtype=torch.int32))
    else:
        names = [name for name in problem.tensors if not name.startswith("weight")]
        tensors = {name: torch.cat([part[name] for part in parts], 1) for name in names}
        found = scan_with(problem, tensors, cu_seqlens=ends)
    for b, (part, (start, end)) in enumerate(zip(parts, rows, strict=True)):
        want = results(part)
        output = found["output"][b, start:end] if kind == "padded" else found["output"][0, ends[b] : ends[b + 1]]
        assert torch.equal(output, want["output"][0])
        for i in range(2):
            assert torch.equal(found[f"weight{i}"][b], want[f"weight{i}"][0])


@pytest.mark.parametrize("objective", [slow("l2"), slow("dot"), "self"])
def test_queries_that_are_the_keys_give_the_bits_of_queries_that_equal_them(host, objective):
    problem = problem_of(objective=objective).cast(torch.bfloat16)
    problem.tensors["q"] = problem["k"].clone()
    expected = results(problem, lengths=[7, 39])
    problem.tensors["q"] = problem["k"]
    assert_identical(results(problem, lengths=[7, 39]), expected)
    assert host.problem.q.data_ptr() == host.problem.k.data_ptr()


@pytest.mark.slow
def test_the_number_of_stages_and_the_architecture_change_no_bit(host):
    problem = problem_of().cast(torch.float16)
    expected = results(problem)
    host.architecture = 80
    assert_identical(results(problem), expected)
    host.shared_memory = 76_000  # one stage
    assert_identical(results(problem), expected)


def test_retentions_of_one_are_none(host):
    problem = problem_of(batch=1).cast(torch.bfloat16)
    problem.tensors["retention"] = torch.ones_like(problem["retention"])
    expected = results(problem)
    del problem.tensors["retention"]
    found = results(problem)
    for name in ("output", "weight0", "weight1"):
        assert torch.equal(found[name], expected[name])


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "dim", "hidden", "architecture", "largest"),
    [
        *(("mlp", 32, 128, 80, 80), ("mlp", 32, 128, 90, 96), ("mlp", 64, 128, 80, 48), ("mlp", 64, 128, 90, 80)),
        *(("mlp", 64, 256, 80, 32), ("mlp", 64, 256, 90, 64), ("mlp", 128, 128, 80, 32), ("mlp", 128, 256, 90, 64)),
        *(("glu", 32, 128, 80, 64), ("glu", 32, 128, 90, 96), ("glu", 64, 128, 80, 48), ("glu", 64, 256, 90, 64)),
        *(("glu", 128, 64, 80, 32), ("glu", 128, 128, 90, 64)),
    ],
)
def test_the_largest_chunk_is_the_documented_one(host, form, dim, hidden, architecture, largest):
    host.architecture = architecture
    sizes = {"dim": dim, "hidden": hidden, "batch": 1, "tokens": largest + 1}
    assert_close_to_truth(problem_of(form, chunk_size=largest, **sizes), torch.bfloat16)
    with pytest.raises(scan.Refused, match="chunk_size is too large"):
        results(problem_of(form, chunk_size=largest + 1, **sizes).cast(torch.bfloat16))


# ---- barriers --------------------------------------------------------------------------------------------------------


@needs_thread_sanitizer
@pytest.mark.parametrize("case", ["small dgd", slow("small glu dgd self"), slow("cluster glu dgd")])
def test_no_thread_sees_what_no_barrier_has_ordered(sanitized, case):
    assert build.races(sanitized, case) == []


@needs_thread_sanitizer
def test_without_a_barrier_the_kernel_races(sanitized):
    assert build.races(sanitized, "small dgd", without=min(written_barriers("__syncthreads", DELTA_RULE)))


@needs_thread_sanitizer
@pytest.mark.slow
def test_without_any_one_of_its_barriers_the_kernel_races(sanitized, tmp_path):
    passed = set(build.barriers(sanitized, tmp_path / "barriers", "small dgd"))
    written = written_barriers("__syncthreads", DELTA_RULE) | written_barriers("__syncwarp", DELTA_RULE)
    assert written <= passed
    for barrier in sorted(written):
        assert build.races(sanitized, "small dgd", without=barrier), f"taking out {barrier} goes unnoticed"
