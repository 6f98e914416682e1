"""The compiled core's kernels of the factored plan: what they take, and the bits that nothing may change."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch

from hope_kernels import MemorySpec, memory_read, memory_scan
from hope_kernels.memory import factored_ops
from tests.cases import STATUS, assert_equal_to_rounding, evaluate_oracle, evaluate_package, make_problem
from tests.memory.test_splits import _continue

pytestmark = pytest.mark.skipif(not STATUS["cpu"], reason=STATUS["cpu"].reason)
FACTORED = "cpu:factored"
FORMS = pytest.mark.parametrize("form", ["linear", "mlp", "glu"])


@pytest.fixture
def calls(monkeypatch):
    """Reads and writes the kernels were asked for."""
    made = []
    for name in ("read", "write"):
        original = getattr(factored_ops.Chunks, name)
        monkeypatch.setattr(
            factored_ops.Chunks, name, lambda *a, name=name, original=original: made.append(name) or original(*a)
        )
    return made


def problem_of(form="mlp", **changes):
    sizes = {"chunk_size": 6, "tokens": 21, "dim": 16, "hidden": 48, "retention": True}
    return make_problem(MemorySpec(form, "silu"), **(sizes | changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@FORMS
def test_every_chunk_is_the_kernels(form, dtype, calls):
    problem = problem_of(form).cast(dtype)
    _continue(problem, problem.memory(), FACTORED)
    assert calls == ["read", "write"] * 3 + ["read"]


@pytest.mark.parametrize(
    ("dtype", "changes"),
    [
        (torch.float32, {"dim": 17}),
        (torch.float32, {"hidden": 40}),
        (torch.bfloat16, {}),
        (torch.float16, {}),
    ],
    ids=str,
)
def test_what_they_do_not_take_is_the_matrix_librarys(dtype, changes, calls):
    problem = problem_of(**changes).cast(dtype)
    _continue(problem, problem.memory(), FACTORED)
    assert not calls


def test_the_reference_and_rows_at_positions_of_their_own_are_the_matrix_librarys(calls):
    problem = problem_of()
    _continue(problem, problem.memory(), "reference:factored")
    valid = torch.tensor([[0, 21]] * problem["q"].shape[0])
    memory_scan(
        problem["q"], problem["k"], problem["v"], problem["lr"], problem.memory(), spec=problem.spec, chunk_size=6,
        retention=problem["retention"], valid=valid, backend=FACTORED,
    )  # fmt: skip
    assert not calls


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("objective", ["l2", "dot", "error", "self"])
@FORMS
def test_long_chunks_and_reads_of_many_rows_equal_the_token_loop(form, objective, residual):
    """More rows than are read at once, more pairs in a block than a panel of the core has columns."""
    spec = MemorySpec(form, "gelu_tanh", residual=residual, objective=objective)
    problem = make_problem(spec, chunk_size=70, tokens=150, batch=1, heads=2, dim=16, hidden=80, retention=True)
    assert_equal_to_rounding(evaluate_package(problem, FACTORED), evaluate_oracle(problem))
    weights = problem.memory()
    q = torch.randn(2, 300, 2, 16, dtype=torch.float64)
    state = _continue(problem, weights, FACTORED).state.index_select([0, 0])
    want = memory_read(q, state, spec=spec, backend="reference:factored")
    torch.testing.assert_close(memory_read(q, state, spec=spec, backend=FACTORED), want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("layout", ["transposed", "float32", "expanded"])
def test_weights_and_tokens_of_any_strides(layout):
    problem = problem_of()
    plain = evaluate_package(problem, FACTORED)

    def other(name, t):
        if name.startswith("weight"):
            if layout == "transposed":
                return t.transpose(1, 2).contiguous().transpose(1, 2)
            return t.float() if layout == "float32" else t
        if t.dim() == 4 and layout == "transposed":
            return t.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)
        return torch.stack([t, t], 2)[:, :, 0] if layout == "expanded" else t

    if layout == "float32":
        problem = problem.map(lambda name, t: t.float().double() if name.startswith("weight") else t)
        plain = evaluate_package(problem, FACTORED)
    got = evaluate_package(problem.map(other), FACTORED)
    for name, want in plain.values.items():
        torch.testing.assert_close(got.values[name], want, rtol=0, atol=0)
    rtol = 1e-6 if layout == "float32" else 1e-12  # of weights: sums over chunks that autograd forms in its own order
    for name, want in plain.gradients.items():
        torch.testing.assert_close(got.gradients[name].double(), want, rtol=rtol, atol=rtol / 10)


@FORMS
def test_threads_and_neighbours_change_no_bit(form):
    problem = problem_of(form, batch=3, heads=1, dim=128, hidden=512, chunk_size=70, tokens=150).cast(torch.float32)
    # As a memory has it that forgets slowly: with less of the old weights left, their part of a sum hides in rounding.
    problem = problem.map(lambda name, t: 1 - 1e-3 * t if name == "retention" else t)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(evaluate_package(problem, FACTORED))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        for name, want in found[0].named().items():
            assert torch.equal(other.named()[name], want), name
    alone = evaluate_package(problem.map(lambda name, t: t if name.startswith("weight") else t[1:2]), FACTORED)
    for name, want in found[0].values.items():
        assert torch.equal(alone.values[name], want[1:2]), name


@pytest.mark.parametrize("retention", [False, True])
@FORMS
def test_few_tokens_of_many_sequences_read_the_shared_weights_together(form, retention):
    """Large weights, up to four tokens: each sequence gets the bits it gets alone, whoever reads with it."""
    sizes = {"batch": 2, "heads": 2, "dim": 512, "hidden": 512, "chunk_size": 5, "tokens": 11}
    problem = problem_of(form, **sizes, retention=retention)
    with torch.no_grad():
        state = _continue(problem, problem.memory(), FACTORED).state.index_select([0, 1] * 20)
        for tokens in (1, 4):
            q = torch.randn(40, tokens, 2, 512, dtype=torch.float64)
            found = memory_read(q, state, spec=problem.spec, backend=FACTORED)
            want = memory_read(q, state, spec=problem.spec, backend="reference:factored")
            torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-12)
            for row in (0, 33):
                alone = memory_read(q[[row]], state.index_select([row]), spec=problem.spec, backend=FACTORED)
                assert torch.equal(alone, found[[row]])


@FORMS
def test_without_gradients_a_stream_has_the_same_bits_and_its_pairs_lie_behind_one_another(form):
    problem = problem_of(form).cast(torch.float32)
    graded = problem.with_tensors(k=problem["k"].clone().requires_grad_())

    def stream(p):
        memory, outputs = p.memory(), []
        for start, stop in ((0, 8), (8, 9), (9, 21)):
            output, memory = _continue(p.span(start, stop), memory, FACTORED)
            outputs.append(output)
        return torch.cat(outputs, 1), memory

    (one, plain), (other, kept) = stream(problem), stream(graded)
    assert torch.equal(one, other.detach())
    whole = _continue(problem, problem.memory(), FACTORED).state
    found = [state.factors.inputs + state.factors.errors for state in (plain, kept, whole)]
    for a, b in zip(*found[:2], strict=True):
        assert torch.equal(a, b.detach())
    assert all(x.is_contiguous() and x.shape[2] == 18 for x in found[2])


@pytest.mark.parametrize("only", ["q", "k", "v", "lr", "retention", "weight0"])
@FORMS
def test_a_gradient_of_one_tensor_alone(form, only):
    """Chunks before the first that depends on it make no graph."""
    problem = problem_of(form)

    def gradient(backend):
        leaf = problem[only].clone().requires_grad_()
        with_leaf = problem.with_tensors(**{only: leaf})
        output, state = _continue(with_leaf, with_leaf.memory(), backend)
        read = memory_read(problem["q"], state, spec=problem.spec, backend=backend)
        loss = output.square().sum() + read.square().sum() + sum(w.square().sum() for w in state.weights)
        return torch.autograd.grad(loss, leaf)[0]

    torch.testing.assert_close(gradient(FACTORED), gradient("reference:factored"), rtol=1e-10, atol=1e-12)


def test_nothing_of_a_call_outlives_its_results():
    """A transposed copy kept beside its tensor keeps that tensor's graph, and the graph what keeps the copy."""
    problem = problem_of().map(lambda _, t: t.clone().requires_grad_())
    seen = []
    original = factored_ops.Chunks.__init__
    for backward in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                factored_ops.Chunks, "__init__", lambda c, *a: seen.append(weakref.ref(c)) or original(c, *a)
            )
            output, state = _continue(problem, problem.memory(), FACTORED)
        if backward:
            (output.sum() + state.weights[0].sum()).backward()
        del output, state
        gc.collect()
    assert len(seen) == 2 and all(chunks() is None for chunks in seen)


