"""With its scale at 0 a model with memories is the model it was, bit for bit, and trains from there."""

from __future__ import annotations

import copy

import pytest
import torch

from hope_kernels.integrations.transformers import add_cms, cms_parameters, remove_cms
from tests.integrations.support import ARCHITECTURES, make, switch_on, tokens, with_oracle

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_are_the_models_own_bit_for_bit_and_the_scale_has_a_gradient(name, dtype):
    model, ids = make(name, dtype), tokens(2, 11)
    with torch.no_grad():
        before = model(ids).logits
    assert add_cms(model, levels=[2, 4]) is model
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)
    after = model(ids, labels=ids)
    assert torch.equal(after.logits, before)
    after.loss.backward()
    for found, parameter in cms_parameters(model):
        if found.endswith("scale"):
            assert parameter.grad.isfinite().all() and parameter.grad.abs() > 0, found


def test_dropout_draws_what_it_drew():
    model, ids = make("gpt2", resid_pdrop=0.3).train(), tokens(2, 9)
    torch.manual_seed(5)
    before = model(ids).logits
    add_cms(model, levels=[2, 4])
    torch.manual_seed(5)
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_memory_switched_on_is_the_oracles_gradients_included(name):
    model, ids = switch_on(add_cms(make(name, torch.float64), levels=[2, 4])), tokens(2, 9)
    oracle, weights = with_oracle(model)
    found, want = model(ids, labels=ids), oracle(ids, labels=ids)
    plain = remove_cms(copy.deepcopy(model))(ids).logits
    assert (want.logits - plain).abs().max() > 1e-2, "the memories change nothing"
    torch.testing.assert_close(found.logits, want.logits, rtol=1e-9, atol=1e-9)
    parameters, gates = dict(model.named_parameters()), [p for _, p in cms_parameters(model)]
    grads = torch.autograd.grad(found.loss, [*gates, *(parameters[name] for name in weights)])
    wanted = torch.autograd.grad(want.loss, [*gates, *weights.values()])
    for one, other in zip(grads, wanted, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


def _double(module, args, output):
    return 2 * output


def _double_on_the_instance(linear):
    forward = linear.forward
    linear.forward = lambda x: 2 * forward(x)


@pytest.mark.parametrize("add", [lambda linear: linear.register_forward_hook(_double), _double_on_the_instance])
@torch.no_grad()
def test_what_hooks_make_of_a_linear_is_what_is_written(add):
    """A model whose linears give twice what their weights say is the model with weights twice as large."""

    def logits(change):
        model = make("llama", torch.float64)
        for layer in model.model.layers:
            change(layer.mlp.down_proj)
        return switch_on(add_cms(model, levels=[3, 6]))(tokens(2, 13)).logits

    found, want = logits(add), logits(lambda linear: linear.weight.mul_(2))
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-9)


def test_padded_rows_start_exactly_with_the_gradients_of_the_model_itself():
    model, ids = make("llama", torch.float64), tokens(3, 9)
    ids[1, :4], ids[2, 6:] = 0, 0
    call = {"attention_mask": (ids != 0).long(), "labels": ids}  # the padding is part of the loss
    weights = [p for n, p in model.named_parameters() if "mlp" in n]
    before = model(ids, **call)
    want = torch.autograd.grad(before.loss, weights)
    after = add_cms(model, levels=[2, 4])(ids, **call)
    assert torch.equal(after.logits, before.logits)
    for one, other in zip(torch.autograd.grad(after.loss, weights), want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
