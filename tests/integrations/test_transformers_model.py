"""The Hope model in transformers' hands: the same numbers as without it, whatever the library asks it to do.

The oracle is the model itself, called without the library on each row alone.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from hope_kernels import CMSLevel
from hope_kernels.models import HopeConfig, HopeForCausalLM
from hope_kernels.models.config import PRESETS
from tests.integrations.hope_support import (
    TIGHT,
    HopeCache,
    TransformersHopeConfig,
    TransformersHopeForCausalLM,
    TransformersHopeModel,
    gradients,
    make,
    make_writer,
    padded,
    rows_of,
    transformers,
    varied,
)
from tests.models.common import ABLATIONS, MIXERS, VOCABULARY, config_of, ids_of

GREEDY = {"do_sample": False, "max_new_tokens": 8}


# ------------------------------------------------------------------------------------------------ config and files


CONFIGS = [*map(config_of, MIXERS), *(config_of("titans", **changes) for changes in ABLATIONS.values())]


@pytest.mark.parametrize("config", [*CONFIGS, *PRESETS.values()], ids=lambda c: f"{c.mixer} {c.dim}")
def test_a_config_carries_every_field_there_and_back(config, tmp_path):
    found = TransformersHopeConfig.from_hope(config, eos_token_id=2)
    assert found.to_hope() == config and found.eos_token_id == 2 and found.model_type == "hope"
    found.save_pretrained(tmp_path)
    again = transformers.AutoConfig.from_pretrained(tmp_path)
    assert isinstance(again, TransformersHopeConfig) and again.to_hope() == config and again.eos_token_id == 2
    # The library's names for the same.
    names = (again.hidden_size, again.num_hidden_layers, again.num_attention_heads, again.tie_word_embeddings)
    assert names == (config.dim, config.depth, config.heads, config.tie_embeddings)


def test_a_config_has_the_same_defaults_and_takes_either_name_and_levels_of_either_kind():
    assert TransformersHopeConfig().to_hope() == HopeConfig()
    levels = (CMSLevel(4, lr_max=0.2), CMSLevel(None))
    found = TransformersHopeConfig(hidden_size=64, tie_word_embeddings=False, levels=levels)
    assert found.to_hope() == HopeConfig(dim=64, tie_embeddings=False, levels=levels)
    assert found.levels == [dataclasses.asdict(level) for level in levels]
    with pytest.raises(ValueError, match="dim is 7 and heads is 4; want dim divisible by heads"):
        TransformersHopeConfig(hidden_size=7)
    with pytest.raises(ValueError, match=r"CMSLevel: got unknown names \['chunk'\]"):
        TransformersHopeConfig(levels=[{"chunk": 3}])
    with pytest.raises(TypeError, match="levels is 3"):
        TransformersHopeConfig(levels=3)
    with pytest.raises(ValueError, match=r"initializer_range: got 0\.02; it follows from dim"):
        TransformersHopeConfig(initializer_range=0.02)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("mixer", ["titans", "transformer"])
def test_checkpoints_of_either_kind_are_read_by_the_library_under_the_same_names(mixer, tied, tmp_path):
    model, hope = make(mixer, tie_embeddings=tied)
    assert [*model.state_dict()] == [*hope.state_dict()]
    model.save_pretrained(tmp_path / "library")
    hope.save_pretrained(tmp_path / "own")
    assert {p.name for p in (tmp_path / "library").iterdir()} >= {"config.json", "model.safetensors"}
    for folder in (tmp_path / "library", tmp_path / "own"):
        again, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert type(again) is TransformersHopeForCausalLM and not again.training
        assert not any(report.values()), report
        assert again.config.to_hope() == hope.config
        for (name, ours), (other, theirs) in zip(hope.named_parameters(), again.named_parameters(), strict=True):
            assert name == other and ours.dtype == theirs.dtype and torch.equal(ours, theirs)
        bare, report = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
        assert type(bare) is TransformersHopeModel and not any(report.values()), report
        ids = ids_of(2, 7)
        torch.testing.assert_close(bare(ids).last_hidden_state, hope.model(ids), **TIGHT)
    with pytest.raises(ValueError, match=r"written by transformers; want .*from_pretrained\(folder\).to_hope\(\)"):
        HopeForCausalLM.from_pretrained(tmp_path / "library")
    # And back: what the library stored becomes the very file that the model would have written itself.
    again.to_hope().save_pretrained(tmp_path / "back")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "own" / name).read_bytes()


def test_loading_takes_a_dtype_and_a_backend(tmp_path):
    model, hope = make()
    model.save_pretrained(tmp_path)
    auto = transformers.AutoModelForCausalLM
    low = auto.from_pretrained(tmp_path, dtype=torch.bfloat16, backend="reference")
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16} and low.dtype == torch.bfloat16
    assert low.model.blocks[0].mixer.backend == "reference"
    for ours, theirs in zip(hope.parameters(), low.parameters(), strict=True):
        assert torch.equal(ours.bfloat16(), theirs)
    assert {p.dtype for p in auto.from_config(model.config, dtype=torch.float32).parameters()} == {torch.float32}
    with pytest.raises(ValueError, match="backend"):
        auto.from_pretrained(tmp_path, backend="abacus")
    pytest.importorskip("accelerate", reason="accelerate is not installed (hope_kernels[integrations])")
    parts = {"model.embedding": "cpu", "model.blocks.0": "cpu", "model.blocks.1": "disk", "model.norm": "cpu"}
    with pytest.raises(ValueError, match=r"device_map: the model would lie on \['cpu', 'disk'\]; want one device"):
        auto.from_pretrained(tmp_path, device_map=parts, offload_folder=str(tmp_path / "disk"))
    one = auto.from_pretrained(tmp_path, device_map="cpu")
    assert torch.equal(one(ids_of(1, 4)).logits, model(ids_of(1, 4)).logits)


def test_parameters_that_a_checkpoint_lacks_begin_as_in_a_fresh_model(tmp_path):
    model, hope = make(tie_embeddings=False, vocab_size=400)
    torch.manual_seed(5)
    weights = {name: p.detach() for name, p in hope.named_parameters()}
    lacking = ("head.weight", "model.blocks.1.mixer.projections.readouts.lr.bias", "model.norm.weight")
    kept = {name: p for name, p in weights.items() if name not in lacking}
    model.save_pretrained(tmp_path, state_dict=kept)
    again, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert report["missing_keys"] == set(lacking)
    found = dict(again.named_parameters())
    fresh = dict(HopeForCausalLM(hope.config, dtype=torch.float64).named_parameters())
    for name, value in found.items():
        if name not in lacking:
            assert torch.equal(value, weights[name]), name
        elif name != "head.weight":
            assert torch.equal(value, fresh[name]), name
    assert 0.9 < found["head.weight"].std() / fresh["head.weight"].std() < 1.1


def test_both_forms_share_their_parameters():
    model, hope = make(tie_embeddings=False)
    again = model.to_hope()
    ours = [p.data_ptr() for p in hope.parameters()]
    assert ours == [p.data_ptr() for p in model.parameters()] == [p.data_ptr() for p in again.parameters()]
    assert torch.equal(again(ids_of(2, 6)).logits, hope(ids_of(2, 6)).logits)
    assert not again.training and TransformersHopeForCausalLM.from_hope(hope.train()).training


# ------------------------------------------------------------------------------------------------ forward and loss


@pytest.mark.parametrize("mixer", MIXERS)
def test_logits_loss_and_gradients_are_the_models_own(mixer):
    model, hope = make(mixer)
    ids = ids_of(3, 10)
    labels = ids.clone()
    labels[0, :4] = labels[2] = -100
    want = hope(ids[:, :-1], labels[:, 1:]).loss  # shifted by the caller
    found = model(ids, labels=labels)
    torch.testing.assert_close(found.logits, hope(ids).logits, rtol=0, atol=0)
    # The library computes the loss in float32.
    torch.testing.assert_close(found.loss.double(), want, rtol=1e-6, atol=1e-6)
    expected = gradients(hope, want)
    for name, gradient in gradients(model, found.loss).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    counted = model(ids, labels=labels, num_items_in_batch=torch.tensor(40)).loss
    torch.testing.assert_close(counted.double(), want * (labels[:, 1:] != -100).sum() / 40, rtol=1e-6, atol=1e-6)


def test_outputs_come_in_the_librarys_forms():
    model, hope = make()
    ids = ids_of(2, 7)
    whole = model(ids, labels=ids, output_hidden_states=True)
    assert isinstance(whole, transformers.modeling_outputs.CausalLMOutputWithPast)
    loss, logits, cache, layers = model(ids, labels=ids, output_hidden_states=True, return_dict=False)
    assert torch.equal(loss, whole.loss) and torch.equal(logits, whole.logits) and isinstance(cache, HopeCache)
    assert len(layers) == hope.config.depth + 1
    torch.testing.assert_close(layers[0], hope.model.embed(ids))
    torch.testing.assert_close(layers[1], hope.model.blocks[0](layers[0]), **TIGHT)
    torch.testing.assert_close(layers[-1], hope.model(ids), **TIGHT)
    assert len(model(ids, use_cache=False, return_dict=False)) == 1
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, whole.logits[:, -2:], **TIGHT)
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([1, 4])).logits, whole.logits[:, [1, 4]], **TIGHT)
    embedded = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embedded).logits, whole.logits, rtol=0, atol=0)
    bare = TransformersHopeModel(model.config)
    bare.model = model.model
    assert torch.equal(bare.eval()(ids, return_dict=False)[0], hope.model(ids))
    # Training needs no cache, and gets one where it asks.
    assert model.train()(ids).past_key_values is None and model(ids, use_cache=True).past_key_values is not None


def test_arguments_that_do_not_fit_are_named():
    model, _ = make("attention")
    ids = ids_of(2, 4)
    with pytest.raises(ValueError, match="input_ids, inputs_embeds: got neither; want one of them"):
        model()
    with pytest.raises(ValueError, match="input_ids, inputs_embeds: got both"):
        model(ids, inputs_embeds=torch.zeros(2, 4, 8))
    with pytest.raises(ValueError, match=r"inputs_embeds: got \(2, 4, 9\); want \[B, T, 8\]"):
        model(inputs_embeds=torch.zeros(2, 4, 9))
    with pytest.raises(ValueError, match="output_attentions: got True"):
        model(ids, output_attentions=True)
    with pytest.raises(TypeError, match="past_key_values: got a DynamicCache; want a HopeCache"):
        model(ids, past_key_values=transformers.DynamicCache())
    for mask, came in ((torch.ones(2, 5), r"\(2, 5\)"), (torch.ones(2, 1, 4, 4), r"\(2, 1, 4, 4\)"), ([1], "list")):
        with pytest.raises(ValueError, match=rf"attention_mask: got {came}; want \(2, 4\)"):
            model(ids, attention_mask=mask)
    with pytest.raises(ValueError, match="attention_mask: has gaps"):
        model(ids, attention_mask=torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]]))
    with pytest.raises(ValueError, match="position_ids: several sequences are packed into one row of 4 tokens"):
        model(ids, position_ids=torch.tensor([[0, 1, 0, 1]]))
    with pytest.raises(ValueError, match="position_ids: several sequences are packed"):
        model(ids, cu_seq_lens_q=torch.tensor([0, 2, 4]))
    rows = torch.tensor([[0, 1, 2, 3], [0, 1, 0, 1]])
    for told in ({"attention_mask": torch.ones(2, 4)}, {"past_key_values": HopeCache()}, {}):
        for positions in (rows, rows[1]):
            with pytest.raises(ValueError, match="position_ids: several sequences are packed into one row of 4"):
                model(ids, position_ids=positions, **told)
        for seq_idx in (rows // 2, torch.tensor([0, 0, 1, 1])):
            with pytest.raises(ValueError, match="seq_idx: several sequences are packed into one row of 4 tokens"):
                model(ids, seq_idx=seq_idx, **told)
    # One sequence per row: what stands at its padding is no other sequence's.
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    model(ids, attention_mask=mask, position_ids=torch.tensor([[1, 1, 0, 1], [5, 6, 7, 0]]), seq_idx=1 - mask)
    with pytest.raises(ValueError, match="input_ids has ids from 11 to 11; want 0 to 10"):
        model(torch.full((1, 2), 11))


# ------------------------------------------------------------------------------------------------ padding


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_padding_is_neither_counted_nor_written(mixer, side):
    model, hope = make(mixer)
    rows = rows_of(9, 4, 1, 9)
    ids, mask = padded(rows, side)
    other = torch.where(mask == 0, 7, ids)
    alone = [hope(row[None]).logits[0] for row in rows]
    for use_cache in (False, True):
        found = model(ids, attention_mask=mask, use_cache=use_cache, output_hidden_states=True)
        for row, want in enumerate(alone):
            torch.testing.assert_close(found.logits[row][mask[row] == 1], want, **TIGHT)
        for tensor in (found.logits, *found.hidden_states):
            assert not tensor[mask == 0].any()
        assert torch.equal(model(other, attention_mask=mask, use_cache=use_cache).logits, found.logits)
    labels = ids.masked_fill(mask == 0, -100)
    expected = gradients(
        hope, sum(F.cross_entropy(x[:-1], row[1:], reduction="sum") for x, row in zip(alone, rows, strict=True)) / 19
    )
    for use_cache in (False, True):
        loss = model(ids, attention_mask=mask, labels=labels, use_cache=use_cache, num_items_in_batch=19).loss
        for name, gradient in gradients(model, loss).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_row_of_padding_alone_and_under_autocast():
    model, hope = make()
    ids, mask = ids_of(2, 5), torch.ones(2, 5, dtype=torch.long)
    mask[1] = 0
    for use_cache in (False, True):
        found = model(ids, attention_mask=mask, use_cache=use_cache)
        torch.testing.assert_close(found.logits[0], hope(ids[:1]).logits[0], **TIGHT)
        assert not found.logits[1].any() and not model(ids, attention_mask=0 * mask, use_cache=use_cache).logits.any()
    cache = found.past_key_values
    assert cache.positions() == [5, 0]
    torch.testing.assert_close(model(ids, past_key_values=cache).logits[1], hope(ids[1:]).logits[0], **TIGHT)
    model.float()
    ids, mask = padded(rows_of(7, 3), "left")
    with torch.autocast("cpu", torch.bfloat16):
        want = model(ids[1:, 4:]).logits
        for use_cache in (False, True):
            found = model(ids, attention_mask=mask, use_cache=use_cache).logits[1:, 4:]
            assert found.dtype == torch.bfloat16 and torch.equal(found, want)


# ------------------------------------------------------------------------------------------------ generate


@pytest.mark.parametrize("mixer", MIXERS)
def test_greedy_and_drawn_tokens_are_those_of_the_models_own_generate(mixer):
    model, hope = make_writer(mixer)
    ids = ids_of(2, 5)
    want = hope.generate(ids, 8, temperature=0)
    varied(want[:, 5:])
    for use_cache in (True, False):
        assert torch.equal(model.generate(ids, **GREEDY, use_cache=use_cache), want)
    torch.manual_seed(3)
    want = hope.generate(ids, 12, temperature=0.8, top_k=9, top_p=0.9)
    torch.manual_seed(3)
    drawn = model.generate(ids, max_new_tokens=12, do_sample=True, temperature=0.8, top_k=9, top_p=0.9)
    assert torch.equal(drawn, want)


@pytest.mark.parametrize("mixer", ["titans", "attention"])
def test_generate_from_padded_prompts_equals_each_prompt_alone(mixer):
    model, hope = make_writer(mixer)
    rows = rows_of(7, 2, 7)
    ids, mask = padded(rows, "left")
    wanted = [hope.generate(prompt[None], 5, temperature=0)[0, len(prompt) :] for prompt in rows]
    varied(torch.cat(wanted))
    unmasked = model.generate(ids, do_sample=False, max_new_tokens=5)[1, 7:]
    assert not torch.equal(unmasked, wanted[1]), "padding that is read shows"
    for options in ({}, {"prefill_chunk_size": 3}, {"use_cache": False}):
        found = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=5, **options)
        for row, want in enumerate(wanted):
            assert torch.equal(found[row, 7:], want), options


@pytest.mark.parametrize("mixer", ["titans", "neural_memory", "attention"])
def test_beams_are_those_of_a_search_without_a_cache(mixer):
    model, _ = make_writer(mixer)
    ids, mask = padded(rows_of(6, 3), "left")
    options = GREEDY | {"num_beams": 3, "num_return_sequences": 2, "attention_mask": mask, "return_dict_in_generate": 1}
    found = model.generate(ids, **options, output_scores=True)
    want = model.generate(ids, **options, output_scores=True, use_cache=False)
    assert torch.equal(found.sequences, want.sequences) and found.past_key_values.batch_size == 6
    torch.testing.assert_close(found.sequences_scores, want.sequences_scores, rtol=1e-5, atol=1e-6)
    assert len({tuple(row) for row in found.sequences.tolist()}) == 4


def test_assisted_generation_takes_rejected_tokens_back(monkeypatch):
    model, hope = make_writer()
    helper, _ = make_writer("neural_memory")
    helper.generation_config.update(num_assistant_tokens=4, assistant_confidence_threshold=0.0)
    taken_back, crop = {}, HopeCache.crop

    def watched(cache, count):
        taken_back[id(cache)] = taken_back.get(id(cache), 0) - count
        crop(cache, count)

    monkeypatch.setattr(HopeCache, "crop", watched)
    ids = ids_of(1, 6)
    want = hope.generate(ids, 20, temperature=0)
    varied(want[:, 6:])
    options = {"do_sample": False, "max_new_tokens": 20}
    assert torch.equal(model.generate(ids, **options, prompt_lookup_num_tokens=3), want)
    assert len(taken_back) == 1 and min(taken_back.values()) > 0
    taken_back.clear()
    assert torch.equal(model.generate(ids, **options, assistant_model=helper), want)
    assert len(taken_back) == 2 and min(taken_back.values()) > 0, "both caches took guesses back"


def test_a_second_turn_goes_on_with_the_cache_of_the_first():
    model, hope = make_writer()
    ids = ids_of(2, 5)
    first = model.generate(ids, **GREEDY, return_dict_in_generate=True)
    more = ids_of(2, 3, seed=4)
    text = torch.cat([first.sequences, more], 1)
    want = hope.generate(text, 8, temperature=0)
    alone = hope.generate(more, 8, temperature=0)[:, 3:]
    assert not torch.equal(varied(want[:, 16:]), alone), "the first turn shows in the second"
    found = model.generate(text, **GREEDY, past_key_values=first.past_key_values)
    assert torch.equal(found, want)


def test_a_cache_that_holds_all_of_the_prompt_is_refused():
    model, _ = make()
    ids = ids_of(2, 5)
    cache = model(ids, use_cache=True).past_key_values
    for length in (5, 3):
        match = f"past_key_values: holds 5 tokens, and input_ids has {length}; want the whole text, with at least one"
        with pytest.raises(ValueError, match=match):
            model.generate(ids[:, :length], **GREEDY, past_key_values=cache)
    assert cache.get_seq_length() == 5


def test_a_prompt_without_a_token_is_refused():
    model, _ = make()
    nothing = torch.zeros(2, 0, dtype=torch.long)
    for options in ({"inputs": nothing}, {"inputs": nothing, "attention_mask": nothing}):
        with pytest.raises(ValueError, match="input_ids: got a prompt without a token; want at least one"):
            model.generate(**options, **GREEDY)


def test_prompts_padded_on_the_right_are_refused():
    model, _ = make()
    ids, mask = padded(rows_of(6, 3), "right")
    for use_cache in (True, False):
        with pytest.raises(ValueError, match="generate wants prompts padded on the left"):
            model.generate(ids, attention_mask=mask, **GREEDY, use_cache=use_cache)


def test_a_cache_records_no_longer_than_the_assisted_call():
    model, hope = make_writer()
    ids = ids_of(1, 6)
    first = model.generate(ids, **GREEDY, prompt_lookup_num_tokens=3, return_dict_in_generate=True)
    cache = first.past_key_values
    assert cache.is_croppable
    found = model.generate(F.pad(first.sequences, (0, 1), value=4), **GREEDY, past_key_values=cache)
    assert torch.equal(found, hope.generate(found[:, :15], 8, temperature=0))
    assert not cache.is_croppable and not any(group.since or group.base for group in cache._groups)


def test_the_id_of_padding_may_be_a_token_of_the_prompt():
    model, hope = make_writer()
    helper, _ = make_writer("neural_memory")
    options = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 3}
    for prompt in ([1, 3, 5, 2], [3, 1, 5, 3]):
        ids = torch.tensor([prompt])
        want = hope.generate(ids, 6, temperature=0)
        for more in ({}, {"prompt_lookup_num_tokens": 2}, {"assistant_model": helper}):
            assert torch.equal(model.generate(ids, attention_mask=torch.ones_like(ids), **options, **more), want)
    # Untold, padding is what stands at the ends.
    ids = torch.tensor([[3, 3, 1, 3, 5]])
    want = hope.generate(ids[:, 2:], 6, temperature=0)
    assert torch.equal(model.generate(ids, **options)[:, 2:], want)
    with pytest.raises(ValueError, match="generate wants prompts padded on the left"):
        model.generate(torch.tensor([[1, 5, 3]]), **options)


def test_sequences_end_and_embeddings_may_be_the_prompt():
    model, hope = make("attention")
    ids = ids_of(3, 4)
    free = hope.generate(ids, 10, temperature=0)[:, 4:]
    end = int(free[0, 2])
    found = model.generate(ids, do_sample=False, max_new_tokens=10, eos_token_id=end, pad_token_id=end)[:, 4:]
    assert torch.equal(found, hope.generate(ids, 10, temperature=0, eos_token_id=end)[:, 4:])
    embedded = model.get_input_embeddings()(ids)
    assert torch.equal(model.generate(inputs_embeds=embedded, do_sample=False, max_new_tokens=10), free)


def test_generation_that_a_hope_model_cannot_do_is_refused():
    model, _ = make("attention")
    for kind in ("static", "quantized", "offloaded"):
        with pytest.raises(ValueError, match=f"cache_implementation: got '{kind}'"):
            model.generate(ids_of(1, 3), **GREEDY, cache_implementation=kind)
    with pytest.raises(ValueError, match="assistant_early_exit: got 1; a Hope model writes with all of its blocks"):
        model.generate(ids_of(1, 3), **GREEDY, assistant_early_exit=1)
    with pytest.raises(NotImplementedError, match="packs all sequences into one row"):
        model.generate(ids_of(1, 3), **GREEDY, cache_implementation="paged")


# ------------------------------------------------------------------------------------------------ training


def enable_checkpointing(model: transformers.PreTrainedModel, **options) -> None:
    """By the name it has in this version of the library."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(**options)


