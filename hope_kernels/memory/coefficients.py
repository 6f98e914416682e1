"""From the gates of a chunk (lr, retention, momentum) to the scalars of its closed form.

Everything here is differentiable torch code on ``[M, N, C]`` tensors (M chunks, N heads, C tokens), so that a
kernel only ever sees a weight per token and a factor per chunk. With ``A_t = prod_{s>t} alpha_s``,
``B_t = prod_{s>t} beta_s`` and ``eta = lr``:

* ``gd``:       ``W' = decay W - U^T diag(step) E``, ``step = A eta``, ``decay = prod alpha``;
* with momentum: ``W' = decay W + carry S - U^T diag(step) E`` and ``S' = mdecay S - U^T diag(mstep) E`` with
  ``a_t = A_t + beta_{t+1} a_{t+1}``, ``step = a eta``, ``carry = beta_1 a_1``, ``mstep = B eta`` and
  ``mdecay = prod beta``;
* ``dgd``:      its effective step depends on the layer's input, so the raw ``eta`` and ``alpha`` are handed on.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from hope_kernels.memory.products import exclusive, suffix_products, suffix_recurrence
from hope_kernels.memory.spec import Rule


class Coefficients(NamedTuple):
    """The scalars of every chunk, as :class:`hope_kernels.backends.interface.ScanProblem` names them."""

    step: Tensor | None = None
    retention: Tensor | None = None
    decay: Tensor | None = None
    momentum_step: Tensor | None = None
    momentum_carry: Tensor | None = None
    momentum_decay: Tensor | None = None


def chunk_coefficients(rule: Rule, lr: Tensor, retention: Tensor | None, momentum: Tensor | None) -> Coefficients:
    """Coefficients of all chunks from their gates, each ``[M, N, C]`` in the state dtype.

    ``retention`` and ``momentum`` may be None (no decay, no momentum).
    """
    if rule == "dgd":
        return Coefficients(step=lr, retention=retention)
    if retention is None and momentum is None:
        return Coefficients(step=lr)
    suffix = decay = None
    if retention is not None:
        products = suffix_products(retention)
        suffix, decay = exclusive(products), products[..., 0].contiguous()
    if momentum is None:
        return Coefficients(step=lr * suffix, decay=decay)
    term = momentum.new_ones(()).expand_as(momentum) if suffix is None else suffix
    weight = suffix_recurrence(momentum, term)
    momentum_products = suffix_products(momentum)
    return Coefficients(
        step=lr * weight,
        decay=decay,
        momentum_step=lr * exclusive(momentum_products),
        momentum_carry=momentum[..., 0] * weight[..., 0],
        momentum_decay=momentum_products[..., 0].contiguous(),
    )
