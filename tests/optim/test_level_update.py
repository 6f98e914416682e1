"""``level_update`` computes what PyTorch's optimizers compute in float64, on every backend, for any levels."""

from __future__ import annotations

import copy
import ctypes
import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hope_kernels.optim import UpdateLevel, level_update
from tests.optim.oracle import Oracle

PIECE = 8192  # elements that the engines take at a time
STATE = ("params", "accumulators", "first_moments", "second_moments", "copies")
Grads = list[list[Tensor | None]]


def tensors(*shapes: Sequence[int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tuple(shape), generator=generator) for shape in shapes]


def gradients(levels: Sequence[UpdateLevel], seed: int, dtype: torch.dtype = torch.float32) -> Grads:
    return [
        [g.to(dtype) for g in tensors(*(p.shape for p in level.params), seed=1000 * seed + i)]
        for i, level in enumerate(levels)
    ]


def clone(levels: Sequence[UpdateLevel], dtype: torch.dtype = torch.float32) -> list[UpdateLevel]:
    def of(field: str, values: Any) -> Any:
        if values is None or field not in STATE:
            return values
        return [v if v is None else v.clone() if field == "copies" else v.to(dtype, copy=True) for v in values]

    fields = [field.name for field in dataclasses.fields(UpdateLevel)]
    return [UpdateLevel(**{name: of(name, getattr(level, name)) for name in fields}) for level in levels]


def state_of(levels: Sequence[UpdateLevel]) -> list[Tensor]:
    return [x for level in levels for name in STATE for x in getattr(level, name) or () if x is not None]


def assert_same_bits(a: Sequence[UpdateLevel], b: Sequence[UpdateLevel]) -> None:
    for x, y in zip(state_of(a), state_of(b), strict=True):
        assert torch.equal(x.view(torch.uint8), y.view(torch.uint8)) if x.dim() else torch.equal(x, y)


def run_and_compare(
    levels: list[UpdateLevel],
    steps: Sequence[Grads],
    backend: str,
    *,
    grad_scale: float = 1.0,
    max_norm: float | None = None,
) -> None:
    """The masters and norms of every step, against float64.

    A backend may err by twice what the float32 reference errs, plus a band of some roundings: eight of a number
    near 1.
    """
    oracle, eager = Oracle(levels), clone(levels)
    for step, grads in enumerate(steps):
        options = {"grad_scale": grad_scale, "max_norm": max_norm}
        expected_norms = oracle.step(grads, step, **options)
        level_update(eager, grads, step, backend="reference", **options)
        result = level_update(levels, grads, step, backend=backend, **options)
        torch.testing.assert_close(
            result.norms.double(), torch.tensor(expected_norms, dtype=torch.float64), rtol=2e-6, atol=1e-6
        )
        assert result.due == tuple(level.due(step) for level in levels)
        for i, level in enumerate(levels):
            for j, param in enumerate(level.params):
                truth = oracle.params[i][j].detach()
                error = (param.double() - truth).abs()
                allowed = 2 * (eager[i].params[j].double() - truth).abs().amax() if param.numel() else 0
                band = 8 * torch.finfo(torch.float32).eps * (1 + truth.abs())
                assert bool((error <= allowed + band).all()), f"step {step}, levels[{i}].params[{j}]"
                gathered = oracle.sums[i][j]
                if level.accumulators is not None:
                    torch.testing.assert_close(level.accumulators[j].double(), gathered, rtol=1e-5, atol=1e-6)
                if level.copies is not None and level.copies[j] is not None and level.due(step):
                    assert torch.equal(level.copies[j], param.to(level.copies[j].dtype))


SHAPES = ((3, 5), (PIECE + 3,), (), (2, 4, 8), (0, 7), (1021,))


