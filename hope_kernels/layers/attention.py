"""Causal softmax attention with rotary positions: the token mixer of Hope-Attention and of the Transformer baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class AttentionState:
    """Keys and values that later tokens may look at. Never changed in place.

    Attributes:
        position: tokens seen by every sequence.
        batch_size: sequences.
        k, v: ``[B, N, P, D]``, keys rotated; all tokens seen, or with a window the last ``window - 1`` of them.
    """

    position: int
    batch_size: int
    k: Tensor
    v: Tensor

    def detach(self) -> AttentionState:
        """The same state without its history: gradients stop here."""
        return replace(self, k=self.k.detach(), v=self.v.detach())

    def to(self, *args: Any, **kwargs: Any) -> AttentionState:
        """The state on another device or in another dtype."""
        return replace(self, k=self.k.to(*args, **kwargs), v=self.v.to(*args, **kwargs))

    def index_select(self, indices: Tensor | Sequence[int]) -> AttentionState:
        """The state whose sequence ``i`` is sequence ``indices[i]`` of this one; may repeat."""
        indices = torch.as_tensor(indices, device=self.k.device)
        return replace(
            self, batch_size=len(indices), k=self.k.index_select(0, indices), v=self.v.index_select(0, indices)
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors; :meth:`from_state_dict` is the inverse."""
        return {"position": self.position, "batch_size": self.batch_size, "k": self.k, "v": self.v}

    @staticmethod
    def from_state_dict(state_dict: dict[str, Any]) -> AttentionState:
        """The inverse of :meth:`state_dict`.

        Raises:
            ValueError: a name is missing or unknown.
        """
        names = {"position", "batch_size", "k", "v"}
        if set(state_dict) != names:
            raise ValueError(f"state_dict: got names {sorted(state_dict)}; want {sorted(names)}")
        return AttentionState(**state_dict)


class CausalAttention(nn.Module):
    """Multi-head softmax attention ``[B, T, dim] -> [B, T, dim]``; token t looks at tokens up to t.

    Queries and keys are rotated by their token's position (RoPE, arXiv 2104.09864): feature pairs ``(i, i + D/2)`` of
    a head by ``position * rope_base^(-2 i / D)``, formed in float64 so that far positions keep their angle.

    Args:
        dim: features of a token.
        heads: attention heads, each ``dim / heads`` wide.
        window: a token looks at the ``window`` last tokens, itself counted; None at all of them.
        rope_base: the longest wave length, in tokens, over 2 pi.
        device, dtype: of the parameters.

    Raises:
        ValueError: a size is out of range.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 4,
        *,
        window: int | None = None,
        rope_base: float = 10000.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if heads < 1 or dim < 1 or dim % heads or dim // heads % 2:
            raise ValueError(f"CausalAttention: dim is {dim}, heads is {heads}; want heads of an even width")
        if window is not None and window < 1:
            raise ValueError(f"CausalAttention: window is {window}; want at least 1, or None")
        if rope_base <= 0:
            raise ValueError(f"CausalAttention: rope_base is {rope_base}; want a positive number")
        self.dim, self.heads, self.window, self.rope_base = dim, heads, window, rope_base
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, device=device, dtype=dtype)
        self.out = nn.Linear(dim, dim, bias=False, device=device, dtype=dtype)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, window={self.window}"

    def forward(self, x: Tensor) -> Tensor:
        """``x [B, T, dim]`` as fresh sequences."""
        return self.stream(x, self.init_state(x.shape[0]))[0]

    def init_state(self, batch_size: int) -> AttentionState:
        """The state before the first token."""
        weight = self.qkv.weight
        nothing = weight.new_empty(batch_size, self.heads, 0, self.dim // self.heads)
        return AttentionState(0, batch_size, nothing, nothing)

    def stream(self, x: Tensor, state: AttentionState) -> tuple[Tensor, AttentionState]:
        """``x [B, T, dim]`` behind the tokens of ``state``, which stays as it is.

        Raises:
            ValueError: ``x`` has another width or batch size.
        """
        if x.dim() != 3 or x.shape[-1] != self.dim or x.shape[0] != state.batch_size:
            raise ValueError(
                f"CausalAttention: x has shape {tuple(x.shape)}; want [{state.batch_size}, T, {self.dim}], the batch "
                "size being that of the state"
            )
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        cos, sin = self._rotation(state.position, x.shape[1], x.device)
        q, k = _rotated(q, cos, sin), _rotated(k, cos, sin)
        k, v = (torch.cat([old.to(new.dtype), new], 2) for old, new in ((state.k, k), (state.v, v)))
        y = F.scaled_dot_product_attention(q, k, v, **self._mask(q.shape[2], k.shape[2], x.device))
        kept = k.shape[2] if self.window is None else min(self.window - 1, k.shape[2])
        first = k.shape[2] - kept
        after = AttentionState(state.position + x.shape[1], state.batch_size, k[:, :, first:], v[:, :, first:])
        return self.out(y.transpose(1, 2).flatten(-2)), after

    def _mask(self, queries: int, keys: int, device: torch.device) -> dict[str, Any]:
        """What lets the last ``queries`` of ``keys`` tokens look back only, and no further than the window."""
        if queries == keys and (self.window is None or self.window >= keys):
            return {"is_causal": True}
        if queries == 1 and (self.window is None or self.window >= keys):
            return {}
        back = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
        seen = back >= 0
        return {"attn_mask": seen if self.window is None else seen & (back < self.window)}

    def _rotation(self, position: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[T, D / 2]`` of the tokens ``position ..``, float64."""
        half = self.dim // self.heads // 2
        frequency = self.rope_base ** (-torch.arange(half, dtype=torch.float64, device=device) / half)
        angle = torch.arange(position, position + count, dtype=torch.float64, device=device)[:, None] * frequency
        return angle.cos(), angle.sin()


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x [B, N, T, D]`` with each pair ``(i, i + D/2)`` rotated, in float32 (float64 for float64)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    a, b = x.to(dtype).chunk(2, -1)
    cos, sin = cos.to(dtype), sin.to(dtype)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)
