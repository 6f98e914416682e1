"""What a factored memory has written: a list of (input, error) pairs for each linear layer, and products with it.

After ``gd`` writes, layer i of a sequence has (semantics: the closed chunk form of gradient descent)

    W_i = gamma W_i(0) - sum_s a_s u_s^T e_s,        a_s = lr_s * (retention of every later token),

so that ``x W_i`` is a product with the shared ``W_i(0)`` and a linear attention over the pairs, with scores ``x . u_s``
and values ``a_s e_s``. :class:`Factors` holds the pairs, :class:`Pairs` computes with them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hope_kernels.memory.joined_pairs import PairEngine
from hope_kernels.memory.networks import product
from hope_kernels.memory.pair_products import pair_products
from hope_kernels.memory.spec import MemorySpec

# Which of the distinct inputs (keys, hidden) feeds each linear layer: both input layers of a glu read the keys.
INPUT_OF_LAYER = {"linear": (0,), "mlp": (0, 1), "glu": (0, 0, 1)}


@dataclass(frozen=True, eq=False)
class Factors:
    """Pairs written since the initial (or merged) weights, for B sequences and N heads.

    Attributes:
        inputs: the distinct inputs of the linear layers, ``[B, N, S, in]`` each: the keys and, but for ``linear``, the
            hidden features. In the dtype of the tokens.
        errors: the error at each linear layer's output, ``[B, N, S, out]``, state dtype.
        weights: ``a [B, N, S]``, state dtype; 0 where a sequence has fewer pairs than others.
        decay: ``gamma [B, N]``, state dtype; None where the memory has no retention.
    """

    inputs: tuple[Tensor, ...]
    errors: tuple[Tensor, ...]
    weights: Tensor
    decay: Tensor | None

    @property
    def count(self) -> int:
        """S, pairs stored of each sequence."""
        return self.weights.shape[2]

    def map(self, function: Callable[[str, Tensor], Tensor]) -> Factors:
        """``function(field name, tensor)`` of every tensor."""
        return Factors(
            tuple(function("inputs", x) for x in self.inputs),
            tuple(function("errors", x) for x in self.errors),
            function("weights", self.weights),
            None if self.decay is None else function("decay", self.decay),
        )

    def state_dict(self) -> dict[str, Any]:
        """Tensors by name."""
        return {
            "inputs": list(self.inputs), "errors": list(self.errors), "weights": self.weights, "decay": self.decay
        }  # fmt: skip

    @staticmethod
    def from_state_dict(state_dict: dict[str, Any]) -> Factors:
        """The inverse of :meth:`state_dict`.

        Raises:
            ValueError: a name is missing or unknown.
        """
        names = {"inputs", "errors", "weights", "decay"}
        if set(state_dict) != names:
            raise ValueError(f"factors: got {sorted(state_dict)}; want {sorted(names)}")
        return Factors(**{**state_dict, "inputs": tuple(state_dict["inputs"]), "errors": tuple(state_dict["errors"])})

    def merged(self, base: Sequence[Tensor], spec: MemorySpec) -> tuple[Tensor, ...]:
        """Dense weights ``gamma W(0) - U^T diag(a) E``, each ``[B, N, in, out]`` in the state dtype, differentiable.

        ``base``: ``W(0)`` of each layer, ``[N, in, out]`` or ``[B, N, in, out]``.
        """
        dtype = self.weights.dtype
        result = []
        for weight, source, errors in zip(base, INPUT_OF_LAYER[spec.form], self.errors, strict=True):
            weight = weight.to(dtype)
            kept = weight if self.decay is None else self.decay[..., None, None] * weight
            update = product(self.inputs[source].transpose(-1, -2), self.weights.unsqueeze(-1) * errors, dtype)
            result.append(kept - update)
        return tuple(result)


def merge_after(spec: MemorySpec, dim: int, hidden: int) -> int:
    """Written tokens beyond which dense weights of a sequence's own cost less than its pairs.

    A token's pair has ``sum of distinct inputs + sum of outputs`` numbers and a sequence's weights have
    ``sum of in * out``; per token read, both are multiplied once. They meet at

        S* = sum(in * out) / (sum(distinct in) + sum(out)),

    that is ``D H / (D + H)`` for ``mlp``, ``3 D H / (2 D + 3 H)`` for ``glu``, ``D / 2`` for ``linear``: the number
    of tokens where the bytes read in decoding are equal; in training and prefill, where dense weights cost no reads of
    their own but a write of ``2 in * out`` per token, what the pairs have cost in all equals what that would have cost
    at ``4/3 S*`` (``mlp``, ``q = k``).
    """
    shapes = spec.weight_shapes(dim, hidden)
    inputs = dim if spec.form == "linear" else dim + hidden
    return sum(a * b for a, b in shapes) // (inputs + sum(out for _, out in shapes))


Block = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]  # inputs and errors of some pairs, as Factors has them


@dataclass(frozen=True, eq=False)
class Pairs:
    """Products with the pairs of several blocks of tokens, at the start of a chunk.

    Attributes:
        form: of the memory.
        blocks: inputs and errors of each block, in the order they were written.
        weights: ``a [B, N, S]`` over all blocks.
        decay: ``gamma [B, N]`` or None.
        operand: what operands of products are rounded to.
        engine: whose kernels multiply; None for the matrix library.
    """

    form: str
    blocks: tuple[Block, ...]
    weights: Tensor
    decay: Tensor | None
    operand: torch.dtype
    engine: PairEngine | None = None

    def of_rows(self, rows: Tensor) -> Pairs:
        """Those of some sequences alone."""

        def chosen(x: Tensor) -> Tensor:
            return x.index_select(0, rows)

        blocks = ((tuple(map(chosen, inputs)), tuple(map(chosen, errors))) for inputs, errors in self.blocks)
        decay = None if self.decay is None else chosen(self.decay)
        return replace(self, blocks=tuple(blocks), weights=chosen(self.weights), decay=decay)

    def deltas(self, layers: Sequence[int], u: Tensor) -> tuple[Tensor, ...]:
        """``(a . (u U^T)) E`` of layers that all read ``u [B, T, N, in]``: ``[B, T, N, out]`` each, state dtype."""
        source = INPUT_OF_LAYER[self.form][layers[0]]
        keys = [inputs[source] for inputs, _ in self.blocks]
        values = [[errors[i] for _, errors in self.blocks] for i in layers]
        return pair_products(u, keys, values, self.weights, self.operand, self.engine)

    def delta_transposed(self, i: int, e: Tensor) -> Tensor:
        """``(a . (e E^T)) U`` of layer i, ``[B, T, N, out]`` to ``[B, T, N, in]`` in the state dtype."""
        source = INPUT_OF_LAYER[self.form][i]
        keys, values = [errors[i] for _, errors in self.blocks], [inputs[source] for inputs, _ in self.blocks]
        return pair_products(e, keys, [values], self.weights, self.operand, self.engine)[0]

    def kept(self, u: Tensor) -> Tensor | None:
        """``gamma``, broadcastable to ``u [B, T, N, features]``; None without retention."""
        return None if self.decay is None else self.decay[:, None, :, None]


def operand_dtype(tokens: Tensor) -> torch.dtype:
    """What operands of products are rounded to: the dtype of the tokens, or of autocast where that is on."""
    if tokens.dtype != torch.float64 and torch.is_autocast_enabled(tokens.device.type):
        return torch.get_autocast_dtype(tokens.device.type)
    return tokens.dtype