@pytest.mark.parametrize("bound", [None, "own", "common"])
@pytest.mark.parametrize(
    ("rule", "settings_"),
    [
        ("sgd", {}),
        ("sgd", {"weight_decay": 0.1}),
        ("momentum", {"weight_decay": [0.0, 0.3, 0.1, 0.0, 0.2, 0.05]}),
        ("momentum", {"nesterov": True, "scale": 0.5}),
        ("adam", {}),
        ("adam", {"weight_decay": 0.2, "betas": (0.5, 0.9), "eps": 1e-3, "scale": 0.25}),
    ],
    ids=["sgd", "sgd-decayed", "momentum-decays", "nesterov", "adam", "adam-decayed"],
)
def test_every_rule_follows_pytorchs_optimizer(
    backend: str, rule: str, settings_: dict[str, Any], bound: str | None
) -> None:
    levels = [
        UpdateLevel.zeros(
            tensors(*SHAPES, seed=period),
            period=period,
            rule=rule,
            lr=0.05,
            copy_dtype=torch.bfloat16 if period == 2 else None,
            max_norm=3.0 if bound == "own" and period != 2 else None,
            **settings_,
        )
        for period in (1, 2, 3)
    ]
    steps = [gradients(levels, seed) for seed in range(6)]
    run_and_compare(levels, steps, backend, grad_scale=0.5, max_norm=4.0 if bound == "common" else None)


def test_a_bound_that_is_not_reached_changes_nothing(backend: str) -> None:
    free = [UpdateLevel.zeros(tensors((5,), (7, 3)), rule="sgd", lr=0.1)]
    bounded = clone(free)
    bounded[0].max_norm = 1e6
    grads = gradients(free, 1)
    assert float(level_update(free, grads, 0, backend=backend).norms) == 0
    norm = level_update(bounded, grads, 0, backend=backend).norms
    expected = torch.cat([g.flatten() for g in grads[0]]).double().norm()
    torch.testing.assert_close(norm.double(), expected[None], rtol=1e-6, atol=0)
    assert_same_bits(free, bounded)


level_strategy = st.builds(
    dict,
    shapes=st.lists(
        st.lists(st.integers(0, 9), max_size=3).map(tuple)
        | st.sampled_from([(PIECE - 1,), (PIECE,), (PIECE + 1,), (2 * PIECE + 5,)]),
        max_size=5,
    ),
    period=st.integers(1, 4),
    rule=st.sampled_from(["sgd", "momentum", "adam"]),
    lr=st.sampled_from([0.0, 0.01, 0.3]),
    nesterov=st.booleans(),
    weight_decay=st.sampled_from([0.0, 0.1]),
    scale=st.sampled_from([1.0, 0.25]),
    max_norm=st.sampled_from([None, 0.5, 100.0]),
    copy_dtype=st.sampled_from([None, torch.bfloat16, torch.float16]),
)


@settings(max_examples=25)
@given(
    st.lists(level_strategy, max_size=4),
    st.integers(1, 5),
    st.sampled_from([None, 0.7]),
    st.lists(st.sampled_from(["none", "float32", "bfloat16", "float16"]), min_size=1, max_size=7),
)
def test_any_list_of_levels_follows_the_oracle(
    backend: str, described: list[dict[str, Any]], steps: int, common: float | None, kinds: list[str]
) -> None:
    levels = []
    for i, description in enumerate(described):
        fields = dict(description)
        if common is not None:
            fields["max_norm"] = None
        # adam's first steps divide g by |g|: an error of g near 0 decides them, so eps stands well above it.
        levels.append(UpdateLevel.zeros(tensors(*fields.pop("shapes"), seed=i), eps=1e-3, **fields))
    every = []
    for step in range(steps):
        grads = gradients(levels, step)
        for i, of_level in enumerate(grads):
            for j, grad in enumerate(of_level):
                kind = kinds[(i + 2 * j + 3 * step) % len(kinds)]
                of_level[j] = None if kind == "none" else grad.to(getattr(torch, kind))
        every.append(grads)
    run_and_compare(levels, every, backend, grad_scale=0.5, max_norm=common)


