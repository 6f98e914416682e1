"""The cache of a Hope model in transformers carries what the model would have, whatever is done to its rows.

The oracle is the model itself, called without the library on each row alone.
"""

from __future__ import annotations

import copy

import pytest
import torch

from tests.integrations.hope_support import TIGHT, HopeCache, gradients, make, padded, rows_of
from tests.models.common import MIXERS, VOCABULARY, ids_of


@pytest.mark.parametrize("mixer", MIXERS)
def test_prefill_and_decoding_equal_the_whole_call(mixer):
    model, hope = make(mixer)
    ids = ids_of(2, 14)
    whole = hope(ids).logits
    expected = gradients(hope, whole.square().mean())
    for lengths in ([14], [5, 1, 8], [1] * 14):
        cache, logits = HopeCache(), []
        for part in ids.split(lengths, 1):
            output = model(part, past_key_values=cache, use_cache=True)
            assert output.past_key_values is cache
            logits.append(output.logits)
        assert cache.get_seq_length() == 14 and cache.positions() == [14, 14] and cache.batch_size == 2
        torch.testing.assert_close(torch.cat(logits, 1), whole, **TIGHT)
        for name, gradient in gradients(model, torch.cat(logits, 1).square().mean()).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-7, atol=1e-10, msg=name)
    cache.detach()
    assert not any(x.requires_grad for x in tensors_in(cache))


@torch.no_grad()
def test_no_rows_and_no_tokens_are_read_too():
    model, hope = make()
    for rows, length in ((0, 3), (2, 0), (0, 0)):
        output = model(ids_of(rows, length), attention_mask=torch.ones(rows, length))
        assert output.logits.shape == (rows, length, VOCABULARY)
        assert output.past_key_values.batch_size == rows and output.past_key_values.get_seq_length() == length
        more = model(ids_of(rows, 4), past_key_values=output.past_key_values).logits
        assert torch.equal(more, hope(ids_of(rows, 4)).logits) if length == 0 else more.shape[0] == 0
        assert model(ids_of(rows, length), use_cache=False).logits.shape == output.logits.shape


def tensors_in(cache: HopeCache) -> list[torch.Tensor]:
    states = [group.state.state_dict() for group in cache._groups]
    return [x for x in torch.utils._pytree.tree_leaves(states) if isinstance(x, torch.Tensor)]


@torch.no_grad()
@pytest.mark.parametrize("mixer", ["titans", "neural_memory", "windowed attention"])
def test_a_cache_does_not_grow_with_what_is_read(mixer):
    model, _ = make(mixer)
    cache, sizes = HopeCache(), set()
    for part in ids_of(2, 12 * 9).split([12, 12, 48, 36], 1):  # multiples of every chunk size
        model(part, past_key_values=cache)
        kept = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors_in(cache)}
        sizes.add(sum(kept.values()))
    assert len(sizes) == 1


@torch.no_grad()
@pytest.mark.parametrize("mixer", ["titans", "attention"])
def test_rows_of_a_cache_are_reordered_selected_repeated_copied_and_forgotten(mixer):
    """Rows at different tokens, so that groups of several sizes are moved about."""
    model, hope = make(mixer)
    rows = rows_of(6, 2, 6, 3)
    ids, mask = padded(rows, "left")
    more = ids_of(6, 5, seed=9)

    def check(cache: HopeCache, order: list[int]) -> None:
        found = model(more[: len(order)], past_key_values=cache).logits
        for place, row in enumerate(order):
            want = hope(torch.cat([rows[row], more[place]])[None]).logits[0, len(rows[row]) :]
            torch.testing.assert_close(found[place], want, **TIGHT)
        assert cache.positions() == [len(rows[row]) + 5 for row in order] and cache.get_seq_length() == 11

    def filled() -> HopeCache:
        return model(ids, attention_mask=mask, use_cache=True).past_key_values

    check(filled(), [0, 1, 2, 3])
    for order in ([3, 2, 1, 0], [1, 1, 1, 2], [0, 0, 0, 0]):
        cache = filled()
        cache.reorder_cache(torch.tensor(order))
        check(cache, order)
    cache = filled()
    cache.batch_select_indices(torch.tensor([2, 0]))
    check(cache, [2, 0])
    cache = filled()
    cache.batch_select_indices(torch.tensor([True, False, True, False]))
    cache.batch_repeat_interleave(3)
    other = copy.deepcopy(cache)
    check(cache, [0, 0, 0, 2, 2, 2])
    check(other, [0, 0, 0, 2, 2, 2])  # the first one's tokens are not in the copy
    with pytest.raises(IndexError, match=r"indices: got \[0, 6\]; want rows 0 to 5"):
        other.reorder_cache(torch.tensor([0, 6]))
    other.reset()
    assert other.get_seq_length() == 0 and other.batch_size == -1
    assert torch.equal(model(more, past_key_values=other).logits, hope(more).logits)