def test_gradient_checkpointing_is_the_models_own_and_changes_no_gradient():
    model, hope = make()
    model.train()
    ids = ids_of(2, 9)
    want = gradients(model, model(ids, labels=ids).loss)
    enable_checkpointing(model)
    assert hope.activation_checkpointing and model.gradient_checkpointing
    calls = []
    hope.model.blocks[0].mixer.register_forward_hook(lambda *_: calls.append(1))
    for name, gradient in gradients(model, model(ids, labels=ids).loss).items():
        torch.testing.assert_close(gradient, want[name], **TIGHT, msg=name)
    assert len(calls) == 2, "a block runs again in the backward"
    model.gradient_checkpointing_disable()
    assert not hope.activation_checkpointing
    for options in ({"use_reentrant": True}, {"use_reentrant": False, "preserve_rng_state": False}):
        with pytest.raises(ValueError, match="want use_reentrant=False"):
            model.gradient_checkpointing_enable(options)
    assert not hope.activation_checkpointing


def test_trainer_trains_stores_and_the_trained_model_generates_as_its_own_does(tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed (hope_kernels[integrations])")
    torch.manual_seed(0)
    config = TransformersHopeConfig.from_hope(config_of("titans", dim=16, depth=1), eos_token_id=10, pad_token_id=10)
    model = TransformersHopeForCausalLM(config)
    text = torch.arange(8).repeat(4)
    rows = [{"input_ids": text[i : i + 9 + i % 3], "labels": text[i : i + 9 + i % 3]} for i in range(16)]
    seen = []

    def collate(rows):
        ids, mask = padded([row["input_ids"] for row in rows], "right")
        seen.append(int(mask.sum()))
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}

    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=16, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}, learning_rate=0.02,
        use_cpu=True, report_to=[], save_strategy="steps", save_steps=8, logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=rows, eval_dataset=rows, data_collator=collate
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 16 and losses[-1] < losses[0] / 2, losses
    assert len(set(seen)) > 1, "batches of different numbers of labels, which num_items_in_batch evens out"
    # What Trainer logs at the end is what the model says of the same rows.
    ids, mask = padded([row["input_ids"] for row in rows], "right")
    model = model.eval()
    with torch.no_grad():
        want = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
    assert abs(trainer.evaluate()["eval_loss"] - float(want)) < 0.02
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-16")
    assert again.config.eos_token_id == 10
    prompt = text[None, :6]
    written = again.generate(prompt, do_sample=False, max_new_tokens=12)
    assert torch.equal(written, model.to_hope().generate(prompt, 12, temperature=0, eos_token_id=10))
    assert torch.equal(written[0], torch.arange(18) % 8), "what it was trained on"


