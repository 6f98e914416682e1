"""The factored plan of `memory_scan` equals the token loop, under any split, and turns dense where its rule says."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from hope_kernels import CMS, CMSLevel, MemorySpec, MemoryState, memory_read, memory_scan, memory_write
from hope_kernels.memory import factored, plan, scan
from hope_kernels.memory.factors import merge_after
from tests.cases import (
    STATUS,
    assert_equal_to_rounding,
    assert_within_budget,
    evaluate,
    evaluate_oracle,
    evaluate_package,
    make_problem,
    make_request,
    oracle_results,
    package_results,
    scan_stream,
    state_results,
)
from tests.memory.test_splits import _continue
from tests.strategies import specs as any_spec
from tests.strategies import splits

FACTORED = "reference:factored"
# That of the compiled core takes D and H that are multiples of 16, and leaves all others to the matrix library.
NAMES = pytest.mark.parametrize(
    "name",
    [FACTORED, pytest.param("cpu:factored", marks=pytest.mark.skipif(not STATUS["cpu"], reason=STATUS["cpu"].reason))],
)
SPECS = any_spec.map(lambda spec: replace(spec, rule="gd"))


def _sizes(sizes):
    return dict(zip(("dim", "hidden"), sizes, strict=True))


@st.composite
def factored_problems(draw, **options):
    """A problem the plan takes, some gates exactly 0, and a split of it into calls."""
    problem = make_problem(
        draw(SPECS),
        chunk_size=draw(st.integers(1, 6)),
        batch=draw(st.integers(1, 3)),
        tokens=draw(st.integers(0, 17)),
        heads=draw(st.integers(1, 3)),
        retention=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
        **draw(st.sampled_from([(1, 1), (3, 8), (6, 5), (16, 16), (16, 48), (32, 16)]).map(_sizes)),
    )
    if draw(st.booleans()):
        shift = draw(st.integers(0, 2))

        def with_zeros(name, t):
            if name not in ("lr", "retention"):
                return t
            t = t.clone()
            t.view(-1)[(shift + (name == "retention")) % 3 :: 3] = 0
            return t

        problem = problem.map(with_zeros)
    # A memory whose steps diverge magnifies rounding without bound.
    assume(all(bool((x.abs() <= 100).all()) for x in oracle_results(problem).values()))
    return problem, draw(splits(problem.tokens, problem.chunk_size))


@NAMES
@given(case=factored_problems())
def test_any_split_equals_the_token_loop_in_values_and_all_gradients(name, case):
    problem, lengths = case
    assert_equal_to_rounding(evaluate_package(problem, name, lengths=lengths), evaluate_oracle(problem))


@given(case=factored_problems(), data=st.data())
def test_merged_between_any_two_calls_it_goes_on_densely_as_before(case, data):
    """A call by a bare name merges; calls before it were factored. Gradients go through the merge."""
    problem, lengths = case
    turn = data.draw(st.integers(0, len(lengths)))

    def found(p):
        memory, outputs, start = p.memory(), [], 0
        for i, length in enumerate(lengths):
            part = p.span(start, start + length)
            output, memory = _continue(part, memory, FACTORED if i < turn else "reference")
            assert memory.factors is None or i < turn
            outputs.append(output)
            start += length
        return {"output": torch.cat(outputs, 1), **state_results(memory)}

    assert_equal_to_rounding(evaluate(problem, found), evaluate_oracle(problem))


@given(case=factored_problems(), data=st.data())
def test_its_own_merging_at_any_number_of_pairs_changes_nothing(case, data):
    problem, lengths = case
    limit = data.draw(st.integers(1, 12))

    def found(p):
        network = factored.WeightNetwork(p.weights, torch.float64, p.spec)
        state, outputs, start = None, [], 0
        for length in lengths:
            part = p.span(start, start + length)
            gate = part.get("retention")
            options = {"spec": p.spec, "chunk_size": p.chunk_size, "retention": gate, "limit": limit}
            output, state = factored.factored_scan(
                network, part["q"], part["k"], part["v"], part["lr"], state, **options
            )
            outputs.append(output)
            start += length
            pairs = state.history.factors
            assert pairs is None or pairs.count <= limit
        return {"output": torch.cat(outputs, 1)}

    def wanted(p):
        return {"output": oracle_results(p)["output"]}

    assert_equal_to_rounding(evaluate(problem, found), evaluate(problem, wanted))


@NAMES
@pytest.mark.parametrize("retention", [False, True])
@pytest.mark.parametrize("form", ["linear", "mlp", "glu"])
@pytest.mark.parametrize("lengths", [[17], [5, 12], [1] * 17], ids=str)
def test_one_tensor_as_query_and_key(name, form, retention, lengths):
    """Reads then share the keys' pass; the gradient of the one tensor is that of both uses."""
    problem = make_problem(MemorySpec(form), chunk_size=4, tokens=17, retention=retention, dim=16, hidden=32)
    tensors = {name: t for name, t in problem.tensors.items() if name != "q"}
    problem = replace(problem, tensors=tensors)

    def both(p):
        return p.with_tensors(q=p["k"])

    def shared(p):
        memory, outputs, start = p.memory(), [], 0
        for length in lengths:
            part = p.span(start, start + length)
            output, memory = _continue(both(part), memory, name)
            outputs.append(output)
            start += length
        return {"output": torch.cat(outputs, 1), **state_results(memory)}

    assert_equal_to_rounding(evaluate(problem, shared), evaluate(problem, lambda p: oracle_results(both(p))))


