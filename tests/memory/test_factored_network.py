"""`factored_scan` on layers of a module: biases, any activation, the plain module's bits at the start, its state."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call

from hope_kernels import MemorySpec
from hope_kernels.memory import pending
from hope_kernels.memory.factored import FactoredState, factored_scan
from hope_kernels.memory.networks import WeightNetwork
from tests.cases import cotangent

DIM, HIDDEN, SIZE = 6, 9, 4


class Module(nn.Module):
    """An MLP or a GLU as models have them."""

    def __init__(self, form: str, act: nn.Module, bias: bool, dtype: torch.dtype, dim=DIM, hidden=HIDDEN) -> None:
        super().__init__()
        widths = [(dim, hidden)] * (1 if form == "mlp" else 2) + [(hidden, dim)]
        self.layers = nn.ModuleList(nn.Linear(*width, bias=bias, dtype=dtype) for width in widths)
        self.act, self.form = act, form

    def forward(self, x):
        hidden = self.act(self.layers[0](x))
        if self.form == "glu":
            hidden = hidden * self.layers[1](x)
        return self.layers[-1](hidden)


class ModuleNetwork:
    """Its layers as a factored scan calls them: for one head."""

    def __init__(self, module: Module) -> None:
        self.layers, self.activate = module.layers, module.act

    def apply(self, i, u):
        return self.layers[i](u.squeeze(2)).unsqueeze(2)

    def apply_transposed(self, i, e):
        return e.to(self.layers[i].weight.dtype) @ self.layers[i].weight

    def out_features(self, i):
        return self.layers[i].out_features

    def bias(self, i):
        return self.layers[i].bias

    def weight(self, i):
        return self.layers[i].weight.t()[None]

    def known_activation(self):
        return None  # any activation: differentiated, not looked up


def inputs(batch: int, tokens: int, dtype: torch.dtype = torch.float64, dim: int = DIM):
    random = torch.Generator().manual_seed(0)
    x, v = (torch.randn(batch, tokens, 1, dim, generator=random, dtype=torch.float64).to(dtype) for _ in range(2))
    gate = torch.float64 if dtype == torch.float64 else torch.float32
    lr = (0.2 * torch.rand(batch, tokens, 1, generator=random, dtype=torch.float64)).to(gate)
    retention = (0.6 + 0.4 * torch.rand(batch, tokens, 1, generator=random, dtype=torch.float64)).to(gate)
    return x, v, lr, retention


def scan(module, spans, x, v, lr, retention, state=None, valid=None, **options):
    """The scan in calls of the given spans, q = k = x."""
    outputs = []
    for start, stop in spans:
        at = slice(start, stop)
        k = x[:, at]
        output, state = factored_scan(
            ModuleNetwork(module), k, k, v[:, at], lr[:, at], state, spec=MemorySpec(module.form, residual=False),
            chunk_size=SIZE, retention=None if retention is None else retention[:, at], valid=valid, **options,
        )  # fmt: skip
        outputs.append(output)
        valid = None
    return torch.cat(outputs, 1), state


def token_loop(module, x, v, lr, retention):
    """One sequence at a time, one token at a time; inner gradients of the weights alone by autograd."""
    outputs = []
    for b in range(x.shape[0]):
        held = dict(module.named_parameters())
        names = [name for name in held if name.endswith("weight")]
        for start in range(0, x.shape[1], SIZE):
            stop = min(start + SIZE, x.shape[1])
            outputs += [functional_call(module, held, (x[b, t, 0],)) for t in range(start, stop)]
            at = held | {name: held[name].clone() for name in names}
            new = dict(held)
            for t in range(start, stop if stop - start == SIZE else start):
                loss = 0.5 * (functional_call(module, at, (x[b, t, 0],)) - v[b, t, 0]).square().sum()
                gradients = torch.autograd.grad(loss, [at[name] for name in names], create_graph=True)
                kept = 1.0 if retention is None else retention[b, t, 0]
                for name, gradient in zip(names, gradients, strict=True):
                    new[name] = kept * new[name] - lr[b, t, 0] * gradient
            held = new
    return torch.stack(outputs).view_as(x)


SPLITS = {"whole": [(0, 14)], "three": [(0, 5), (5, 9), (9, 14)], "ones": [(t, t + 1) for t in range(14)]}


@pytest.mark.parametrize("limit", [None, 1, 6, 1000])
@pytest.mark.parametrize("spans", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("whole_product", [False, True])
@pytest.mark.parametrize(
    ("form", "act", "bias", "decays"),
    [("mlp", nn.GELU("tanh"), True, True), ("glu", nn.SiLU(), True, True), ("mlp", nn.Tanh(), False, False)],
    ids=["mlp", "glu", "tanh"],
)
def test_with_biases_it_equals_the_token_loop_merged_or_not(form, act, bias, decays, whole_product, spans, limit):
    torch.manual_seed(0)
    module = Module(form, act, bias, torch.float64)
    *tensors, retention = (t.requires_grad_() for t in inputs(2, 14))
    if not decays:
        retention = None
    leaves = [*tensors, *([retention] if decays else []), *module.parameters()]
    found, state = scan(module, spans, *tensors, retention, limit=limit, one_base_product=whole_product)
    # The rule's own limit is 3 pairs here (6 * 9 / 15), so that all of a chunk's four are merged as they are written.
    assert (state.history.merged is None) == (limit == 1000)
    want = token_loop(module, *tensors, retention)
    torch.testing.assert_close(found, want, rtol=0, atol=1e-10)
    upstream = cotangent("output", want)
    for a, b in zip(*(torch.autograd.grad(y, leaves, upstream) for y in (found, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10 * max(1.0, b.abs().max().item()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(("form", "act"), [("mlp", nn.GELU("tanh")), ("mlp", nn.ReLU()), ("glu", nn.SiLU())])
def test_rates_of_zero_give_the_plain_modules_bits(form, act, dtype):
    """In calls of any length, chunks complete in all of them."""
    torch.manual_seed(0)
    module = Module(form, act, True, dtype, 33, 70)
    x, v, lr, retention = inputs(3, 23, dtype, 33)
    for spans in ([(0, 23)], [(0, 10), (10, 23)], [(t, t + 1) for t in range(23)]):
        found, _ = scan(module, spans, x, v, 0 * lr, 0 * retention + 1, one_base_product=True)
        want = torch.cat([module(x[:, start:stop, 0]) for start, stop in spans], 1)
        assert found.dtype == dtype and torch.equal(found.squeeze(2), want)


def test_rates_of_zero_still_have_a_gradient():
    torch.manual_seed(0)
    module = Module("mlp", nn.GELU(), True, torch.float64)
    x, v, lr, retention = inputs(2, 14)
    scale = torch.zeros((), dtype=torch.float64, requires_grad=True)
    output, _ = scan(module, [(0, 14)], x, v, scale * lr, retention, one_base_product=True)
    (gradient,) = torch.autograd.grad(output.square().sum(), scale)
    (want,) = torch.autograd.grad(token_loop(module, x, v, scale * lr, retention).square().sum(), scale)
    assert want.abs() > 1e-3
    torch.testing.assert_close(gradient, want, rtol=1e-10, atol=0)


@pytest.mark.parametrize("limit", [1, 7, 1000])
@pytest.mark.parametrize("whole_product", [False, True])
def test_left_padded_rows_and_reordered_ones_equal_each_row_alone(whole_product, limit):
    torch.manual_seed(0)
    module = Module("mlp", nn.GELU(), True, torch.float64)
    x, v, *_ = tensors = inputs(3, 40)
    starts = [0, 3, 9]
    x[1, :3], v[2, :9] = torch.nan, torch.nan  # padding may hold anything
    valid = torch.tensor([[start, 20] for start in starts])
    spans = [(0, 20)] + [(t, t + 1) for t in range(20, 31)]
    options = {"limit": limit, "one_base_product": whole_product}
    found, state = scan(module, spans, *tensors, valid=valid, **options)
    assert state.position == (31, 28, 22) and state.pending_count == (3, 0, 2)
    order = [2, 0, 0, 1]
    reordered, after = scan(
        module, [(31, 38), (38, 40)], *(t[order] for t in tensors), state.index_select(order), **options
    )
    assert after.position == (31, 40, 40, 37)
    for b, start in enumerate(starts):
        row = slice(b, b + 1)
        alone, _ = scan(module, [(0, 40 - start)], *(t[row, start:] for t in tensors), limit=1000)
        torch.testing.assert_close(found[b, start:], alone[0, : 31 - start], rtol=0, atol=1e-11)
        for i in (i for i, source in enumerate(order) if source == b):
            torch.testing.assert_close(reordered[i], alone[0, 31 - start :], rtol=0, atol=1e-11)
        assert not found[b, :start].any()


def test_gradients_of_left_padded_rows_equal_those_of_each_row_alone():
    torch.manual_seed(0)
    module = Module("glu", nn.SiLU(), True, torch.float64)
    tensors = [t.requires_grad_() for t in inputs(3, 19)]
    starts, leaves = [0, 3, 9], [*tensors, *module.parameters()]
    found, _ = scan(module, [(0, 19)], *tensors, valid=torch.tensor([[s, 19] for s in starts]))
    loss = sum(
        scan(module, [(0, 19 - s)], *(t[b : b + 1, s:] for t in tensors))[0].square().sum()
        for b, s in enumerate(starts)
    )
    pairs = (torch.autograd.grad(y, leaves) for y in (found.square().sum(), loss))
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("ends", [(9, 13, 13), (5, 19, 0), (19, 4, 12)])
@pytest.mark.parametrize("form", ["mlp", "glu"])
def test_gradients_of_rows_that_end_at_tokens_of_their_own_do_not_know_of_a_merge(form, ends):
    """Rows complete chunks that others do not; what was written by then is merged in the middle of the call."""
    torch.manual_seed(0)
    module = Module(form, nn.SiLU(), True, torch.float64)
    tensors = [t.requires_grad_() for t in inputs(3, 19)]
    leaves, valid = [*tensors, *module.parameters()], torch.tensor([[0, end] for end in ends])
    pairs = []
    for limit in (6, 1000):
        output, state = scan(module, [(0, 19)], *tensors, valid=valid, limit=limit)
        assert (state.history.merged is not None) == (limit == 6)
        pairs.append(torch.autograd.grad(output.square().sum(), leaves))
    for merged, whole in zip(*pairs, strict=True):
        torch.testing.assert_close(merged, whole, rtol=1e-9, atol=1e-10)


def test_what_is_recomputed_does_not_ask_for_the_random_state(monkeypatch):
    """Threads that ask for it while torch's generator is locked and the garbage collector runs wait for each other."""

    def asked(*_):
        raise AssertionError("the random state was asked for")

    module, tensors = Module("glu", nn.SiLU(), True, torch.float64), inputs(2, 11)
    monkeypatch.setattr(torch, "get_rng_state", asked)
    output, _ = scan(
        module, [(0, 11)], *(t.requires_grad_() for t in tensors), valid=torch.tensor([[0, 11], [0, 5]]), limit=4
    )
    output.sum().backward()