@pytest.mark.parametrize("hooks", ["checkpoint", "clones"])
def test_transposed_copies_grow_with_the_tokens_alone(hooks, monkeypatch):
    """A backward that is handed new tensors for every chunk must not keep a copy of each."""
    held = []
    original = factored_ops.Chunks.turned

    def counted(chunks, x, **options):
        made = original(chunks, x, **options)
        held.append((weakref.ref(chunks), sum(t.numel() for _, t in chunks._turned.values() if t is not None)))
        return made

    monkeypatch.setattr(factored_ops.Chunks, "turned", counted)

    def most(tokens):
        held.clear()
        problem = problem_of(tokens=tokens, heads=1, batch=1).map(lambda _, t: t.clone().requires_grad_())

        def loss(*_):
            return _continue(problem, problem.memory(), FACTORED).output.sum()

        if hooks == "checkpoint":
            torch.utils.checkpoint.checkpoint(loss, problem["k"], use_reentrant=False).backward()
        else:
            with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x.clone()):
                found = loss()
            found.backward()
        return max(count for _, count in held)

    assert most(192) < 2.5 * most(96)


@pytest.mark.parametrize("graded", [False, True])
def test_a_whole_graph_is_compiled_without_them(graded, calls):
    problem = problem_of()
    leaves = problem.map(lambda _, t: t.clone().requires_grad_(graded))

    def call(q):
        return _continue(leaves.with_tensors(q=q), leaves.memory(), FACTORED).output

    torch._dynamo.reset()
    got = torch.compile(call, fullgraph=True, backend="eager")(leaves["q"])
    assert not calls
    torch.testing.assert_close(got, call(leaves["q"]), rtol=1e-12, atol=1e-12)