def test_a_level_that_is_not_due_only_gathers(backend: str) -> None:
    levels = [
        UpdateLevel.zeros(tensors((9,), (300,)), period=3, copy_dtype=torch.bfloat16),
        UpdateLevel.zeros(tensors((20,)), rule="momentum"),
    ]
    before = clone(levels)
    grads = gradients(levels, 1)
    assert level_update(levels, grads, 0, backend=backend).due == (False, True)
    for name in ("params", "first_moments", "second_moments", "copies"):
        for x, y in zip(getattr(levels[0], name), getattr(before[0], name), strict=True):
            assert torch.equal(x, y)
    for x, g in zip(levels[0].accumulators, grads[0], strict=True):
        assert torch.equal(x, g)
    assert not torch.equal(levels[1].params[0], before[1].params[0])


@pytest.mark.parametrize("copy_dtype", [torch.bfloat16, torch.float16])
def test_copies_are_the_masters_rounded_to_nearest_even(backend: str, copy_dtype: torch.dtype) -> None:
    one = torch.tensor(1.0).to(copy_dtype)
    ulp = torch.finfo(copy_dtype).eps
    ties = [float(one) + (k + 0.5) * ulp for k in range(8)]
    special = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 3e38, -3e38, 1e-40, 6e-8, 65504.0, 65520.0, 7e4]
    params = torch.tensor([*ties, *special, *torch.randn(1000).tolist()])
    level = UpdateLevel.zeros([params], rule="sgd", lr=0.0, copy_dtype=copy_dtype)
    level.copies[0].zero_()
    level_update([level], [[None]], 0, backend=backend)
    expected = params.to(copy_dtype)
    assert torch.equal(level.copies[0].isnan(), expected.isnan())
    kept = ~expected.isnan()
    assert torch.equal(level.copies[0][kept].view(torch.int16), expected[kept].view(torch.int16))


def test_nothing_to_do_is_no_error(backend: str) -> None:
    result = level_update([], [], 0, backend=backend)
    assert result.due == () and result.norms.shape == (0,)
    levels = [
        UpdateLevel.zeros([], max_norm=1.0),
        UpdateLevel.zeros(tensors((0,), (4, 0)), max_norm=1.0, copy_dtype=torch.bfloat16),
    ]
    result = level_update(levels, [[], [None, torch.zeros(4, 0)]], 0, backend=backend)
    assert result.due == (True, True) and result.norms.tolist() == [0, 0]
    result = level_update([*levels, UpdateLevel.zeros(tensors((3,)))], [[], [None, None], [None]], 0, backend=backend)
    assert result.norms.tolist() == [0, 0, 0]


def test_gradients_may_have_any_strides(backend: str) -> None:
    plain = [UpdateLevel.zeros(tensors((6, 10), (33,)), period=2, rule="momentum")]
    strided = clone(plain)
    for step in range(2):
        grads = gradients(plain, step)
        twisted = [[grads[0][0].t().contiguous().t(), torch.stack([grads[0][1], grads[0][1]], 1)[:, 1]]]
        assert not any(g.is_contiguous() for g in twisted[0])
        level_update(plain, grads, step, backend=backend)
        level_update(strided, twisted, step, backend=backend)
    assert_same_bits(plain, strided)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_may_start_anywhere_in_memory(engine: str, dtype: torch.dtype) -> None:
    """Views that are not aligned to the width of a vector give the same bits as tensors that are."""
    size = PIECE + 37
    aligned = [UpdateLevel.zeros(tensors((size,)), period=2, copy_dtype=torch.bfloat16, max_norm=1.0)]
    shifted = clone(aligned)
    for name in STATE:
        (x,) = getattr(shifted[0], name)
        setattr(shifted[0], name, [torch.cat([x.new_zeros(3), x])[3:]])
    for step in range(2):
        (grad,) = gradients(aligned, step, dtype)[0]
        level_update(aligned, [[grad]], step, backend=engine)
        level_update(shifted, [[torch.cat([grad.new_zeros(1), grad])[1:]]], step, backend=engine)
    for name in STATE:
        torch.testing.assert_close(getattr(shifted[0], name), getattr(aligned[0], name), rtol=1e-6, atol=1e-7)
    # What surrounds a view is left alone.
    assert torch.equal(shifted[0].params[0]._base[:3], torch.zeros(3))


