"""The readable truth: a memory read and written in eager PyTorch, differentiated by plain autograd.

Two implementations that share no formula:

* :func:`recurrent_scan` goes token by token and takes every inner gradient by automatic differentiation of the
  inner loss itself. It is the oracle the tests and ``hope-kernels verify`` hold everything else against.
* :func:`chunked_scan` computes each chunk in closed form, a few matrix products per weight. It is
  ``backend="reference"``, the naive path every fused backend is measured against; it keeps every chunk's
  weights for the backward pass, so its memory grows linearly with the number of chunks.

The file imports nothing of the package but its vocabulary, so that it can be read beside the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from hope_kernels.backends.interface import CHUNK_INDEX, CHUNK_ROW, LENGTH, PENDING, ROW, START, ScanProblem
from hope_kernels.memory.products import between_products, exclusive, prefix_products, suffix_products
from hope_kernels.memory.spec import Activation, MemorySpec

Weights = tuple[Tensor, ...]


def activate(z: Tensor, activation: Activation) -> Tensor:
    """The activation of a memory's hidden layer, elementwise."""
    if activation == "gelu_tanh":
        return F.gelu(z, approximate="tanh")
    if activation == "gelu":
        return F.gelu(z)
    if activation == "silu":
        return F.silu(z)
    return F.relu(z).square()


# --------------------------------------------------------------------------------------------------------------
# Token by token


def memory_forward(spec: MemorySpec, weights: Weights, x: Tensor) -> tuple[Tensor, Weights]:
    """``f_W(x)`` and the input ``u`` of each linear layer, for ``x [..., D]`` and weights ``[..., in, out]``."""

    def project(u: Tensor, weight: Tensor) -> Tensor:
        return (u.unsqueeze(-2) @ weight).squeeze(-2)

    if spec.form == "linear":
        inputs: Weights = (x,)
        out = project(x, weights[0])
    elif spec.form == "mlp":
        hidden = activate(project(x, weights[0]), spec.activation)
        inputs = (x, hidden)
        out = project(hidden, weights[1])
    else:
        hidden = activate(project(x, weights[0]), spec.activation) * project(x, weights[1])
        inputs = (x, x, hidden)
        out = project(hidden, weights[2])
    return (x + out if spec.residual else out), inputs


def inner_loss(spec: MemorySpec, prediction: Tensor, v: Tensor, weights: Weights) -> Tensor:
    """The inner loss of one token per row, summed: rows have weights of their own, so gradients stay apart.

    The target of ``self`` is read with ``weights``: the caller passes those the gradient is *not* taken for.
    """
    if spec.objective == "l2":
        return 0.5 * (prediction - v).square().sum()
    if spec.objective == "dot":
        return -(prediction * v).sum()
    if spec.objective == "error":
        # v is the gradient of some task loss at the prediction: any loss with that gradient will do.
        return (prediction * v).sum()
    target, _ = memory_forward(spec, weights, v)
    return 0.5 * (prediction - target).square().sum()