def test_pairs_and_retention_of_any_strides():
    problem = problem_of(tokens=12)
    state = _continue(problem, problem.memory(), FACTORED).state
    q = problem["q"]
    want = memory_read(q, state, spec=problem.spec, backend=FACTORED)

    def spread(name, x):
        if name == "decay":
            return torch.stack([x, x], -1)[..., 0]
        if name == "inputs":  # a slice along C, beside errors that are contiguous
            return torch.cat([x, x], 2)[:, :, : x.shape[2]]
        return x

    strided = state.replaced(factors=state.factors.map(spread))
    assert torch.equal(memory_read(q, strided, spec=problem.spec, backend=FACTORED), want)


@pytest.mark.parametrize("graded", [False, True])
@pytest.mark.parametrize("backend", ["reference:factored", FACTORED])
@pytest.mark.parametrize("objective", ["l2", "error"])
def test_a_state_holds_no_memory_of_the_callers(objective, backend, graded):
    spec = MemorySpec("linear", objective=objective)
    problem = make_problem(spec, chunk_size=6, tokens=6, batch=2, heads=1, dim=16, hidden=16)
    problem = problem.map(lambda name, t: t.clone().requires_grad_(graded and name == "weight0"))
    state = _continue(problem, problem.memory(), backend).state
    before = [x.clone() for x in (*state.factors.inputs, *state.factors.errors, state.factors.weights)]
    with torch.no_grad():
        for name in ("k", "v", "lr"):
            problem[name].fill_(7)
    after = (*state.factors.inputs, *state.factors.errors, state.factors.weights)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b)


def test_a_second_backward_and_gradients_of_some_tensors_alone():
    problem = problem_of("glu")
    want = evaluate_package(problem, FACTORED).gradients
    leaves = problem.map(lambda name, t: t.clone().requires_grad_(name in ("v", "weight0")))
    output, state = _continue(leaves, leaves.memory(), FACTORED)
    every = problem.map(lambda _, t: t.clone().requires_grad_())
    output_of_all, state_of_all = _continue(every, every.memory(), FACTORED)
    loss = output.square().sum() + sum(w.square().sum() for w in state.weights)
    loss_of_all = output_of_all.square().sum() + sum(w.square().sum() for w in state_of_all.weights)
    some = [leaves["v"], leaves["weight0"]]
    first = torch.autograd.grad(loss, some, retain_graph=True)
    second = torch.autograd.grad(loss, some)
    of_all = torch.autograd.grad(loss_of_all, [every["v"], every["weight0"]])
    for a, b, c in zip(first, second, of_all, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-12, atol=1e-12)
    assert set(want) >= {"v", "weight0"}


def test_a_chunk_that_nothing_reads_needs_no_adjoint_of_its_write():
    """Only the output's gradient: the last chunk's pairs have none, values and rates of it get zeros."""
    problem = problem_of(tokens=12)
    v = problem["v"].clone().requires_grad_()
    output, _ = _continue(problem.with_tensors(v=v), problem.memory(), FACTORED)
    (gradient,) = torch.autograd.grad(output.sum(), v)
    assert gradient[:, :6].abs().sum() > 0
    assert torch.equal(gradient[:, 6:], torch.zeros_like(gradient[:, 6:]))


def test_a_changed_spec_changes_the_result():
    """The kernels are told form, activation and objective: a guard against a constant in their place."""
    problem = problem_of()
    outputs = [
        _continue(replace(problem, spec=spec), problem.memory(), FACTORED).output
        for spec in (MemorySpec("mlp", a, objective=o) for a in ("silu", "gelu", "relu2") for o in ("l2", "dot"))
    ]
    for i, a in enumerate(outputs):
        assert not any(torch.equal(a, b) for b in outputs[:i])
