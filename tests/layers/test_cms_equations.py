"""A CMS computes what its equations say: levels, gates and variants against hand-made calls of the memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hope_kernels import CMS, CMSLevel, memory_scan
from hope_kernels.memory.reference import recurrent_scan
from tests.cases import FLOAT64_BACKENDS
from tests.layers.common import DIM, HEADS, make_cms, spread, tokens

HEAD_DIM = DIM // HEADS


def by_hand(module, x: Tensor) -> dict[str, Tensor]:
    """What a level gives its memory for ``x [B, T, dim]``, from its parameters and the equations."""
    level, parameters = module.level, dict(module.named_parameters())
    batch, length, _ = x.shape

    def heads(y: Tensor) -> Tensor:
        return y.reshape(batch, length, HEADS, HEAD_DIM)

    key = heads(x) / (heads(x) ** 2).sum(-1, keepdim=True).add(1e-6).sqrt()
    gates = x @ parameters["gates.weight"].T + parameters["gates.bias"]
    gates = [gates[..., i * HEADS : (i + 1) * HEADS] for i in range(gates.shape[-1] // HEADS)]
    lr = level.step_bound / (1 + torch.exp(-gates.pop(0)))
    found = {"q": key, "k": key, "v": heads(x @ parameters["target.weight"].T), "lr": lr}
    if level.retention:
        found["retention"] = torch.exp(-lr * torch.log1p(torch.exp(gates.pop(0))))
    if level.momentum:
        found["momentum"] = 1 / (1 + torch.exp(-gates.pop(0)))
    assert not gates
    return found


def level_by_tokens(module, x: Tensor) -> Tensor:
    """A written level's output by the token-by-token recurrence."""
    output, _, _ = recurrent_scan(
        **by_hand(module, x), weights=tuple(module.weights), spec=module.spec, chunk_size=module.chunk_size
    )
    return output.flatten(2)


def plain_by_hand(module, x: Tensor) -> Tensor:
    w_in, w_out = module.weights
    unit = x / (x**2).mean(-1, keepdim=True).add(1e-6).sqrt()
    return x + F.gelu(unit @ w_in, approximate="tanh") @ w_out


def expected_output(cms: CMS, x: Tensor) -> Tensor:
    """The whole layer, level by level; a nested level restarts by being run on each segment alone."""
    outputs = []
    for index, module in enumerate(cms.levels):
        reads = x if cms.variant == "independent" or not outputs else outputs[-1]
        if module.level.chunk_size is None:
            outputs.append(plain_by_hand(module, reads))
            continue
        slower = cms.levels[index + 1].level.chunk_size if index + 1 < len(cms.levels) else None
        segment = slower if cms.variant == "nested" and slower else max(x.shape[1], 1)
        outputs.append(torch.cat([level_by_tokens(module, part) for part in reads.split(segment, 1)], 1))
    if cms.variant != "independent":
        return outputs[-1]
    share = torch.exp(cms.mix) / torch.exp(cms.mix).sum()
    return sum(share[i] * output for i, output in enumerate(outputs))


