"""Products with written pairs by Triton kernels, and scans of the factored plan with them, in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hope_kernels import MemorySpec, available_backends, memory_read, memory_scan, memory_write
from hope_kernels.backends import pair_engine
from hope_kernels.memory.joined_pairs import Grown
from hope_kernels.memory.pair_products import pair_products
from tests.backends.test_triton import Launches
from tests.cases import (
    Evaluation,
    assert_within_budget,
    cotangent,
    device_of,
    evaluate_oracle,
    evaluate_package,
    make_problem,
    package_results,
    scan_stream,
)

STATUS = available_backends()["triton"]
pytestmark = pytest.mark.skipif(not STATUS, reason=f"triton: {STATUS.reason}")
FACTORED = "triton:factored"
DTYPES = (torch.float32, torch.float16)

if STATUS:
    from hope_kernels.backends import triton as engine
    from hope_kernels.backends.triton.configurations import Configuration, assume


@contextmanager
def small_tiles() -> Iterator[None]:
    """So that sizes a test can afford have several tiles, and parts of one, each way."""
    configuration = Configuration.of(rows=16, columns=16, inner=16, num_warps=4)
    with assume(dict.fromkeys(("pairs_scores", "pairs_adjoint", "pairs_sums", "pairs_odd"), configuration)):
        yield


# ---- products and gradients ------------------------------------------------------------------------------------------


def make_pairs(
    batch: int, tokens: int, heads: int, inner: int, outer: int, pairs: int, *, lists: int = 1, seed: int = 0
) -> dict[str, Tensor]:
    """In float64, weights between 0 and 1, some of them 0."""
    random = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    weights = torch.rand(batch, heads, pairs, generator=random, dtype=torch.float64)
    weights[..., 1::5] = 0
    return {
        "u": drawn(batch, tokens, heads, inner),
        "keys": drawn(batch, heads, pairs, inner),
        "weights": weights,
        **{f"value{i}": drawn(batch, heads, pairs, outer) for i in range(lists)},
    }


def rounded(pairs: dict[str, Tensor], dtype: torch.dtype, *, errors: str = "values") -> dict[str, Tensor]:
    """As a scan of tokens in ``dtype`` has them: inputs of layers in it, errors (values, or keys and u) in float32."""
    exact = ("weights", *([n for n in pairs if n.startswith("value")] if errors == "values" else ["u", "keys"]))
    # Numbers that every dtype has, so that float64 is given the same.
    return {n: t.half().to(torch.float32 if n in exact else dtype).to(device_of("triton")) for n, t in pairs.items()}


def evaluated(
    pairs: dict[str, Tensor],
    operand: torch.dtype,
    *,
    by: object = None,
    blocks: Sequence[int] | None = None,
    layout: Callable[[Tensor], Tensor] = lambda x: x,
) -> Evaluation:
    """Results and all gradients; pairs in blocks of these lengths, every tensor as ``layout`` places it in memory."""
    leaves = {n: t.detach().clone().requires_grad_() for n, t in pairs.items()}
    placed = {n: layout(t) for n, t in leaves.items()}
    lengths = list(blocks or [placed["keys"].shape[2]])
    values = [placed[n].split(lengths, 2) for n in placed if n.startswith("value")]
    results = pair_products(placed["u"], placed["keys"].split(lengths, 2), values, placed["weights"], operand, by)
    loss = sum((layout(r) * cotangent(f"result{i}", r).to(r.dtype)).sum() for i, r in enumerate(results))
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return Evaluation(
        {f"result{i}": r.detach().cpu() for i, r in enumerate(results)},
        {n: g.cpu() for n, g in zip(leaves, gradients, strict=True)},
    )


def assert_kernels_are_right(
    pairs: dict[str, Tensor], dtype: torch.dtype, *, errors: str = "values", **options
) -> None:
    """Within twice the error of the matrix library, which multiplies operands of the same dtype."""
    given = rounded(pairs, dtype, errors=errors)
    found = evaluated(given, dtype, by=engine, **options)
    truth = evaluated({n: t.double().cpu() for n, t in given.items()}, torch.float64)
    assert all(torch.is_tensor(x) and x.abs().max() > 0 for x in truth.named().values())
    assert_within_budget(found, evaluated(given, dtype), truth, dtype)


# batch, tokens, heads, features of keys and of values, pairs: with tiles of 16 none, some or all of them are whole
SIZES = [(2, 19, 1, 16, 32, 37), (1, 16, 2, 32, 16, 16), (1, 3, 2, 7, 21, 33), (2, 2, 1, 48, 17, 5)]


@pytest.mark.interpreted_cases(8)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("errors", ["values", "keys"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_products_and_every_gradient_equal_float64(sizes, errors, dtype):
    with small_tiles():
        assert_kernels_are_right(make_pairs(*sizes), dtype, errors=errors)


@pytest.mark.interpreted_cases(2)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_lists_of_values_share_their_scores(dtype):
    with small_tiles():
        assert_kernels_are_right(make_pairs(1, 18, 2, 20, 33, 21, lists=2), dtype)


def test_lists_of_different_widths_are_refused():
    given = rounded(make_pairs(1, 2, 1, 4, 5, 3, lists=2), torch.float32)
    given["value1"] = given["value1"][..., :4]
    with pytest.raises(ValueError, match=r"values: got shapes \[\(1, 1, 3, 4\), \(1, 1, 3, 5\)\]; want lists of one"):
        evaluated(given, torch.float32, by=engine)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_tiles_of_the_shipped_table_compute_the_same(dtype):
    assert_kernels_are_right(make_pairs(1, 130, 1, 64, 160, 140, lists=2), dtype)
    assert_kernels_are_right(make_pairs(1, 1, 2, 96, 64, 140), dtype, errors="keys")


def test_more_blocks_of_rows_than_go_through_the_columns_together():
    with small_tiles():
        assert_kernels_are_right(make_pairs(1, 130, 1, 16, 32, 20), torch.float32)


def test_several_blocks_of_pairs_are_one_list():
    with small_tiles():
        assert_kernels_are_right(make_pairs(1, 5, 2, 7, 9, 20, lists=2), torch.float32, blocks=[3, 16, 1])


def turned(x: Tensor) -> Tensor:
    """The same numbers with the last dimension the slowest."""
    return x.movedim(-1, 0).contiguous().movedim(0, -1)


def spaced(x: Tensor) -> Tensor:
    """The same numbers, each dimension a part of a longer one."""
    room = x.new_zeros([n + 3 for n in x.shape])
    at = tuple(slice(1, 1 + n) for n in x.shape)
    room[at] = x
    return room[at]


@pytest.mark.interpreted_cases(2)
@pytest.mark.parametrize("layout", [turned, spaced], ids=lambda f: f.__name__)
def test_tensors_may_have_any_strides(layout):
    with small_tiles():
        assert_kernels_are_right(make_pairs(2, 5, 3, 7, 9, 20, lists=2), torch.float32, layout=layout)


def test_upstream_gradients_of_one_number_are_read_where_they_lie():
    pairs = rounded(make_pairs(2, 5, 2, 7, 9, 20), torch.float32)
    leaves = {n: t.requires_grad_() for n, t in pairs.items()}

    def gradients(by: object) -> tuple[Tensor, ...]:
        u, keys, weights, value = leaves.values()
        (result,) = pair_products(u, [keys], [[value]], weights, torch.float32, by)
        return torch.autograd.grad(result.sum(), list(leaves.values()))  # strides of 0

    for found, want in zip(gradients(engine), gradients(None), strict=True):
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


@pytest.mark.interpreted_cases(7)
@pytest.mark.parametrize("wanted", ["u", "keys", "weights", "value0", "value1", "keys value1", "u weights"])
def test_only_gradients_that_are_wanted_are_computed_and_they_are_the_same(wanted):
    given = rounded(make_pairs(1, 5, 1, 7, 9, 20, lists=2), torch.float32)
    everything = evaluated(given, torch.float32, by=engine).gradients
    leaves = {n: t.detach().clone().requires_grad_(n in wanted.split()) for n, t in given.items()}
    u, keys, weights, *values = leaves.values()
    results = pair_products(u, [keys], [[value] for value in values], weights, torch.float32, engine)
    loss = sum((r * cotangent(f"result{i}", r).to(r.dtype)).sum() for i, r in enumerate(results))
    for name, found in zip(wanted.split(), torch.autograd.grad(loss, [leaves[n] for n in wanted.split()]), strict=True):
        assert torch.equal(found.cpu(), everything[name])


@pytest.mark.interpreted_cases(3)
@pytest.mark.parametrize("empty", ["batch", "tokens", "pairs"])
def test_nothing_to_multiply_gives_zeros_and_gradients_of_zero(empty):
    sizes = {"batch": 2, "tokens": 3, "heads": 2, "inner": 5, "outer": 4, "pairs": 6} | {empty: 0}
    given = rounded(make_pairs(**sizes), torch.float32)
    found = evaluated(given, torch.float32, by=engine)
    assert found.values["result0"].shape == (sizes["batch"], sizes["tokens"], 2, 4)
    assert not any(x.any() for x in found.named().values())
    assert all(found.gradients[n].shape == t.shape for n, t in given.items())


def test_a_row_has_the_same_bits_in_a_batch_and_alone():
    u, keys, weights, value = rounded(make_pairs(2, 18, 1, 20, 17, 21), torch.float16).values()
    upstream = torch.randn(2, 18, 1, 17, device=u.device)

    def results(row: slice) -> list[Tensor]:
        given = u[row], keys[row], [value[row]], weights[row], torch.float16
        *gradients, (d_value,) = engine.pair_gradients(*given, [upstream[row]], [True] * 4)
        return [*engine.pair_products(*given), *gradients, d_value]

    with small_tiles():
        together = results(slice(None))
        for b in range(2):
            for found, want in zip(results(slice(b, b + 1)), together, strict=True):
                assert torch.equal(found[0], want[b])


def test_the_largest_number_of_float16_reads_as_such():
    """Scores are rounded to the operands' dtype as the matrix library's are; sums are float32."""
    given = rounded(make_pairs(1, 2, 1, 16, 16, 16), torch.float16)
    given["u"].fill_(8)
    given["keys"].fill_(8)
    given["weights"].fill_(1)
    given["value0"].fill_(100)
    found = evaluated(given, torch.float16, by=engine).values["result0"]
    assert torch.equal(found, torch.full_like(found, 16 * 1024 * 100.0))


# ---- pairs in one growing tensor -------------------------------------------------------------------------------------


def test_blocks_are_appended_behind_rows_that_stay_and_each_gets_its_gradient():
    first = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    blocks = [torch.randn(2, 3, n, 5, dtype=torch.float64, requires_grad=True) for n in (2, 1, 3, 2)]
    grown, lengths = Grown(first), []
    for i, block in enumerate(blocks):
        lengths.append(grown.append(block, room=sum(b.shape[2] for b in blocks[i + 1 :])))
    wanted = [torch.cat([first, *blocks[: i + 1]], 2) for i in range(4)]
    for found, want in zip(lengths, wanted, strict=True):
        assert torch.equal(found, want)
    assert len({x.untyped_storage().data_ptr() for x in lengths}) == 1
    assert lengths[-1].is_contiguous()  # no more room than was to come
    leaves = [first, *blocks]

    def gradients(results: list[Tensor]) -> tuple[Tensor, ...]:
        loss = sum((x.square() * cotangent(str(i), x)).sum() for i, x in enumerate(results))
        return torch.autograd.grad(loss, leaves)

    for found, want in zip(gradients(lengths), gradients(wanted), strict=True):
        torch.testing.assert_close(found, want)


@pytest.mark.interpreted_cases(2)
@pytest.mark.parametrize("needs_gradients", [False, True])
def test_rows_move_to_a_longer_storage_where_one_is_full(needs_gradients):
    grown, kept = Grown(), []
    blocks = [torch.full((1, 1, 2, 3), float(i), requires_grad=needs_gradients) for i in range(9)]
    for block in blocks:
        kept.append(grown.append(block, room=4))
    assert torch.equal(kept[-1][0, 0, ::2, 0], torch.arange(9.0)) and kept[-1].requires_grad == needs_gradients
    assert all(torch.equal(x, kept[-1][:, :, : x.shape[2]]) for x in kept)
    assert len({x.untyped_storage().data_ptr() for x in kept}) == 3
    if needs_gradients:
        for i, found in enumerate(torch.autograd.grad(sum(x.sum() for x in kept), blocks)):
            assert torch.equal(found, torch.full_like(found, 9.0 - i))


# ---- scans -----------------------------------------------------------------------------------------------------------


def factored_problem(spec: MemorySpec, dtype: torch.dtype = torch.float32, **sizes):
    sizes = {"batch": 1, "heads": 1, "chunk_size": 4, "tokens": 11, "dim": 5, "hidden": 7, "max_lr": 0.1} | sizes
    return make_problem(spec, retention=True, **sizes).cast(dtype)


@pytest.mark.interpreted_cases(5)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("spec", "sizes"),
    [
        (MemorySpec(), {"batch": 2}),
        (MemorySpec("glu", "silu", objective="self", residual=False), {}),
        (MemorySpec("linear", objective="dot"), {"tokens": 15, "heads": 2}),
    ],
    ids=["mlp", "glu", "linear"],
)
@pytest.mark.parametrize("lengths", [None, [6, 5]], ids=["whole", "split"])
def test_a_scan_stays_within_twice_the_eager_error_with_every_gradient(spec, sizes, lengths, dtype):
    problem = factored_problem(spec, dtype, **sizes)
    split = lengths and [6, problem.tokens - 6]
    found = evaluate_package(problem, FACTORED, lengths=split)
    eager = evaluate_package(problem, "reference", lengths=split)
    assert_within_budget(found, eager, evaluate_oracle(problem), dtype)


def test_pairs_before_a_retention_of_zero_weigh_nothing():
    problem = factored_problem(MemorySpec(), tokens=14)
    problem["retention"][:, 6] = 0
    found = evaluate_package(problem, FACTORED)
    assert_within_budget(found, evaluate_package(problem, "reference"), evaluate_oracle(problem), torch.float32)
    _, state = scan_stream(problem.to(device_of("triton")), [14], backend=FACTORED)
    assert not state.factors.weights[..., :4].any() and not state.factors.decay.any()


def test_a_state_that_kernels_wrote_is_read_and_continued_by_any_backend(monkeypatch):
    problem = factored_problem(MemorySpec("glu"), heads=2, tokens=14).to(device_of("triton"))
    want = package_results(problem, backend="reference:factored")
    _, state = scan_stream(problem.span(0, 9), [9], backend=FACTORED)
    assert all(x.is_contiguous() for x in (*state.factors.inputs, *state.factors.errors))
    rest = problem.span(9, 14)
    for backend in (FACTORED, "reference:factored", "reference"):
        output, last = memory_scan(
            rest["q"], rest["k"], rest["v"], rest["lr"], state, spec=problem.spec, chunk_size=4,
            retention=rest["retention"], backend=backend,
        )  # fmt: skip
        torch.testing.assert_close(output, want["output"][:, 9:], rtol=1e-5, atol=1e-6)
        for i, weight in enumerate(last.weights):
            torch.testing.assert_close(weight, want[f"weight{i}"], rtol=1e-5, atol=1e-6)
    with monkeypatch.context() as patch:
        counted = Launches(patch)
        found = memory_read(problem["q"], state, spec=problem.spec, backend=FACTORED)
        assert counted.names == {"scores_kernel": 2, "sums_kernel": 2}  # gate and up together, and the last layer
    torch.testing.assert_close(found, memory_read(problem["q"], state, spec=problem.spec, backend="reference"))


def test_writes_of_any_length_follow_one_another():
    problem = factored_problem(MemorySpec("linear"), tokens=9).to(device_of("triton"))

    def written(backend: str) -> tuple[Tensor, ...]:
        state = problem.weights
        for start, stop in ((0, 2), (2, 7), (7, 9)):
            part = problem.span(start, stop)
            options = {"spec": problem.spec, "retention": part["retention"], "backend": backend}
            state = memory_write(part["k"], part["v"], part["lr"], state, **options)
        return state.weights

    for found, want in zip(written(FACTORED), written("reference"), strict=True):
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)


def test_rows_of_different_lengths_write_their_own_pairs():
    problem = factored_problem(MemorySpec("linear"), batch=3, tokens=13).to(device_of("triton"))
    valid = torch.tensor([[0, 13], [4, 13], [13, 13]], device=problem["q"].device)

    def results(backend: str) -> tuple[Tensor, ...]:
        output, state = memory_scan(
            problem["q"], problem["k"], problem["v"], problem["lr"], problem.weights, spec=problem.spec, chunk_size=4,
            retention=problem["retention"], valid=valid, backend=backend,
        )  # fmt: skip
        return output, *state.weights

    for found, want in zip(results(FACTORED), results("reference"), strict=True):
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)


# ---- launches, memory and who multiplies -----------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """How many of torch's operations run inside, views and allocations included."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.count += 1
        return function(*arguments, **(options or {}))


