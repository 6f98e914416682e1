"""Bad arguments of the Titans layers: the right exception, naming the argument, what came and what is wanted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hope_kernels import NeuralMemory, SelfModifyingTitans
from tests.layers.common import DIM, HEADS, tokens
from tests.layers.titans_common import make_titans

KINDS = [SelfModifyingTitans, NeuralMemory]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dim": -6}, ValueError, "dim is -6; want at least 1"),
        ({"dim": 6.0}, TypeError, r"dim is 6\.0; want a positive int"),
        ({"heads": 4}, ValueError, "dim is 6 and heads is 4; want dim divisible by heads"),
        ({"chunk_size": 0}, ValueError, "chunk_size is 0; want at least 1"),
        ({"chunk_size": None}, TypeError, "chunk_size is None; want a positive int$"),
        ({"expansion": 0}, ValueError, "expansion is 0; want at least 1"),
        ({"bptt_chunks": 0}, ValueError, "bptt_chunks is 0; want at least 1"),
        ({"bptt_chunks": 1.0}, TypeError, r"bptt_chunks is 1\.0; want a positive int or None"),
        ({"activation": "relu"}, ValueError, "activation is 'relu'; want one of"),
        ({"lr_max": 0.0}, ValueError, r"lr_max is 0\.0; want a finite number above 0"),
        ({"lr_max": "0.1"}, TypeError, r"lr_max is '0\.1'; want a positive float or None"),
        ({"retention": None}, TypeError, "retention is None; want True or False"),
        ({"momentum": 1}, TypeError, "momentum is 1; want True or False"),
        ({"backend": "gpu"}, ValueError, "backend is 'gpu'; want None or one of"),
    ],
)
def test_a_bad_layer_is_refused(kind, options, error, message) -> None:
    with pytest.raises(error, match=message):
        kind(**{"dim": DIM, "heads": HEADS, **options})
    kind(dim=DIM, heads=HEADS)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"projection_chunk_size": 0}, ValueError, "projection_chunk_size is 0; want at least 1"),
        ({"rule": "adam"}, ValueError, "rule is 'adam'; want one of 'gd', 'dgd'"),
        ({"momentum": True}, ValueError, "momentum is True with rule 'dgd'; momentum goes with rule 'gd' only"),
        ({"value_norm_max": -1.0}, ValueError, r"value_norm_max is -1\.0; want a finite number above 0"),
        ({"weight_norm_max": 0}, ValueError, r"weight_norm_max is 0; want a finite number above 0"),
        ({"adaptive": ("q",)}, ValueError, "adaptive has 'q'; want some of 'k', 'v', 'lr', 'retention'"),
        ({"adaptive": "kv"}, TypeError, "adaptive is 'kv'; want a sequence of names, or None for all"),
        ({"adaptive": True}, TypeError, "adaptive is True; want a sequence of names, or None for all"),
        ({"adaptive": ("retention",), "retention": False}, ValueError, "adaptive has 'retention' with retention=False"),
    ],
)
def test_an_undefined_ablation_is_refused(options, error, message) -> None:
    with pytest.raises(error, match=f"SelfModifyingTitans: {message}|MemorySpec: {message}"):
        SelfModifyingTitans(DIM, HEADS, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", ["forward", "stream"])
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ([[1.0]], TypeError, r"x is a list; want a tensor \[B, T, dim\]"),
        (torch.zeros(2, 3, DIM + 1), ValueError, r"x has shape \(2, 3, 7\); want \[B, T, 6\]"),
        (torch.zeros(2, 3, DIM).double(), TypeError, r"x is torch\.float64, the parameters are torch\.float32"),
        (torch.zeros(2, 3, DIM, device="meta"), ValueError, "x is on meta, the parameters on cpu; want one device"),
    ],
)
def test_a_bad_input_is_refused(kind, call, x, error, message) -> None:
    layer = kind(DIM, HEADS)
    with pytest.raises(error, match=f"{kind.__name__}: {message}"):
        layer(x) if call == "forward" else layer.stream(x, layer.init_state(2))


@pytest.mark.parametrize(
    ("size", "error", "message"),
    [(-1, ValueError, "batch_size is -1; want at least 0"), (True, TypeError, "batch_size is True; want an int")],
)
def test_a_bad_batch_size_is_refused(size, error, message) -> None:
    with pytest.raises(error, match=f"NeuralMemory.init_state: {message}"):
        NeuralMemory(DIM, HEADS).init_state(size)


def test_a_state_of_another_layer_is_refused() -> None:
    layer = make_titans()
    x = tokens(2, 7)
    _, state = layer.stream(x, layer.init_state(2))
    with pytest.raises(TypeError, match="SelfModifyingTitans: state is a MemoryState; want a TitansState"):
        layer.stream(x, state.memory)
    with pytest.raises(ValueError, match="state has batch size 2, x has 3 rows; want the same"):
        layer.stream(tokens(3, 7), state)
    for other, message in (
        (make_titans("plain"), r"state is for adaptive projections \('k', 'v', 'lr', 'retention'\); want \(\)"),
        (make_titans("fixed k and v"), r"state is for adaptive projections .*; want \('lr', 'retention'\)"),
        (make_titans("gd"), r"state has a memory for .*rule='dgd'.*; want .*rule='gd'"),
        (make_titans(chunk_size=4), r"state has a memory for .* and chunk size 3; want .* and 4"),
        (make_titans(projection_chunk_size=3), r"state has a projections for .* and chunk size 2; want .* and 3"),
        (make_titans(expansion=3), r"state has a memory with weights .*; want "),
        (make_titans(dtype=torch.float32), r"state has a tail of torch.float64 on cpu; want one for x, torch.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            other.stream(x.to(other.query.weight.dtype), state)
    plain = make_titans("plain", chunk_size=3)
    _, gated = plain.stream(x, plain.init_state(2))
    with pytest.raises(ValueError, match=r"state has \(retention, momentum\) \(True, True\); want \(False, False\)"):
        make_titans("plain, no gates").stream(x, gated)
    for changes, message in (
        ({"tail": state.tail[:, 1:]}, r"state has a tail of shape \(2, 2, 6\); want \(2, 3, 6\)"),
        ({"position": 8}, "state has its memory at token 7; want 8"),
        ({"pending": None}, "state has projections at token 6 and 0 tokens pending; want 6 and 1"),
    ):
        with pytest.raises(ValueError, match=message):
            layer.stream(x, replace(state, **changes))