def test_a_vocabulary_grows_and_shrinks():
    for tied in (True, False):
        model, hope = make("attention", tie_embeddings=tied)
        before = hope(ids_of(1, 5)).logits
        model.resize_token_embeddings(VOCABULARY + 4, mean_resizing=False)
        assert model.config.vocab_size == VOCABULARY + 4 and model.to_hope().config.vocab_size == VOCABULARY + 4
        ids = torch.tensor([[1, VOCABULARY + 3, 2]])
        found = model(ids, labels=ids)
        assert found.logits.shape[-1] == VOCABULARY + 4 and found.loss.isfinite()
        torch.testing.assert_close(model(ids_of(1, 5)).logits[..., :VOCABULARY], before, **TIGHT)
        assert torch.equal(model.to_hope()(ids).logits, found.logits)
        model.resize_token_embeddings(5)
        with pytest.raises(ValueError, match="ids from 5 to 5; want 0 to 4"):
            model(torch.tensor([[5]]))
    # Unit entries, as those of a fresh model, before the blocks.
    wide = TransformersHopeForCausalLM(TransformersHopeConfig(vocab_size=8, dim=64, depth=1, heads=2))
    wide.resize_token_embeddings(2000, mean_resizing=False)
    assert 0.9 < wide.model.embed(torch.arange(8, 2000)[None]).square().mean().sqrt() < 1.1


def test_lora_adapts_it_and_the_merged_model_is_the_same():
    peft = pytest.importorskip("peft", reason="peft is not installed (hope_kernels[integrations])")
    model, hope = make("neural_memory")
    ids = ids_of(2, 9)
    before = hope(ids).logits
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["query", "key", "value"], init_lora_weights=False)
    )
    loss = adapted(input_ids=ids, labels=ids).loss
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert len(trained) == 12 and all(g.abs().max() > 0 for g in torch.autograd.grad(loss, trained))
    with torch.no_grad():
        want = adapted(input_ids=ids).logits
        written = adapted.generate(input_ids=ids, **GREEDY)
    assert (want - before).abs().max() > 1e-3
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, want, **TIGHT)
    assert torch.equal(merged.to_hope().generate(ids, 8, temperature=0), written)


def test_a_call_without_padding_is_one_graph():
    torch.compiler.reset()
    model, hope = make()
    ids = ids_of(2, 9)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for use_cache in (False, True):
        torch.testing.assert_close(compiled(ids, use_cache=use_cache).logits, hope(ids).logits, **TIGHT)
