"""The state of memories follows the cache: decoding, beams, padding, rejected guesses, copies."""

from __future__ import annotations

import copy
import gc
import io
import weakref

import pytest
import torch

from hope_kernels.integrations.drop_in import memories
from hope_kernels.integrations.transformers import add_cms, remove_cms
from tests.integrations.support import ARCHITECTURES, make, switch_on, tokens, transformers

EXACT = {"rtol": 1e-9, "atol": 1e-9}


def adapted(name: str = "llama", dtype: torch.dtype = torch.float64, levels: tuple[int, ...] = (2, 4)):
    return switch_on(add_cms(make(name, dtype), levels=list(levels)))


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_any_split_into_calls_with_a_cache_gives_the_whole_forward(name):
    model, ids = adapted(name), tokens(2, 11)
    whole = model(ids, use_cache=False).logits
    assert (whole - remove_cms(copy.deepcopy(model))(ids).logits).abs().max() > 1e-2
    for parts in ([5, 1, 1, 1, 1, 1, 1], [1] * 11, [3, 8], [11]):
        cache, found = None, []
        for part in ids.split(parts, 1):
            result = model(part, past_key_values=cache, use_cache=True)
            cache, logits = result.past_key_values, result.logits
            found.append(logits)
        torch.testing.assert_close(torch.cat(found, 1), whole, **EXACT)


@torch.no_grad()
def test_calls_longer_than_what_can_be_taken_back_are_exact_too():
    model, ids = adapted(levels=(16, 32)), tokens(2, 150)
    whole = model(ids, use_cache=False).logits
    cache = transformers.DynamicCache(config=model.config)
    found = [model(part, past_key_values=cache).logits for part in ids.split([131, 1, 18], 1)]
    torch.testing.assert_close(torch.cat(found, 1), whole, **EXACT)