def work_of(chunks: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Launches and torch operations of a scan of so many chunks, forward and backward."""
    problem = factored_problem(MemorySpec("linear"), chunk_size=1, tokens=chunks, dim=2).to(device_of("triton"))
    leaves = problem.map(lambda _, t: t.requires_grad_())
    with monkeypatch.context() as patch:
        counted = Launches(patch)
        with Operations() as forward:
            results = package_results(leaves, backend=FACTORED)
        launched = counted.total
        with Operations() as backward:
            sum(r.sum() for r in results.values()).backward()
        return [launched, counted.total - launched, forward.count, backward.count]


def test_what_a_chunk_launches_does_not_grow_with_the_chunks_before_it(monkeypatch):
    works = [work_of(chunks, monkeypatch) for chunks in (3, 4, 5, 8)]
    steps = [[b - a for a, b in zip(*pair, strict=True)] for pair in pairwise(works)]
    assert steps[0] == steps[1] and [3 * n for n in steps[0]] == steps[2]
    launches_forward, launches_backward, *_ = steps[0]
    assert launches_forward == 2 * 2  # a read and a write, scores and sums each
    assert launches_backward == 2 * 4  # scores' adjoints, and the sums for u, keys and values


def test_what_a_backward_needs_is_a_few_rows_per_token():
    def kept_bytes(tokens: int) -> int:
        problem = factored_problem(MemorySpec("linear"), tokens=tokens, chunk_size=64, dim=32)
        leaves = problem.to(device_of("triton")).map(lambda _, t: t.requires_grad_())
        storages = {}

        def keep(x: Tensor) -> Tensor:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            results = package_results(leaves, backend=FACTORED)
        assert results["output"].requires_grad
        return sum(storages.values())

    few, many = kept_bytes(128), kept_bytes(512)
    assert many < 4.5 * few


def test_kernels_multiply_where_triton_is_the_backend_and_the_library_elsewhere(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    problem = factored_problem(MemorySpec("linear"), tokens=9)
    for backend, launches in ((FACTORED, True), ("reference:factored", False), ("cpu:factored", False)):
        if not available_backends()[backend.partition(":")[0]]:
            continue
        with monkeypatch.context() as patch:
            counted = Launches(patch)
            package_results(problem.to(device_of(backend.partition(":")[0])), backend=backend)
            assert (counted.total > 0) == launches, backend
    assert pair_engine(None, cpu, torch.float32) is None
    monkeypatch.setattr(engine, "refuses_operands", lambda dtype, device: None)
    for backend in (None, "triton", "triton:factored", "triton:tiled"):
        assert pair_engine(backend, cuda, torch.bfloat16) is engine
    for backend in ("cuda", "cuda:factored", "reference:factored"):
        assert pair_engine(backend, cuda, torch.bfloat16) is None
    monkeypatch.setattr(engine, "refuses_operands", lambda dtype, device: "no")
    assert pair_engine(None, cuda, torch.float64) is None


def test_a_trace_multiplies_by_the_library():
    problem = factored_problem(MemorySpec("linear"), tokens=9)
    if device_of("triton").type != "cpu":
        problem = problem.to(device_of("triton"))
    names = ("q", "k", "v", "lr", "retention")

    def call(*tensors: Tensor) -> Tensor:
        q, k, v, lr, retention = tensors
        return memory_scan(
            q, k, v, lr, problem.weights, spec=problem.spec, chunk_size=4, retention=retention, backend=FACTORED
        ).output

    tensors = [problem[name] for name in names]
    found = torch.compile(call, fullgraph=True, backend="eager")(*tensors)
    torch.testing.assert_close(found, call(*tensors), rtol=1e-5, atol=1e-6)


def test_only_first_derivatives():
    problem = factored_problem(MemorySpec("linear"), tokens=9).to(device_of("triton"))
    k = problem["k"].clone().requires_grad_()
    output = package_results(problem.with_tensors(k=k), backend=FACTORED)["output"]
    (gradient,) = torch.autograd.grad(output.square().sum(), k, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(gradient.sum(), k)
