"""``add_cms`` on models of the library: what it puts where, what it takes out again, what it refuses."""

from __future__ import annotations

import pytest
import torch

from hope_kernels.integrations.drop_in import memories
from hope_kernels.integrations.transformers import add_cms, cms_parameters, remove_cms
from tests.integrations.support import (
    ARCHITECTURES,
    LLAMA,
    in_a_process_group,
    make,
    switch_on,
    tokens,
    transformers,
)


def hooks_of(model):
    """How many hooks of each kind every module has."""
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")
    return {name: [len(getattr(module, kind)) for kind in kinds] for name, module in model.named_modules()}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_removing_restores_modules_hooks_and_logits(name):
    model, ids = make(name), tokens(2, 9)
    with torch.no_grad():
        want = model(ids).logits
    modules = {n: (id(m), type(m), set(m.__dict__)) for n, m in model.named_modules()}
    hooks = hooks_of(model)
    weights = {n: (id(p), p.detach().clone()) for n, p in model.named_parameters()}
    switch_on(add_cms(model, levels=[2, 4]))
    with torch.no_grad():
        assert not torch.equal(model(ids).logits, want)
    assert remove_cms(model) is model
    assert {n: (id(m), type(m), set(m.__dict__)) for n, m in model.named_modules()} == modules
    assert hooks_of(model) == hooks
    for n, p in model.named_parameters():
        assert id(p) == weights[n][0] and torch.equal(p, weights[n][1])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, want)


def test_few_parameters_are_added_each_with_a_name():
    model = make(num_hidden_layers=4, hidden_size=64, intermediate_size=176)
    before = sum(p.numel() for p in model.parameters())
    add_cms(model, levels=[2, 4], rank=1)
    added = cms_parameters(model)
    names = {"scale", "gates.weight", "gates.bias", "target_diagonal", "target_down", "target_up"}
    assert {name for name, _ in added} == {f"model.layers.{i}.mlp.cms.{name}" for i in range(4) for name in names}
    assert sum(p.numel() for _, p in added) == 4 * (1 + 2 * 64 + 2 + 64 + 2 * 64)
    assert sum(p.numel() for _, p in added) < 0.01 * before
    assert [module.cms_chunk_size for _, module in memories(model)] == [2, 2, 4, 4]
    assert len(cms_parameters(add_cms(make(num_hidden_layers=4), {3: 8}, rank=0))) == 4


@torch.no_grad()
def test_a_model_without_a_head_and_positional_arguments_work():
    for name in ("llama", "gpt2"):
        model = switch_on(add_cms(make(name, torch.float64), levels=[2, 4]))
        ids = tokens(2, 9)
        ids[1, :4] = 0
        mask = (ids != 0).long()
        body, whole = model.base_model, model(ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
        want = whole.hidden_states[-1]
        positional = body(ids, mask) if name == "llama" else body(ids, None, mask)
        torch.testing.assert_close(positional.last_hidden_state, want, rtol=1e-5, atol=1e-5)
        alone = body(ids[1:, 4:]).last_hidden_state[0] if name == "llama" else None
        if alone is not None:  # positions of padded rows differ by what rotations forget, and in float32
            torch.testing.assert_close(want[1, 4:], alone, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_call_that_fails_leaves_nothing_behind():
    model, ids = switch_on(add_cms(make(), levels=[2, 4])), tokens(1, 9)
    want = model(ids).logits
    handle = model.model.norm.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(ids, attention_mask=torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]]))
    handle.remove()
    layer = model.model.layers[0].mlp
    from hope_kernels.integrations.context import current_call

    assert current_call() is None
    x = torch.randn(1, 9, 16)
    assert torch.equal(layer(x), layer(x))
    assert torch.equal(model(ids).logits, want)


@torch.no_grad()
def test_layers_called_by_themselves_carry_no_state_and_say_so():
    model, ids = add_cms(make(), levels=[2, 4]), tokens(1, 5)
    hidden = model.model.embed_tokens(ids)
    call = {"position_embeddings": model.model.rotary_emb(hidden, torch.arange(5)[None])}
    layer, cache = model.model.layers[0], transformers.DynamicCache(config=model.config)
    layer(hidden, past_key_values=cache, **call)
    switch_on(model)
    layer(hidden, **call)
    with pytest.raises(RuntimeError, match=r"layers.0.mlp: its decoder layer is called with a cache outside"):
        layer(hidden, past_key_values=cache, **call)


@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
@torch.no_grad()
def test_a_compiled_model_decodes_what_an_eager_one_does(name):
    """With a static cache; compiled code breaks off at the hooks and at the memories."""
    model, ids = switch_on(add_cms(make(name), levels=[2, 4])), tokens(1, 7)
    ids[0, :2] = 0
    want = model(ids, attention_mask=(ids != 0).long(), use_cache=False).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    cache = transformers.StaticCache(config=model.config, max_cache_len=16)
    found = []
    for part in ids.split([4, 1, 1, 1], 1):
        seen = sum(x.shape[1] for x in found) + part.shape[1]
        found.append(compiled(part, attention_mask=(ids[:, :seen] != 0).long(), past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(found, 1)[:, 2:], want[:, 2:], rtol=1e-4, atol=1e-5)


def test_models_that_cannot_take_memories_are_refused_with_what_to_do():
    def refused(model, error, message, levels=(2, 4)):
        state = {n: type(m) for n, m in model.named_modules()}
        with pytest.raises(error, match=message):
            add_cms(model, list(levels))
        assert {n: type(m) for n, m in model.named_modules()} == state

    mixtral = {**LLAMA, "num_local_experts": 2, "num_experts_per_tok": 1}
    refused(transformers.MixtralForCausalLM(transformers.MixtralConfig(**mixtral)), ValueError, "mixtures of experts")
    opt = transformers.OPTConfig(hidden_size=16, ffn_dim=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=61,
                                 word_embed_proj_dim=16)  # fmt: skip
    refused(transformers.OPTForCausalLM(opt), ValueError, "opt is not an architecture .* replace_mlps")
    refused(torch.nn.Linear(2, 2), TypeError, "model: Linear is no transformers model; .*replace_mlps")
    refused(make(), ValueError, "levels: got 3 chunk sizes for 2 layers", levels=(2, 4, 8))
    twice = add_cms(make(), levels=[2, 4])
    refused(twice, ValueError, "model.layers.0.mlp: already a memory; .*remove_cms")
    quantised = make()
    quantised.is_quantized = True
    refused(quantised, TypeError, "quantised weights; .*dequantize")
    parallel = make()
    parallel._tp_size = 2
    refused(parallel, TypeError, "tensor-parallel .*tp_plan")
    with pytest.raises(ValueError, match="no CMS"):
        cms_parameters(make())


def shard_and_refuse():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = make()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(TypeError, match=r"is sharded .* want add_cms before"):
        add_cms(model, [2])


def test_a_sharded_model_is_refused():
    in_a_process_group(shard_and_refuse)
