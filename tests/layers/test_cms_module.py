"""A CMS behaves as a PyTorch module: containers, copies, dtypes, autocast, hooks, data parallel, torch.compile."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from hope_kernels import CMS, CMSLevel
from tests.cases import COMPILED_BACKENDS, FLOAT64_BACKENDS
from tests.layers.common import (
    DIM,
    HEADS,
    VARIANTS,
    assert_same,
    make_cms,
    results_of,
    run_stream,
    spread,
    tokens,
)


def make_float(variant: str = "sequential", backend: str | None = None, seed: int = 0) -> CMS:
    torch.manual_seed(seed)
    levels = [CMSLevel(2, momentum=True), CMSLevel(4, form="glu", expansion=2), CMSLevel(None)]
    return spread(CMS(DIM, levels, heads=HEADS, variant=variant, backend=backend), seed)


def test_in_a_sequential_container_all_parameters_get_a_gradient() -> None:
    torch.manual_seed(0)
    cms = make_float("nested")
    model = nn.Sequential(nn.Linear(5, DIM), nn.LayerNorm(DIM), cms, nn.Linear(DIM, 3))
    x = tokens(2, 9, dim=5, dtype=torch.float32)
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name
    torch.testing.assert_close(model(x), model[3](cms(model[1](model[0](x)))), rtol=0, atol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_deep_copy_is_equal_and_independent(variant) -> None:
    cms = make_cms(variant)
    x = tokens(2, 9)
    cms(x).sum().backward()
    other = copy.deepcopy(cms)
    assert torch.equal(other(x), cms(x))
    before = cms(x).detach()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    assert torch.equal(cms(x), before)
    assert (other(x) - before).abs().max() > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_state_dict_brings_all_parameters_and_nothing_else(variant) -> None:
    cms, other = make_cms(variant, seed=0), make_cms(variant, seed=1)
    x = tokens(2, 9)
    assert (cms(x) - other(x)).abs().max() > 1e-3
    saved = cms.state_dict()
    assert set(saved) == {name for name, _ in cms.named_parameters()}
    assert other.load_state_dict(saved).missing_keys == []
    assert torch.equal(other(x), cms(x))


def test_reset_parameters_leaves_nothing_of_the_old_ones() -> None:
    fresh, used = (make_float("independent", seed=seed) for seed in (0, 1))
    for cms in (fresh, used):
        torch.manual_seed(3)
        cms.reset_parameters()
    assert_same(dict(used.state_dict()), dict(fresh.state_dict()), tolerance=0.0)
    assert torch.equal(used.mix, torch.zeros(3))


def test_forward_and_backward_hooks_run_once() -> None:
    cms = make_float()
    calls: list[str] = []
    cms.register_forward_pre_hook(lambda *_: calls.append("before"))
    cms.register_forward_hook(lambda module, args, output: output * 2)
    cms.register_full_backward_hook(lambda *_: calls.append("backward"))
    for name, parameter in cms.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: calls.append(name))
    x = tokens(2, 9, dtype=torch.float32).requires_grad_()
    doubled = cms(x)
    doubled.sum().backward()
    assert sorted(calls) == sorted(["before", "backward", *(name for name, _ in cms.named_parameters())])
    cms._forward_hooks.clear()
    torch.testing.assert_close(cms(x) * 2, doubled)


DATA_PARALLEL = """
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tests.layers.common import tokens
from tests.layers.test_cms_module import make_float

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
plain, wrapped = make_float("nested"), DistributedDataParallel(make_float("nested"))
# The middle length completes no chunk: the parameters that only a write uses must still take part, or the next
# iteration refuses to start.
for length in (9, 1, 9):
    x = tokens(2, length, dtype=torch.float32)
    for model in (plain, wrapped):
        model.zero_grad()
        model(x).square().sum().backward()
    for a, b in zip(plain.parameters(), wrapped.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
print("same")
# Left to the interpreter's end, gloo's threads may release tensors while it is torn down, and abort the process.
del wrapped
dist.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")
def test_distributed_data_parallel_trains_through_short_and_long_sequences() -> None:
    result = subprocess.run(
        [sys.executable, "-c", DATA_PARALLEL],
        capture_output=True,
        text=True,
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "same"


def test_representation_names_what_was_chosen() -> None:
    text = repr(make_cms("nested", momentum=True, backend="reference"))
    for part in (
        "dim=6, heads=2, variant='nested', backend='reference'",
        "mlp x4, C=1, gd, lr<=0.3, retention, momentum, reset every 2 tokens",
        "glu x2, C=2, gd, lr<=0.3, momentum, reset every 6 tokens",
        "mlp x2, never written",
    ):
        assert part in text
    assert "dgd" in repr(make_cms("sequential"))
    assert "reset" not in repr(make_cms("sequential"))


@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_follow_float64(variant, dtype, backend) -> None:
    cms = make_cms(variant, backend=backend)
    x = tokens(2, 13).bfloat16().double()
    for parameter in cms.parameters():  # numbers both dtypes can hold: the comparison is of the arithmetic
        parameter.data = parameter.data.bfloat16().double()
    exact = cms(x)
    low = copy.deepcopy(cms).to(dtype)
    output = low(x.to(dtype))
    assert output.dtype == dtype
    # About twenty roundings deep (levels, norms, products); the writes themselves are in float32.
    error = (output.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert error < 20 * torch.finfo(dtype).eps
    output.float().square().sum().backward()
    for name, parameter in low.named_parameters():
        assert parameter.grad.dtype == dtype, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_autocast_rounds_tokens_and_keeps_gates_and_state(variant, backend) -> None:
    cms = make_float(variant, backend=backend)
    x = tokens(2, 13, dtype=torch.float32)
    exact = cms(x)
    gates = cms.levels[0].tokens(x)
    with torch.autocast("cpu", torch.bfloat16):
        output, state = cms.stream(x, cms.init_state(2))
        low = cms.levels[0].tokens(x)
    assert output.dtype == low.k.dtype == low.v.dtype == torch.bfloat16
    assert torch.equal(low.lr, gates.lr)
    assert torch.equal(low.retention, gates.retention)
    assert torch.equal(low.momentum, gates.momentum)
    assert state.levels[0].weights[0].dtype == torch.float32
    error = (output.float() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert 0 < error < 20 * torch.finfo(torch.bfloat16).eps
    output.float().square().sum().backward()
    for name, parameter in cms.named_parameters():
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name


# Eager code unrolled over every chunk takes a compiler minutes: what is compiled in earnest is the operator.
@pytest.mark.interpreted_cases(0)
@pytest.mark.parametrize("backend", COMPILED_BACKENDS)
@pytest.mark.parametrize("variant", ["sequential", *(pytest.param(v, marks=pytest.mark.slow) for v in VARIANTS[1:])])
def test_compiled_equals_eager_at_dynamic_lengths_forward_and_backward(variant, backend) -> None:
    torch.compiler.reset()
    cms = make_float(variant, backend=backend)
    compiled = torch.compile(cms, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (8, 13, 16):
        x = tokens(2, length, dtype=torch.float32).requires_grad_()
        leaves = [x, *cms.parameters()]
        got, want = compiled(x), cms(x)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        for a, b in zip(
            torch.autograd.grad(got.sin().sum(), leaves),
            torch.autograd.grad(want.sin().sum(), leaves),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("batch", "length"), [(0, 0), (0, 5), (2, 0), (0, 1), (1, 1), (2, 1)])
def test_no_sequences_no_tokens_one_token(variant, batch, length) -> None:
    cms = make_cms(variant, momentum=True)
    x = tokens(batch, length).requires_grad_()
    output, state = cms.stream(x, cms.init_state(batch))
    assert output.shape == x.shape
    assert cms(x).shape == x.shape
    assert (state.position, state.batch_size) == (length, batch)
    output.sum().backward()
    assert x.grad.shape == x.shape
    if batch and length:
        assert x.grad.abs().max() > 0
    # and the stream goes on from there as if it had begun with all tokens
    more = tokens(batch, 7, seed=5)
    rest, after = cms.stream(more, state)
    whole, expected = run_stream(cms, torch.cat([x, more], 1), [length + 7])
    torch.testing.assert_close(rest, whole[:, length:], rtol=1e-10, atol=1e-11)
    assert_same(results_of(rest, after), results_of(whole[:, length:], expected))


def test_a_layer_of_one_plain_level_has_an_empty_state() -> None:
    cms = CMS(DIM, [CMSLevel(None)], heads=HEADS)
    x = tokens(2, 4, dtype=torch.float32)
    output, state = cms.stream(x, cms.init_state(2))
    assert torch.equal(output, cms(x))
    assert state.levels == (None,)
    assert state.index_select([1, 1, 0]).batch_size == 3
    buffer = cms.make_buffer(state)
    torch.testing.assert_close(cms.step(x[:, 0], buffer), output[:, 0])
    assert buffer.to_state().position == 5


@pytest.mark.parametrize("stride", ["transposed", "sliced", "expanded"])
def test_strides_of_the_input_and_of_the_gradient_do_not_matter(stride) -> None:
    cms = make_cms("nested", momentum=True)
    base = tokens(2, 10)
    if stride == "transposed":
        x, weight = base.transpose(0, 1).contiguous().transpose(0, 1), tokens(10, 2, seed=2).transpose(0, 1)
    elif stride == "sliced":
        wide = torch.cat([base, base], 2)
        x, weight = wide[..., :DIM], torch.cat([tokens(2, 20, seed=2)], 1)[:, ::2]
    else:
        x, weight = base[:1].expand(2, -1, -1), tokens(1, 1, seed=2).expand(2, 10, DIM)
    grads = []
    for given, upstream in ((x, weight), (x.contiguous(), weight.contiguous())):
        leaf = given.detach().requires_grad_()
        assert leaf.stride() == given.stride()
        grads.append(torch.autograd.grad(cms(leaf), leaf, upstream)[0])
    assert not x.is_contiguous()
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-11, atol=1e-12)


def test_a_plain_level_takes_a_fraction_of_the_width() -> None:
    torch.manual_seed(0)
    cms = CMS(8, [CMSLevel(None, form="glu", activation="silu", expansion=8 / 3)], heads=2, dtype=torch.float64)
    gate, up, out = cms.levels[0].weights
    assert gate.shape == up.shape == (8, 21) and out.shape == (21, 8)  # 21.33 rounded
    x = tokens(2, 3, dim=8)
    inner = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(cms(x), x + (nn.functional.silu(inner @ gate) * (inner @ up)) @ out)
    assert "glu x2.667, never written" in repr(cms)