def test_a_shared_pass_reads_the_network_once(monkeypatch):
    """With q the tensor k is, every layer is applied once per chunk; with an equal copy, twice."""
    calls = []
    apply = factored.WeightNetwork.apply
    monkeypatch.setattr(factored.WeightNetwork, "apply", lambda *a: calls.append(a[1]) or apply(*a))
    problem = make_problem(MemorySpec(), chunk_size=4, tokens=12)
    problem = problem.with_tensors(q=problem["k"])
    for q, count in ((problem["k"], 6), (problem["k"].clone(), 12)):
        calls.clear()
        _continue(problem.with_tensors(q=q), problem.memory(), FACTORED)
        assert len(calls) == count


@pytest.mark.parametrize("length", [5, 6])  # two tokens into a chunk, and at its end
def test_gradients_reach_a_factored_state_that_is_used_and_continued(length):
    problem = make_problem(MemorySpec("glu", "silu"), chunk_size=3, tokens=11, retention=True)

    def both(prefix, results):
        return {f"prefix {name}": value for name, value in prefix.items() if name != "output"} | results

    def package(p):
        first, middle = scan_stream(p.span(0, length), [length], backend=FACTORED)
        output, last = _continue(p.span(length, p.tokens), middle, FACTORED)
        return both(state_results(middle), {"output": torch.cat([first, output], 1), **state_results(last)})

    def truth(p):
        return both(oracle_results(p.span(0, length)), oracle_results(p))

    assert_equal_to_rounding(evaluate(problem, package), evaluate(problem, truth))


@NAMES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", ["mlp", "glu"])
def test_lower_precision_stays_within_the_budget_of_the_eager_reference(name, form, dtype):
    problem = make_problem(
        MemorySpec(form), chunk_size=8, tokens=45, dim=16, hidden=32, retention=True, max_lr=0.1
    ).cast(dtype)
    found = evaluate_package(problem, name, lengths=[3, 1, 17, 0, 8, 16])
    eager, truth = evaluate_package(problem, "reference"), evaluate_oracle(problem)
    assert_within_budget(found, eager, truth, dtype)


