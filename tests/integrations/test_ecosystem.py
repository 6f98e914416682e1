"""Models with memories in the hands of the libraries around them: PEFT, Accelerate, Trainer, safetensors, FSDP2,
autocast.
"""

from __future__ import annotations

import copy
import io

import pytest
import torch
from safetensors.torch import load_file

from hope_kernels.integrations.drop_in import memories
from hope_kernels.integrations.transformers import add_cms, cms_parameters, load_cms, remove_cms, save_cms
from tests.integrations.support import in_a_process_group, make, oracle_mlp, switch_on, tokens, transformers

EXACT = {"rtol": 1e-9, "atol": 1e-9}


def only_gates(model):
    model.requires_grad_(False)
    for _, parameter in cms_parameters(model):
        parameter.requires_grad_(True)
    return model


def lora(model, **settings):
    peft = pytest.importorskip("peft", reason="peft is not installed (hope_kernels[integrations])")
    names = ["c_fc", "c_proj"] if "GPT2" in type(model).__name__ else ["gate_proj", "up_proj", "down_proj", "q_proj"]
    settings = {"target_modules": names, "fan_in_fan_out": "c_fc" in names} | settings
    config = peft.LoraConfig(r=2, init_lora_weights=False, **settings)
    torch.manual_seed(3)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("first", ["cms", "lora"])
def test_lora_adapts_the_layers_that_a_memory_reads_and_writes(name, first):
    """Merged into the weights, the same adapters must give the same memory."""
    model, ids = make(name, torch.float64), tokens(2, 9)
    with torch.no_grad():
        plain = lora(copy.deepcopy(model))(ids).logits
    model = lora(add_cms(model, levels=[2, 4])) if first == "cms" else add_cms(lora(model), levels=[2, 4])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain)
    switch_on(model, scale=0.3)
    for _, parameter in cms_parameters(model):
        parameter.requires_grad_(True)
    found = model(ids, labels=ids)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad and ("lora" in n or ".cms." in n)}
    assert any("lora" in n for n in trained) and any("cms" in n for n in trained)
    grads = torch.autograd.grad(found.loss, list(trained.values()))
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in grads)
    merged = copy.deepcopy(model).merge_and_unload()
    merged_loss = merged(ids, labels=ids)
    torch.testing.assert_close(found.logits, merged_loss.logits, **EXACT)
    gates = [p for n, p in model.named_parameters() if ".cms." in n]
    merged_gates = [p for n, p in merged.named_parameters() if ".cms." in n]
    for one, other in zip(torch.autograd.grad(merged_loss.loss, merged_gates), torch.autograd.grad(
        model(ids, labels=ids).loss, gates), strict=True):  # fmt: skip
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-10)


def test_adapters_that_drop_out_are_refused_where_memories_write():
    model, ids = lora(add_cms(make(), levels=[2, 4]), lora_dropout=0.5).train(), tokens(2, 9)
    with torch.no_grad():
        model(ids)  # the model's own forward, with its dropout: no memory runs
    model.requires_grad_(True)
    with pytest.raises(ValueError, match=r"mlp: gate_proj.lora_dropout.default is a dropout of 0.5 .*lora_dropout=0"):
        model(ids)
    with torch.no_grad(), pytest.raises(ValueError, match="is a dropout"):
        switch_on(model)(ids)
    model.eval()(ids, labels=ids).loss.backward()


def test_lora_on_all_linear_layers_leaves_the_gates_alone():
    model, ids = switch_on(add_cms(make(dtype=torch.float64), levels=[2, 4])), tokens(2, 9)
    model = lora(model, target_modules="all-linear")
    adapted = [name for name, _ in model.named_parameters() if "lora" in name]
    assert any(".mlp." in name for name in adapted) and not any("cms" in name for name in adapted)
    loss = model(ids, labels=ids).loss
    torch.testing.assert_close(model.merge_and_unload()(ids, labels=ids).loss, loss, **EXACT)


