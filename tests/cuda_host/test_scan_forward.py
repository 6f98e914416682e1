"""The CUDA engine's forward scan, run on the CPU: results against float64, exact equalities, refusals, barriers.

Memories that one block holds; test_scan_cluster.py has those of several.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hope_kernels import MemorySpec, memory_read, memory_write
from hope_kernels.backends.interface import ScanProblem
from tests.cases import Evaluation, Problem, assert_within_budget, make_problem, oracle_results
from tests.cuda_host import build, scan
from tests.cuda_host.forward_cases import (
    FORMS,
    HALVES,
    ONE_FORM,
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
    with_long_momentum,
    with_mild_retention,
    written_barriers,
)
from tests.golden_cases import GOLDEN, load_golden

pytestmark = needs_host_layer
QUICK_GOLDEN = ["glu_gd_dot_momentum", "mlp_carried_state", "mlp_gd_momentum"]
KINDS = [
    pytest.param("mlp", False, id="mlp", marks=pytest.mark.slow),
    pytest.param("mlp", True, id="mlp momentum"),
    pytest.param("glu", True, id="glu momentum", marks=pytest.mark.slow),
]

# ---- values ----------------------------------------------------------------------------------------------------------

SIZES = [
    # dim, hidden, chunk_size, tokens
    (64, 256, 16, 37),
    (64, 256, 32, 64),
    (64, 256, 64, 133),
    (64, 256, 96, 100),  # tokens of one chunk at a time
    (64, 256, 20, 46),
    (32, 128, 16, 33),
    (64, 128, 40, 85),
    (5, 6, 4, 11),
    (17, 129, 7, 24),
    (33, 20, 1, 5),
]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("momentum", [False, True], ids=["plain", "momentum"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_any_size_that_fits_stays_within_twice_the_eager_error(host, sizes, form, momentum, dtype):
    dim, hidden, chunk_size, tokens = sizes
    if form == "glu":
        hidden = min(hidden, 128)
    sizes = {"dim": dim, "hidden": hidden, "chunk_size": chunk_size, "tokens": tokens}
    sizes |= {"batch": 1, "heads": 1 if dim * hidden > 4096 else 2}
    problem = make_problem(
        MemorySpec(form), retention=True, momentum=momentum, initial_momentum=momentum, max_lr=0.1, **sizes
    )
    problem = with_long_momentum(problem)
    # float16 gets the strong retention: weights of tokens that are too small for it. Not in a glu, whose hidden values,
    # products of two numbers, it makes too small for float16 on any path.
    strong = dtype == torch.float16 and form == "mlp"
    assert_close_to_truth(problem if strong else with_mild_retention(problem), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu", "silu", "relu2"])
@pytest.mark.parametrize("objective", ["l2", "dot", "error", "self"])
@pytest.mark.parametrize("form", FORMS)
def test_every_objective_and_activation(host, form, objective, activation, dtype):
    residual = activation in ("gelu_tanh", "relu2")
    spec = MemorySpec(form, activation, residual=residual, objective=objective)
    for momentum in (False, True):
        assert_close_to_truth(small(spec, batch=1, momentum=momentum), dtype)


@pytest.mark.parametrize("dtype", ONE_HALF, ids=str)
@pytest.mark.parametrize(
    "name",
    [n if n in QUICK_GOLDEN else slow(n) for n in GOLDEN if not n.startswith("linear") and "dgd" not in n],
)
def test_golden_cases(host, name, dtype):
    """The truth is the stored one: tokens and weights are rounded to `dtype` first for the eager path as for this one,
    so what rounding the inputs does to the results is in the budget."""
    case = load_golden(name)
    problem = case.problem.cast(dtype)
    found, eager = results(problem), results(problem, "reference")
    stored = case.expected.values
    chosen = [{key: part[key] for key in stored} for part in (found, eager)]
    assert_within_budget(*(Evaluation(part, {}) for part in (*chosen, stored)), dtype)


@pytest.mark.parametrize("form", FORMS)
def test_the_oracle_agrees(host, form):
    """Token by token and with inner gradients by automatic differentiation, not in closed form."""
    problem = small(MemorySpec(form), batch=1, momentum=True, initial_momentum=True).cast(torch.bfloat16)
    assert_close_to_truth(problem, torch.bfloat16, oracle_results(exact(problem)))


# ---- layouts ---------------------------------------------------------------------------------------------------------


def test_tokens_of_any_stride_and_alignment_are_read_where_they_lie(host):
    problem = small(MemorySpec("mlp")).cast(torch.bfloat16)
    expected = results(problem)

    def spread(name: str, t: Tensor) -> Tensor:
        if name not in ("q", "k", "v"):
            return t
        wide = torch.full((*t.shape[:3], 3 * t.shape[3]), torch.nan, dtype=t.dtype).transpose(1, 2)
        view = wide.transpose(1, 2)[..., 3 : 3 + t.shape[3]]
        return view.copy_(t)

    spread_out = problem.map(spread)
    assert_identical(results(spread_out), expected)
    assert host.problem.k.data_ptr() == spread_out["k"].data_ptr()


@pytest.mark.parametrize("form", [slow("float32"), "16 bits", "transposed", slow("per sequence")])
def test_weights_are_read_in_any_form(host, form):
    problem = small(MemorySpec("glu")).cast(torch.bfloat16, torch.bfloat16)
    expected = results(problem)

    def change(name: str, t: Tensor) -> Tensor:
        if not name.startswith("weight") or form == "16 bits":
            return t
        if form == "transposed":
            return t.transpose(-1, -2).contiguous().transpose(-1, -2)
        return t.float() if form == "float32" else t.expand(2, *t.shape)

    assert_identical(results(problem.map(change)), expected)


@pytest.mark.parametrize(("form", "momentum"), KINDS)
@pytest.mark.parametrize("kind", ["packed", "padded"])
def test_packed_and_padded_sequences_are_what_they_are_alone(host, kind, form, momentum):
    problem = small(MemorySpec(form), batch=4, momentum=momentum).cast(torch.bfloat16)
    rows = [(0, 46), (3, 22), (40, 46), (7, 7)]
    alone = [results(part) if part.tokens else None for part in pieces(problem, rows)]
    names = [name for name in problem.tensors if not name.startswith("weight")]
    if kind == "padded":
        found = scan_with(problem, problem.tensors, valid=torch.tensor(rows, dtype=torch.int32))
    else:
        parts = pieces(problem, rows)
        tensors = {name: torch.cat([part[name] for part in parts], 1) for name in names}
        ends = torch.tensor([0, *(end - start for start, end in rows)]).cumsum(0)
        found = scan_with(problem, tensors, cu_seqlens=ends)
    first = 0
    for b, ((start, end), want) in enumerate(zip(rows, alone, strict=True)):
        output = found["output"][b] if kind == "padded" else found["output"][0, first : first + end - start]
        first += end - start
        if kind == "padded":
            outside = torch.cat([output[:start], output[end:]])
            assert torch.equal(outside, torch.zeros_like(outside))
            output = output[start:end]
        if want is None:
            assert torch.equal(found["weight0"][b], problem["weight0"])
            continue
        assert torch.equal(output, want["output"][0])
        for name in want:
            if name.startswith(("weight", "momentum")):
                assert torch.equal(found[name][b], want[name][0]), f"{name} of sequence {b}"


def test_a_table_with_wild_values_reaches_nothing_outside_the_tensors(host, library):
    """Every tensor lies between NaN: a number read from outside spoils a result, one written outside a neighbour."""
    problem = small(MemorySpec("mlp"), batch=2).cast(torch.bfloat16)
    scan_with(problem, problem.tensors, valid=torch.tensor([[0, 46], [3, 40]], dtype=torch.int32))
    fenced = replace(host.problem, **{n: fence(getattr(host.problem, n)) for n in ("q", "k", "v", "step", "decay")})
    wild = [-(10**12), -1, 0, 1, 7, 10**12]
    random = torch.Generator().manual_seed(0)
    for _ in range(12):
        picked = torch.randint(len(wild), host.problem.sequences.shape, generator=random)
        table = replace(fenced, sequences=torch.tensor(wild)[picked])
        output, weights, _, saved = scan.scan_forward(library, table, save=True)
        assert torch.isfinite(output).all()
        assert all(torch.isfinite(w).all() for w in weights)
        assert saved


def fence(x: Tensor) -> Tensor:
    room = torch.full((3, *x.shape), torch.nan, dtype=x.dtype)
    return room[1].copy_(x)


# ---- exact equalities ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "momentum"), KINDS)
def test_a_call_of_any_length_gives_the_same_bits(host, form, momentum):
    problem = small(MemorySpec(form), momentum=momentum).cast(torch.bfloat16)
    whole = results(problem)
    for lengths in ([20, 20, 6], [3, 7, 1, 35]):
        split = results(problem, lengths=lengths)
        for name in ("output", *(n for n in whole if n.startswith(("weight", "momentum")))):
            # The chunk's own scalars are products whose grouping the split does not change; its tokens are the same.
            assert torch.equal(split[name], whole[name]), (lengths, name)


@pytest.mark.parametrize("form", ONE_FORM)
def test_a_row_does_not_depend_on_its_neighbours_even_if_they_are_nan(host, form):
    problem = small(MemorySpec(form), batch=3).cast(torch.bfloat16)
    whole = results(problem)
    problem["k"][1, 5], problem["v"][1, 30] = torch.nan, torch.inf
    spoiled = results(problem)
    assert not torch.isfinite(spoiled["output"][1]).all()
    for b in (0, 2):
        alone = results(problem.row(b))
        for name in ("output", "weight0", "weight1"):
            assert torch.equal(spoiled[name][b], whole[name][b]) and torch.equal(alone[name][0], whole[name][b])


@pytest.mark.parametrize("objective", ["l2", slow("dot"), slow("self")])
@pytest.mark.parametrize("form", FORMS)
def test_queries_that_are_the_keys_give_the_bits_of_queries_that_equal_them(host, form, objective):
    problem = small(MemorySpec(form, objective=objective)).cast(torch.bfloat16)
    problem.tensors["q"] = problem["k"].clone()
    expected = results(problem, lengths=[7, 39])
    problem.tensors["q"] = problem["k"]
    assert_identical(results(problem, lengths=[7, 39]), expected)
    assert host.problem.q.data_ptr() == host.problem.k.data_ptr()


@pytest.mark.parametrize(("form", "momentum", "one_stage"), [("mlp", False, 58_000), slow("glu", True, 66_000)])
def test_the_number_of_stages_and_the_architecture_change_no_bit(host, form, momentum, one_stage):
    problem = small(MemorySpec(form), momentum=momentum).cast(torch.float16)
    expected = results(problem)
    host.architecture = 80
    assert_identical(results(problem), expected)
    host.shared_memory = one_stage
    assert_identical(results(problem), expected)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_checkpoints_are_the_states_of_shorter_calls(host, library, monkeypatch, form):
    monkeypatch.setattr(ScanProblem, "checkpoint_interval", 2)
    full = small(MemorySpec(form), chunk_size=7, tokens=47, momentum=True).cast(torch.bfloat16)
    results(full)
    *_, saved = scan.scan_forward(library, host.problem, save=True)
    count = full.spec.weight_count
    assert len(saved) == 2 * count and saved[0].shape[0] == 2 * 3
    for chunk in (2, 4, 6):
        shorter = results(full.span(0, 7 * chunk))
        for i, checkpoint in enumerate(saved):
            name = f"{'momentum' if i >= count else 'weight'}{i % count}"
            for b in range(2):
                assert torch.equal(checkpoint[3 * b + chunk // 2 - 1], shorter[name][b]), (name, chunk)
    # None is kept that the backward would not start from: nothing follows the sixth chunk here.
    results(full.span(0, 42))
    assert scan.scan_forward(library, host.problem, save=True)[3][0].shape[0] == 2 * 2


# ---- reads and writes ------------------------------------------------------------------------------------------------


def test_a_read_alone_and_a_write_alone(host):
    problem = small(MemorySpec("mlp"), tokens=20).cast(torch.bfloat16)
    whole, options = results(problem), {"spec": problem.spec, "backend": "cpu"}
    with torch.no_grad():
        gates = {"retention": problem["retention"]}
        state = memory_write(problem["k"], problem["v"], problem["lr"], problem.weights, **gates, **options)
        output = memory_read(problem["q"], problem.weights, **options)
    assert host.problem.k is None
    assert torch.equal(output, whole["output"])
    for i, weight in enumerate(state.weights):
        assert torch.equal(weight, whole[f"weight{i}"])


def test_a_long_read_goes_piece_by_piece(host):
    problem = small(MemorySpec("mlp"), tokens=150, batch=1, heads=1).cast(torch.bfloat16)

    def read(part: Problem, backend: str) -> Evaluation:
        with torch.no_grad():
            return Evaluation({"output": memory_read(part["q"], part.weights, spec=part.spec, backend=backend)}, {})

    parts = read(problem, "cpu"), read(problem, "reference"), read(exact(problem), "reference")
    assert_within_budget(*parts, torch.bfloat16)


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"tokens": 1}, {"tokens": 19}], ids=str)
def test_a_call_that_completes_no_chunk(host, sizes):
    problem = small(MemorySpec("mlp"), **sizes).cast(torch.bfloat16)
    found, eager = results(problem), results(problem, "reference")
    for i in range(2):
        assert torch.equal(found[f"weight{i}"], eager[f"weight{i}"])
    assert found["output"].shape == eager["output"].shape
    torch.testing.assert_close(found["output"], eager["output"], rtol=2**-7, atol=2**-7)


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"spec": MemorySpec("linear")}, "computes mlp and glu memories only"),
        ({"dtype": torch.float32}, "takes bfloat16 or float16 tokens"),
        ({"chunk_size": 200, "tokens": 200, "hidden": 256, "dim": 64}, "chunk_size is too large"),
        ({"architecture": 75}, "sm_80 or newer"),
        ({"architecture": 80, "dim": 64, "hidden": 256, "chunk_size": 96, "tokens": 96}, "chunk_size is too large"),
    ],
    ids=str,
)
def test_what_is_not_covered_is_refused_with_the_reason(host, change, reason):
    options = dict(change)
    spec, dtype = options.pop("spec", MemorySpec("mlp")), options.pop("dtype", torch.bfloat16)
    architecture = options.pop("architecture", 90)
    host.architecture, host.shared_memory = architecture, scan.SHARED_MEMORY[max(architecture, 80)]
    problem = small(spec, batch=1, heads=1, **options).cast(dtype)
    with pytest.raises(scan.Refused, match=reason):
        results(problem)


@pytest.mark.parametrize(
    ("form", "dim", "hidden", "architecture", "largest"),
    [
        *(slow("mlp", 32, 128, 80, 176), slow("mlp", 32, 128, 90, 256)),
        *(slow("mlp", 64, 128, 80, 96), slow("mlp", 64, 128, 90, 176)),
        *(("mlp", 64, 256, 80, 64), slow("mlp", 64, 256, 90, 112)),
        *(slow("glu", 32, 128, 80, 128), slow("glu", 32, 128, 90, 192)),
        *(slow("glu", 64, 128, 80, 80), slow("glu", 64, 128, 90, 128)),
    ],
)
def test_the_largest_chunk_is_the_documented_one(host, form, dim, hidden, architecture, largest):
    host.architecture = architecture
    sizes = {"dim": dim, "hidden": hidden, "batch": 1, "tokens": largest + 1}
    assert_close_to_truth(small(MemorySpec(form), chunk_size=largest, **sizes), torch.bfloat16)
    with pytest.raises(scan.Refused, match="chunk_size is too large"):
        results(small(MemorySpec(form), chunk_size=largest + 1, **sizes).cast(torch.bfloat16))


# ---- barriers --------------------------------------------------------------------------------------------------------

QUICK = ["small", "small glu"]
CASES = ["small single", "small momentum", "small self", "small write", "full"]


@needs_thread_sanitizer
@pytest.mark.parametrize("case", [*QUICK, *map(slow, CASES)])
def test_no_thread_sees_what_no_barrier_has_ordered(sanitized, case):
    assert build.races(sanitized, case) == []


@needs_thread_sanitizer
def test_without_a_barrier_the_kernel_races(sanitized, tmp_path):
    written = written_barriers("__syncthreads") & set(build.barriers(sanitized, tmp_path / "barriers", "small"))
    assert build.races(sanitized, "small", without=min(written))


@needs_thread_sanitizer
@pytest.mark.slow
def test_without_any_one_of_its_barriers_the_kernel_races(sanitized, tmp_path):
    passed = {case: build.barriers(sanitized, tmp_path / "barriers", case) for case in ("small", "small single")}
    written = written_barriers("__syncthreads")
    assert written == {barrier for barriers in passed.values() for barrier in barriers}
    for barrier in sorted(written):
        case = next(case for case, barriers in passed.items() if barrier in barriers)
        assert build.races(sanitized, case, without=barrier), f"taking out {barrier} goes unnoticed"
