"""The Titans layers compute what their equations say: against the token-by-token oracle, in every ablation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hope_kernels import NeuralMemory, SelfModifyingTitans
from tests.cases import FLOAT64_BACKENDS
from tests.layers import titans_oracle
from tests.layers.common import DIM, HEADS, assert_same, gradients_of, spread, tokens
from tests.layers.titans_common import LAYERS, make_titans, results_of


def compare(layer, length: int, batch: int = 2) -> None:
    """Output, final weights and momentum, and the gradients of all of them, by the layer and by the oracle."""
    x = tokens(batch, length).requires_grad_()
    named = {"x": x, **dict(layer.named_parameters())}
    expected = titans_oracle.run(layer, x)
    found = results_of(*layer.stream(x, layer.init_state(batch)))
    found = {name: found[name] for name in expected}
    assert_same(found | gradients_of(found, named), expected | gradients_of(expected, named), tolerance=1e-10)


@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
@pytest.mark.parametrize("name", LAYERS)
def test_outputs_states_and_gradients_are_those_of_the_tokens(name, backend) -> None:
    compare(make_titans(name, backend=backend), 8)


@pytest.mark.parametrize(("memory", "projection"), [(1, 1), (4, 2), (2, 4), (5, 3), (3, 20), (20, 3)])
def test_any_two_chunk_sizes_and_odd_lengths(memory, projection) -> None:
    compare(make_titans(chunk_size=memory, projection_chunk_size=projection, seed=memory), 9, batch=1)


@pytest.mark.parametrize("length", [1, 2, 4])
def test_sequences_shorter_than_the_convolution_and_the_chunks(length) -> None:
    compare(make_titans(chunk_size=4, projection_chunk_size=3), length)


@pytest.mark.parametrize("bptt", [1, 2])
def test_bptt_chunks_cut_each_memory_at_its_own_chunks(bptt) -> None:
    compare(make_titans(bptt_chunks=bptt), 13)


@pytest.mark.parametrize("name", ["titans", "plain"])
def test_a_token_reads_only_the_convolution_and_completed_chunks(name) -> None:
    chunk, length = 3, 10
    options = {"projection_chunk_size": chunk} if name == "titans" else {}
    layer = make_titans(name, chunk_size=chunk, **options)
    x = tokens(1, length)
    jacobian = torch.autograd.functional.jacobian(lambda y: layer(y).sum((0, 2)), x)  # [T, 1, T, dim]
    reads = jacobian.abs().amax((1, 3)) > 1e-9
    t = torch.arange(length)
    before = t[:, None] - t
    expected = ((before >= 0) & (before < 4)) | (t // chunk < t[:, None] // chunk)
    assert torch.equal(reads, expected)


@pytest.mark.parametrize("name", LAYERS)
def test_a_row_alone_equals_the_row_in_a_batch_and_keeps_its_nan(name) -> None:
    layer = make_titans(name)
    x = tokens(3, 9)
    together, state = layer.stream(x, layer.init_state(3))
    alone, state_alone = layer.stream(x[1:2], layer.init_state(1))
    assert_same(results_of(alone, state_alone), results_of(together[1:2], state.index_select([1])), tolerance=1e-12)
    x[1, 4] = torch.nan
    output, after = layer.stream(x, layer.init_state(3))
    assert output[1, 4:].isnan().all()
    kept = after.index_select([0, 2]), state.index_select([0, 2])
    assert_same(results_of(output[[0, 2]], kept[0]), results_of(together[[0, 2]], kept[1]), tolerance=1e-12)


def test_switches_change_what_they_name_and_nothing_else() -> None:
    names = {name: {n.split(".")[0] for n, _ in make_titans(name).named_parameters()} for name in LAYERS}
    assert names["titans"] == {"conv", "query", "weights", "projections"}
    assert names["fixed k and v"] == {"conv", "query", "key", "value", "weights", "projections"}
    assert names["fixed gates"] == {"conv", "query", "gates", "weights", "projections"}
    assert names["all fixed"] == {"conv", "query", "key", "value", "gates", "weights"}
    assert names["plain"] == names["all fixed"] | {"output"}
    assert make_titans("no retention").adaptive == ("k", "v", "lr")
    assert make_titans("fixed gates").adaptive == ("k", "v")  # in one order, however they are named
    assert (make_titans().spec.rule, make_titans("gd").spec.rule) == ("dgd", "gd")


def test_gates_start_where_the_documentation_says() -> None:
    for layer, bound in (
        (SelfModifyingTitans(DIM, HEADS), 0.1),
        (SelfModifyingTitans(DIM, HEADS, rule="gd"), 0.25 / 64),
        (SelfModifyingTitans(DIM, HEADS, chunk_size=256, rule="gd"), 0.25 / 256),
        (SelfModifyingTitans(DIM, HEADS, chunk_size=2, projection_chunk_size=1, rule="gd"), 0.1),
        (NeuralMemory(DIM, HEADS, chunk_size=16), 0.25 / 16),
        (NeuralMemory(DIM, HEADS, lr_max=0.5), 0.5),
    ):
        assert layer.lr_max == bound
        _, state = layer.stream(tokens(1, 1, dtype=torch.float32), layer.init_state(1))
        held = state.memory
        torch.testing.assert_close(held.pending_lr, torch.full((1, 1, HEADS), bound / 2))
        torch.testing.assert_close(held.pending_retention, torch.exp(-0.02 * held.pending_lr))
        if layer.momentum:
            torch.testing.assert_close(held.pending_momentum, torch.full((1, 1, HEADS), 0.25))


def test_a_bound_shortens_the_targets_beyond_it_and_no_others() -> None:
    x = tokens(2, 30)
    options = {"chunk_size": 50, "projection_chunk_size": 50}
    free, bounded = (make_titans(name, **options) for name in ("titans", "bounded targets"))
    v, w = (layer.stream(x, layer.init_state(2))[1].memory.pending_v for layer in (free, bounded))
    long = v.norm(dim=-1) > 0.3
    assert 0 < long.sum() < long.numel()
    torch.testing.assert_close(w[~long], v[~long], rtol=1e-12, atol=0)
    torch.testing.assert_close(w[long], 0.3 * v[long] / v[long].norm(dim=-1, keepdim=True), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("kind", "norm"), [(SelfModifyingTitans, 0.25), (NeuralMemory, 1.0)])
def test_targets_start_at_the_size_the_documentation_says(kind, norm) -> None:
    torch.manual_seed(0)
    options = {"projection_chunk_size": 400} if kind is SelfModifyingTitans else {}
    layer = kind(64, 2, 400, **options)
    _, state = layer.stream(torch.randn(2, 300, 64), layer.init_state(2))
    size = state.memory.pending_v.norm(dim=-1).square().mean().sqrt()
    assert 0.8 * norm < size < 1.3 * norm
    torch.testing.assert_close(state.memory.pending_k.norm(dim=-1), torch.ones(2, 300, 2), rtol=1e-3, atol=0)


def long_sequence(kind: str, length: int) -> Tensor:
    """Independent tokens, strongly correlated ones, or eight tokens again and again; unit entries."""
    x = tokens(2, length, dim=32)
    if kind == "correlated":
        return 0.6 * x + 0.8 * tokens(2, 1, dim=32, seed=2)
    if kind == "repeating":
        return x[:, torch.randint(8, (length,), generator=torch.Generator().manual_seed(0))]
    return x


@torch.no_grad()
def largest(kind: str, norm: float, chunks: tuple[int, int], length: int, **options) -> float:
    """The largest entry of output and memories where the convolution's results begin with ``norm``; may be NaN."""
    torch.manual_seed(0)
    layer = SelfModifyingTitans(32, 2, *chunks, **options, dtype=torch.float64)
    layer.conv.weight.mul_(4 * norm)
    output, state = layer.stream(long_sequence(kind, length), layer.init_state(2))
    held = (output, *state.memory.weights, *state.projections.weights)
    return torch.stack([x.abs().max() for x in held]).max().item()