def recurrent_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    weights: Sequence[Tensor],
    *,
    spec: MemorySpec,
    chunk_size: int,
    retention: Tensor | None = None,
    momentum: Tensor | None = None,
    initial_momentum: Sequence[Tensor] | None = None,
    bptt_chunks: int | None = None,
) -> tuple[Tensor, Weights, Weights | None]:
    """A chunked scan computed one token at a time (equations 71 and 90), differentiable.

    Inside a chunk that starts at ``W_c`` every token reads ``f_{W_c}(q_t)`` and takes the gradient ``g_t`` of its
    inner loss at ``W_c``; the write replays the token recurrence, starting from ``M = W_c``:

    * ``gd``:  ``M <- alpha_t M - eta_t g_t``; with momentum ``S <- beta_t S - eta_t g_t``, ``M <- alpha_t M + S``;
    * ``dgd``, for each linear layer with input ``u_t``: ``M <- alpha_t M - e u_t^T (u_t M) - e g_t`` with
      ``e = eta_t / (1 + eta_t |u_t|^2)``.

    The last ``T % chunk_size`` tokens are read and write nothing.

    Args:
        q, k, v: ``[B, T, N, D]``.
        lr, retention, momentum: ``[B, T, N]``; None stands for retention 1 and for no momentum.
        weights: initial weights in the order of ``spec.weight_names``, ``[N, in, out]`` or ``[B, N, in, out]``.
        initial_momentum: like ``weights``; zeros if None.
        bptt_chunks: detach weights and momentum when they are written into chunk ``n, 2n, ..``.

    Returns:
        output ``[B, T, N, D]``; weights, and momentum (None without it), after the complete chunks, each
        ``[B, N, in, out]``.
    """
    batch, length = q.shape[:2]

    def per_sequence(tensors: Sequence[Tensor]) -> Weights:
        return tuple(w if w.dim() == 4 else w.expand(batch, *w.shape) for w in tensors)

    state = per_sequence(weights)
    speed: Weights | None = None
    if momentum is not None:
        speed = per_sequence(initial_momentum or [torch.zeros_like(w) for w in weights])

    def gate(g: Tensor, t: int) -> Tensor:
        return g[:, t, :, None, None]

    outputs = []
    for start in range(0, length, chunk_size):
        stop = start + chunk_size
        outputs += [memory_forward(spec, state, q[:, t])[0] for t in range(start, min(stop, length))]
        if stop > length:
            break
        new_state, new_speed = state, speed
        for t in range(start, stop):
            # Gradients are taken for a copy of the chunk-start weights: a `self` target, read with the original,
            # is a constant of this inner gradient, and the outer gradient still flows through it.
            with torch.enable_grad():
                at = tuple(w.clone().requires_grad_() if not w.requires_grad else w.clone() for w in state)
                prediction, inputs = memory_forward(spec, at, k[:, t])
                loss = inner_loss(spec, prediction, v[:, t], state)
                gradients = torch.autograd.grad(loss, at, create_graph=True)
            written, speeds = [], []
            for i, (weight, gradient) in enumerate(zip(new_state, gradients, strict=True)):
                kept = weight if retention is None else gate(retention, t) * weight
                if spec.rule == "dgd":
                    u = inputs[i].unsqueeze(-2)
                    step = gate(lr, t) / (1 + gate(lr, t) * u.square().sum(-1, keepdim=True))
                    written.append(kept - step * (u.transpose(-1, -2) @ (u @ weight)) - step * gradient)
                elif new_speed is not None and momentum is not None:
                    speeds.append(gate(momentum, t) * new_speed[i] - gate(lr, t) * gradient)
                    written.append(kept + speeds[i])
                else:
                    written.append(kept - gate(lr, t) * gradient)
            new_state = tuple(written)
            new_speed = tuple(speeds) if new_speed is not None else None
        state, speed = new_state, new_speed
        if bptt_chunks and (stop // chunk_size) % bptt_chunks == 0:
            state = tuple(w.detach() for w in state)
            speed = None if speed is None else tuple(s.detach() for s in speed)
    output = torch.stack(outputs, 1) if outputs else q.new_zeros(q.shape)
    return output, state, speed


# --------------------------------------------------------------------------------------------------------------
# Chunk by chunk


def _product(a: Tensor, b: Tensor, operand: torch.dtype) -> Tensor:
    """``a @ b`` with both operands rounded to ``operand``, accumulated in the state dtype (that of ``a``).

    The operands go back to the state dtype for the product: a 16-bit product would round its result as well.
    """
    if operand == a.dtype:
        return a @ b
    return a.to(operand).to(a.dtype) @ b.to(operand).to(a.dtype)


def activation_derivative(z: Tensor, activation: Activation) -> Tensor:
    """``act'(z)``, elementwise, in closed form so that autograd can differentiate it once more."""
    if activation == "gelu_tanh":
        c = (2 / torch.pi) ** 0.5
        t = torch.tanh(c * (z + 0.044715 * z**3))
        return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * c * (1 + 3 * 0.044715 * z * z)
    if activation == "gelu":
        return 0.5 * (1 + torch.erf(z * 0.5**0.5)) + z * torch.exp(-0.5 * z * z) * (2 * torch.pi) ** -0.5
    if activation == "silu":
        s = torch.sigmoid(z)
        return s * (1 + z * (1 - s))
    return 2 * F.relu(z)


def _read(spec: MemorySpec, weights: Weights, x: Tensor, operand: torch.dtype) -> tuple[Tensor, Weights, Weights]:
    """``f_W(x)``, each layer's input and each layer's product ``u W``, for ``x [B, N, C, D]``."""
    if spec.form == "linear":
        inputs: Weights = (x,)
        products: Weights = (_product(x, weights[0], operand),)
    elif spec.form == "mlp":
        z = _product(x, weights[0], operand)
        hidden = activate(z, spec.activation)
        inputs, products = (x, hidden), (z, _product(hidden, weights[1], operand))
    else:
        gate, up = _product(x, weights[0], operand), _product(x, weights[1], operand)
        hidden = activate(gate, spec.activation) * up
        inputs, products = (x, x, hidden), (gate, up, _product(hidden, weights[2], operand))
    return (x + products[-1] if spec.residual else products[-1]), inputs, products


def _layer_errors(
    spec: MemorySpec, weights: Weights, products: Weights, delta: Tensor, operand: torch.dtype
) -> Weights:
    """``E``: the inner loss's gradient at each layer's product, from ``delta`` at the output."""
    if spec.form == "linear":
        return (delta,)
    hidden_error = _product(delta, weights[-1].transpose(-1, -2), operand)
    slope = activation_derivative(products[0], spec.activation)
    if spec.form == "mlp":
        return (hidden_error * slope, delta)
    gate, up = products[:2]
    return (hidden_error * up * slope, hidden_error * activate(gate, spec.activation), delta)


def _delta_errors(
    u: Tensor, error: Tensor, product: Tensor, lr: Tensor, retention: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``dgd`` as ``gd`` with corrected errors ``R``: returns ``R``, the step of each token and the decay.

    ``(I + L) R = E + diag(gamma_{t-1}) (U W)`` with ``L_ts = e_s (u_s . u_t) prod_{s<j<t} alpha_j``; for a linear
    memory with ``l2`` this is equation 93.
    """
    step = lr / (1 + lr * u.square().sum(-1))  # e_t, the exact proximal step
    overlap = step.unsqueeze(-2) * (u @ u.transpose(-1, -2))
    decay = None
    if retention is None:
        lower = overlap.tril(-1)
        right = error + product
    else:
        lower = overlap * between_products(retention)
        before = F.pad(prefix_products(retention)[..., :-1], (1, 0), value=1.0)
        right = error + before.unsqueeze(-1) * product
        after = suffix_products(retention)
        step, decay = step * exclusive(after), after[..., 0]
    corrected = torch.linalg.solve_triangular(
        lower + torch.eye(u.shape[-2], dtype=u.dtype, device=u.device), right, upper=False, unitriangular=True
    )
    return corrected, step, decay


def _write(
    problem: ScanProblem,
    weights: Weights,
    momentum: Weights | None,
    k: Tensor,
    v: Tensor,
    chunk: int,
    operand: torch.dtype,
) -> tuple[Weights, Weights | None]:
    """One write: all tokens of a chunk, ``k`` and ``v [B, N, C, D]``, into ``weights`` and ``momentum``."""
    spec, batch = problem.spec, k.shape[0]

    def coefficient(name: str) -> Tensor | None:
        rows = getattr(problem, name)  # [B * chunks, N, ...]
        return None if rows is None else rows.unflatten(0, (batch, problem.chunks))[:, chunk]

    prediction, inputs, products = _read(spec, weights, k, operand)
    if spec.objective == "l2":
        delta = prediction - v
    elif spec.objective == "dot":
        delta = -v
    elif spec.objective == "error":
        delta = v
    else:
        delta = prediction - _read(spec, weights, v, operand)[0]
    errors = _layer_errors(spec, weights, products, delta, operand)

    step, decay = coefficient("step"), coefficient("decay")
    momentum_step = coefficient("momentum_step")
    carry, momentum_decay = coefficient("momentum_carry"), coefficient("momentum_decay")
    written, speeds = [], []
    for i, (weight, u, error) in enumerate(zip(weights, inputs, errors, strict=True)):
        token_step = step
        if spec.rule == "dgd":
            error, token_step, decay = _delta_errors(u, error, products[i], step, coefficient("retention"))
        kept = weight if decay is None else decay[..., None, None] * weight
        update = _product(u.transpose(-1, -2), token_step.unsqueeze(-1) * error, operand)
        if momentum_step is None:
            written.append(kept - update)
            continue
        momentum_update = _product(u.transpose(-1, -2), momentum_step.unsqueeze(-1) * error, operand)
        if momentum is None:
            written.append(kept - update)
            speeds.append(-momentum_update)
        else:
            written.append(kept + carry[..., None, None] * momentum[i] - update)
            speeds.append(momentum_decay[..., None, None] * momentum[i] - momentum_update)
    return tuple(written), (tuple(speeds) if momentum_step is not None else None)


def chunked_scan(problem: ScanProblem) -> tuple[Tensor, Weights, Weights]:
    """The chunked scan in closed form, one Python iteration per chunk, differentiated by plain autograd.

    Returns the output (an empty tensor when only writing), and the final weights and momentum, ``[S, N, in, out]``
    (``()`` when there is no complete chunk to write, or no momentum). In bfloat16 and float16 each operand of a
    matrix product is rounded to the dtype of ``q``; the state stays float32.
    """
    if problem.sequences is not None:
        return _scan_each_sequence(problem)
    operand = problem.tokens.dtype
    state_dtype = problem.state_dtype
    size, chunks = problem.chunk_size, problem.chunks

    def heads_first(x: Tensor) -> Tensor:
        return x.transpose(1, 2).to(state_dtype)  # [B, N, tokens, D]

    weights = tuple(w.to(state_dtype) for w in problem.weights)
    momentum: Weights | None = problem.momentum or None
    pending = 0 if problem.pending_k is None else problem.pending_k.shape[1]
    k, v = problem.k, problem.v
    if pending:
        k, v = torch.cat([problem.pending_k, k], 1), torch.cat([problem.pending_v, v], 1)
    outputs: list[Tensor] = []

    def read_until(stop: int | None) -> None:
        if problem.q is None:
            return
        start = sum(o.shape[1] for o in outputs)
        part = problem.q[:, start:stop]
        if part.shape[1]:
            outputs.append(_read(problem.spec, weights, heads_first(part), operand)[0].transpose(1, 2))

    for chunk in range(chunks):
        tokens = slice(chunk * size, (chunk + 1) * size)
        read_until((chunk + 1) * size - pending)
        weights, momentum = _write(
            problem, weights, momentum, heads_first(k[:, tokens]), heads_first(v[:, tokens]), chunk, operand
        )
        if problem.bptt_chunks and (problem.first_chunk + chunk + 1) % problem.bptt_chunks == 0:
            weights = tuple(w.detach() for w in weights)
            momentum = None if momentum is None else tuple(m.detach() for m in momentum)
    read_until(None)
    if outputs:
        output = torch.cat(outputs, 1).to(operand)
    else:  # no token to read; a copy of an empty q keeps its gradient
        output = problem.tokens.new_zeros(0) if problem.q is None else problem.q.clone()
    return (output, weights, momentum or ()) if chunks else (output, (), ())


def _scan_each_sequence(problem: ScanProblem) -> tuple[Tensor, Weights, Weights]:
    """Packed or padded sequences, one at a time: the reference reads their table on the host."""
    assert problem.sequences is not None and problem.q is not None
    size = problem.chunk_size
    state_dtype = problem.state_dtype
    output = torch.zeros_like(problem.q)
    finals: list[Weights] = []
    speeds: list[Weights] = []
    for s, row in enumerate(problem.sequences.tolist()):
        tokens = slice(row[START], row[START] + row[LENGTH])
        chunks = 0 if problem.k is None else (row[PENDING] + row[LENGTH]) // size
        chunk_rows = slice(row[CHUNK_ROW], row[CHUNK_ROW] + chunks)

        def of_sequence(x: Tensor | None, row: list[int] = row, tokens: slice = tokens) -> Tensor | None:
            return None if x is None else x[row[ROW] : row[ROW] + 1, tokens]

        def of_state(x: Tensor, s: int = s) -> Tensor:
            return x[s : s + 1] if x.dim() == 4 else x

        def of_chunks(x: Tensor | None, rows: slice = chunk_rows) -> Tensor | None:
            return None if x is None else x[rows]

        pending = slice(0, row[PENDING])
        part = replace(
            problem,
            q=of_sequence(problem.q),
            k=of_sequence(problem.k),
            v=of_sequence(problem.v),
            pending_k=None if problem.pending_k is None else problem.pending_k[s : s + 1, pending],
            pending_v=None if problem.pending_v is None else problem.pending_v[s : s + 1, pending],
            step=of_chunks(problem.step),
            retention=of_chunks(problem.retention),
            decay=of_chunks(problem.decay),
            momentum_step=of_chunks(problem.momentum_step),
            momentum_carry=of_chunks(problem.momentum_carry),
            momentum_decay=of_chunks(problem.momentum_decay),
            weights=tuple(of_state(w) for w in problem.weights),
            momentum=tuple(of_state(m) for m in problem.momentum),
            sequences=None,
            chunks=chunks,
            first_chunk=row[CHUNK_INDEX],
        )
        part_output, weights, momentum = chunked_scan(part)
        if row[LENGTH]:
            output[row[ROW], tokens] = part_output[0]
        if not weights:
            heads = problem.q.shape[2]
            weights = tuple(w.to(state_dtype).expand(1, heads, *w.shape[-2:]) for w in part.weights)
            if problem.has_momentum:
                momentum = tuple(
                    m.expand(1, heads, *m.shape[-2:]) for m in (part.momentum or map(torch.zeros_like, weights))
                )
        finals.append(weights)
        speeds.append(momentum)
    if not problem.chunks or not finals:
        return output, (), ()
    return (
        output,
        tuple(torch.cat(parts) for parts in zip(*finals, strict=True)),
        tuple(torch.cat(parts) for parts in zip(*speeds, strict=True)),
    )