@pytest.mark.parametrize("whole_product", [False, True])
def test_nan_in_padding_reaches_no_gradient(whole_product):
    torch.manual_seed(0)
    module = Module("mlp", nn.GELU(), True, torch.float64)
    tensors, valid = inputs(2, 11), torch.tensor([[0, 11], [3, 11]])
    for t in tensors:
        t[1, :3] = torch.nan
    leaves = [*(t.requires_grad_() for t in tensors), *module.parameters()]
    output, _ = scan(module, [(0, 11)], *tensors, valid=valid, one_base_product=whole_product)
    for gradient in torch.autograd.grad(output.square().sum(), leaves):
        assert gradient.isfinite().all() and gradient.any()


def test_right_padding_leaves_rows_of_any_length_and_none():
    torch.manual_seed(0)
    module = Module("mlp", nn.GELU(), True, torch.float64)
    tensors = inputs(3, 14)
    valid = torch.tensor([[0, 14], [2, 2], [0, 5]])
    found, state = scan(module, [(0, 14)], *tensors, valid=valid, limit=1000)
    assert state.position == (14, 0, 5) and state.history.counts == (12, 0, 4)
    alone, _ = scan(module, [(0, 5)], *(t[2:] for t in tensors))
    torch.testing.assert_close(found[2, :5], alone[0], rtol=0, atol=1e-12)
    assert not found[1].any() and not found[2, 5:].any()


