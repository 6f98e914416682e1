"""Offsets beyond 2^31 elements in the Triton engine: tokens, weights and gradients that lie far apart in memory.

Nothing of that size is filled. On a CPU the room is a sparse file mapped into memory, of which a few pages are ever
touched. An offset that was formed in 32 bits comes out negative: there is room before the tensors as well, so that it
reads zeros and a test fails, where else the process would.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hope_kernels import MemorySpec, available_backends
from tests.cases import device_of

STATUS = available_backends()["triton"]
pytestmark = pytest.mark.skipif(not STATUS, reason=f"triton: {STATUS.reason}")

if STATUS:
    from hope_kernels.backends import implementation
    from hope_kernels.backends.interface import ScanProblem
    from hope_kernels.backends.triton.compile_only import meta_problem

BEYOND = 2**31
# Times 2, the highest index below, and times 3 it is beyond 2^31; the stride itself fits 32 bits.
FAR = 2**30 + 2**20
# One chunk and a token that no write reaches; three of what lies apart.
SIZES = {"batch": 1, "tokens": 3, "heads": 1, "dim": 3, "hidden": 4, "chunk_size": 2}
TOKENS = {"row": {"batch": 3}, "token": {}, "head": {"heads": 3}}
MATRICES = {"sequence": {"batch": 3}, "head": {"heads": 3}, "row": {}, "column": {}}
ZEROS = torch.zeros
Room = Callable[[int, torch.dtype], Tensor]


@pytest.fixture
def room(tmp_path: Path) -> Room:
    """A function that gives ``size`` zeros, with as many again as 32 bits reach before them in the same storage."""
    device = device_of("triton")
    files = iter(range(100))

    def make(size: int, dtype: torch.dtype) -> Tensor:
        total = BEYOND + size
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            if total * dtype.itemsize > 0.8 * free:
                pytest.skip(f"no {total * dtype.itemsize / 2**30:.0f} GiB free on the GPU")
            return ZEROS(total, dtype=dtype, device=device)[BEYOND:]
        path = tmp_path / f"room{next(files)}"
        storage = torch.UntypedStorage.from_file(str(path), shared=True, nbytes=total * dtype.itemsize)
        path.unlink()  # the mapping keeps it
        return torch.empty(0, dtype=dtype).set_(storage, BEYOND, (size,), (1,))

    return make


def near_problem(**changed: int) -> ScanProblem:
    """A scan of float16 tokens in which every number is set."""
    problem = meta_problem(MemorySpec(), dtype=torch.float16, device="cpu", **(SIZES | changed))
    generator = torch.Generator().manual_seed(0)

    def drawn(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=generator).to(x.dtype)

    problem = replace(
        problem,
        **{name: drawn(getattr(problem, name)) for name in "qkv"},
        step=0.1 * torch.rand(problem.step.shape, generator=generator),
        weights=tuple(0.3 * drawn(w.expand(problem.q.shape[0], *w.shape)) for w in problem.weights),
    )
    device = device_of("triton")
    moved = {name: getattr(problem, name).to(device) for name in (*"qkv", "step")}
    return replace(problem, **moved, weights=tuple(w.contiguous().to(device) for w in problem.weights))


def placed(room: Tensor, offset: int, x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """A copy of ``x`` in ``room``, ``offset`` elements into it, with these strides."""
    return room.as_strided(x.shape, strides, room.storage_offset() + offset).copy_(x)


def spread(x: Tensor, dimension: int) -> tuple[int, ...]:
    """Strides of ``x`` that are dense but for one dimension, whose neighbours lie ``FAR`` apart."""
    strides = list(torch.empty(x.shape, device="meta").stride())
    strides[dimension] = FAR
    return tuple(strides)


def results_of(plan: str, problem: ScanProblem, d_output: Tensor, d_weights: list[Tensor]) -> list[Tensor]:
    """Output, final weights and every gradient."""
    engine = implementation(f"triton:{plan}")
    output, weights, _, saved = engine.scan_forward(problem, save=True)
    gradients = engine.scan_backward(problem, saved, d_output, d_weights, [])
    return [output, *weights, *(g for g in gradients[:11] if g is not None), *gradients.weights]


@pytest.mark.parametrize("plan", ["resident", "tiled"])
@pytest.mark.parametrize("far", TOKENS)
def test_tokens_whose_rows_tokens_or_heads_lie_far_apart_are_found(room, far, plan):
    problem, dimension = near_problem(**TOKENS[far]), list(TOKENS).index(far)
    d_output = torch.randn(problem.q.shape, device=problem.q.device).half()
    d_weights = [torch.randn(w.shape, device=w.device) for w in problem.weights]
    expected = results_of(plan, problem, d_output, d_weights)
    space = room((max(problem.q.shape) - 1) * FAR + 4096, torch.float16)
    strides = spread(problem.q, dimension)
    q, k, v, d_far = (
        placed(space, 1024 * i, x, strides) for i, x in enumerate((problem.q, problem.k, problem.v, d_output))
    )
    assert (q.shape[dimension] - 1) * q.stride(dimension) > BEYOND > q.stride(dimension)
    found = results_of(plan, replace(problem, q=q, k=k, v=v), d_far, d_weights)
    assert_identical(found, expected)


@pytest.mark.parametrize(
    ("far", "plan"),
    [(far, plan) for far in MATRICES for plan in ("resident", "tiled")],
)
def test_initial_weights_and_gradients_of_final_ones_far_apart_are_found(room, far, plan):
    problem, dimension = near_problem(**MATRICES[far]), list(MATRICES).index(far)
    d_output = torch.randn(problem.q.shape, device=problem.q.device).half()
    d_weights = [torch.randn(w.shape, device=w.device) for w in problem.weights]
    expected = results_of(plan, problem, d_output, d_weights)
    space = room(max(w.shape[dimension] for w in problem.weights) * FAR, torch.float32)
    distant = [placed(space, 1024 * i, x, spread(x, dimension)) for i, x in enumerate((*problem.weights, *d_weights))]
    count = len(problem.weights)
    assert max((x.shape[dimension] - 1) * x.stride(dimension) for x in distant) > BEYOND
    found = results_of(plan, replace(problem, weights=tuple(distant[:count])), d_output, distant[count:])
    assert_identical(found, expected)


@pytest.mark.parametrize("plan", ["resident", "tiled"])
def test_the_last_tokens_of_tensors_of_more_than_two_to_the_31_elements_are_read_and_written(room, plan, monkeypatch):
    """Inputs, output and gradients of tokens, each dense; a table says that the last three tokens alone are there."""
    near = near_problem(dim=4)
    length, features = SIZES["tokens"], near.q.shape[3]
    total = BEYOND // features + 1024
    device = near.q.device

    def table(start: int) -> Tensor:
        return torch.tensor([[0, start, length, 0, 0, 0]], device=device)

    def long(x: Tensor) -> Tensor:
        whole = room(total * features, x.dtype).view(1, total, 1, features)
        whole[:, total - length :] = x
        return whole

    d_output = torch.randn(near.q.shape, device=device).half()
    d_weights = [torch.randn(w.shape, device=device) for w in near.weights]
    expected = results_of(plan, replace(near, sequences=table(0)), d_output, d_weights)
    far = replace(near, sequences=table(total - length), **{name: long(getattr(near, name)) for name in "qkv"})
    d_far = long(d_output)

    def zeros(shape: tuple[int, ...], *, dtype: torch.dtype | None = None, device: torch.device) -> Tensor:
        size = math.prod(shape)
        return room(size, dtype).view(shape) if size >= BEYOND else ZEROS(shape, dtype=dtype, device=device)

    # Results of that size are filled with zeros first: here they are zeros that nothing had to write.
    monkeypatch.setattr(torch, "zeros", zeros)
    found = results_of(plan, far, d_far, d_weights)
    found = [x[:, total - length :] if x.shape[1:2] == (total,) else x for x in found]
    assert_identical(found, expected)


@pytest.mark.parametrize("far", range(3), ids=["sequence", "head or token", "pair or head"])
def test_written_pairs_whose_sequences_heads_or_rows_lie_far_apart_are_found(room, far):
    engine, device = implementation("triton"), device_of("triton")
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).half().to(device)

    batch, tokens, heads, pairs = (3 if far in dimensions else 1 for dimensions in ((0,), (1,), (1, 2), (2,)))
    u, upstream = (drawn(batch, tokens, heads, features) for features in (5, 4))
    keys, value = (drawn(batch, heads, pairs, features) for features in (5, 4))
    weights = drawn(batch, heads, pairs).float()

    def results(u: Tensor, keys: Tensor, value: Tensor, upstream: Tensor) -> list[Tensor]:
        given = (u, keys, [value], weights, torch.float16)
        *gradients, (d_value,) = engine.pair_gradients(*given, [upstream], [True] * 4)
        return [*engine.pair_products(*given), *gradients, d_value]

    expected = results(u, keys, value, upstream)
    space = room(2 * FAR + 4096, torch.float16)
    distant = [placed(space, 1024 * i, x, spread(x, far)) for i, x in enumerate((u, keys, value, upstream))]
    assert all((x.shape[far] - 1) * x.stride(far) > BEYOND > x.stride(far) for x in distant)
    assert_identical(results(*distant), expected)


def test_blocks_of_pairs_that_lie_far_apart_are_found(room):
    """Of 16 pairs, as products with them go on from one block to the next."""
    from hope_kernels.backends.triton.configurations import Configuration, assume

    engine, device = implementation("triton"), device_of("triton")
    u, weights = torch.randn(1, 2, 1, 3, device=device), torch.rand(1, 1, 17, device=device)
    keys, value = torch.randn(1, 1, 17, 3, device=device).half(), torch.randn(1, 1, 17, 4, device=device).half()
    stride = BEYOND // 16 + 2**20
    space = room(17 * stride, torch.float16)
    distant = placed(space, 0, value, (0, 0, stride, 1))
    small = Configuration.of(rows=16, columns=16, inner=16, num_warps=4)
    with assume(dict.fromkeys(("pairs_scores", "pairs_sums", "pairs_odd"), small)):
        found, expected = (engine.pair_products(u, keys, [v], weights, torch.float16) for v in (distant, value))
    assert_identical(list(found), list(expected))


def assert_identical(found: list[Tensor], expected: list[Tensor]) -> None:
    """The same numbers, none of which is trivial."""
    assert len(found) == len(expected)
    for got, want in zip(found, expected, strict=True):
        assert want.isfinite().all() and want.abs().max() > 0
        assert torch.equal(got, want)
