"""Tokens one after the other: prefill, then a decoder whose memory does not grow with what it writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hope_kernels.models.state import BlockState, HopeState

if TYPE_CHECKING:
    from hope_kernels.models.hope import HopeForCausalLM


class HopeDecoder:
    """One token per sequence at a time, from a state on: the CMS of every block is a buffer that is updated in place.

    The logits are those of the model for the same tokens, to rounding. Nothing is differentiated, and the state it
    began from does not change.

    Args:
        model: it must not change while it decodes.
        state: of the tokens before.
    """

    @torch.no_grad()
    def __init__(self, model: HopeForCausalLM, state: HopeState) -> None:
        self.model, self.position, self.batch_size = model, state.position, state.batch_size
        self.mixers = [block.mixer for block in state.blocks]
        blocks = zip(model.model.blocks, state.blocks, strict=True)
        self.buffers = [block.cms.make_buffer(held.cms) for block, held in blocks]

    @torch.no_grad()
    def step(self, ids: Tensor) -> Tensor:
        """Logits ``[B, vocab_size]`` of the token behind ``ids [B]``.

        Raises:
            ValueError, TypeError: ``ids`` does not fit.
        """
        if ids.dim() != 1 or len(ids) != self.batch_size:
            raise ValueError(f"HopeDecoder: ids has shape {tuple(ids.shape)}; want [{self.batch_size}]")
        model = self.model.model
        x = model.embed(ids[:, None])
        for index, block in enumerate(model.blocks):
            y, self.mixers[index] = block.mixer.stream(block.mixer_norm(x), self.mixers[index])
            x = x + y
            x = x + block.cms.step(block.cms_norm(x), self.buffers[index])
        self.position += 1
        return self.model.logits(model.norm(x))[:, 0]

    def to_state(self) -> HopeState:
        """The state at this token, which later steps do not change."""
        parts = zip(self.mixers, self.buffers, strict=True)
        blocks = tuple(BlockState(mixer, buffer.to_state()) for mixer, buffer in parts)
        return HopeState(self.position, self.batch_size, blocks)


def choose(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A token per row of ``logits [B, V]`` -> int64 ``[B]``.

    Drawn from ``softmax(logits / temperature)`` in float32, of which ``top_k`` keeps the k most likely, then ``top_p``
    as few of the most likely as reach that probability together (at least one). Temperature 0 takes the most likely.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k, -1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(-1, descending=True)
        likely = ordered.softmax(-1)
        beyond = likely.cumsum(-1) - likely >= top_p  # the tokens before it reach top_p already
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


@torch.no_grad()
def generate(
    model: HopeForCausalLM,
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    state: HopeState | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    callback: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """``input_ids`` and what the model writes behind them: see :meth:`HopeForCausalLM.generate`."""
    ends = _checked(model, input_ids, max_new_tokens, temperature, top_k, top_p, eos_token_id)
    written = [input_ids]
    if max_new_tokens == 0:
        return input_ids
    state = model.init_state(input_ids.shape[0]) if state is None else state
    features, state = model.model.stream(input_ids, state)
    logits = model.logits(features[:, -1])
    decoder = HopeDecoder(model, state)
    ended = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
    for count in range(1, max_new_tokens + 1):
        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "generator": generator}
        ids = choose(logits, **options).to(input_ids.dtype)
        if ends is not None:
            ids = torch.where(ended, ends[0].to(ids.dtype), ids)
            ended = ended | torch.isin(ids, ends.to(ids.dtype))
        written.append(ids[:, None])
        if callback is not None:
            callback(ids)
        if count == max_new_tokens or (ends is not None and bool(ended.all())):
            break
        logits = decoder.step(ids)
    return torch.cat(written, 1)


def _checked(
    model: HopeForCausalLM,
    input_ids: Tensor,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    eos_token_id: int | Sequence[int] | None,
) -> Tensor | None:
    """The ids that end a sequence; raises where an argument does not fit."""
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or input_ids.shape[1] == 0:
        came = tuple(input_ids.shape) if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise ValueError(f"generate: input_ids is {came}; want a prompt [B, T] of at least one token")
    if not isinstance(max_new_tokens, int) or max_new_tokens < 0:
        raise ValueError(f"generate: max_new_tokens is {max_new_tokens!r}; want a whole number, 0 or more")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"generate: temperature is {temperature}; want 0 (greedy) or a positive number")
    if top_k is not None and top_k < 1:
        raise ValueError(f"generate: top_k is {top_k}; want at least 1, or None")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"generate: top_p is {top_p}; want a probability above 0, or None")
    if eos_token_id is None:
        return None
    ends = torch.as_tensor(eos_token_id, device=input_ids.device).reshape(-1)
    if not len(ends) or ends.min() < 0 or ends.max() >= model.config.vocab_size:
        raise ValueError(
            f"generate: eos_token_id is {eos_token_id!r}; want ids from 0 to {model.config.vocab_size - 1}, or None"
        )
    return ends