@pytest.mark.parametrize("bound", [None, 0.5])
def test_results_do_not_depend_on_the_number_of_threads(bound: float | None) -> None:
    found = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            levels = [UpdateLevel.zeros(tensors((3 * PIECE + 5,), (77,), (PIECE,)), max_norm=bound)]
            norms = [level_update(levels, gradients(levels, s), s, backend="cpu").norms for s in range(2)]
            found.append((levels, norms))
    finally:
        torch.set_num_threads(threads)
    for levels, norms in found[1:]:
        assert_same_bits(levels, found[0][0])
        assert all(torch.equal(a, b) for a, b in zip(norms, found[0][1], strict=True))


@pytest.mark.usefixtures("cuda_on_host")
def test_results_do_not_depend_on_the_number_of_blocks(cuda_host: ctypes.CDLL) -> None:
    found = []
    try:
        for multiprocessors in (1, 2, 3):
            cuda_host.cuda_host_set_device(9, 0, multiprocessors, 1)
            levels = [UpdateLevel.zeros(tensors((3 * PIECE + 5,), (77,), (PIECE,)), max_norm=0.5)]
            norms = level_update(levels, gradients(levels, 0), 0, backend="cuda").norms
            found.append((levels, norms))
    finally:
        cuda_host.cuda_host_set_device(9, 0, 2, 1)
    for levels, norms in found[1:]:
        assert_same_bits(levels, found[0][0])
        assert torch.equal(norms, found[0][1])


@pytest.mark.usefixtures("cuda_on_host")
@pytest.mark.parametrize(("own", "common"), [(None, None), (1.0, None), (None, 1.0)])
def test_a_call_is_one_launch(cuda_host: ctypes.CDLL, own: float | None, common: float | None) -> None:
    levels = [UpdateLevel.zeros(tensors((5,), (PIECE + 1,)), period=p, max_norm=own) for p in (1, 2, 4)]
    before = cuda_host.cuda_host_launches()
    level_update(levels, gradients(levels, 0), 3, max_norm=common, backend="cuda")
    assert cuda_host.cuda_host_launches() - before == 1


def test_a_nan_stays_in_its_element_or_under_its_bound(backend: str) -> None:
    levels = [
        UpdateLevel.zeros(tensors((5,)), rule="sgd"),
        UpdateLevel.zeros(tensors((5,), (6,)), rule="sgd", max_norm=1.0),
        UpdateLevel.zeros(tensors((5,)), rule="sgd", max_norm=1.0),
    ]
    grads = gradients(levels, 0)
    grads[0][0][2] = grads[1][0][3] = float("nan")
    norms = level_update(levels, grads, 0, backend=backend).norms
    assert norms.isnan().tolist() == [False, True, False]
    assert levels[0].params[0].isnan().tolist() == [False, False, True, False, False]
    assert levels[1].params[0].isnan().all() and levels[1].params[1].isnan().all()
    assert not levels[2].params[0].isnan().any()


def test_autograd_sees_that_masters_have_changed(backend: str) -> None:
    weight = torch.nn.Parameter(torch.randn(3, 3))
    y = (torch.randn(2, 3, requires_grad=True) @ weight).sum()
    level_update([UpdateLevel.zeros([weight])], [[torch.ones(3, 3)]], 0, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_float64_masters_run_on_the_reference_alone(engine: str) -> None:
    level = UpdateLevel.zeros([torch.randn(4, dtype=torch.float64)])
    grads = [[torch.randn(4, dtype=torch.float64)]]
    with pytest.raises(RuntimeError, match=f"backend='{engine}' cannot run this: it takes float32 masters"):
        level_update([level], grads, 0, backend=engine)
    assert level_update([copy.deepcopy(level)], grads, 0).due == (True,)