def test_a_cache_carries_gradients_from_call_to_call():
    model, ids = adapted(), tokens(2, 10)
    gates = [p for _, m in memories(model) for p in m.cms.parameters()]
    want = torch.autograd.grad(model(ids, use_cache=False).logits[:, 6:].square().sum(), gates)
    cache = model(ids[:, :6], use_cache=True).past_key_values
    found = torch.autograd.grad(model(ids[:, 6:], past_key_values=cache).logits.square().sum(), gates)
    for one, other in zip(found, want, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_rows_of_different_lengths_are_each_what_they_are_alone(name):
    # Gemma 2's own attention, eager, casts float64's lowest number to float32: NaN for rows with padding.
    dtype, near = (torch.float32, 1e-4) if name == "gemma2" else (torch.float64, 1e-7)
    model = adapted(name, dtype)
    rows = [tokens(1, length, seed=length) for length in (9, 6, 3)]
    padded = torch.cat([torch.nn.functional.pad(row, (9 - row.shape[1], 0)) for row in rows])
    settings = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    found = model.generate(padded, attention_mask=(padded != 0).long(), **settings)
    for i, row in enumerate(rows):
        alone = model.generate(row, attention_mask=torch.ones_like(row), **settings)
        torch.testing.assert_close(
            torch.stack(found.logits, 1)[i], torch.stack(alone.logits, 1)[0], rtol=near, atol=near
        )
        assert torch.equal(found.sequences[i, 9:], alone.sequences[0, row.shape[1] :])


def test_right_padding_in_training_changes_neither_loss_nor_gradients():
    model, ids = adapted(), tokens(1, 7)
    gates = [p for _, m in memories(model) for p in m.cms.parameters()]
    longer = torch.nn.functional.pad(torch.cat([ids, tokens(1, 7, seed=3)]), (0, 3))
    longer[1] = tokens(1, 10, seed=4)
    mask = (longer != 0).long()
    labels = longer.masked_fill(mask == 0, -100)
    labels[1] = -100
    both, alone = model(longer, attention_mask=mask, labels=labels).loss, model(ids, labels=ids).loss
    torch.testing.assert_close(both, alone, **EXACT)
    for one, other in zip(torch.autograd.grad(both, gates), torch.autograd.grad(alone, gates), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-10)


@torch.no_grad()
def test_beam_search_reorders_memories():
    """Each beam's score must be that of its own text, read in one piece."""
    model, ids = adapted(), tokens(2, 5)
    found = model.generate(
        ids, num_beams=3, num_return_sequences=3, max_new_tokens=9, do_sample=False, length_penalty=0.0,
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    steps = found.beam_indices[:, :9]
    assert any(len(set(column.tolist())) < 6 for column in steps.T), "no beam was ever dropped"
    logits = model(found.sequences[:, :-1], use_cache=False).logits.log_softmax(-1)[:, 4:]
    scores = logits.gather(-1, found.sequences[:, 5:, None]).squeeze(-1).sum(1)
    torch.testing.assert_close(found.sequences_scores.double(), scores, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_rows_of_a_cache_are_selected_and_repeated():
    model, ids, more = adapted(), tokens(3, 7), tokens(4, 4, seed=5)
    chosen = torch.tensor([2, 0, 0, 1])
    want = model(torch.cat([ids[chosen], more], 1), use_cache=False).logits[:, 7:]
    cache = model(ids, use_cache=True).past_key_values
    cache.batch_select_indices(chosen)
    torch.testing.assert_close(model(more, past_key_values=cache).logits, want, **EXACT)
    cache = model(ids[:2], use_cache=True).past_key_values
    cache.batch_repeat_interleave(2)
    want = model(torch.cat([ids[:2].repeat_interleave(2, 0), more], 1), use_cache=False).logits[:, 7:]
    torch.testing.assert_close(model(more, past_key_values=cache).logits, want, **EXACT)


@torch.no_grad()
def test_a_copied_cache_goes_on_by_itself_and_a_reset_one_starts_afresh():
    model, prompt = adapted(), tokens(1, 7)
    cache = model(prompt, use_cache=True).past_key_values
    for seed in (1, 2):
        more = tokens(1, 6, seed)
        want = model(torch.cat([prompt, more], 1), use_cache=False).logits[:, 7:]
        torch.testing.assert_close(model(more, past_key_values=copy.deepcopy(cache)).logits, want, **EXACT)
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    stored = torch.load(file, weights_only=False)
    torch.testing.assert_close(model(more, past_key_values=stored).logits, want, **EXACT)
    cache.reset()
    torch.testing.assert_close(model(more, past_key_values=cache).logits, model(more).logits, **EXACT)


@torch.no_grad()
def test_the_state_is_freed_with_its_cache():
    model = adapted()
    cache = model(tokens(1, 9), use_cache=True).past_key_values
    states = [weakref.ref(state) for state in cache.cms_context.states.values()]
    assert len(states) == 2 and all(state() is not None for state in states)
    del cache
    gc.collect()
    assert all(state() is None for state in states)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
@torch.no_grad()
def test_tokens_taken_back_were_never_written(name):
    model, ids, more = adapted(name), tokens(1, 9), tokens(1, 5, seed=8)
    for taken in (1, 3, 5):
        cache = transformers.DynamicCache(config=model.config)
        cache.activate_past_recording()
        model(ids[:, :4], past_key_values=cache)
        for part in ids[:, 4:].split([2, 3], 1):
            model(part, past_key_values=cache)
        cache.crop(-taken)
        want = model(torch.cat([ids[:, : 9 - taken], more], 1), use_cache=False).logits[:, 9 - taken :]
        torch.testing.assert_close(model(more, past_key_values=cache).logits, want, **EXACT)


def bytes_of(states):
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for state in states for t in state._tensors()}
    return sum(sizes.values())


@pytest.mark.parametrize("size", [1, 16, 512])
@torch.no_grad()
def test_what_can_be_taken_back_is_little_beside_the_state_itself(size):
    model, ids = adapted(levels=(size,)), tokens(1, 230)
    cache, largest = model(ids[:, :100], use_cache=True).past_key_values, 0
    for i in range(100, 230):
        model(ids[:, i : i + 1], past_key_values=cache)
        context = cache.cms_context
        for name, steps in context.steps.items():
            held = [step.state for step in steps if step.holds]
            assert len(held) <= 3 and 64 <= sum(step.length for step in steps) < 200
            largest = max(largest, bytes_of([context.states[name]]))
            assert bytes_of([context.states[name], *held]) <= 4 * largest


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_tokens_are_taken_back_over_many_calls(padded):
    model, ids, more = adapted(levels=(3, 6)), tokens(2, 190), tokens(2, 4, seed=8)
    if padded:
        ids[1, :150] = 0
    mask = (ids != 0).long()
    for taken in (1, 5, 63, 64):
        cache = transformers.DynamicCache(config=model.config)
        cache.activate_past_recording()
        for part, stop in zip(ids.split([70] + [1] * 115 + [5], 1), (70, *range(71, 186), 190), strict=True):
            model(part, attention_mask=mask[:, :stop], past_key_values=cache)
        for back in (taken - taken // 2, taken // 2):  # twice in a row
            cache.crop(-back)
        text = torch.cat([ids[:, : 190 - taken], more], 1)
        call = {"attention_mask": (text != 0).long()}
        want = model(text, use_cache=False, **call).logits[:, 190 - taken :]
        torch.testing.assert_close(model(more, past_key_values=cache, **call).logits, want, **EXACT)


@torch.no_grad()
def test_a_cache_keeps_no_model_alive():
    model = adapted()
    cache = model(tokens(1, 9), use_cache=True).past_key_values
    weights = weakref.ref(model.model.layers[0].mlp.gate_proj.weight)
    del model
    gc.collect()
    assert weights() is None
    with pytest.raises(ValueError, match=r"crop: the model whose memory .* is gone"):
        cache.crop(-2)


@torch.no_grad()
def test_assisted_generation_writes_what_plain_generation_writes():
    model, ids = adapted(levels=(2, 4)), tokens(1, 5)
    settings = {"max_new_tokens": 20, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    plain = model.generate(ids, **settings)
    assistant = make("llama", torch.float64)
    assert torch.equal(model.generate(ids, assistant_model=assistant, **settings), plain)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **settings), plain)


@torch.no_grad()
def test_more_than_what_can_be_taken_back_is_refused_and_nothing_changed():
    model, ids = adapted(levels=(16, 32)), tokens(1, 120)
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="crop: got 65 tokens"):
        cache.crop(-65)
    assert cache.get_seq_length() == 120
    more = tokens(1, 6, seed=2)
    want = model(torch.cat([ids, more], 1), use_cache=False).logits[:, 120:]
    torch.testing.assert_close(model(more, past_key_values=cache).logits, want, **EXACT)


@torch.no_grad()
def test_tokens_that_passed_while_the_scale_was_zero_are_not_taken_back_from_the_state():
    model, ids = adapted(), tokens(1, 12)
    cache = model(ids[:, :5], use_cache=True).past_key_values
    switched = {module: module.cms.scale.clone() for _, module in memories(model)}
    for module in switched:
        module.cms.scale.zero_()
    model(ids[:, 5:9], past_key_values=cache)
    for module, scale in switched.items():
        module.cms.scale.copy_(scale)
    with pytest.raises(ValueError, match="crop: got 3 tokens"):
        cache.crop(-3)
    assert cache.get_seq_length() == 9
    model(ids[:, 9:], past_key_values=cache)
    cache.crop(-2)
    assert [state.position for state in cache.cms_context.states.values()] == [6, 6]


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt2"])
@torch.no_grad()
def test_a_static_cache_generates_what_a_dynamic_one_does(name):
    model = adapted(name)
    ids = tokens(2, 9)
    ids[1, :4] = 0
    settings = {"max_new_tokens": 12, "do_sample": False, "attention_mask": (ids != 0).long()}
    dynamic = model.generate(ids, **settings)
    assert torch.equal(model.generate(ids, cache_implementation="static", disable_compile=True, **settings), dynamic)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_a_mask_as_long_as_a_static_cache_says_what_a_short_one_says(name):
    model, ids = adapted(name), tokens(2, 9)
    ids[1, :3] = 0
    want = model(ids, attention_mask=(ids != 0).long(), use_cache=False).logits
    whole = torch.nn.functional.pad((ids != 0).long(), (0, 7))
    cache, found = transformers.StaticCache(config=model.config, max_cache_len=16), []
    for start, stop in ((0, 5), (5, 6), (6, 9)):
        mask = whole.clone()
        mask[:, stop:] = 0
        found.append(model(ids[:, start:stop], attention_mask=mask, past_key_values=cache).logits)
    assert [state.position for state in cache.cms_context.states.values()] == [(9, 6)] * 2
    torch.testing.assert_close(torch.cat(found, 1)[0], want[0], **EXACT)
    torch.testing.assert_close(torch.cat(found, 1)[1, 3:], want[1, 3:], **EXACT)


@torch.no_grad()
def test_a_mask_of_the_new_tokens_alone_is_refused():
    model, ids = adapted(), tokens(1, 9)
    cache = model(ids[:, :5], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="attention_mask: covers 4 tokens of 9, 5 in the cache and 4 new"):
        model(ids[:, 5:], attention_mask=torch.ones(1, 4), past_key_values=cache)


@torch.no_grad()
def test_two_caches_and_two_models_do_not_see_each_other():
    one, two = adapted(), adapted("gpt2")
    ids = tokens(1, 8)
    caches = [model(ids[:, :3], use_cache=True).past_key_values for model in (one, two, one)]
    parts = [
        model(ids[:, 3:], past_key_values=cache).logits for model, cache in zip((one, two, one), caches, strict=True)
    ]
    assert torch.equal(parts[0], parts[2])
    for model, part in ((one, parts[0]), (two, parts[1])):
        torch.testing.assert_close(part, model(ids, use_cache=False).logits[:, 3:], **EXACT)


@torch.no_grad()
def test_a_mask_with_gaps_and_packed_rows_are_refused():
    model, ids = adapted(), tokens(1, 6)
    mask = torch.tensor([[1, 1, 0, 1, 1, 1]])
    with pytest.raises(ValueError, match="attention_mask: has gaps"):
        model(ids, attention_mask=mask)
    with pytest.raises(ValueError, match="packed into one row"):
        model(ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]), use_cache=False)
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    blocks = torch.block_diag(torch.ones(2, 2), torch.ones(4, 4)).bool() & causal
    for kind in (lambda m: m[None, None], lambda m: torch.where(m, 0.0, -1e30).double()[None, None]):
        with pytest.raises(ValueError, match="attention_mask: several sequences are packed into one row of 6"):
            model(ids, attention_mask=kind(blocks))
        torch.testing.assert_close(model(ids, attention_mask=kind(causal)).logits, model(ids).logits, **EXACT)


