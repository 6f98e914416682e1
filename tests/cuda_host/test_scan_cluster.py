"""Memories that the blocks of a cluster hold together: the forward scan of the CUDA engine, run on the CPU."""

from __future__ import annotations

import pytest
import torch

from hope_kernels import MemorySpec
from hope_kernels.backends.interface import ScanProblem
from tests.cases import Problem, make_problem, oracle_results
from tests.cuda_host import build, scan
from tests.cuda_host.forward_cases import (
    FORMS,
    HALVES,
    ONE_FORM,
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

pytestmark = needs_host_layer


def spread(form: str = "glu", **options) -> Problem:
    """A small problem over two blocks: each sum of a glu is over 64 columns, of an mlp over 128, in two parts."""
    objective = options.pop("objective", "l2")
    sizes = {"dim": 40, "hidden": 136} if form == "glu" else {"dim": 72, "hidden": 136}
    return small(MemorySpec(form, objective=objective), **(sizes | options))


# ---- values ----------------------------------------------------------------------------------------------------------

SIZES = [
    # form, dim, hidden, chunk_size, tokens, blocks
    ("mlp", 128, 128, 16, 33, 1),
    ("mlp", 128, 256, 32, 70, 2),
    ("mlp", 128, 512, 16, 37, 4),
    ("mlp", 65, 10, 7, 24, 1),
    ("mlp", 20, 300, 5, 11, 4),  # one block has no hidden units of its own
    ("mlp", 64, 1024, 16, 17, 8),
    ("glu", 64, 256, 16, 37, 2),
    ("glu", 33, 1000, 9, 19, 8),
    ("glu", 128, 64, 16, 33, 1),
    ("glu", 128, 512, 16, 33, 8),
    ("glu", 70, 90, 20, 46, 2),
]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("momentum", [False, True], ids=["plain", "momentum"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_any_size_stays_within_twice_the_eager_error(host, sizes, momentum, dtype):
    form, dim, hidden, chunk_size, tokens, _ = sizes
    options = {"dim": dim, "hidden": hidden, "chunk_size": chunk_size, "tokens": tokens, "batch": 1, "heads": 1}
    options |= {"retention": True, "momentum": momentum, "initial_momentum": momentum, "max_lr": 0.1}
    problem = with_mild_retention(with_long_momentum(make_problem(MemorySpec(form), **options)))
    assert_close_to_truth(problem, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["l2", "dot", "error", "self"])
@pytest.mark.parametrize("form", FORMS)
def test_every_objective(host, form, objective):
    for momentum in (False, True):
        problem = with_long_momentum(spread(form, objective=objective, batch=1, momentum=momentum))
        assert_close_to_truth(problem, torch.bfloat16)


@pytest.mark.parametrize("form", ONE_FORM)
def test_the_oracle_agrees(host, form):
    """Token by token and with inner gradients by automatic differentiation, not in closed form."""
    problem = spread(form, batch=1, momentum=True, initial_momentum=True).cast(torch.bfloat16)
    assert_close_to_truth(problem, torch.bfloat16, oracle_results(exact(problem)))


# ---- exact equalities ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [slow([20, 20, 6]), [3, 7, 1, 35]], ids=str)
def test_a_call_of_any_length_gives_the_same_bits(host, lengths):
    problem = spread(batch=1, momentum=True).cast(torch.bfloat16)
    whole, split = results(problem), results(problem, lengths=lengths)
    for name in ("output", *(n for n in whole if n.startswith(("weight", "momentum")))):
        assert torch.equal(split[name], whole[name]), name


@pytest.mark.slow
def test_a_row_does_not_depend_on_its_neighbours_even_if_they_are_nan(host):
    problem = spread(batch=3).cast(torch.bfloat16)
    whole = results(problem)
    problem["k"][1, 5], problem["v"][1, 30] = torch.nan, torch.inf
    spoiled = results(problem)
    assert not torch.isfinite(spoiled["output"][1]).all()
    for b in (0, 2):
        alone = results(problem.row(b))
        for name in ("output", "weight0", "weight1", "weight2"):
            assert torch.equal(spoiled[name][b], whole[name][b]) and torch.equal(alone[name][0], whole[name][b])


@pytest.mark.slow
def test_packed_sequences_are_what_they_are_alone(host):
    problem = spread(batch=3).cast(torch.bfloat16)
    rows = [(0, 46), (3, 22), (40, 46)]
    parts = pieces(problem, rows)
    names = [name for name in problem.tensors if not name.startswith("weight")]
    ends = torch.tensor([0, *(end - start for start, end in rows)]).cumsum(0)
    found = scan_with(problem, {name: torch.cat([part[name] for part in parts], 1) for name in names}, cu_seqlens=ends)
    for b, part in enumerate(parts):
        want = results(part)
        assert torch.equal(found["output"][0, ends[b] : ends[b + 1]], want["output"][0])
        for i in range(3):
            assert torch.equal(found[f"weight{i}"][b], want[f"weight{i}"][0])


@pytest.mark.parametrize(("form", "objective"), [slow("mlp", "l2"), ("glu", "l2"), slow("glu", "self")])
def test_queries_that_are_the_keys_give_the_bits_of_queries_that_equal_them(host, form, objective):
    problem = spread(form, objective=objective, batch=1).cast(torch.bfloat16)
    problem.tensors["q"] = problem["k"].clone()
    expected = results(problem, lengths=[7, 39])
    problem.tensors["q"] = problem["k"]
    assert_identical(results(problem, lengths=[7, 39]), expected)
    assert host.problem.q.data_ptr() == host.problem.k.data_ptr()


@pytest.mark.slow
def test_the_number_of_stages_changes_no_bit(host):
    problem = spread(batch=1).cast(torch.float16)
    expected = results(problem)
    host.shared_memory = 122_000  # one stage
    assert_identical(results(problem), expected)


@pytest.mark.parametrize(("form", "hidden"), [("mlp", 128), ("glu", 64)])
def test_a_memory_of_one_block_is_the_same_where_there_are_no_clusters(host, form, hidden):
    problem = small(MemorySpec(form), dim=128, hidden=hidden, batch=1).cast(torch.bfloat16)
    expected = results(problem)
    host.architecture = 80
    assert_identical(results(problem), expected)


@pytest.mark.slow
def test_checkpoints_are_the_states_of_shorter_calls(host, library, monkeypatch):
    monkeypatch.setattr(ScanProblem, "checkpoint_interval", 2)
    full = spread(chunk_size=7, tokens=22, batch=1, momentum=True).cast(torch.bfloat16)
    results(full)
    *_, saved = scan.scan_forward(library, host.problem, save=True)
    shorter = results(full.span(0, 14))
    for i, checkpoint in enumerate(saved):
        assert torch.equal(checkpoint[0], shorter[f"{'momentum' if i >= 3 else 'weight'}{i % 3}"][0]), i
    assert len(saved) == 6


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "dim", "hidden", "architecture", "reason"),
    [
        ("mlp", 129, 16, 90, "dim at most 128"),
        ("mlp", 128, 1025, 90, "cluster of eight blocks"),
        ("glu", 64, 1025, 90, "cluster of eight blocks"),
        ("glu", 65, 513, 90, "cluster of eight blocks"),
        ("mlp", 128, 129, 80, "sm_90 or newer"),
        ("mlp", 64, 257, 80, "sm_90 or newer"),
        ("glu", 64, 129, 80, "sm_90 or newer"),
        ("glu", 65, 65, 80, "sm_90 or newer"),
    ],
)
def test_what_is_not_covered_is_refused_with_the_reason(host, form, dim, hidden, architecture, reason):
    host.architecture = architecture
    problem = small(MemorySpec(form), dim=dim, hidden=hidden, batch=1).cast(torch.bfloat16)
    with pytest.raises(scan.Refused, match=reason):
        results(problem)


def test_kernels_built_without_clusters_are_not_started_in_one(host, library):
    library.cuda_host_set_device(8, 0, 2, 1)
    try:
        with pytest.raises(scan.Refused, match="not built for sm_90"):
            results(spread(batch=1).cast(torch.bfloat16))
    finally:
        library.cuda_host_set_device(9, 0, 2, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "dim", "hidden", "architecture", "largest"),
    [
        *(("mlp", 128, 128, 80, 64), ("mlp", 128, 128, 90, 112), ("mlp", 128, 256, 90, 112)),
        *(("glu", 64, 256, 90, 128), ("glu", 128, 64, 80, 64), ("glu", 128, 128, 90, 112)),
    ],
)
def test_the_largest_chunk_is_the_documented_one(host, form, dim, hidden, architecture, largest):
    host.architecture = architecture
    sizes = {"dim": dim, "hidden": hidden, "batch": 1, "tokens": largest + 1}
    assert_close_to_truth(small(MemorySpec(form), chunk_size=largest, **sizes), torch.bfloat16)
    with pytest.raises(scan.Refused, match="chunk_size is too large"):
        results(small(MemorySpec(form), chunk_size=largest + 1, **sizes).cast(torch.bfloat16))


# ---- barriers --------------------------------------------------------------------------------------------------------


@needs_thread_sanitizer
@pytest.mark.parametrize("case", ["cluster glu", slow("cluster"), slow("cluster glu self"), slow("cluster write")])
def test_no_thread_sees_what_no_barrier_has_ordered(sanitized, case):
    assert build.races(sanitized, case) == []


@needs_thread_sanitizer
@pytest.mark.parametrize("which", [0, slow(1)])
def test_without_a_barrier_of_the_cluster_the_kernel_races(sanitized, which):
    first, second = sorted(written_barriers("cluster_sync"))
    assert build.races(sanitized, "cluster glu", without=(first, second)[which])
