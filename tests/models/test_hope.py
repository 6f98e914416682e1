"""The whole model: any split, any batch, decoding and checkpointing give the same numbers; the loss is what it says."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hope_kernels.models import HopeDecoder, HopeForCausalLM
from tests.cases import FLOAT64_BACKENDS
from tests.models.common import MIXERS, VOCABULARY, config_of, ids_of, make_model

TIGHT = {"rtol": 1e-9, "atol": 1e-11}


def gradients(model: HopeForCausalLM, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
@pytest.mark.parametrize("mixer", MIXERS)
def test_any_split_gives_the_same_logits_and_gradients(mixer, backend) -> None:
    model = make_model(mixer, backend=backend)
    ids, labels = ids_of(2, 14)[:, :-1], ids_of(2, 14)[:, 1:]
    whole = model(ids, labels)
    assert whole.state is None and whole.logits.shape == (2, 13, VOCABULARY)
    expected = gradients(model, whole.loss)
    assert all(gradient.abs().max() > 0 for gradient in expected.values())
    for lengths in ([13], [1, 5, 7], [4, 0, 9], [1] * 13):
        state, logits = model.init_state(2), []
        for part in ids.split(lengths, 1):
            output = model(part, state=state)
            state = output.state
            logits.append(output.logits)
        joined = torch.cat(logits, 1)
        assert state.position == 13
        torch.testing.assert_close(joined, whole.logits, **TIGHT)
        loss = F.cross_entropy(joined.flatten(0, 1), labels.flatten())
        for name, gradient in gradients(model, loss).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-7, atol=1e-10, msg=name)


@pytest.mark.parametrize("mixer", MIXERS)
def test_backends_agree_on_logits_and_gradients(mixer) -> None:
    ids, labels = ids_of(2, 12)[:, :-1], ids_of(2, 12)[:, 1:]
    found = {}
    for backend in ("reference", None):
        model = make_model(mixer, backend=backend)
        output = model(ids, labels)
        found[backend] = {"logits": output.logits, **gradients(model, output.loss)}
    for name, value in found["reference"].items():
        torch.testing.assert_close(found[None][name], value, rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize("mixer", MIXERS)
def test_rows_do_not_influence_each_other(mixer) -> None:
    model = make_model(mixer)
    ids = ids_of(3, 9)
    whole = model(ids).logits
    for row in range(3):
        torch.testing.assert_close(model(ids[row : row + 1]).logits, whole[row : row + 1], **TIGHT)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("prompt", [1, 5])
def test_prefill_and_decoding_equal_the_whole_call_and_leave_the_state_alone(mixer, prompt) -> None:
    model = make_model(mixer)
    ids = ids_of(2, 16)
    with torch.no_grad():
        whole = model(ids).logits
        state = model(ids[:, :prompt], state=model.init_state(2)).state
        decoder = HopeDecoder(model, state)
        for t in range(prompt, 12):
            torch.testing.assert_close(decoder.step(ids[:, t]), whole[:, t], **TIGHT)
        assert state.position == prompt
        # A call goes on where the decoder stands.
        rest = model(ids[:, 12:], state=decoder.to_state()).logits
        torch.testing.assert_close(rest, whole[:, 12:], **TIGHT)


@pytest.mark.parametrize("mixer", MIXERS)
def test_activation_checkpointing_changes_no_gradient(mixer) -> None:
    model = make_model(mixer)
    ids, labels = ids_of(2, 10)[:, :-1], ids_of(2, 10)[:, 1:]
    expected = gradients(model, model(ids, labels).loss)
    model.activation_checkpointing = True
    for state in (None, model.init_state(2)):
        for name, gradient in gradients(model, model(ids, labels, state).loss).items():
            torch.testing.assert_close(gradient, expected[name], **TIGHT, msg=name)


@pytest.mark.parametrize("mixer", MIXERS)
def test_states_are_selected_stored_and_cut(mixer) -> None:
    model = make_model(mixer)
    ids = ids_of(3, 12)
    state = model(ids[:, :7], state=model.init_state(3)).state
    whole = model(ids[:, 7:], state=state).logits
    chosen = model(ids[[2, 0], 7:], state=state.index_select([2, 0])).logits
    torch.testing.assert_close(chosen, whole[[2, 0]], **TIGHT)
    again = model.model.load_state(state.state_dict())
    assert torch.equal(model(ids[:, 7:], state=again).logits, whole)
    cut = model(ids[:, 7:], ids[:, 7:], state=state.detach())
    cut.loss.backward()
    assert model.model.embedding.weight.grad is not None
    with pytest.raises(ValueError, match=r"state_dict: got 1 blocks; want 2"):
        model.model.load_state({**state.state_dict(), "blocks": state.state_dict()["blocks"][:1]})
    with pytest.raises(ValueError, match="state_dict: got names"):
        model.model.load_state({"blocks": []})


def test_the_loss_is_the_mean_over_labels_that_are_there() -> None:
    model = make_model("attention", torch.bfloat16)
    ids, labels = ids_of(2, 9)[:, :-1], ids_of(2, 9)[:, 1:].clone()
    labels[0, :5] = -100
    output = model(ids, labels)
    assert output.loss.dtype == torch.float32
    kept = labels != -100
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits.float()[kept], labels[kept]))
    nothing = model(ids, torch.full_like(labels, -100)).loss
    assert nothing == 0 and not nothing.isnan()


def test_tied_and_untied_heads() -> None:
    tied, untied = make_model("attention"), make_model("attention", tie_embeddings=False)
    assert tied.parameter_count() == untied.parameter_count() - VOCABULARY * 8
    assert "head.weight" in untied.state_dict() and "head.weight" not in tied.state_dict()
    features = torch.randn(2, 3, 8, dtype=torch.float64)
    torch.testing.assert_close(tied.logits(features), features @ tied.model.embedding.weight.T)
    torch.testing.assert_close(untied.logits(features), features @ untied.head.weight.T)


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_model_in_bfloat16_and_under_autocast_stays_close(mixer) -> None:
    ids = ids_of(2, 12)
    model = make_model(mixer, torch.float32)
    with torch.no_grad():
        expected = model(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        cast = model(ids)
    low = model.bfloat16()(ids)
    assert low.logits.dtype == torch.bfloat16
    for found in (cast, low):
        torch.testing.assert_close(found.logits.float(), expected, rtol=0.1, atol=0.1 * float(expected.abs().max()))


def test_input_that_does_not_fit_is_named() -> None:
    model = make_model("attention")
    with pytest.raises(ValueError, match=r"input_ids has ids from 0 to 11; want 0 to 10"):
        model(torch.tensor([[0, 11]]))
    with pytest.raises(ValueError, match=r"input_ids has ids from -1 to 3; want 0 to 10"):
        model(torch.tensor([[-1, 3]]))
    with pytest.raises(TypeError, match=r"input_ids is torch\.float32; want an integer tensor"):
        model(torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"input_ids has shape \(3,\); want \[B, T\]"):
        model(torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"labels is torch\.int64 of shape \(1, 3\); want integers of shape \(1, 2\)"):
        model(ids_of(1, 2), ids_of(1, 3))
    with pytest.raises(ValueError, match=r"state is of 2 sequences and 2 blocks; want 1 and 2"):
        model(ids_of(1, 2), state=model.init_state(2))
    with pytest.raises(TypeError, match="state is a tuple; want a HopeState"):
        model(ids_of(1, 2), state=())
    decoder = HopeDecoder(model, model.init_state(2))
    with pytest.raises(ValueError, match=r"ids has shape \(3,\); want \[2\]"):
        decoder.step(torch.zeros(3, dtype=torch.long))
    assert model(ids_of(2, 0)).logits.shape == (2, 0, VOCABULARY)
    assert model(ids_of(0, 3)).logits.shape == (0, 3, VOCABULARY)


def test_a_model_learns_to_repeat() -> None:
    """Twenty steps on one short pattern halve the loss: gradients reach what must move."""
    torch.manual_seed(0)
    model = HopeForCausalLM(config_of("titans", dim=16, depth=1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    text = torch.arange(8).repeat(4)[None]
    losses = []
    for _ in range(20):
        loss = model(text[:, :-1], text[:, 1:]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0] / 2, losses