def test_peft_saves_gates_that_are_named_to_it():
    """``modules_to_save`` wraps the child, which must go on working and be trained."""
    model = lora(add_cms(make(dtype=torch.float64), levels=[2, 4]), modules_to_save=["cms"])
    ids = tokens(2, 9)
    gates = dict(cms_parameters(model))
    assert len(gates) == 12 and all("modules_to_save.default" in n and p.requires_grad for n, p in gates.items())
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in gates.values())
    scales = [p for n, p in cms_parameters(model) if n.endswith("modules_to_save.default.scale")]
    assert len(scales) == 2 and all(p.grad.abs() > 0 for p in scales)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient_and_writes_once(reentrant):
    model, ids = switch_on(add_cms(make(dtype=torch.float64), levels=[2, 4])).train(), tokens(3, 9)
    ids[1, :4], ids[2, 6:] = 0, 0
    call = {"attention_mask": (ids != 0).long(), "labels": ids.masked_fill(ids == 0, -100)}
    gates = [p for _, p in cms_parameters(model)]

    def gradients():
        model.zero_grad()
        model(ids, **call).loss.backward()
        return [p.grad.clone() for p in gates]

    want = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    cache = transformers.DynamicCache(config=model.config)
    # A call with another mask between forward and backward, as when losses are gathered.
    model.zero_grad()
    loss = model(ids, past_key_values=cache, use_cache=True, **call).loss
    model(tokens(3, 9), labels=ids)
    loss.backward()
    assert not hasattr(cache, "cms_context"), "the library drops the cache under checkpointing"
    for one, other in zip([p.grad for p in gates], want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_checkpointing_that_calls_memories_in_the_backward_by_itself_is_refused():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    model, ids = add_cms(make(), levels=[2, 4]).train(), tokens(1, 6)
    layer = type(model.model.layers[0])
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, layer))
    with pytest.raises(RuntimeError, match="gradient_checkpointing_enable"):
        model(ids, labels=ids).loss.backward()


def test_accelerate_trains_the_gates_and_the_loss_falls():
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed (hope_kernels[integrations])")
    model, ids = only_gates(add_cms(make().train(), levels=[2, 4])), tokens(2, 24)
    ids[:, 12:] = ids[:, :12]
    accelerator = accelerate.Accelerator(cpu=True)
    optimizer = torch.optim.AdamW([p for _, p in cms_parameters(model)], lr=0.02)
    model, optimizer = accelerator.prepare(model, optimizer)
    losses = []
    for _ in range(12):
        loss = model(ids, labels=ids).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05, losses
    assert all(m.cms.scale.item() != 0 for _, m in memories(model))


@torch.no_grad()
def test_offloaded_weights_are_refused():
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed (hope_kernels[integrations])")
    ids = tokens(2, 9)
    before = accelerate.cpu_offload(make(), execution_device="cpu")
    with pytest.raises(ValueError, match=r"layers.0.mlp .* has hooks of Accelerate .* want add_cms first"):
        add_cms(before, levels=[2, 4])
    for scale in (0.0, 0.1):
        after = accelerate.cpu_offload(switch_on(add_cms(make(), levels=[2, 4]), scale), execution_device="cpu")
        with pytest.raises(ValueError, match=r"layers.0.mlp: its weights are on the meta device.*without offloading"):
            after(ids)
    # Dispatched without offloading the weights stay where they are.
    model = switch_on(add_cms(make(), levels=[2, 4]))
    want = model(ids).logits
    assert torch.equal(accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)(ids).logits, want)


def test_trainer_trains_and_stores_and_the_store_gives_the_model_back(tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed (hope_kernels[integrations])")
    model = only_gates(add_cms(make(), levels=[2, 4]))
    rows = [{"input_ids": row, "labels": row} for row in tokens(8, 12)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, learning_rate=0.02, use_cpu=True,
        report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    assert all(m.cms.scale.item() != 0 for _, m in memories(model))
    trainer.save_model(str(tmp_path / "stored"))
    save_cms(model, tmp_path / "stored")
    again = load_cms(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "stored"), tmp_path / "stored").eval()
    ids = tokens(2, 11)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model.cpu().eval()(ids).logits)


