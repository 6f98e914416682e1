"""Bad arguments of the CMS: the right exception, naming the argument, what came and what is wanted."""

from __future__ import annotations

import pytest
import torch

from hope_kernels import CMS, CMSLevel
from tests.layers.common import DIM, HEADS, assert_same, make_cms, positions_of, results_of, tokens


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"chunk_size": 0}, ValueError, "chunk_size is 0; want at least 1"),
        ({"chunk_size": -4}, ValueError, "chunk_size is -4; want at least 1"),
        ({"chunk_size": 2.0}, TypeError, r"chunk_size is 2\.0; want a positive int or None"),
        ({"chunk_size": True}, TypeError, "chunk_size is True; want a positive int"),
        ({"chunk_size": 4, "expansion": 0}, ValueError, "expansion is 0; want at least 1"),
        ({"chunk_size": 4, "expansion": None}, TypeError, "expansion is None; want a positive int$"),
        ({"chunk_size": 4, "expansion": 2.5}, TypeError, "expansion is 2.5; want a positive int$"),
        ({"chunk_size": None, "expansion": -0.5}, ValueError, "expansion is -0.5; want a finite number above 0"),
        ({"chunk_size": None, "expansion": float("nan")}, ValueError, "expansion is nan; want a finite number above 0"),
        ({"chunk_size": 4, "bptt_chunks": 0}, ValueError, "bptt_chunks is 0; want at least 1"),
        ({"chunk_size": 4, "form": "conv"}, ValueError, "form is 'conv'; want one of 'linear', 'mlp', 'glu'"),
        ({"chunk_size": 4, "activation": "relu"}, ValueError, "activation is 'relu'; want one of"),
        ({"chunk_size": 4, "rule": "adam"}, ValueError, "rule is 'adam'; want one of 'gd', 'dgd'"),
        ({"chunk_size": 4, "rule": "dgd", "momentum": True}, ValueError, "momentum is True with rule 'dgd'"),
        ({"chunk_size": 4, "lr_max": 0.0}, ValueError, r"lr_max is 0\.0; want a finite number above 0"),
        ({"chunk_size": 4, "lr_max": float("inf")}, ValueError, "lr_max is inf"),
        ({"chunk_size": 4, "lr_max": float("nan")}, ValueError, "lr_max is nan"),
        ({"chunk_size": 4, "lr_max": "0.1"}, TypeError, r"lr_max is '0\.1'; want a positive float or None"),
        ({"chunk_size": 4, "retention": None}, TypeError, "retention is None; want True or False"),
        ({"chunk_size": 4, "momentum": 1}, TypeError, "momentum is 1; want True or False"),
        ({"chunk_size": None, "momentum": True}, ValueError, "momentum is True with chunk_size None"),
        ({"chunk_size": None, "rule": "dgd"}, ValueError, "rule is 'dgd' with chunk_size None"),
        ({"chunk_size": None, "lr_max": 0.1}, ValueError, r"lr_max is 0\.1 with chunk_size None"),
        ({"chunk_size": None, "bptt_chunks": 2}, ValueError, "bptt_chunks is 2 with chunk_size None"),
    ],
)
def test_a_bad_level_is_refused(options, error, message) -> None:
    with pytest.raises(error, match=message):
        CMSLevel(**options)


def test_a_level_is_frozen_and_compares_by_value() -> None:
    level = CMSLevel(4)
    with pytest.raises(AttributeError):
        level.chunk_size = 8
    assert {CMSLevel(4), CMSLevel(4), CMSLevel(8)} == {CMSLevel(4), CMSLevel(8)}


GOOD = {"dim": DIM, "levels": [CMSLevel(2), CMSLevel(4)], "heads": HEADS}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"levels": []}, TypeError, r"levels is \[\]; want a non-empty sequence of CMSLevel"),
        ({"levels": CMSLevel(2)}, TypeError, "want a non-empty sequence of CMSLevel"),
        ({"levels": [16, 64]}, TypeError, r"levels is \[16, 64\]; want a non-empty sequence of CMSLevel"),
        (
            {"levels": [CMSLevel(4), CMSLevel(6)]},
            ValueError,
            r"levels\[0\] and \[1\] have chunk_size 4 and 6; .*dividing the next",
        ),
        (
            {"levels": [CMSLevel(2), CMSLevel(8), CMSLevel(4)]},
            ValueError,
            r"levels\[1\] and \[2\] have chunk_size 8 and 4; want the fastest level first",
        ),
        (
            {"levels": [CMSLevel(None), CMSLevel(4)]},
            ValueError,
            r"levels\[0\] has chunk_size None; want that in the last of the 2 levels only",
        ),
        ({"levels": [CMSLevel(None), CMSLevel(None)]}, ValueError, r"levels\[0\] has chunk_size None"),
        ({"heads": 4}, ValueError, "dim is 6 and heads is 4; want dim divisible by heads"),
        ({"heads": 0}, ValueError, "heads is 0; want at least 1"),
        ({"dim": -6}, ValueError, "dim is -6; want at least 1"),
        ({"dim": 6.0}, TypeError, r"dim is 6\.0; want a positive int"),
        (
            {"variant": "parallel"},
            ValueError,
            "variant is 'parallel'; want one of 'sequential', 'independent', 'nested'",
        ),
        (
            {"backend": "gpu"},
            ValueError,
            "backend is 'gpu'; want None or one of 'reference', 'cpu', 'triton', 'cuda'",
        ),
    ],
)
def test_a_bad_layer_is_refused(options, error, message) -> None:
    with pytest.raises(error, match=message):
        CMS(**{**GOOD, **options})
    CMS(**GOOD)