@NAMES
def test_packed_and_padded_sequences_equal_each_alone(name):
    problem = make_problem(MemorySpec(), chunk_size=4, tokens=29, batch=1, retention=True)
    edges = [0, 11, 11, 13, 29]
    options = {"spec": problem.spec, "chunk_size": 4}

    def call(p, memory, **more):
        retention = p["retention"]
        return memory_scan(
            p["q"], p["k"], p["v"], p["lr"], memory, retention=retention, backend=name, **options, **more
        )

    def packed(p):
        output, state = call(p, p.weights, cu_seqlens=torch.tensor(edges))
        assert state.factors is not None and state.factors.count == 16
        return {"output": output, **{f"weight{i}": w for i, w in enumerate(state.weights)}}

    def alone(p):
        parts = [oracle_results(p.span(a, b)) for a, b in pairwise(edges)]
        return {
            key: torch.cat([part[key] for part in parts], 1 if key == "output" else 0)
            for key in ("output", "weight0", "weight1")
        }

    assert_equal_to_rounding(evaluate(problem, packed), evaluate(problem, alone))


def test_left_padded_rows_prefill_and_decode_as_each_row_alone():
    """Rows of different lengths, whose chunks end at different tokens from then on."""
    problem = make_problem(MemorySpec(), chunk_size=4, tokens=24, batch=3, retention=True)
    starts, prefill = [0, 3, 9], 14

    def call(part, memory, **more):
        return memory_scan(
            part["q"], part["k"], part["v"], part["lr"], memory, spec=problem.spec, chunk_size=4,
            retention=part["retention"], backend=FACTORED, **more,
        )  # fmt: skip

    def padded(p):
        valid = torch.tensor([[start, prefill] for start in starts])
        output, state = call(p.span(0, prefill), p.weights, valid=valid)
        outputs = [output]
        for t in range(prefill, p.tokens):
            output, state = call(p.span(t, t + 1), state)
            outputs.append(output)
        whole = torch.cat(outputs, 1)
        assert state.position.tolist() == [24 - start for start in starts]
        return {f"{b}": whole[b, start:] for b, start in enumerate(starts)} | {
            f"weight{i}": w for i, w in enumerate(state.weights)
        }

    def alone(p):
        results, finals = {}, []
        for b, start in enumerate(starts):
            row = oracle_results(p.row(b).span(start, p.tokens))
            results[f"{b}"] = row["output"][0]
            finals.append((row["weight0"], row["weight1"]))
        return results | {f"weight{i}": torch.cat(w) for i, w in enumerate(zip(*finals, strict=True))}

    assert_equal_to_rounding(evaluate(problem, padded), evaluate(problem, alone))


def test_rows_of_padding_alone_read_zeros():
    problem = make_problem(MemorySpec(), chunk_size=4, tokens=6)
    q = problem["q"].clone().requires_grad_()
    output, state = memory_scan(
        q, problem["k"], problem["v"], problem["lr"], problem.weights, spec=problem.spec, chunk_size=4,
        valid=torch.tensor([[0, 0], [3, 3]]), backend=FACTORED,
    )  # fmt: skip
    assert not output.any() and state.position.tolist() == [0, 0]
    assert not torch.autograd.grad(output.sum(), q)[0].any()


def test_nan_in_one_row_stays_there():
    problem = make_problem(MemorySpec(), chunk_size=4, tokens=13, retention=True)
    poisoned = problem.map(lambda _, t: t.clone())
    poisoned["v"][1, 2] = torch.nan

    def evaluated(p):
        return evaluate(p, lambda p: package_results(p, backend=FACTORED))

    clean, found = evaluated(problem).named(), evaluated(poisoned).named()
    for name, want in clean.items():
        if "weight" in name and "gradient" in name:
            continue  # shared: a sum over the rows
        torch.testing.assert_close(found[name][0], want[0], rtol=1e-12, atol=1e-12)
    assert found["output"][1, 4:].isnan().all()


