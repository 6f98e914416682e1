"""What a Hugging Face model is told of its tokens, as memories need it: which are real, one sequence per row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def check_not_packed(packed: bool, positions: Tensor | None, length: int, valid: Tensor | None = None) -> None:
    """That a row holds one sequence; a memory would carry what one of them wrote into the next.

    Args:
        packed: whether something else said that it holds several.
        positions: of the tokens, ``[T]`` or ``[B, T]``; others are not looked at.
        length: T, tokens of this call.
        valid: ``[B, 2]``, first and one past the last real token of each row; None: all are real.

    Raises:
        ValueError: it holds several.
    """
    if packed or not _steps_by(1, positions, length, valid):
        raise _packed("position_ids", length)


def check_one_sequence(seq_idx: Tensor | None, length: int, valid: Tensor | None = None) -> None:
    """The same of the number ``[T]`` or ``[B, T]`` of the sequence that each token is of."""
    if not _steps_by(0, seq_idx, length, valid):
        raise _packed("seq_idx", length)


def _steps_by(step: int, numbers: Tensor | None, length: int, valid: Tensor | None) -> bool:
    """Whether numbers of tokens grow by ``step`` from each real token to the next, as far as they are known."""
    if not isinstance(numbers, Tensor) or numbers.dim() not in (1, 2) or numbers.shape[-1] != length or length < 2:
        return True
    wrong = numbers.diff() != step
    if valid is not None:
        at = torch.arange(1, length, device=valid.device)
        wrong = wrong.to(valid.device) & (at > valid[:, :1]) & (at < valid[:, 1:])
    return not bool(wrong.any())


def _packed(argument: str, length: int) -> ValueError:
    return ValueError(
        f"{argument}: several sequences are packed into one row of {length} tokens; memories want one sequence "
        "per row, padded, with its attention_mask"
    )


def real_tokens(mask: Any, length: int, past: int | Tensor) -> Tensor | None:
    """First and one past the last real token of each row, int64 ``[B, 2]``; None where all tokens of the call are real.

    Args:
        mask: 2-D over past and new tokens, maybe as long as a static cache will ever be; or 4-D, as ``generate``
            makes it for static caches: a token is real if it sees itself.
        length: T, tokens of this call.
        past: where the first of them is among the columns of a 2-D mask or the keys of a 4-D one.

    Raises:
        ValueError: real tokens of a row are not next to each other, one does not see the one before it (several
            sequences packed into the row), or the mask is of another kind.
    """
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask: got {shape}; memories want [batch, past and new tokens], or the 4-D one of generate"
        )
    if mask.dim() == 2:
        past = int(past)
        if mask.shape[1] < past + length:
            raise ValueError(
                f"attention_mask: covers {mask.shape[1]} tokens of {past + length}, {past} in the cache and {length} "
                "new; want all of them"
            )
        real = mask[:, past : past + length] != 0
    else:
        keys = torch.arange(length, device=mask.device) + past

        def seen(queries: slice, keys: Tensor) -> Tensor:
            found = mask[:, 0, queries].gather(-1, keys.view(1, -1, 1).expand(mask.shape[0], -1, 1)).squeeze(-1)
            return found if found.dtype == torch.bool else found == 0

        real = seen(slice(None), keys)
        if bool((real[:, 1:] & real[:, :-1] & ~seen(slice(1, None), keys[:-1])).any()):
            raise _packed("attention_mask", length)
    if bool(real.all()):
        return None
    count = real.sum(1)
    first = torch.where(count > 0, real.int().argmax(1), 0)
    valid = torch.stack([first, first + count], 1)
    at = torch.arange(length, device=mask.device)
    if bool((real != ((at >= valid[:, :1]) & (at < valid[:, 1:]))).any()):
        raise ValueError(
            "attention_mask: has gaps between the real tokens of a row; memories want them next to each other"
        )
    return valid