def test_checkpoints_keep_their_keys_and_gates_are_stored_by_themselves(tmp_path):
    model = make("gpt2")
    keys, ids = list(model.state_dict()), tokens(2, 11)
    model.save_pretrained(tmp_path / "base")
    switch_on(add_cms(model, {0: 2, 1: 4}, rank=3))
    new = [name for name in model.state_dict() if name not in keys]
    assert [name for name in model.state_dict() if name in keys] == keys
    assert new and all(".mlp.cms." in name for name in new)
    assert sorted(new) == sorted(name for name, _ in cms_parameters(model))
    file = save_cms(model, tmp_path / "gates")
    stored = load_file(file)
    assert sum(t.numel() for t in stored.values()) == sum(p.numel() for _, p in cms_parameters(model))
    base = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "base").eval()
    again = load_cms(base, file)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    # The whole model, memories included, in the library's own format.
    model.save_pretrained(tmp_path / "whole")
    whole = add_cms(make("gpt2"), {0: 2, 1: 4}, rank=3)
    missing = whole.load_state_dict(load_file(tmp_path / "whole" / "model.safetensors"), strict=False)
    assert missing.unexpected_keys == [] and missing.missing_keys in ([], ["lm_head.weight"])
    with torch.no_grad():
        assert torch.equal(whole(ids).logits, model(ids).logits)
    with pytest.raises(ValueError, match=r"has a CMS with levels \{0: 2, 1: 8\}"):
        load_cms(add_cms(make("gpt2"), {0: 2, 1: 8}), file)
    other = make("gpt2", n_embd=32)
    with pytest.raises(ValueError, match="layer 0 wants parameters"):
        load_cms(other, file)
    assert not list(memories(other)) and not any("cms" in name for name in other.state_dict())


def test_a_model_is_copied_and_pickled_with_its_memories():
    model, ids = switch_on(add_cms(make(), levels=[2, 4])), tokens(2, 9)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    with torch.no_grad():
        want = model(ids).logits
        for again in (copy.deepcopy(model), torch.load(file, weights_only=False)):
            assert torch.equal(again(ids).logits, want)
            plain = remove_cms(again)
            assert not plain.model._forward_pre_hooks and not plain.model.layers[0]._forward_pre_hooks
        assert torch.equal(model(ids).logits, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_near_float64_and_autocast_runs(dtype):
    """The budget is twice what the dense oracle errs, run in the same dtype on the same weights."""
    model, x = switch_on(add_cms(make(), levels=[4])).model.layers[0].mlp, torch.randn(2, 13, 16)
    low, high = copy.deepcopy(model).to(dtype), copy.deepcopy(model).to(dtype).double()
    plain = remove_cms(copy.deepcopy(low))
    with torch.no_grad():
        found = low(x.to(dtype)).double()
    x = x.to(dtype)
    want = oracle_mlp(high, remove_cms(copy.deepcopy(high)), x.double(), 4)
    naive = oracle_mlp(low, plain, x, 4).double()
    budget = 2 * (naive - want).abs().max() + 2 * torch.finfo(dtype).eps * want.abs().max()
    assert (found - want).abs().max() < budget
    with torch.autocast("cpu", dtype):
        automatic = model(x.float())
    assert automatic.dtype == dtype
    # Gates and the state stay float32 there, the weights are not rounded twice: of the same size as the error above.
    exact = oracle_mlp(copy.deepcopy(model).double(), remove_cms(copy.deepcopy(model)).double(), x.double(), 4)
    assert (automatic.double() - exact).abs().max() < 0.1 * exact.abs().max()


def test_autocast_starts_exactly_too():
    model, ids = make(), tokens(2, 9)
    with torch.autocast("cpu", torch.bfloat16):
        before = model(ids).logits
        add_cms(model, levels=[2, 4])
        after = model(ids, labels=ids)
    assert torch.equal(before, after.logits)
    after.loss.backward()
    assert all(m.cms.scale.grad.abs() > 0 for _, m in memories(model))


def shard_train_and_compare():
    """Each process trains on rows of its own; the gradients are those of one model on all of them."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    rank, ranks = dist.get_rank(), dist.get_world_size()

    model, ids = switch_on(add_cms(make(), levels=[2, 4])), tokens(2, 9)
    want = copy.deepcopy(model)
    want(ids, labels=ids).loss.backward()
    mesh, own = init_device_mesh("cpu", (ranks,)), ids[rank::ranks]
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    sharded = [p.to_local().shape != p.shape for p in model.parameters()]
    assert any(sharded) == (ranks > 1)
    loss = model(own, labels=own).loss
    loss.backward()
    whole = dict(want.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad.full_tensor(), whole[name].grad)
    optimizer = torch.optim.AdamW([p for _, p in cms_parameters(model)], lr=0.01)
    optimizer.step()
    assert model(own, labels=own).loss.item() != loss.item()


@pytest.mark.parametrize("ranks", [1, 2])
def test_fsdp2_shards_a_model_with_memories(ranks):
    in_a_process_group(shard_train_and_compare, ranks)
