"""The network under a factored memory: the linear layers that all sequences share, or, merged, each its own.

A factored memory (:mod:`hope_kernels.memory.factored`) never asks what its linear layers are, only what they do:
:class:`SharedNetwork` is that question. :class:`WeightNetwork` answers it with weight tensors; an integration answers
it with a pre-trained module's own layers.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from hope_kernels.backends.interface import state_dtype
from hope_kernels.memory.reference import activate, activation_derivative
from hope_kernels.memory.spec import Activation, MemorySpec

_HAS_OUT_DTYPE = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 8)


class SharedNetwork(Protocol):
    """The linear layers of a memory's network and its activation, as a factored scan calls them.

    Layers are numbered like ``MemorySpec.weight_names`` of the memory's form: ``mlp`` has ``W_in, W_out``, ``glu``
    ``W_gate, W_up, W_out``. The tensors below have leading dimensions ``[B, T, N]`` (sequences, tokens, heads).
    """

    def apply(self, i: int, u: Tensor) -> Tensor:
        """``u W_i + b_i``: ``[B, T, N, in]`` to ``[B, T, N, out]``, in the dtype the layer itself computes in. Where
        nothing is written this is the layer's output, bit for bit, so it should be the layer's own call."""
        ...

    def apply_transposed(self, i: int, e: Tensor) -> Tensor:
        """``e W_i^T``, without bias: ``[B, T, N, out]`` in the state dtype to ``[B, T, N, in]`` in any dtype."""
        ...

    def out_features(self, i: int) -> int:
        """``out`` of layer i, without computing anything."""
        ...

    def bias(self, i: int) -> Tensor | None:
        """``b_i``, broadcastable to ``[N, out]``, or None. It is never written and never decays."""
        ...

    def weight(self, i: int) -> Tensor:
        """``W_i [N, in, out]``, any strides. Asked for only where written pairs are merged into dense weights."""
        ...

    def activate(self, z: Tensor) -> Tensor:
        """The activation: elementwise, twice differentiable, for the dtype of ``apply`` and the state dtype."""
        ...

    def known_activation(self) -> Activation | None:
        """Which of ``MemorySpec``'s activations :meth:`activate` is; None where it is another."""
        ...


# The level of forward-mode differentiation is global to the process: two threads at once would mix their tangents.
_ONE_AT_A_TIME = threading.RLock()


def times_slope(network: SharedNetwork, z: Tensor, e: Tensor) -> Tensor:
    """``e act'(z)``, elementwise and differentiable, from any number of threads.

    In closed form where the activation is known. Any other one made of torch operations is differentiated
    forward-mode, by which nothing is unpacked inside a checkpointed region; one thread at a time.
    """
    known = network.known_activation()
    if known is not None:
        return e * activation_derivative(z, known)
    with _ONE_AT_A_TIME:
        return torch.func.jvp(network.activate, (z,), (e,))[1]


def multiply(a: Tensor, b: Tensor, operand: torch.dtype) -> Tensor:
    """``a @ b``, batches of matrices ``[M, ., .]``, with operands rounded to ``operand``; sums and result in its state
    dtype. Not differentiable in 16 bits on a GPU: that is :func:`product`'s affair."""
    dtype = state_dtype(operand)
    if operand != dtype and a.is_cuda and _HAS_OUT_DTYPE:
        return torch.bmm(a.to(operand), b.to(operand), out_dtype=dtype)
    # Elsewhere the rounded operands are multiplied in the state dtype: a 16-bit product would round its result as well.
    return torch.bmm(a.to(operand).to(dtype), b.to(operand).to(dtype))


class _Refusal(torch.autograd.Function):
    """Hands on its first ``count`` tensors; a derivative of them with respect to any is an error, not silently zero."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(
            "hope_kernels: the factored plan gives first derivatives only; for gradients of gradients use "
            "backend='reference'"
        )


def first_derivatives(gradients: Sequence[Tensor | None], inputs: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """``gradients`` as a function of ``inputs`` that refuses to be differentiated, where a graph of it is made."""
    if not torch.is_grad_enabled():
        return tuple(gradients)
    present = [g for g in gradients if g is not None]
    handed_on = iter(_Refusal.apply(len(present), *present, *inputs))
    return tuple(None if g is None else next(handed_on) for g in gradients)


def needs_graph(*tensors: Tensor) -> bool:
    """Whether a function of ``tensors`` is to be differentiated."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