@torch.no_grad()
def test_a_cache_refuses_what_does_not_continue_it_and_stays_as_it_was():
    model, hope = make()
    rows = rows_of(6, 3)
    ids, mask = padded(rows, "left")
    cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
    more = ids_of(2, 2)
    with pytest.raises(ValueError, match="past_key_values: holds 2 sequences, and 3 came"):
        model(ids_of(3, 2), past_key_values=cache)
    with pytest.raises(
        ValueError, match=r"attention_mask: got \(2, 2\); want \(2, 8\): .* 6 tokens in the cache and 2"
    ):
        model(more, past_key_values=cache, attention_mask=torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"attention_mask: has \[6, 6\] real tokens .* was given \[6, 3\]"):
        model(more, past_key_values=cache, attention_mask=torch.ones(2, 8))
    with pytest.raises(ValueError, match="state is of 1 sequences and 2 blocks; want 1 and 1"):
        make(depth=1)[0](more, past_key_values=cache)
    with pytest.raises(ValueError, match="state of block 0 is TitansState"):
        make("attention")[0](more, past_key_values=cache)
    found = model(more, past_key_values=cache, attention_mask=torch.cat([mask, torch.ones(2, 2)], 1)).logits
    for row in range(2):
        want = hope(torch.cat([rows[row], more[row]])[None]).logits[0, -2:]
        torch.testing.assert_close(found[row], want, **TIGHT)


@torch.no_grad()
def test_tokens_that_were_recorded_are_taken_back():
    model, hope = make()
    ids, wrong = ids_of(2, 20), ids_of(2, 20, seed=7)
    whole = hope(ids).logits
    cache = HopeCache()
    assert not cache.is_croppable
    cache.activate_past_recording()
    model(ids[:, :5], past_key_values=cache)
    assert cache.is_croppable and cache.is_recording_past(0)
    cache.crop(0)
    read = 5
    for right, guessed in ((3, 2), (0, 4), (1, 0), (4, 1)):  # of each call's tokens, and over several calls
        model(ids[:, read : read + right], past_key_values=cache)
        model(wrong[:, :guessed], past_key_values=cache)
        cache.crop(-guessed)
        read += right
        assert cache.get_seq_length() == read and cache.positions() == [read, read]
        cache.reorder_cache(torch.tensor([0, 1]))
    torch.testing.assert_close(model(ids[:, read:], past_key_values=cache).logits, whole[:, read:], **TIGHT)
    # A guess that spans two calls, of rows that change places.
    cache.crop(0)
    model(wrong[:, :3], past_key_values=cache)
    model(wrong[:, 3:5], past_key_values=cache)
    cache.crop(-4)
    cache.reorder_cache(torch.tensor([1, 1]))
    want = hope(torch.cat([ids, wrong[:, :1], ids[[1, 1]][:, :3]], 1)[1:]).logits[:, -3:]
    torch.testing.assert_close(model(ids[[1, 1]][:, :3], past_key_values=cache).logits[1:], want, **TIGHT)


@torch.no_grad()
def test_tokens_that_were_not_recorded_stay():
    model, hope = make()
    ids, mask = padded(rows_of(6, 3), "left")
    cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
    cache.crop(0)
    with pytest.raises(ValueError, match=r"crop: got -1, .* keeps no past; want activate_past_recording\(\) called"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="crop: got 2; want minus the number of tokens"):
        cache.crop(2)
    cache.activate_past_recording()
    model(ids[:, :2], past_key_values=cache)
    with pytest.raises(ValueError, match=r"crop: got -3, .* the last 2 of 8 columns were recorded without padding"):
        cache.crop(-3)
    cache.crop(-2)
    more = ids_of(2, 4)
    found = model(more, past_key_values=cache).logits
    torch.testing.assert_close(found[1], hope(torch.cat([ids[1, 3:], more[1]])[None]).logits[0, 3:], **TIGHT)
    # Padded columns are not taken back: which tokens of a row would they be?
    cache.reset()
    model(ids, attention_mask=mask, past_key_values=cache)
    with pytest.raises(ValueError, match="the last 3 of 6 columns were recorded without padding"):
        cache.crop(-4)
    cache.crop(-2)
    assert cache.positions() == [4, 1]
    found = model(more, past_key_values=cache).logits
    torch.testing.assert_close(found[1], hope(torch.cat([ids[1, 3:4], more[1]])[None]).logits[0, 1:], **TIGHT)