@pytest.mark.parametrize("whole_product", [False, True])
def test_rows_of_padding_alone_read_zeros(whole_product):
    module = Module("mlp", nn.GELU(), True, torch.float32)
    tensors = inputs(2, 6, torch.float32)
    valid = torch.tensor([[0, 0], [3, 3]])
    with torch.autocast("cpu", torch.bfloat16):
        found, state = scan(module, [(0, 6)], *tensors, valid=valid, one_base_product=whole_product)
    assert found.dtype == torch.bfloat16 and not found.any() and state.position == 0


def test_a_state_is_checked_against_its_call():
    module = Module("mlp", nn.GELU(), True, torch.float64)
    x, v, lr, retention = inputs(2, 14)
    network, spec = ModuleNetwork(module), MemorySpec("mlp", residual=False)
    options = {"spec": spec, "chunk_size": SIZE, "retention": retention}
    _, state = factored_scan(network, x, x, v, lr, limit=1000, **options)

    def refuses(error, match, *, x=x, v=v, lr=lr, state=state, **changes):
        with pytest.raises(error, match=match):
            factored_scan(network, x, x, v, lr, state, **(options | changes))

    refuses(ValueError, "chunk_size: got 8, but the state has tokens pending in a chunk of 4", chunk_size=8)
    refuses(ValueError, "retention: got None, but the state was made with a gate", retention=None)
    refuses(ValueError, "spec: got rule 'dgd'", spec=MemorySpec("mlp", rule="dgd"))
    refuses(TypeError, "state: got .*; want the FactoredState", state=(1, 2))
    refuses(ValueError, "limit: got 0", limit=0)
    more = (torch.cat([t, t]) for t in (x, v, lr, retention))
    x2, v2, lr2, retention2 = more
    refuses(ValueError, "state: got one of 2 sequences", x=x2, v=v2, lr=lr2, retention=retention2)
    with pytest.raises(IndexError, match="indices: got values from 0 to 2"):
        state.index_select([0, 2])
    detached = state.detach()
    assert detached.history.factors.count == 12 and not detached.history.factors.errors[0].requires_grad


