"""The truth of the tests: a memory as a recurrence over single tokens, all gradients by automatic differentiation.

Nothing of the package is used here, and no closed form of a chunk. One token's inner gradient is
`torch.autograd.grad` of its inner loss at the state of the chunk's start; the outer gradients come from
differentiating through that. Slow, float64, and meant to be read beside the equations:

    gd              M <- alpha_t M - eta_t grad_t
    gd, momentum    S <- beta_t S - eta_t grad_t;   M <- alpha_t M + S
    dgd             M <- alpha_t M - eta'_t u_t^T (u_t M) - eta'_t grad_t,   eta'_t = eta_t / (1 + eta_t |u_t|^2)

where `grad_t` is the gradient of the inner loss at the chunk-start weights and `u_t` the input of the weight's linear
layer there."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class OracleResult(NamedTuple):
    output: Tensor  # [B, T, N, D]
    weights: tuple[Tensor, ...]  # each [B, N, in, out], after the last complete chunk
    momentum: tuple[Tensor, ...]  # likewise; () without momentum


def activate(name: str, x: Tensor) -> Tensor:
    if name == "gelu":
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    if name == "gelu_tanh":
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    if name == "silu":
        return x * torch.sigmoid(x)
    if name == "relu2":
        return torch.relu(x) ** 2
    raise AssertionError(name)


def apply_memory(spec, weights: tuple[Tensor, ...], x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """f_W(x) for one token: x [B, N, D], weights [B, N, in, out]. Returns it and the input of each weight's linear
    layer."""

    def linear(inputs: Tensor, weight: Tensor) -> Tensor:
        return (inputs.unsqueeze(-2) @ weight).squeeze(-2)

    if spec.form == "linear":
        inputs = (x,)
        y = linear(x, weights[0])
    elif spec.form == "mlp":
        hidden = activate(spec.activation, linear(x, weights[0]))
        inputs = (x, hidden)
        y = linear(hidden, weights[1])
    else:
        hidden = activate(spec.activation, linear(x, weights[0])) * linear(x, weights[1])
        inputs = (x, x, hidden)
        y = linear(hidden, weights[2])
    return (x + y if spec.residual else y), inputs


def inner_loss(spec, weights: tuple[Tensor, ...], target_weights: tuple[Tensor, ...], k: Tensor, v: Tensor) -> Tensor:
    """One token's inner loss, summed over sequences and heads.

    `target_weights` hold the same numbers as `weights`; the `self` target reads them, so that the inner gradient (taken
    for `weights`) sees a constant and the outer gradient does not.
    """
    prediction, _ = apply_memory(spec, weights, k)
    if spec.objective == "l2":
        return 0.5 * ((prediction - v) ** 2).sum()
    if spec.objective == "dot":
        return -(prediction * v).sum()
    if spec.objective == "error":
        return (prediction * v).sum()
    target, _ = apply_memory(spec, target_weights, v)
    return 0.5 * ((prediction - target) ** 2).sum()


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    weights: tuple[Tensor, ...],
    *,
    spec,
    chunk_size: int,
    retention: Tensor | None = None,
    momentum: Tensor | None = None,
    initial_momentum: tuple[Tensor, ...] | None = None,
    bptt_chunks: int | None = None,
) -> OracleResult:
    """One uniform batch from position 0: q, k, v [B, T, N, D], gates [B, T, N], weights [N, in, out] or [B, N, in,
    out]."""
    batch, tokens, _, _ = k.shape
    state = tuple(w if w.dim() == 4 else w.expand(batch, *w.shape) for w in weights)
    carried: tuple[Tensor, ...] = ()
    if momentum is not None:
        carried = tuple(torch.zeros_like(w) for w in state) if initial_momentum is None else tuple(initial_momentum)

    outputs = []
    for start in range(0, tokens, chunk_size):
        stop = start + chunk_size
        outputs += [apply_memory(spec, state, q[:, t])[0] for t in range(start, min(stop, tokens))]
        if stop > tokens:
            break
        # The state is the variable of the inner loss at one place of the graph, and the constant self target at
        # another.
        variables = tuple((w if w.requires_grad else w.detach().requires_grad_()).view_as(w) for w in state)
        new, new_momentum = state, carried
        for t in range(start, stop):
            loss = inner_loss(spec, variables, state, k[:, t], v[:, t])
            gradients = torch.autograd.grad(loss, variables, create_graph=True)
            eta = lr[:, t, :, None, None]
            alpha = torch.ones_like(eta) if retention is None else retention[:, t, :, None, None]
            if momentum is not None:
                beta = momentum[:, t, :, None, None]
                new_momentum = tuple(beta * s - eta * g for s, g in zip(new_momentum, gradients, strict=True))
                new = tuple(alpha * m + s for m, s in zip(new, new_momentum, strict=True))
            elif spec.rule == "gd":
                new = tuple(alpha * m - eta * g for m, g in zip(new, gradients, strict=True))
            else:
                _, inputs = apply_memory(spec, state, k[:, t])
                updated = []
                for m, g, u in zip(new, gradients, inputs, strict=True):
                    step = eta / (1 + eta * (u**2).sum(-1)[..., None, None])
                    u_row = u.unsqueeze(-2)
                    updated.append(alpha * m - step * (u_row.mT @ (u_row @ m)) - step * g)
                new = tuple(updated)
        state, carried = new, new_momentum
        if bptt_chunks and (stop // chunk_size) % bptt_chunks == 0:
            state, carried = tuple(w.detach() for w in state), tuple(s.detach() for s in carried)

    output = torch.stack(outputs, dim=1) if outputs else torch.zeros_like(q)
    return OracleResult(output, state, carried)
