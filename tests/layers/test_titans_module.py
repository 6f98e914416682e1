"""A Titans layer is a PyTorch module: gradients, copies, dtypes, autocast, backends, odd shapes; and it learns."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hope_kernels import NeuralMemory, SelfModifyingTitans, available_backends
from hope_kernels.layers import projections
from tests.cases import COMPILED_BACKENDS, FLOAT64_BACKENDS, device_of
from tests.layers.common import assert_same, run_stream, tokens, with_gradients
from tests.layers.test_cms_training import PAIRS, VALUE, recall_batch
from tests.layers.titans_common import LAYERS, make_titans, results_of

KINDS = ["titans", "gd", "fixed k and v", "plain"]


@pytest.mark.parametrize("name", LAYERS)
def test_every_parameter_has_a_gradient_at_every_length(name) -> None:
    layer = make_titans(name)
    for length in (9, 1):  # data parallel training stops where a sequence too short to write leaves one without
        layer.zero_grad()
        layer(tokens(2, length)).square().sum().backward()
        for parameter_name, parameter in layer.named_parameters():
            assert parameter.grad is not None, parameter_name
            reads = length == 9 or parameter_name.split(".")[0] in ("conv", "query", "weights", "output")
            assert (parameter.grad.abs().max() > 0) == reads, parameter_name


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("batch", "length"), [(0, 0), (0, 5), (2, 0), (1, 1), (2, 1)])
def test_no_sequences_no_tokens_one_token(name, batch, length) -> None:
    layer = make_titans(name)
    x = tokens(batch, length).requires_grad_()
    output, state = layer.stream(x, layer.init_state(batch))
    assert output.shape == layer(x).shape == x.shape
    assert (state.position, state.batch_size) == (length, batch)
    output.sum().backward()
    assert x.grad.shape == x.shape
    more = tokens(batch, 7, seed=5)
    rest, after = layer.stream(more, state)
    whole, expected = run_stream(layer, torch.cat([x, more], 1), [length + 7])
    assert_same(results_of(rest, after), results_of(whole[:, length:], expected))


@pytest.mark.parametrize("name", KINDS)
def test_copies_and_saved_parameters_are_equal_and_independent(name) -> None:
    layer, other = make_titans(name), make_titans(name, seed=1)
    x = tokens(2, 9)
    layer(x).sum().backward()
    copied = copy.deepcopy(layer)
    assert torch.equal(copied(x), layer(x))
    assert (other(x) - layer(x)).abs().max() > 1e-3
    assert set(layer.state_dict()) == {parameter_name for parameter_name, _ in layer.named_parameters()}
    other.load_state_dict(layer.state_dict())
    before = layer(x).detach()
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(1.5)
    assert torch.equal(other(x), before)
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("name", KINDS)
def test_strides_of_the_input_and_of_the_gradient_do_not_matter(name) -> None:
    layer = make_titans(name)
    x = tokens(2, 20)[:, ::2].transpose(0, 1).contiguous().transpose(0, 1)
    upstream = tokens(1, 1, seed=2).expand(2, 10, -1)
    grads = []
    for given, weight in ((x, upstream), (x.contiguous(), upstream.contiguous())):
        leaf = given.detach().requires_grad_()
        grads.append(torch.autograd.grad(layer(leaf), leaf, weight)[0])
    assert not x.is_contiguous()
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-11, atol=1e-12)


def test_representation_names_what_was_chosen() -> None:
    text = repr(make_titans("gd", bptt_chunks=2, backend="reference"))
    for part in (
        "dim=6, heads=2, C=3, gd, lr<=0.3, retention, momentum, bptt=2, backend='reference'",
        "dim=6, width=4",
        "adaptive=('k', 'v', 'lr', 'retention'), C=2",
        "heads=2, head_dim=3",
    ):
        assert part in text


@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_follow_float64(name, dtype, backend) -> None:
    layer = make_titans(name, backend=backend)
    x = tokens(2, 13).bfloat16().double()
    for parameter in layer.parameters():  # numbers both dtypes can hold: the comparison is of the arithmetic
        parameter.data = parameter.data.bfloat16().double()
    exact = layer(x)
    low = copy.deepcopy(layer).to(dtype)
    output = low(x.to(dtype))
    assert output.dtype == dtype
    error = (output.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert error < 10 * torch.finfo(dtype).eps
    output.float().square().sum().backward()
    for parameter_name, parameter in low.named_parameters():
        assert parameter.grad.dtype == dtype, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name


@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
@pytest.mark.parametrize("name", KINDS)
def test_autocast_rounds_tokens_and_keeps_gates_and_state(name, backend) -> None:
    layer = make_titans(name, backend=backend, dtype=torch.float32)
    x = tokens(2, 13, dtype=torch.float32)
    exact, exact_state = layer.stream(x, layer.init_state(2))
    with torch.autocast("cpu", torch.bfloat16):
        output, state = run_stream(layer, x, [5, 1, 7])
    assert output.dtype == state.memory.pending_k.dtype == torch.bfloat16
    assert state.memory.pending_lr.dtype == state.memory.weights[0].dtype == torch.float32
    if name == "plain":  # gates that nothing rounded was read off
        assert torch.equal(state.memory.pending_lr, exact_state.memory.pending_lr)
    else:
        assert state.projections.weights[0].dtype == torch.float32
    error = (output.float() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert 0 < error < 10 * torch.finfo(torch.bfloat16).eps
    output.float().square().sum().backward()
    for parameter_name, parameter in layer.named_parameters():
        assert parameter.grad.dtype == torch.float32, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("backend", COMPILED_BACKENDS)
def test_outputs_states_and_gradients_follow_the_eager_path_under_a_split(name, backend) -> None:
    device = device_of(backend)
    layer = make_titans(name, backend=backend).float().to(device)
    eager = make_titans(name, backend="reference").to(device)
    x = tokens(1, 5).float().to(device)
    for parameter, exact in zip(layer.parameters(), eager.parameters(), strict=True):
        exact.data = parameter.data.double()
    found = with_gradients(layer, x, [3, 2], results_of)
    expected = with_gradients(eager, x.double(), [5], results_of)
    assert sorted(found) == sorted(expected)
    for part, want in expected.items():
        scale = max(want.abs().max().item(), 1e-3)
        torch.testing.assert_close(
            found[part].double(), want, rtol=0, atol=2e-4 * scale, msg=lambda m, n=part: f"{n}: {m}"
        )


def test_a_chunk_of_the_projections_is_one_read_and_one_write(monkeypatch) -> None:
    calls: list[str] = []

    def counted(name):
        function = getattr(projections, name)

        def call(tokens, *args, **options):
            calls.append(f"{name} of {tokens.shape[1]} tokens, {tokens.shape[2]} memories")
            return function(tokens, *args, **options)

        monkeypatch.setattr(projections, name, call)

    counted("memory_read")
    counted("memory_write")
    layer = make_titans(projection_chunk_size=4)
    layer(tokens(2, 10))
    both = ["memory_read of 4 tokens, 8 memories", "memory_write of 4 tokens, 8 memories"]
    assert calls == [*both, *both, "memory_read of 2 tokens, 8 memories"]


@pytest.mark.skipif(not available_backends()["triton"], reason=available_backends()["triton"].reason)
def test_a_chunk_of_the_projections_is_two_launches_and_two_in_the_backward(monkeypatch) -> None:
    from tests.backends.test_triton import Launches

    device = device_of("triton")
    layer = make_titans(chunk_size=4, projection_chunk_size=2, backend="triton").float().to(device)
    x = tokens(1, 4).float().to(device)
    with monkeypatch.context() as patch:
        counted = Launches(patch)
        output = layer(x)
        forward = counted.total
        output.sum().backward()
    # One more for the main memory's scan; the last write serves no output, so nothing flows back through it.
    assert (forward, counted.total - forward) == (2 * 2 + 1, 2 * 2)


class Recall(nn.Module):
    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.read_in, self.norm, self.layer = nn.Linear(2 * VALUE, width), nn.LayerNorm(width), layer
        self.read_out = nn.Linear(width, VALUE)

    def forward(self, x):
        return self.read_out(self.layer(self.norm(self.read_in(x)))[:, PAIRS:])


def train(layer: nn.Module, steps: int) -> list[float]:
    """Losses of recalling pairs shown earlier in the sequence, by Adam. Every gradient on the way is finite."""
    torch.manual_seed(0)
    model = Recall(layer, 32)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    random = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        shown, answer = recall_batch(16, random)
        loss = F.mse_loss(model(shown), answer)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("make", "last"),
    [
        (lambda: SelfModifyingTitans(32, 2, 8, 8), (0.0, 0.2)),
        (lambda: NeuralMemory(32, 2, 8), (0.0, 0.2)),
        (lambda: NeuralMemory(32, 2, 8, lr_max=1e-9), (0.8, 1.1)),  # without writes nothing is recalled
    ],
    ids=["titans", "plain", "never written"],
)
def test_recall_within_the_context_is_learned_by_writing(make, last) -> None:
    torch.manual_seed(0)
    losses = train(make(), 280)
    assert losses[0] > 0.9
    assert last[0] <= sum(losses[-10:]) / 10 < last[1], losses[::20]


@pytest.mark.slow
@pytest.mark.parametrize("lr_max", [0.1, 0.3])
def test_a_trained_layer_with_bounded_targets_runs_through_long_sequences(lr_max) -> None:
    torch.manual_seed(0)
    layer = SelfModifyingTitans(32, 2, 8, 8, lr_max=lr_max, value_norm_max=1.0)
    losses = train(layer, 800)
    assert losses[-1] < 0.05
    with torch.no_grad():
        assert layer(tokens(2, 4000, dim=32, dtype=torch.float32)).abs().max() < 10
