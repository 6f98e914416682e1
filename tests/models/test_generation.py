"""Generation: what is drawn, when it ends, what it keeps, and what it refuses."""

from __future__ import annotations

import gc

import pytest
import torch
from torch.utils._pytree import tree_leaves

from hope_kernels.memory.plain import is_ordinary
from hope_kernels.models import HopeDecoder, HopeState
from hope_kernels.models.generation import sample
from tests.models.common import MIXERS, ids_of, make_model


@pytest.mark.parametrize("mixer", MIXERS)
def test_greedy_tokens_are_those_of_whole_calls(mixer) -> None:
    model = make_model(mixer)
    prompt = ids_of(2, 3).to(torch.int32)
    seen = []
    written = model.generate(prompt, 9, temperature=0, callback=seen.append)
    assert written.dtype == torch.int32 and written.shape == (2, 12)
    assert torch.equal(written[:, :3], prompt) and torch.equal(torch.stack(seen, 1), written[:, 3:])
    logits = model(written[:, :-1]).logits
    assert torch.equal(logits[:, 2:].argmax(-1), written[:, 3:].long())


def bytes_in(state: HopeState) -> int:
    """Of all that the state keeps alive."""
    tensors = [x for x in tree_leaves(state.state_dict()) if isinstance(x, torch.Tensor)]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


@pytest.mark.parametrize("mixer", ["titans", "neural_memory", "windowed attention"])
def test_memory_does_not_grow_with_what_is_read(mixer) -> None:
    model = make_model(mixer)
    ids = ids_of(1, 12 * 9)
    sizes = set()
    state = model.init_state(1)
    for part in ids.split([12, 12, 48, 36], 1):  # multiples of every chunk size
        with torch.no_grad():
            state = model(part, state=state).state
        sizes.add(bytes_in(state))
    assert len(sizes) == 1


def storages_alive() -> dict[int, torch.UntypedStorage]:
    """Of all tensors there are in the process, but those of compilers, which hold nothing: by address."""
    gc.collect()
    storages = [x.untyped_storage() for x in gc.get_objects() if is_ordinary(x)]
    return {storage.data_ptr(): storage for storage in storages}


@pytest.mark.parametrize("mixer", ["titans", "windowed attention", "attention"])
def test_memory_does_not_grow_with_what_is_written_but_by_attention_to_all_of_it(mixer) -> None:
    # Held, so that nothing of other tests is freed meanwhile and gives its address to another.
    others = storages_alive()
    model, sizes = make_model(mixer), []
    decoder = HopeDecoder(model, model.init_state(1))
    for count in range(1, 12 * 8 + 1):
        decoder.step(torch.tensor([count % 11]))
        if count in (24, 96):  # behind the end of every chunk
            sizes.append(sum(x.nbytes() for address, x in storages_alive().items() if address not in others))
    assert (sizes[0] == sizes[1]) == (mixer != "attention"), sizes


@pytest.mark.parametrize("mixer", ["titans", "neural_memory", "windowed attention"])
def test_no_prompt_is_too_long_and_a_long_one_may_be_read_in_parts(mixer) -> None:
    model, prompt = make_model(mixer, depth=1), ids_of(1, 3001)
    written = model.generate(prompt, 4, temperature=0)
    assert written.shape == (1, 3005)
    state = model.init_state(1)
    with torch.no_grad():
        for part in prompt[:, :-1].split(1000, 1):
            state = model(part, state=state).state
        decoder, whole = HopeDecoder(model, state), model(written).logits
    for t in range(3000, 3005):
        torch.testing.assert_close(decoder.step(written[:, t]), whole[:, t], rtol=1e-9, atol=1e-11)


def test_a_state_goes_on_and_does_not_change() -> None:
    model = make_model("titans")
    ids = ids_of(2, 8)
    with torch.no_grad():
        state = model(ids[:, :5], state=model.init_state(2)).state
    found = model.generate(ids[:, 5:], 6, state=state, temperature=0)
    assert torch.equal(found[:, 3:], model.generate(ids, 6, temperature=0)[:, 8:])
    assert state.position == 5
    assert torch.equal(model.generate(ids[:, 5:], 6, state=state, temperature=0), found)