class _Product(torch.autograd.Function):
    """:func:`multiply` and its first derivatives."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, operand: torch.dtype) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.operand = operand
        return multiply(a, b, operand)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        for_a, for_b, _ = ctx.needs_input_grad
        with torch.no_grad():
            d_a = multiply(gradient, b.transpose(1, 2), ctx.operand).to(a.dtype) if for_a else None
            d_b = multiply(a.transpose(1, 2), gradient, ctx.operand).to(b.dtype) if for_b else None
        return (*first_derivatives((d_a, d_b), (gradient, a, b)), None)


def product(a: Tensor, b: Tensor, operand: torch.dtype) -> Tensor:
    """``a @ b`` of ``[..., ., .]`` with operands rounded to ``operand``, summed and returned in its state dtype."""
    lead = a.shape[:-2]
    with torch.autocast(a.device.type, enabled=False):
        a, b = a.flatten(0, -3), b.flatten(0, -3)
        # Without a graph to make, a compiler traces what a Function does, and cannot trace that it keeps a dtype.
        result = _Product.apply(a, b, operand) if needs_graph(a, b) else multiply(a, b, operand)
    return result.view(*lead, *result.shape[-2:])


class WeightNetwork:
    """A network of plain weight tensors, without biases: those ``memory_scan`` is given.

    Args:
        weights: each ``[N, in, out]`` (one product for all sequences) or ``[B, N, in, out]`` (each its own), any
            strides, any floating dtype.
        operand: what operands of products are rounded to, the dtype of the tokens.
        spec: for its activation.
    """

    def __init__(self, weights: Sequence[Tensor], operand: torch.dtype, spec: MemorySpec) -> None:
        self.weights, self.operand, self.spec = tuple(weights), operand, spec

    def apply(self, i: int, u: Tensor) -> Tensor:
        return linear(u, self.weights[i], self.operand)

    def apply_transposed(self, i: int, e: Tensor) -> Tensor:
        return linear(e, self.weights[i].transpose(-1, -2), self.operand)

    def out_features(self, i: int) -> int:
        return self.weights[i].shape[-1]

    def bias(self, i: int) -> None:
        return None

    def weight(self, i: int) -> Tensor:
        return self.weights[i]

    def activate(self, z: Tensor) -> Tensor:
        return activate(z, self.spec.activation)

    def known_activation(self) -> Activation:
        return self.spec.activation


class MergedNetwork:
    """Weights of each sequence's own in the place of a shared network's, whose biases and activation go on.

    Args:
        network: the shared network.
        weights: each ``[B, N, in, out]`` in the state dtype.
        operand: what operands of products are rounded to.
    """

    def __init__(self, network: SharedNetwork, weights: Sequence[Tensor], operand: torch.dtype) -> None:
        self.network, self.weights, self.operand = network, tuple(weights), operand

    def apply(self, i: int, u: Tensor) -> Tensor:
        z, bias = linear(u, self.weights[i], self.operand), self.network.bias(i)
        return (z if bias is None else z + bias).to(self.operand)  # as the shared network's own layers round

    def apply_transposed(self, i: int, e: Tensor) -> Tensor:
        return linear(e, self.weights[i].transpose(-1, -2), self.operand)

    def out_features(self, i: int) -> int:
        return self.weights[i].shape[-1]

    def bias(self, i: int) -> Tensor | None:
        return self.network.bias(i)

    def weight(self, i: int) -> Tensor:
        return self.weights[i]

    def activate(self, z: Tensor) -> Tensor:
        return self.network.activate(z)

    def known_activation(self) -> Activation | None:
        return self.network.known_activation()


def with_weights(network: SharedNetwork, weights: Sequence[Tensor], operand: torch.dtype) -> SharedNetwork:
    """``network`` with dense weights of each sequence's own, ``[B, N, in, out]``, in the place of the shared ones."""
    if isinstance(network, WeightNetwork):
        return WeightNetwork(weights, operand, network.spec)
    return MergedNetwork(network, weights, operand)


def linear(u: Tensor, weight: Tensor, operand: torch.dtype) -> Tensor:
    """``u W``, state dtype, for ``u [B, T, N, in]`` and ``W [N, in, out]`` (shared) or ``[B, N, in, out]``."""
    if weight.dim() == 4:
        return product(u.transpose(1, 2), weight, operand).transpose(1, 2)
    rows, length, heads, features = u.shape
    # A broadcast product would copy the weights for every sequence; heads in front share them.
    by_head = u.permute(2, 0, 1, 3).reshape(heads, rows * length, features)
    return product(by_head, weight, operand).view(heads, rows, length, weight.shape[-1]).permute(1, 2, 0, 3)
