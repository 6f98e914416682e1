"""The whole model: any split, any batch, decoding and checkpointing give the same numbers; the loss is what it says."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves

from hope_kernels.models import HopeConfig, HopeDecoder, HopeForCausalLM, HopeState
from tests.cases import FLOAT64_BACKENDS
from tests.models.common import ABLATIONS, MIXERS, VOCABULARY, config_of, ids_of, make_model

TIGHT = {"rtol": 1e-9, "atol": 1e-11}


def tensors_in(state: HopeState) -> list[torch.Tensor]:
    return [x for x in tree_leaves(state.state_dict()) if isinstance(x, torch.Tensor)]


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
    assert whole.requires_grad and all(not x.requires_grad for x in tensors_in(state.detach()))
    assert any(x.requires_grad for x in tensors_in(state))
    single = state.to(torch.float32)
    assert all(x.dtype == torch.float32 for x in tensors_in(single))
    assert model.float()(ids[:, 7:], state=single).logits.dtype == torch.float32
    with pytest.raises(ValueError, match=r"state_dict: got 1 blocks; want 2"):
        model.model.load_state({**state.state_dict(), "blocks": state.state_dict()["blocks"][:1]})
    with pytest.raises(ValueError, match="state_dict: got names"):
        model.model.load_state({"blocks": []})
    with pytest.raises(ValueError, match=r"state_dict: got names \['cms'\]; want \['cms', 'mixer'\]"):
        model.model.load_state({**state.state_dict(), "blocks": [{"cms": None}] * 2})


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


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dim", [32, 256])
@pytest.mark.parametrize("mixer", MIXERS)
def test_a_fresh_model_says_nothing_yet_and_keeps_what_its_tokens_are(mixer, dim, tied) -> None:
    torch.manual_seed(0)
    config = config_of(mixer, vocab_size=256, dim=dim, heads=4, tie_embeddings=tied)
    model = HopeForCausalLM(config)
    ids = torch.randint(256, (2, 33))
    with torch.no_grad():
        loss, embedded, features = model(ids[:, :-1], ids[:, 1:]).loss, model.model.embed(ids), model.model(ids)
    assert abs(loss.item() - math.log(256)) < 0.1
    assert 0.9 < embedded.square().mean().sqrt() < 1.1
    # Behind two blocks a token's features still lie along its embedding: with small embeddings this is about 0.
    assert F.cosine_similarity(embedded, features, -1).mean() > 0.5


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("autocast", [False, True])
def test_in_bfloat16_a_model_errs_little_more_than_the_eager_one(mixer, autocast) -> None:
    ids = ids_of(2, 12)
    truth = make_model(mixer)(ids).logits.detach()

    def error(backend: str | None) -> float:
        model = make_model(mixer, backend=backend).to(torch.float32 if autocast else torch.bfloat16)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(ids).logits
        assert logits.dtype == torch.bfloat16
        return float((logits.double() - truth).norm() / truth.norm())

    assert error(None) <= 2 * error("reference") + 2**-8
    assert error(None) < 0.2


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_model_is_one_graph(mixer) -> None:
    torch.compiler.reset()
    model, ids = make_model(mixer), ids_of(2, 9)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    whole = model(ids, ids)
    torch.testing.assert_close(compiled(ids, ids).loss, whole.loss)
    first = compiled(ids[:, :4], state=model.init_state(2))
    rest = compiled(ids[:, 4:], state=first.state)
    torch.testing.assert_close(rest.logits, whole.logits[:, 4:], **TIGHT)


def test_a_block_without_a_cms_is_a_transformers() -> None:
    """x + attention(norm(x)), then x + W_out gelu(W_in norm(x)): one norm and one residual for each half."""
    block = make_model("transformer").model.blocks[0]
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    x1 = x + block.mixer(block.mixer_norm(x))
    w_in, w_out = block.mlp.weights
    expected = x1 + F.gelu(block.cms_norm(x1) @ w_in, approximate="tanh") @ w_out
    torch.testing.assert_close(block(x), expected)


def test_bounds_of_the_configuration_are_those_of_every_memory_of_the_mixer() -> None:
    bounds = {"lr_max": 0.2, "value_norm_max": 0.7, "weight_norm_max": 1.1}
    for given in (bounds, {**bounds, "value_norm_max": None, "weight_norm_max": None}):
        for block in make_model("titans", **given).model.blocks:
            for part in (block.mixer, block.mixer.projections):
                assert {name: getattr(part, name) for name in given} == given
            for held in block.mixer.init_state(1).memory, block.mixer.init_state(1).projections:
                norms = torch.linalg.matrix_norm(held.weights[1], ord=2)
                assert ((norms <= 1.1).all()) == (given["weight_norm_max"] is not None), norms


def test_switches_of_the_configuration_are_those_of_the_mixer() -> None:
    def found(mixer: str, **changes) -> tuple:
        layer = make_model(mixer, **changes).model.blocks[1].mixer
        return layer.spec.rule, layer.retention, layer.momentum, layer.adaptive

    everything = ("k", "v", "lr", "retention")
    assert found("titans") == ("dgd", True, False, everything)
    assert found("titans", rule="gd") == ("gd", True, False, everything)
    assert found("titans", rule="gd", momentum=True) == ("gd", True, True, everything)
    assert found("titans", retention=False) == ("dgd", False, False, everything[:3])
    assert found("titans", adaptive=("retention", "lr")) == ("dgd", True, False, everything[2:])
    assert found("titans", adaptive=()) == ("dgd", True, False, ())
    assert found("neural_memory") == ("gd", True, True, ())
    assert found("neural_memory", momentum=False, retention=False) == ("gd", False, False, ())


@pytest.mark.parametrize("name", ABLATIONS)
def test_without_one_of_its_parts_it_is_another_model_that_decodes_and_stores_as_the_whole_does(name) -> None:
    model, ids = make_model("titans", **ABLATIONS[name]), ids_of(2, 12)
    assert HopeConfig.from_dict(json.loads(json.dumps(model.config.to_dict()))) == model.config
    whole = model(ids, ids)
    assert not torch.allclose(whole.logits, make_model("titans")(ids).logits, rtol=0, atol=1e-3)
    assert all(gradient.abs().max() > 0 for gradient in gradients(model, whole.loss).values())
    with torch.no_grad():
        decoder = HopeDecoder(model, model(ids[:, :5], state=model.init_state(2)).state)
        for t in range(5, 12):
            torch.testing.assert_close(decoder.step(ids[:, t]), whole.logits[:, t], **TIGHT)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16])
def test_ids_may_have_any_integer_dtype(dtype) -> None:
    model, ids = make_model("attention"), ids_of(2, 6)
    assert torch.equal(model(ids.to(dtype), ids.to(torch.int32)).loss, model(ids, ids).loss)
    with pytest.raises(ValueError, match="want 0 to 10"):
        model(torch.full((1, 2), 11).to(dtype))


def test_a_decoder_that_refused_a_token_goes_on_as_if_it_had_not() -> None:
    model, ids = make_model("titans", torch.float32), ids_of(2, 6)
    decoder = HopeDecoder(model, model.init_state(2))
    for t in range(3):
        decoder.step(ids[:, t])
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="want the dtype"):
        decoder.step(ids[:, 3])
    assert decoder.position == 3 and not any(x.requires_grad for x in tensors_in(decoder.to_state()))
    torch.testing.assert_close(decoder.step(ids[:, 3]), model(ids).logits[:, 3], rtol=1e-4, atol=1e-5)


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
    with pytest.raises(TypeError, match="labels is a list; want an integer tensor"):
        model(ids_of(1, 2), [[1, 2]])
    for label in (11, -1):
        with pytest.raises(ValueError, match=r"labels has ids from .*; want 0 to 10, or -100"):
            model(ids_of(1, 2), torch.tensor([[0, label]]))
    with pytest.raises(ValueError, match="state of block 0 is TitansState and CMSState; want AttentionState and CMSSt"):
        HopeDecoder(model, make_model("titans").init_state(2))
    with pytest.raises(ValueError, match=r"state is of 2 sequences and 1 blocks; want 2 and 2"):
        HopeDecoder(model, make_model("attention", depth=1).init_state(2))
    decoder = HopeDecoder(model, model.init_state(2))
    for ids in (torch.zeros(3, dtype=torch.long), [1, 2]):
        with pytest.raises(ValueError, match=r"ids is .*; want a tensor \[2\]"):
            decoder.step(ids)
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
