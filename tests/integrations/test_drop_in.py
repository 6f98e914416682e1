"""Memories in plain modules: what is replaced, told apart, refused and taken out again. Needs PyTorch alone."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hope_kernels import MemorySpec, memory_scan
from hope_kernels.integrations import in_context
from hope_kernels.integrations.context import CMSContext, carrying
from hope_kernels.integrations.drop_in import cms_parameters, memories, replace_mlps
from hope_kernels.integrations.in_context import MLPStructure
from hope_kernels.integrations.levels import chunk_sizes
from hope_kernels.integrations.transformers import remove_cms


class Gated(nn.Module):
    """A gated MLP without biases: what ``memory_scan`` calls ``glu``."""

    def __init__(self, dim: int = 12, hidden: int = 20) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.out = nn.Linear(hidden, dim, bias=False)
        self.act = nn.SiLU()

    def forward(self, x):
        return self.out(self.act(self.gate(x)) * self.up(x))


class Stack(nn.Module):
    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(12) for _ in range(depth))
        self.mlps = nn.ModuleList(Gated() for _ in range(depth))

    def forward(self, x):
        for norm, mlp in zip(self.norms, self.mlps, strict=True):
            x = x + mlp(norm(x))
        return x


STRUCTURE = MLPStructure(("gate", "up", "out"), "act")


def gated(name, module):
    return STRUCTURE if isinstance(module, Gated) else None


def stack(levels=(2, 4), scale: float | None = 0.5, **settings) -> Stack:
    torch.manual_seed(0)
    model = replace_mlps(Stack().double(), gated, list(levels), **settings)
    if scale is not None:
        with torch.no_grad():
            for _, module in memories(model):
                module.cms.scale.fill_(scale)
                for parameter in list(module.cms.parameters())[1:]:
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def inputs(rows: int = 2, length: int = 11) -> torch.Tensor:
    return torch.randn(rows, length, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_an_mlp_is_the_dense_memory_of_memory_scan_gradients_included():
    model, x = stack(), inputs().requires_grad_()
    for _, module in memories(model):
        plain = copy.deepcopy(module)
        del plain.cms
        plain.__class__ = Gated
        v, lr, retention = module.cms(x, Gated.forward(module, x))
        weights = [getattr(module, name).weight.t().unsqueeze(0) for name in STRUCTURE.linears]
        spec = MemorySpec("glu", "silu", residual=False)
        k = x.unsqueeze(2)
        want = memory_scan(
            k, k, v.unsqueeze(2), lr, weights, spec=spec, chunk_size=module.cms_chunk_size, retention=retention,
            backend="reference",
        ).output.squeeze(2)  # fmt: skip
        found = module(x)
        assert (want - plain(x)).abs().max() > 1e-3
        torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-10)
        to = [x, *module.parameters()]
        for one, other in zip(
            torch.autograd.grad(found.square().sum(), to), torch.autograd.grad(want.square().sum(), to), strict=True
        ):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def test_the_gates_are_the_documented_equations():
    module, x = stack().mlps[2], inputs()
    gates, base = module.cms, Gated.forward(module, x)
    w, b = gates.gates.weight, gates.gates.bias
    lr = gates.scale * torch.sigmoid(x @ w[0] + b[0]) / (1 + x.square().sum(-1))
    low_rank = x @ gates.target_down.T @ gates.target_up.T
    v, found_lr, retention = gates(x, base)
    torch.testing.assert_close(found_lr.squeeze(-1), lr)
    torch.testing.assert_close(retention.squeeze(-1), torch.exp(-lr * F.softplus(x @ w[1] + b[1])))
    torch.testing.assert_close(v, base + gates.target_diagonal * x + low_rank)
    fresh = stack(levels=(2, 8), scale=None).mlps[2].cms
    assert torch.sigmoid(fresh.gates.bias[0]).item() == pytest.approx(1 / 9)
    with torch.no_grad():
        gates.scale.fill_(-1.0)
        assert torch.equal(gates(x, base)[2], torch.ones_like(retention))
        gates.scale.zero_()
        assert torch.equal(gates(x, base)[2], torch.ones_like(retention))


def test_without_gradients_a_scale_of_zero_costs_the_mlp_alone(monkeypatch):
    model, x = stack(scale=None), inputs()

    def never(*_, **__):
        raise AssertionError("the update path ran")

    monkeypatch.setattr(in_context, "factored_scan", never)
    calls = []
    for _, module in memories(model):
        module.gate.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model(x)
    assert len(calls) == 3
    for _, parameter in cms_parameters(model):
        parameter.requires_grad_(False)
    model(x)
    with torch.no_grad():
        model.mlps[1].cms.scale.fill_(0.1)
        with pytest.raises(AssertionError, match="the update path ran"):
            model(x)
        model.mlps[1].cms.scale.data.zero_()
        model(x)


def test_a_gpus_scale_is_read_once_for_each_version():
    """On a device other than the CPU; here a stand-in that counts how often its value is asked for."""
    gates = stack(scale=None).mlps[0].cms
    reads = []

    class Counting:
        is_inference = staticmethod(lambda: False)
        device = torch.device("cuda", 0)
        _version = 0

        def data_ptr(self):
            return 1

        def any(self):
            reads.append(1)
            return torch.tensor(False)

    scale = Counting()
    gates._parameters.pop("scale")
    gates.__dict__["scale"] = scale
    assert gates.is_off() and gates.is_off() and len(reads) == 1
    scale._version = 1
    assert gates.is_off() and len(reads) == 2
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    optimizer.step()
    assert gates.is_off() and gates.is_off() and len(reads) == 3
    gates._is_fsdp_managed_module = True  # what FSDP gathers anew has the version it had
    assert gates.is_off() and gates.is_off() and len(reads) == 5


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_a_fused_optimizer_switches_memories_on(kind, monkeypatch):
    """On the path of devices that are not asked at each call: fused steps count no version of the parameter."""
    monkeypatch.setattr(in_context, "_HOST_DEVICES", frozenset())
    model, x = stack(scale=None), inputs()
    gates = [parameter for _, parameter in cms_parameters(model)]
    optimizer = kind(gates, lr=0.05, fused=True)
    with torch.no_grad():
        before = model(x)
    version = gates[0]._version
    for _ in range(2):
        loss = model(x).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert gates[0]._version == version, "this optimizer counts versions: the test shows nothing"
    with torch.no_grad():
        found = model(x)
        again = copy.deepcopy(model)
        assert (found - before).abs().max() > 1e-6
        assert torch.equal(found, again(x))
        for _, module in memories(model):
            module.cms.scale.zero_()
        assert torch.equal(model(x), before)


def test_training_does_not_ask_for_the_scale(monkeypatch):
    def never(_):
        raise AssertionError("the scale was read")

    model, x = stack(scale=None), inputs()
    monkeypatch.setattr(in_context.CMSGates, "is_off", never)
    model(x).square().sum().backward()
    assert all(module.cms.scale.grad.abs() > 0 for _, module in memories(model))


@torch.no_grad()
def test_a_context_is_carried_from_call_to_call_and_branches():
    model, x = stack(), inputs(2, 30)
    whole = model(x)
    with carrying(CMSContext()) as context:
        parts = [model(part) for part in x[:, :20].split([3, 1, 7, 9], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole[:, :20], rtol=1e-9, atol=1e-9)
    for _ in range(2):
        with carrying(copy.deepcopy(context)):
            torch.testing.assert_close(model(x[:, 20:]), whole[:, 20:], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(model(x[:, 20:]), whole[:, 20:], atol=1e-6)


@torch.no_grad()
def test_tokens_outside_valid_get_the_trained_mlp_and_are_not_counted():
    module, x = stack().mlps[0], inputs(2, 9)
    valid = torch.tensor([[0, 9], [4, 7]])
    with carrying(CMSContext(), valid=valid) as context:
        found = module(x)
    torch.testing.assert_close(found[1, 4:7], module(x[1:, 4:7])[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found[0], module(x[:1])[0], rtol=1e-10, atol=1e-10)
    for span in (slice(0, 4), slice(7, 9)):
        assert torch.equal(found[1, span], Gated.forward(module, x)[1, span])
    with carrying(context):
        more = module(x)
    both = torch.cat([x[1, 4:7], x[1]])
    torch.testing.assert_close(more[1], module(both.unsqueeze(0))[0, 3:], rtol=1e-10, atol=1e-10)


def test_what_is_removed_is_what_was_there():
    torch.manual_seed(0)
    model, x = Stack().double(), inputs()
    before = {name: (id(module), type(module)) for name, module in model.named_modules()}
    weights = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    attributes = {name: set(module.__dict__) for name, module in model.named_modules()}
    want = model(x)
    replace_mlps(model, gated, [2, 4])
    assert isinstance(model.mlps[0], Gated) and type(model.mlps[0]) is not Gated
    assert "gate.weight" in dict(model.mlps[0].named_parameters())
    assert remove_cms(model) is model
    assert {name: (id(module), type(module)) for name, module in model.named_modules()} == before
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == attributes
    for name, p in model.named_parameters():
        assert id(p) == weights[name][0] and torch.equal(p, weights[name][1])
    assert torch.equal(model(x), want)
    with pytest.raises(ValueError, match="has no CMS to remove"):
        remove_cms(model)
    with pytest.raises(ValueError, match="has no CMS"):
        cms_parameters(model)


def test_levels_are_spread_fastest_first():
    assert chunk_sizes([512, 2048], "all", 5) == {0: 512, 1: 512, 2: 512, 3: 2048, 4: 2048}
    assert chunk_sizes([1, 2, 4], "all", 4) == {i: [1, 2, 4][i * 3 // 4] for i in range(4)}
    assert chunk_sizes(8, [-1, 1], 4) == {1: 8, 3: 8}
    assert chunk_sizes([2, 8], [3, 0, 2], 4) == {0: 2, 2: 2, 3: 8}
    assert chunk_sizes({-1: 4, 0: 3}, "all", 3) == {0: 3, 2: 4}
    numpy = pytest.importorskip("numpy")
    sizes = chunk_sizes(list(numpy.array([2, 4])), list(numpy.array([0, 2])), 4)
    assert sizes == {0: 2, 2: 4} and all(type(x) is int for pair in sizes.items() for x in pair)
    assert chunk_sizes({numpy.int64(1): numpy.int32(8)}, "all", 4) == chunk_sizes(numpy.int64(8), [1], 4) == {1: 8}
    model = stack(levels=(2, 4), layers=[0, 2])
    assert [m.cms_chunk_size for _, m in memories(model)] == [2, 4] and type(model.mlps[1]) is Gated


@pytest.mark.parametrize(
    ("levels", "layers", "error", "message"),
    [
        ([8, 2], "all", ValueError, "levels: got .*fastest first"),
        ([2, 3], "all", ValueError, "levels: got .*multiple"),
        ([0], "all", ValueError, "levels: got chunk size 0"),
        ([True], "all", TypeError, "levels: got chunk size True"),
        ([2.0], "all", TypeError, "levels: got chunk size 2.0"),
        ("512", "all", TypeError, "levels: got '512'"),
        ([], "all", ValueError, "levels: got 0 chunk sizes"),
        ([1, 2, 4, 8], "all", ValueError, "levels: got 4 chunk sizes for 3 layers"),
        ({}, "all", ValueError, "levels: got an empty mapping"),
        ({5: 2}, "all", ValueError, "levels: got layer 5; the model has 3"),
        ({0: 2, -3: 4}, "all", ValueError, "names a layer twice"),
        ({0: 2}, [0], ValueError, "layers: got .* with a mapping"),
        ([2], "some", ValueError, "layers: got 'some'"),
        ([2], 1, TypeError, "layers: got 1"),
        ([2], [True], TypeError, "layers: got layer True"),
    ],
)
def test_levels_that_do_not_fit_are_refused(levels, layers, error, message):
    with pytest.raises(error, match=message):
        replace_mlps(Stack(), gated, levels, layers=layers)


def test_modules_that_cannot_become_memories_are_refused_and_left_alone():
    def refused(model, match, error, message, **settings):
        with pytest.raises(error, match=message):
            replace_mlps(model, match, [2], **settings)
        assert not list(memories(model)) or message.startswith("mlps.0: already")

    refused(Stack(), lambda name, module: None, ValueError, "match: found no MLP in Stack")
    refused(Stack(), lambda n, m: MLPStructure(("gate", "no"), "act") if isinstance(m, Gated) else None, ValueError,
            r"mlps.0 \(Gated\): has no no")  # fmt: skip
    swapped = MLPStructure(("up", "gate", "out"), "act")
    refused(Stack(), lambda n, m: swapped if isinstance(m, Gated) else None, ValueError, "its forward pass is not that")
    refused(replace_mlps(Stack(), gated, [2]), gated, ValueError, "mlps.0: already a memory; .*remove_cms")
    model = Stack()
    model.mlps[1].up.weight = nn.Parameter(model.mlps[1].up.weight.to(torch.int8), requires_grad=False)
    refused(model, gated, TypeError, r"mlps.1 \(Gated\): up has quantised weights .*dequantize")
    model = Stack()
    model.mlps[2].act.weight = None
    model.mlps[2].gate = nn.SiLU()
    refused(model, gated, TypeError, "gate is a SiLU without a weight")
    model = Stack()
    model.mlps[1].act = nn.SiLU(inplace=True)
    refused(model, gated, ValueError, r"mlps.1 \(Gated\): act works in place, .*inplace=False")
    model = Stack()
    model.mlps[0].forward = lambda x: x
    refused(model, gated, ValueError, "mlps.0 .* its forward was replaced on the instance")

    class Residual(Gated):
        def forward(self, x, residual):
            return super().forward(x) + residual

    refused(nn.Sequential(Residual()), gated, ValueError, r"0 \(Residual\): its forward pass is not that")
    model = replace_mlps(Stack(), gated, [2])
    model.mlps[0].forward = model.mlps[0].forward
    with pytest.raises(ValueError, match=r"mlps\.0: the memory was wrapped"):
        remove_cms(model)
    model = Stack()
    model.mlps[2] = model.mlps[0]
    refused(model, gated, ValueError, "mlps.2: the same module as mlps.0; want MLPs of their own")
    refused(Stack(), gated, TypeError, "rank: got '4'", rank="4")
    refused(Stack(), gated, ValueError, "rank: got -1", rank=-1)
    with pytest.raises(ValueError, match="x has shape"):
        stack()(inputs()[0])
    with pytest.raises(ValueError, match="two names"):
        MLPStructure(("one",), "act")
    with pytest.raises(TypeError, match="context: got dict"), carrying({}):
        pass


def test_weights_that_are_no_numbers_are_not_taken_for_another_structure():
    model = Stack()
    with torch.no_grad():
        model.mlps[0].up.weight[0, 0] = torch.nan
    assert len(list(memories(replace_mlps(model, gated, [2])))) == 3


def test_a_model_on_the_meta_device_takes_memories_before_its_weights():
    with torch.device("meta"):
        model = Stack()
    replace_mlps(model, gated, [2, 4])
    assert all(p.device.type == "meta" for _, p in cms_parameters(model))