def test_a_backend_that_cannot_run_here_says_why() -> None:
    cms = CMS(**GOOD, backend="cuda")
    with pytest.raises(RuntimeError, match="backend='cuda' cannot run this: "):
        cms(tokens(1, 3, dtype=torch.float32))
    with pytest.raises(RuntimeError, match="backend='cuda' cannot run this: "):
        cms.make_buffer(1)


@pytest.mark.parametrize("call", ["forward", "stream"])
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ([[1.0]], TypeError, r"x is a list; want a tensor \[B, T, dim\]"),
        (torch.zeros(2, DIM), ValueError, r"x has shape \(2, 6\); want \[B, T, 6\]"),
        (torch.zeros(2, 3, DIM + 1), ValueError, r"x has shape \(2, 3, 7\); want \[B, T, 6\]"),
        (
            torch.zeros(2, 3, DIM, dtype=torch.float64),
            TypeError,
            r"x is torch\.float64, the parameters are torch\.float32",
        ),
        (
            torch.zeros(2, 3, DIM, dtype=torch.bfloat16),
            TypeError,
            r"x is torch\.bfloat16, the parameters are torch\.float32",
        ),
        (
            torch.zeros(2, 3, DIM, dtype=torch.int64),
            TypeError,
            r"x is torch\.int64, the parameters are torch\.float32",
        ),
        (
            torch.zeros(2, 3, DIM, device="meta"),
            ValueError,
            "x is on meta, the parameters on cpu; want one device",
        ),
    ],
)
def test_a_bad_input_is_refused(call, x, error, message) -> None:
    cms = CMS(**GOOD)
    with pytest.raises(error, match=message):
        cms(x) if call == "forward" else cms.stream(x, cms.init_state(2))


def test_autocast_does_not_excuse_float64_or_integers() -> None:
    cms = CMS(**GOOD)
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.float64, torch.int64):
            with pytest.raises(TypeError, match=f"x is {dtype}, the parameters are torch.float32; want one dtype"):
                cms(torch.zeros(2, 3, DIM, dtype=dtype))


def test_a_state_of_another_layer_is_refused_and_unchanged() -> None:
    cms = make_cms("nested")
    x = tokens(2, 7)
    _, state = cms.stream(x, cms.init_state(2))
    before, positions = {k: v.clone() for k, v in results_of(x, state).items()}, positions_of(state)
    with pytest.raises(ValueError, match="state has batch size 2, x has 3 rows; want the same"):
        cms.stream(tokens(3, 7), state)
    with pytest.raises(TypeError, match="state is a tuple; want a CMSState"):
        cms.stream(x, state.levels)
    with pytest.raises(TypeError, match="state is a CMSBuffer; want a CMSState"):
        cms.stream(x, cms.make_buffer(2))
    with pytest.raises(ValueError, match="state has 4 levels; want 2"):
        CMS(**GOOD, dtype=torch.float64).stream(x, state)
    with pytest.raises(ValueError, match=r"state of level 0 is at token 1; want 7, where variant 'sequential'"):
        make_cms("sequential").stream(x, state)
    with pytest.raises(ValueError, match=r"state of level 0 has .* \(True, False\); want \(True, True\)"):
        make_cms("nested", momentum=True).stream(x, state)
    wide = CMS(DIM, [CMSLevel(2, expansion=3), CMSLevel(4)], heads=HEADS, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"state of level 0 has weights .* want "):
        CMS(**GOOD, dtype=torch.float64).stream(x, wide.init_state(2))
    delta = CMS(DIM, [CMSLevel(2, rule="dgd"), CMSLevel(4)], heads=HEADS, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"state of level 0 is for .*rule=.dgd.*; want .*rule=.gd"):
        CMS(**GOOD, dtype=torch.float64).stream(x, delta.init_state(2))
    levels = [x.level for x in cms.levels[:3]]
    with pytest.raises(ValueError, match="state has no memory for level 3; want one"):
        CMS(DIM, [*levels, CMSLevel(12)], heads=HEADS, variant="nested", dtype=torch.float64).stream(x, state)
    chunks = [CMSLevel(3), CMSLevel(6)]
    held = CMS(DIM, chunks, heads=HEADS).init_state(2)
    with pytest.raises(ValueError, match=r"state of level 0 is for .* and chunk size 3; want .* and 2"):
        CMS(**GOOD).stream(x.float(), held)
    assert_same(results_of(x, state), before, tolerance=0.0)
    assert positions_of(state) == positions


@pytest.mark.parametrize(
    ("size", "error", "message"),
    [
        (-1, ValueError, "batch_size is -1; want at least 0"),
        (2.0, TypeError, r"batch_size is 2\.0; want an int"),
        (True, TypeError, "batch_size is True; want an int"),
    ],
)
def test_a_bad_batch_size_is_refused(size, error, message) -> None:
    cms = CMS(**GOOD)
    for make in (cms.init_state, cms.make_buffer):
        with pytest.raises(error, match=message):
            make(size)


@pytest.mark.parametrize("other", [{"momentum": True}, {"retention": False}, {"expansion": 2}], ids=str)
def test_a_buffer_of_another_layer_is_refused_before_any_level_moves(other) -> None:
    levels = [CMSLevel(2), CMSLevel(4)]
    cms = CMS(DIM, levels, heads=HEADS, dtype=torch.float64)
    stranger = CMS(DIM, [levels[0], CMSLevel(4, **other)], heads=HEADS, dtype=torch.float64)
    x = torch.ones(2, DIM, dtype=torch.float64)
    for layer, buffer in ((cms, stranger.make_buffer(2)), (stranger, cms.make_buffer(2))):
        with pytest.raises(ValueError, match=r"buffer of level 1 has .*; want "):
            layer.step(x, buffer)
        assert buffer.position == 0
        assert [level.position for level in buffer.levels] == [0, 0]