@pytest.mark.parametrize("limit", [2, 1000], ids=["merged", "pairs"])
@pytest.mark.parametrize("tokens", [12, 14, 3], ids=["none pending", "some pending", "all pending"])
@pytest.mark.parametrize("form", ["mlp", "glu", "linear"])
def test_a_state_of_other_sizes_dtype_batch_or_spec_is_refused_before_anything_is_computed(form, tokens, limit):
    def made(dim=DIM, hidden=HIDDEN, heads=1, dtype=torch.float64, batch=2):
        shapes = MemorySpec(form).weight_shapes(dim, hidden)
        network = WeightNetwork(
            [0.3 * torch.randn(heads, *shape, dtype=dtype) for shape in shapes], dtype, MemorySpec(form, residual=False)
        )
        x, v, lr, retention = inputs(batch, tokens, dtype, dim)
        return network, *(t.expand(batch, tokens, heads, *t.shape[3:]) for t in (x, v, lr, retention))

    def run(made, state=None, spec=MemorySpec(form, residual=False)):  # noqa: B008 (frozen)
        network, x, v, lr, retention = made
        options = {"spec": spec, "chunk_size": SIZE, "retention": retention, "limit": limit}
        return factored_scan(network, x, x, v, lr, state, **options)

    usual = made()
    state = run(usual).state
    before = run(usual, state).output

    def refused(match, made, **changes):
        def compute(*_):
            raise AssertionError("something was computed")

        made[0].apply = compute
        with pytest.raises(ValueError, match=match):
            run(made, state, **changes)

    low = made(dtype=torch.float32)
    refused(r"state: got .* of torch.float64; want torch.float32 with tokens of torch.float32", low)
    refused(r"state: got one of 2 sequences on cpu; want 3 on cpu", made(batch=3))
    refused(r"state: got .* of shape \(.*\); want \(2, .*\), for 2 heads of 6 features", made(heads=2))
    refused(r"state: got .* of shape \(.*\); want \(2, .*\), for 1 heads of 7 features", made(dim=7))
    if form != "linear" and tokens > 3:
        refused(
            r"state: got .* of shape \(.*9.*\); want \(2, .*10.*\), .* and 10 behind the network's", made(hidden=10)
        )
    for changes in ({"residual": True}, {"residual": False, "objective": "dot"}):
        other = MemorySpec(form, **changes)
        refused(r"state: got one of MemorySpec\(.*; want one of the call's spec, MemorySpec\(", made(), spec=other)
    refused(r"got one of MemorySpec\(", made(), spec=MemorySpec("glu" if form == "mlp" else "mlp", residual=False))
    meta = FactoredState.to(state, "meta")
    with pytest.raises(ValueError, match="state: got one of 2 sequences on meta; want 2 on cpu"):
        run(usual, meta)
    # The activation is the network's, whatever the spec says; and a refused call has changed nothing.
    assert torch.equal(run(usual, state, MemorySpec(form, "relu2", residual=False)).output, before)