@pytest.mark.parametrize("length", [2, 8, 10])
def test_index_select_detach_and_state_dict_of_a_factored_state(length, tmp_path):
    problem = make_problem(MemorySpec("glu"), chunk_size=4, tokens=17, batch=3, retention=True)
    leaves = problem.map(lambda _, t: t.clone().requires_grad_())
    _, state = scan_stream(leaves.span(0, length), [length], backend=FACTORED)
    rest = problem.span(length, 17)
    order = [2, 0, 0, 1]
    want = _continue(
        rest.map(lambda n, t: t if n.startswith("weight") else t[order]), state.index_select(order), FACTORED
    )
    full = _continue(rest, state, FACTORED)
    torch.testing.assert_close(want.output, full.output[order], rtol=1e-12, atol=1e-12)

    detached = state.detach()
    assert not any(w.requires_grad for w in detached.weights)
    torch.save(detached.state_dict(), tmp_path / "state.pt")
    loaded = MemoryState.from_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert (loaded.factors is None) == (length < 4)
    assert torch.equal(_continue(rest, loaded, FACTORED).output, full.output)
    with pytest.raises(ValueError, match="factors: got"):
        MemoryState.from_state_dict(detached.state_dict() | {"factors": {"inputs": []}})
    half = detached.to(torch.float32)
    assert all(w.dtype == torch.float32 for w in half.weights)


def test_no_rows_of_a_state_of_padded_rows_go_on():
    problem = make_problem(MemorySpec(), chunk_size=4, tokens=6)
    options = {"spec": problem.spec, "chunk_size": 4, "backend": FACTORED}
    tokens = [problem[name] for name in ("q", "k", "v", "lr")]
    _, state = memory_scan(*tokens, problem.weights, valid=torch.tensor([[0, 6], [3, 6]]), **options)
    output, after = memory_scan(*(t[:0] for t in tokens), state.index_select([]), **options)
    assert output.shape == (0, *problem["q"].shape[1:]) and after.weights[0].shape[0] == 0


def test_a_state_stored_before_there_was_a_factored_plan_is_loaded():
    problem = make_problem(MemorySpec(), chunk_size=4, tokens=10)
    _, state = scan_stream(problem.span(0, 5), [5], backend="reference")
    stored = {name: x for name, x in state.state_dict().items() if name != "factors"}
    rest, loaded = problem.span(5, 10), MemoryState.from_state_dict(stored)
    assert loaded.factors is None
    assert torch.equal(_continue(rest, loaded, None).output, _continue(rest, state, None).output)


@torch.no_grad()
def test_a_layer_asked_for_the_factored_plan_steps_as_it_scans():
    torch.manual_seed(0)
    layer = CMS(16, levels=[CMSLevel(chunk_size=2)], heads=2, backend=FACTORED)
    x = torch.randn(2, 5, 16)
    buffer = layer.make_buffer(2)
    found = torch.cat([layer.step(x[:, t : t + 1], buffer) for t in range(5)], 1)
    want = layer(x)
    torch.testing.assert_close(found, want[0] if isinstance(want, tuple) else want)


def test_the_state_refers_to_the_initial_weights_and_a_read_merges_nothing(monkeypatch):
    problem = make_problem(MemorySpec(), chunk_size=4, tokens=14)
    _, state = scan_stream(problem, [14], backend=FACTORED)
    assert all(a is b for a, b in zip(state.stored_weights, problem.weights, strict=True))
    assert "factored" in repr(state) and state.factors.count == 12
    want = memory_read(problem["q"], state.merged(), spec=problem.spec, backend="reference")
    merges = []
    merged = type(state.factors).merged
    monkeypatch.setattr(type(state.factors), "merged", lambda *a: merges.append(1) or merged(*a))
    for backend, count in ((None, 0), (FACTORED, 0), ("reference", 1)):
        found = memory_read(problem["q"], state, spec=problem.spec, backend=backend)
        torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)
        assert len(merges) == count