@torch.no_grad()
def test_a_mask_that_hides_what_memories_were_given_is_refused():
    """As in a second turn after one row's answer ended early: its padding was given as text."""
    model, ids, more = adapted(), tokens(2, 6), tokens(2, 3, seed=7)
    answer = model.generate(ids, max_new_tokens=5, do_sample=False)
    end = next(int(t) for t in answer[0, 6:9] if t not in answer[1])
    first = model.generate(
        ids, max_new_tokens=5, do_sample=False, eos_token_id=end, pad_token_id=0, return_dict_in_generate=True
    )
    text, cache = torch.cat([first.sequences, more], 1), first.past_key_values
    assert (text == 0).any()
    seen = cache.get_seq_length()
    with pytest.raises(ValueError, match=r"attention_mask: has \d+ real tokens before this call in row 0"):
        model(text[:, seen:], attention_mask=(text != 0).long(), past_key_values=copy.deepcopy(cache))
    # The mask it was given with: as one call over the whole text, padding included.
    found = model(text[:, seen:], attention_mask=torch.ones_like(text), past_key_values=cache).logits
    torch.testing.assert_close(found, model(text, use_cache=False).logits[:, seen:], **EXACT)


@torch.no_grad()
def test_memories_begin_with_the_first_token_after_they_were_put_in_or_switched_on():
    ids = tokens(1, 10)
    for late in ("added", "switched on"):
        model = make(dtype=torch.float64)
        if late == "switched on":
            add_cms(model, levels=[2, 4])
        cache = model(ids[:, :5], use_cache=True).past_key_values
        first = copy.deepcopy(cache)
        switch_on(model if late == "switched on" else add_cms(model, levels=[2, 4]))
        whole = model(ids[:, 5:], past_key_values=cache).logits
        assert [state.position for state in cache.cms_context.states.values()] == [5, 5]
        parts = [model(part, past_key_values=first).logits for part in ids[:, 5:].split([2, 1, 2], 1)]
        torch.testing.assert_close(torch.cat(parts, 1), whole, **EXACT)
        plain = remove_cms(copy.deepcopy(model))(ids, use_cache=False).logits[:, 5:]
        torch.testing.assert_close(whole[:, :2], plain[:, :2], **EXACT)
        assert (whole[:, 2:] - plain[:, 2:]).abs().amax(-1).min() > 1e-4