def test_rows_at_tokens_of_their_own_are_counted():
    module = Module("mlp", nn.GELU(), True, torch.float64)
    x, v, lr, retention = inputs(2, 3)
    _, state = scan(module, [(0, 3)], x, v, lr, retention, valid=torch.tensor([[0, 3], [0, 1]]))
    assert state.position == (3, 1)
    alone = [torch.cat([t, t]) for t in (x, v, lr, retention)]
    with pytest.raises(ValueError, match="state: got one of 2 sequences; want 4"):
        scan(module, [(0, 3)], *alone, state=state)


def test_a_state_under_autocast_is_of_autocasts_dtype():
    module = Module("mlp", nn.GELU(), True, torch.float32)
    tensors = inputs(2, 12, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        _, state = scan(module, [(0, 8)], *tensors, limit=1000)
        output, _ = scan(module, [(8, 12)], *tensors, state=state, limit=1000)
    assert output.isfinite().all()
    with pytest.raises(ValueError, match=r"got written tokens of torch.bfloat16; want torch.float32 with tokens of"):
        scan(module, [(8, 12)], *tensors, state=state, limit=1000)


@pytest.mark.parametrize("limit", [2, 1000])
@pytest.mark.parametrize("ragged", [False, True])
def test_a_stored_state_goes_on_with_the_same_bits(ragged, limit, tmp_path):
    torch.manual_seed(0)
    module = Module("mlp", nn.GELU(), True, torch.float64)
    tensors = inputs(2, 20)
    valid = torch.tensor([[0, 14], [3, 14]]) if ragged else None
    _, state = scan(module, [(0, 14)], *tensors, valid=valid, limit=limit)
    torch.save(state.detach().state_dict(), tmp_path / "state.pt")
    loaded = FactoredState.from_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert (loaded.history.factors is None) == (limit == 2) and loaded.spec == state.spec == MemorySpec(
        "mlp", residual=False
    )
    ends = [scan(module, [(14, 20)], *tensors, s, limit=limit) for s in (state, loaded)]
    assert torch.equal(ends[0][0], ends[1][0]) and ends[0][1].position == ends[1][1].position
    renamed = {"count" if name == "counts" else name: x for name, x in loaded.state_dict().items()}
    with pytest.raises(ValueError, match=r"state_dict: missing .'counts'., unknown .'count'."):
        FactoredState.from_state_dict(renamed)


def test_pending_tokens_gather_in_place_and_no_state_can_tell(monkeypatch):
    torch.manual_seed(0)
    module, tensors = Module("glu", nn.SiLU(), True, torch.float64), inputs(2, 14)
    spans = [(start, start + 1) for start in range(14)]

    def stream() -> tuple[list, list]:
        outputs, states, state = [], [], None
        with torch.no_grad():
            for span in spans:
                output, state = scan(module, [span], *tensors, state)
                outputs.append(output)
                states.append(state)
                state = state.detach()
        return outputs, states

    expected, apart = stream()
    monkeypatch.setattr(pending, "WORTHWHILE", 0)
    found, together = stream()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    for state, want in zip(together, apart, strict=True):
        for x, y in zip(state.pending, want.pending, strict=True):
            assert (x is None and y is None) or torch.equal(x, y)
    assert together[1].room is not None and all(state.room is None for state in apart)
    assert together[1].pending_k.data_ptr() == together[2].pending_k.data_ptr()
    stored = together[1].state_dict()
    assert "room" not in stored and stored["pending_k"].untyped_storage().nbytes() == stored["pending_k"].nbytes
    assert torch.equal(FactoredState.from_state_dict(stored).pending_k, together[1].pending_k)