@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("variant", ["sequential", "independent", "nested"])
@pytest.mark.parametrize("length", [1, 5, 12, 20])
def test_output_is_that_of_the_recurrences_with_hand_made_resets(variant, momentum, length, backend) -> None:
    cms = make_cms(variant, momentum=momentum, backend=backend)
    x = tokens(3, length)
    torch.testing.assert_close(cms(x), expected_output(cms, x), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("variant", ["sequential", "independent", "nested"])
def test_gradients_are_those_of_the_recurrences(variant) -> None:
    cms = make_cms(variant, momentum=True)
    x = tokens(2, 14).requires_grad_()
    leaves = [x, *cms.parameters()]
    got = torch.autograd.grad(cms(x).sin().sum(), leaves)
    want = torch.autograd.grad(expected_output(cms, x).sin().sum(), leaves)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_nested_differs_from_sequential_exactly_after_the_first_reset() -> None:
    torch.manual_seed(0)
    levels = [CMSLevel(2, lr_max=0.4), CMSLevel(6)]
    nested = spread(CMS(DIM, levels, heads=HEADS, variant="nested", dtype=torch.float64))
    sequential = CMS(DIM, levels, heads=HEADS, dtype=torch.float64)
    sequential.load_state_dict(nested.state_dict())
    x = tokens(2, 12)
    a, b = nested(x), sequential(x)
    torch.testing.assert_close(a[:, :6], b[:, :6], rtol=0, atol=1e-12)
    assert ((a - b)[:, 6:].abs().amax((0, 2)) > 1e-4).all()


def test_folded_segments_equal_one_memory_scan_per_segment() -> None:
    cms = make_cms("nested", momentum=True)
    level = cms.levels[1]
    x = tokens(2, 15)
    folded, _ = level(x)
    parts = []
    for part in x.split(level.segment, 1):
        gates = by_hand(level, part)
        parts.append(
            memory_scan(**gates, memory=tuple(level.weights), spec=level.spec, chunk_size=level.chunk_size).output
        )
    assert len(parts) == 3
    torch.testing.assert_close(folded, torch.cat(parts, 1).flatten(2), rtol=1e-10, atol=1e-11)


def test_independent_starts_as_the_mean_of_its_levels() -> None:
    torch.manual_seed(0)
    levels = [CMSLevel(2), CMSLevel(4), CMSLevel(None)]
    cms = CMS(DIM, levels, heads=HEADS, variant="independent", dtype=torch.float64)
    x = tokens(2, 9)
    alone = [level(x)[0] for level in cms.levels]
    assert (alone[0] - alone[1]).abs().max() > 1e-3
    torch.testing.assert_close(cms(x), torch.stack(alone).mean(0))


def test_a_token_reads_only_itself_and_completed_chunks() -> None:
    chunk, length = 3, 10
    torch.manual_seed(0)
    cms = spread(CMS(DIM, [CMSLevel(chunk, lr_max=0.3)], heads=HEADS, dtype=torch.float64))
    x = tokens(1, length)
    jacobian = torch.autograd.functional.jacobian(lambda y: cms(y).sum((0, 2)), x)  # [T, 1, T, dim]
    reads = jacobian.abs().amax((1, 3)) > 1e-9
    t = torch.arange(length)
    expected = (t[:, None] == t) | (t // chunk < t[:, None] // chunk)
    assert torch.equal(reads, expected)


@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
@pytest.mark.parametrize("variant", ["sequential", "independent", "nested"])
def test_a_row_alone_equals_the_row_in_a_batch(variant, backend) -> None:
    cms = make_cms(variant, backend=backend)
    x = tokens(4, 13)
    together = cms(x)
    for row in range(4):
        torch.testing.assert_close(cms(x[row : row + 1])[0], together[row], rtol=0, atol=1e-12)


@pytest.mark.parametrize("variant", ["sequential", "independent", "nested"])
def test_nan_in_one_sequence_stays_there(variant) -> None:
    cms = make_cms(variant)
    x = tokens(3, 13)
    clean, clean_state = cms.stream(x, cms.init_state(3))
    x[1, 4] = torch.nan
    output, state = cms.stream(x, cms.init_state(3))
    assert output[1, 4:].isnan().any()
    torch.testing.assert_close(output[[0, 2]], clean[[0, 2]], rtol=0, atol=1e-12)
    for now, before in zip(state.levels[:3], clean_state.levels[:3], strict=True):
        for a, b in zip(now.weights, before.weights, strict=True):
            torch.testing.assert_close(a[[0, 2]], b[[0, 2]], rtol=0, atol=1e-12)


def test_permuting_heads_permutes_results() -> None:
    torch.manual_seed(0)
    cms = spread(CMS(8, [CMSLevel(2, momentum=True)], heads=4, dtype=torch.float64))
    order = torch.tensor([2, 0, 3, 1])

    def permuted(y: Tensor, axis: int, groups: int = 1) -> Tensor:
        blocks = y.unflatten(axis, (groups, 4, -1))
        return blocks.index_select(axis + 1, order).flatten(axis, axis + 2)

    other = CMS(8, [CMSLevel(2, momentum=True)], heads=4, dtype=torch.float64)
    a, b = cms.levels[0], other.levels[0]
    with torch.no_grad():
        for mine, theirs in zip(a.weights, b.weights, strict=True):
            theirs.copy_(mine[order])
        b.target.weight.copy_(permuted(permuted(a.target.weight, 0), 1))
        b.gates.weight.copy_(permuted(permuted(a.gates.weight, 0, groups=3), 1))
        b.gates.bias.copy_(permuted(a.gates.bias, 0, groups=3))
    x = tokens(2, 7, dim=8)
    torch.testing.assert_close(other(permuted(x, 2)), permuted(cms(x), 2))


def test_gates_start_where_the_documentation_says_and_stay_in_range() -> None:
    cms = CMS(DIM, [CMSLevel(4, momentum=True), CMSLevel(32)], heads=HEADS, dtype=torch.float64)
    x = tokens(1, 5)
    first, second = (level.tokens(x) for level in cms.levels)
    torch.testing.assert_close(first.lr, torch.full_like(first.lr, 1 / 32))
    torch.testing.assert_close(second.lr, torch.full_like(second.lr, 1 / 256))
    torch.testing.assert_close(first.retention, torch.exp(-first.lr * 0.02))
    torch.testing.assert_close(first.momentum, torch.full_like(first.lr, 0.25))
    assert second.momentum is None
    with torch.no_grad():
        cms.levels[0].gates.bias[:HEADS] = -1000.0  # the step underflows to exactly 0: nothing may be forgotten
    closed = cms.levels[0].tokens(x)
    assert torch.equal(closed.lr, torch.zeros_like(closed.lr))
    assert torch.equal(closed.retention, torch.ones_like(closed.lr))


@pytest.mark.parametrize(("chunk_size", "bound"), [(1, 0.1), (2, 0.1), (16, 1 / 64), (512, 1 / 2048)])
def test_the_default_bound_of_the_step_limits_a_chunk_to_a_quarter_of_a_full_step(chunk_size, bound) -> None:
    level = CMSLevel(chunk_size)
    assert level.step_bound == bound
    assert chunk_size * level.step_bound <= 0.25
    assert CMSLevel(chunk_size, lr_max=0.5).step_bound == 0.5


def test_bptt_chunks_cut_the_gradient_and_not_the_value() -> None:
    def gradient(bptt: int | None) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        cms = spread(CMS(DIM, [CMSLevel(2, lr_max=0.3, bptt_chunks=bptt)], heads=HEADS, dtype=torch.float64))
        x = tokens(1, 8).requires_grad_()
        output = cms(x)
        (d_x,) = torch.autograd.grad(output[:, -1].sum(), x)
        return output.detach(), d_x.abs().amax((0, 2)) > 1e-12

    full, reads_all = gradient(None)
    cut, reads_cut = gradient(1)
    half, reads_half = gradient(2)
    assert torch.equal(full, cut)
    assert torch.equal(full, half)
    assert reads_all.tolist() == [True] * 6 + [False, True]
    assert reads_cut.tolist() == [False] * 7 + [True]
    assert reads_half.tolist() == [False] * 4 + [True, True, False, True]  # cut at the start of chunk 2