@pytest.mark.parametrize("form", ["linear", "mlp", "glu"])
def test_memory_write_appends_one_chunk_of_any_length(form):
    problem = make_problem(MemorySpec(form), chunk_size=4, tokens=15, retention=True)

    def write(p, backends):
        state = p.weights
        for (a, b), backend in zip(((0, 4), (4, 11), (11, 15)), backends, strict=True):
            part = p.span(a, b)
            options = {"spec": p.spec, "retention": part["retention"], "backend": backend}
            state = memory_write(part["k"], part["v"], part["lr"], state, **options)
        assert state.position == 15 and state.chunk_index == 3
        return {f"weight{i}": w for i, w in enumerate(state.weights)}

    want = evaluate(problem, lambda p: write(p, ["reference"] * 3))
    for backends in ([FACTORED] * 3, [FACTORED, FACTORED, "reference"]):
        assert_equal_to_rounding(evaluate(problem, lambda p, names=backends: write(p, names)), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_rates_of_zero_leave_every_read_what_it_was(dtype):
    """Within one layout of the reads: pairs that weigh 0 and a retention of 1 change no bit."""
    problem = make_problem(MemorySpec(), chunk_size=8, tokens=16, dim=16, hidden=24, retention=True).cast(dtype)
    problem["lr"].zero_()
    problem["retention"].fill_(1)
    _, state = scan_stream(problem, [16], backend=FACTORED)
    assert state.factors.count == 16 and not state.factors.weights.any()
    fresh = memory_read(problem["q"], problem.weights, spec=problem.spec, backend=FACTORED)
    assert torch.equal(memory_read(problem["q"], state, spec=problem.spec, backend=FACTORED), fresh)


def test_autocast_casts_tokens_as_the_dense_plan_does():
    problem = make_problem(MemorySpec(), chunk_size=8, tokens=20, dim=16, hidden=24, retention=True)
    problem = problem.cast(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = _continue(problem, problem.memory(), FACTORED)
    half = problem.map(lambda n, t: t.bfloat16() if n in ("q", "k", "v") else t)
    want = _continue(half, problem.memory(), FACTORED)
    assert found.output.dtype == torch.bfloat16 and torch.equal(found.output, want.output)
    assert found.state.factors.inputs[0].dtype == torch.bfloat16
    assert found.state.factors.errors[0].dtype == torch.float32


def test_a_compiled_call_equals_eager_forward_and_backward():
    problem = make_problem(MemorySpec("mlp"), chunk_size=4, tokens=14, retention=True)
    names = list(problem.tensors)

    def call(*tensors):
        p = problem.with_tensors(**dict(zip(names, tensors, strict=True)))
        output, state = _continue(p, p.weights, FACTORED)
        return output, *state.weights

    leaves = [problem[name].clone().requires_grad_() for name in names]
    found, want = torch.compile(call, fullgraph=True, backend="aot_eager")(*leaves), call(*leaves)
    gradients = [torch.autograd.grad(sum(x.square().sum() for x in r), leaves) for r in (found, want)]
    for a, b in zip((*found, *gradients[0]), (*want, *gradients[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad], ids=lambda m: m.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_compiled_call_without_gradients_equals_eager(mode, dtype):
    problem = make_problem(MemorySpec("mlp"), chunk_size=4, tokens=10, retention=True).cast(dtype)

    def call(q, k):
        output, state = _continue(problem.with_tensors(q=q, k=k), problem.weights, FACTORED)
        return output, *state.weights

    with mode():
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        found, want = (f(problem["q"], problem["k"]) for f in (compiled, call))
    for a, b in zip(found, want, strict=True):
        assert torch.equal(a, b)


def test_a_compiled_call_that_names_no_backend_is_dense(monkeypatch):
    monkeypatch.setattr(plan, "LEAST_ELEMENTS", 0)
    monkeypatch.setattr(plan, "LEAST_CHUNK", 1)
    problem = make_problem(MemorySpec(), chunk_size=4, tokens=6, dim=20, hidden=30)
    names = ("q", "k", "v", "lr")

    def call(q, k, v, lr):
        output, state = memory_scan(q, k, v, lr, problem.weights, spec=problem.spec, chunk_size=4)
        return output, state.factors is None

    found, dense = torch.compile(call, fullgraph=True, backend="eager")(*(problem[name] for name in names))
    want, dense_in_eager = call(*(problem[name] for name in names))
    assert dense and not dense_in_eager
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)


def test_compiled_calls_refuse_sequences_of_different_lengths_in_our_words():
    problem = make_problem(MemorySpec(), chunk_size=4, tokens=6)

    def call(q, valid):
        return memory_scan(
            q, problem["k"], problem["v"], problem["lr"], problem.weights, spec=problem.spec, chunk_size=4,
            valid=valid, backend=FACTORED,
        ).output  # fmt: skip

    with pytest.raises(RuntimeError, match=r"torch.compile the factored plan takes neither cu_seqlens nor valid"):
        torch.compile(call, fullgraph=True, backend="eager")(problem["q"], torch.tensor([[0, 6], [2, 6]]))


@NAMES
def test_only_first_derivatives(name):
    problem = make_problem(MemorySpec(), chunk_size=2, tokens=6, dim=16, hidden=32)
    k = problem["k"].clone().requires_grad_()
    output, _ = _continue(problem.with_tensors(k=k), problem.memory(), name)
    (gradient,) = torch.autograd.grad(output.square().sum(), k, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(gradient.sum(), k)


# --------------------------------------------------------------------------------------------------------------
# What is kept for the backward


def kept_bytes(backend: str, tokens: int, chunk_size: int) -> int:
    """Distinct storages that the graph of one call keeps, in bytes."""
    problem = make_problem(MemorySpec(), chunk_size=chunk_size, tokens=tokens, heads=1, dim=16, hidden=32, batch=2)
    leaves = problem.cast(torch.float32).map(lambda _, t: t.requires_grad_())
    storages = {}

    def keep(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        result = _continue(leaves, leaves.memory(), backend)  # alive: freed storages would be counted twice
    assert result.output.requires_grad
    return sum(storages.values())


@NAMES
def test_what_a_backward_needs_is_a_few_rows_per_token_and_nothing_per_pair_of_tokens(name):
    """From 256 to 1024 tokens, a graph that keeps scores [C, S] or a chunk's joined pairs grows sixteenfold."""
    few, many = (kept_bytes(name, tokens, 64) for tokens in (256, 1024))
    assert many < 4.5 * few
    # 4 bytes, 2 rows; q and k differ, so the pass of each is kept.
    assert (many - few) / (4 * 2 * (1024 - 256)) < 10 * (16 + 32)


# --------------------------------------------------------------------------------------------------------------
# Which plan a call gets


def state_of(spec: MemorySpec, dim: int, hidden: int, chunk_size: int, **changes) -> MemoryState:
    weights = [torch.empty(1, *shape, device="meta") for shape in spec.weight_shapes(dim, hidden)]
    return replace(MemoryState.initial(weights, spec=spec, chunk_size=chunk_size), **changes)


@pytest.mark.parametrize(("form", "want"), [("mlp", 2048 * 8192 // 10240), ("linear", 1024), ("glu", 1755)])
def test_pairs_cost_as_much_as_dense_weights_at_the_documented_number_of_tokens(form, want):
    spec = MemorySpec(form)
    assert merge_after(spec, 2048, 8192) == want
    numbers = sum(a * b for a, b in spec.weight_shapes(2048, 8192))
    _, state = scan_stream(make_problem(spec, chunk_size=2, tokens=2, heads=1, batch=1), [2], backend=FACTORED)
    # Numbers of a pair with features 5 and 6, scaled to the features asked for.
    scale = {5: 2048, 6: 8192}
    pair = sum(scale[x.shape[-1]] for x in (*state.factors.inputs, *state.factors.errors))
    assert want == numbers // pair


def test_the_rule_takes_large_shared_memories_until_their_pairs_cost_more():
    spec = MemorySpec()
    large = make_request(spec, heads=1, dim=2048, hidden=8192, chunk_size=512)
    fresh = state_of(spec, 2048, 8192, 512)
    # 1638 pairs are the crossover: chunks that start with 0, 512, 1024, 1536 of them are factored.
    assert plan.factored_until(None, large, fresh) == 2048
    assert plan.factored_until("cpu", large, fresh) == 0
    assert plan.factored_until("cpu:factored", large, fresh) == plan.ALWAYS
    for change in (
        {"dim": 128, "hidden": 512},
        {"chunk_size": 2048},
        {"chunk_size": 127},
        {"table": True},
        {"momentum": True},
    ):
        assert plan.factored_until(None, large._replace(**change), fresh) == 0, change
    for change in ({"gradients": True}, {"heads": 4}, {"retention": True}):  # not the rule's affair
        assert plan.factored_until(None, large._replace(**change), fresh) == 2048, change
    own = replace(fresh, stored_weights=tuple(w[None] for w in fresh.stored_weights))
    assert plan.factored_until(None, large, own) == 0
    assert plan.factored_until(None, large, fresh, bptt_chunks=2) == 0


@pytest.mark.parametrize("lengths", [[17], [8, 9], [7, 7, 3], [1] * 17], ids=str)
def test_a_stream_turns_dense_at_the_same_token_under_any_split(lengths, monkeypatch):
    """With the threshold of size out of the way: 20 * 30 / 50 = 12 pairs, so chunks at 0, 4, 8, 12 are factored."""
    monkeypatch.setattr(plan, "LEAST_ELEMENTS", 0)
    monkeypatch.setattr(plan, "LEAST_CHUNK", 1)
    problem = make_problem(MemorySpec(), chunk_size=4, tokens=17, dim=20, hidden=30, retention=True)
    plans = []
    run, dense = factored.scan_problem, scan._run
    monkeypatch.setattr(
        factored, "scan_problem", lambda tokens, *a: plans.append(("factored", tokens[1].shape[1])) or run(tokens, *a)
    )
    monkeypatch.setattr(scan, "_run", lambda p, *a: plans.append(("dense", p.q.shape[1])) or dense(p, *a))
    found = evaluate_package(problem, None, lengths=lengths)
    assert sum(n for name, n in plans if name == "factored") == 16 and plans[-1] == ("dense", 1)
    assert_equal_to_rounding(found, evaluate_oracle(problem))


def test_at_the_turn_the_state_is_merged_at_once(monkeypatch):
    monkeypatch.setattr(plan, "LEAST_ELEMENTS", 0)
    monkeypatch.setattr(plan, "LEAST_CHUNK", 1)
    problem = make_problem(MemorySpec(), chunk_size=4, tokens=16, dim=20, hidden=30)
    _, before = scan_stream(problem.span(0, 15), [15], backend=None)
    _, after = scan_stream(problem, [15, 1], backend=None)
    assert before.factors.count == 12 and after.factors is None
    assert after.stored_weights[0].shape == (2, 2, 20, 30)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"spec": MemorySpec(rule="dgd")}, "rule 'gd', got 'dgd'"),
        ({"momentum": True}, "has no momentum"),
        ({"shared": False}, "that all sequences share"),
    ],
)
def test_refusals_name_the_reason(changes, reason):
    problem = make_problem(**{"spec": MemorySpec(), "chunk_size": 4} | changes)
    with pytest.raises(RuntimeError, match=rf"backend='reference:factored' cannot run this: .*{reason}"):
        package_results(problem, backend=FACTORED)


def test_other_refusals():
    problem = make_problem(MemorySpec(), chunk_size=4)
    with pytest.raises(RuntimeError, match="no bptt_chunks"):
        package_results(problem, backend=FACTORED, bptt_chunks=2)
    with pytest.raises(ValueError, match="want None or one of"):
        package_results(problem, backend="gpu:factored")
    if STATUS["triton"]:  # interpreted here: an engine's own refusals hold for its factored plan
        with pytest.raises(RuntimeError, match="backend='triton:factored' cannot run this: it takes float32"):
            package_results(problem, backend="triton:factored")
    _, state = scan_stream(problem, [11], backend=FACTORED)
    with pytest.raises(ValueError, match=r"memory: got a state of torch.float64; want torch.float32"):
        _continue(problem.cast(torch.float32), state, FACTORED)
    whole, half = problem.span(0, 8).cast(torch.float32), problem.cast(torch.bfloat16, torch.float32)
    _, state = scan_stream(whole, [8], backend=FACTORED)
    with pytest.raises(ValueError, match=r"got a factored state of torch.float32 tokens; want torch.bfloat16"):
        _continue(half, state, FACTORED)
    assert _continue(half, state.to(torch.bfloat16), FACTORED).output.dtype == torch.bfloat16