@pytest.mark.parametrize(
    ("rule", "lr_max", "norm"), [("dgd", 0.1, 0.75), ("dgd", 0.3, 0.75), ("dgd", 3.0, 0.75), ("gd", 0.1, 0.5)]
)
def test_long_sequences_stay_bounded_up_to_the_norm_the_documentation_says(rule, lr_max, norm) -> None:
    arguments = {"kind": "repeating", "chunks": (4, 8), "length": 800, "rule": rule, "lr_max": lr_max}
    assert largest(norm=norm, **arguments) < 2
    assert not largest(norm=1.5, **arguments) < 2
    if rule == "dgd":
        assert largest(norm=10, value_norm_max=1.0, **arguments) < 2


def test_memories_that_training_made_steep_diverge_and_bounded_ones_do_not() -> None:
    def reached(gain: float, bound: float | None) -> float:
        torch.manual_seed(0)
        layer = SelfModifyingTitans(32, 2, 16, 64, value_norm_max=1.0, weight_norm_max=bound, dtype=torch.float64)
        with torch.no_grad():
            for weights in (layer.weights, layer.projections.weights):
                weights[1].mul_(gain)
            state = layer.stream(long_sequence("correlated", 800), layer.init_state(2))[1]
        return max(w.abs().max().item() for w in (*state.memory.weights, *state.projections.weights))

    assert not reached(4, None) < 1e3
    assert reached(4, 2.0) < 1
    assert reached(1, None) == reached(1, 2.0)  # fresh memories are within the bound


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "lr_max"), [("dgd", 0.1), ("dgd", 0.3), ("dgd", 1.0), ("dgd", 3.0), ("gd", None), ("gd", 0.1)]
)
def test_the_bounds_of_stability_are_those_of_the_documentation(rule, lr_max) -> None:
    for kind in ("independent", "correlated", "repeating"):
        for chunks, length in (((16, 64), 4096), ((2, 4), 512)):
            arguments = {"kind": kind, "chunks": chunks, "length": length, "rule": rule, "lr_max": lr_max}
            for norm in (0.25, 0.5, *([0.75] if rule == "dgd" else [])):
                assert largest(norm=norm, **arguments) < 2, (arguments, norm)
            assert not largest(norm=1.5, **arguments) < 2, arguments
            if rule == "dgd" or lr_max is None:
                for norm in (1.5, 10):
                    assert largest(norm=norm, value_norm_max=1.0, **arguments) < 2, (arguments, norm)


@pytest.mark.parametrize("name", LAYERS)
def test_reset_parameters_leaves_nothing_of_the_old_ones(name) -> None:
    drawn = []
    for seed in (0, 1):
        layer = spread(make_titans(name, seed=seed), seed)
        torch.manual_seed(3)
        layer.reset_parameters()
        drawn.append(dict(layer.state_dict()))
    assert_same(*drawn, tolerance=0.0)