def test_draws_follow_the_probabilities_that_are_left() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0]).expand(20000, 4)
    probabilities = logits[0].softmax(-1)

    def frequencies(**options) -> torch.Tensor:
        drawn = sample(logits, generator=torch.Generator().manual_seed(0), **options)
        return torch.bincount(drawn, minlength=4) / len(drawn)

    close = {"rtol": 0.0, "atol": 0.015}
    torch.testing.assert_close(frequencies(), probabilities, **close)
    torch.testing.assert_close(frequencies(temperature=2.0), (logits[0] / 2).softmax(-1), **close)
    two = probabilities * torch.tensor([1, 1, 0, 0])
    torch.testing.assert_close(frequencies(top_k=2), two / two.sum(), **close)
    # 0.64 + 0.24 reach 0.8; 0.64 alone reaches 0.5, and so does nothing less.
    torch.testing.assert_close(frequencies(top_p=0.8), two / two.sum(), **close)
    assert frequencies(top_p=0.5)[0] == 1 and frequencies(top_p=1e-9)[0] == 1
    assert torch.equal(frequencies(top_p=1.0), frequencies()) and torch.equal(frequencies(top_k=9), frequencies())
    assert frequencies(temperature=0)[0] == 1


def test_draws_of_equal_and_of_far_logits() -> None:
    equal = torch.tensor([1.0, 1.0, 1.0, 0.0]).expand(1000, 4)
    assert len(sample(equal, top_k=1).unique()) == 1 and len(sample(equal, top_k=2).unique()) == 2
    assert sample(torch.tensor([[20.0, 1.0, 0.0]]), temperature=1e-38).item() == 0


def test_draws_depend_on_the_generator_alone() -> None:
    model, prompt = make_model("attention"), ids_of(2, 4)
    drawn = [model.generate(prompt, 8, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_sequences_end_each_at_its_own_token() -> None:
    model, prompt = make_model("attention"), ids_of(4, 4)
    free = model.generate(prompt, 12, temperature=0)[:, 4:]
    end = int(free[0, 3])
    ended = model.generate(prompt, 12, temperature=0, eos_token_id=end)[:, 4:]
    longest = 0
    for row in range(4):
        hits = (free[row] == end).nonzero()
        length = int(hits[0]) + 1 if len(hits) else 12
        longest = max(longest, length)
        assert torch.equal(ended[row, :length], free[row, :length])
        assert (ended[row, length:] == end).all()
    assert ended.shape[1] == longest
    alone = model.generate(prompt[:1], 12, temperature=0, eos_token_id=[end, 10])
    assert alone.shape[1] <= 8 and int(alone[0, -1]) in (end, 10)


def test_arguments_that_do_not_fit_are_named() -> None:
    model, prompt = make_model("attention"), ids_of(1, 3)
    assert torch.equal(model.generate(prompt, 0), prompt)
    with pytest.raises(ValueError, match=r"input_ids is \(1, 0\); want a prompt \[B, T\] of at least one token"):
        model.generate(prompt[:, :0], 3)
    bad = {"temperature": (-1.0, float("nan"), "a"), "top_k": (0, 2.5), "top_p": (0.0, "a")}
    for name, value in ((name, value) for name, values in bad.items() for value in values):
        with pytest.raises(ValueError, match=f"{name} is {value!r}"):
            model.generate(prompt, 3, **{name: value})
    wide = make_model("attention", vocab_size=300)
    with pytest.raises(ValueError, match=r"input_ids is torch\.uint8, which does not hold the ids up to 299"):
        wide.generate(prompt.to(torch.uint8), 3)
    with pytest.raises(ValueError, match=r"ids from 12 to 12; want 0 to 10"):
        model.generate(torch.tensor([[12]]), 0)
    with pytest.raises(ValueError, match="max_new_tokens is -1"):
        model.generate(prompt, -1)
    for end in (11, -1, [], 3.7, True, "x"):
        with pytest.raises(ValueError, match=r"eos_token_id is .*; want ids from 0 to 10"):
            model.generate(prompt, 3, eos_token_id=end)
