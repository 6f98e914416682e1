"""The truth of the Titans tests: the layers token by token, from their equations, with nothing of the package.

One memory of a sequence and head is ``M(x) = x + gelu(x W_in) W_out``. Token ``t`` of ``x [B, T, dim]`` gives

    x̃_t = sum_j c_j x_{t-j}                       q_t = norm(x̃_t W_q)             y_t = M_mem(q_t)
    k_t = norm(M_k(x̃_t)), v_t = M_v(x̃_t)          η_t = η_max sigmoid(<M_η(x_t), w> + b)
    α_t = exp(-η_t softplus(<M_α(x_t), w'> + b'))

every memory at its chunk's start; a projection that is no memory is a linear map instead. Every memory then takes the
inner gradient ``g`` of ``1/2 |M(k_t) - target|^2`` at the chunk's start, by automatic differentiation, and changes by

    dgd  M <- α M - e u^T (u M) - e g, e = η / (1 + η |u|^2), per weight with its own input u
    gd   M <- α M - η g; with momentum S <- β S - η g, M <- α M + S
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

Weights = tuple[Tensor, Tensor]


def norm(x: Tensor) -> Tensor:
    return x / (x**2).sum(-1, keepdim=True).add(1e-6).sqrt()


def sigmoid(z: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-z))


def softplus(z: Tensor) -> Tensor:
    return torch.log1p(torch.exp(z))


def read(weights: Weights, x: Tensor) -> tuple[Tensor, Weights]:
    """M(x) for ``x [B, N, D]``, and the input of each weight."""
    z = torch.einsum("bnd,bndh->bnh", x, weights[0])
    hidden = 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    return x + torch.einsum("bnh,bnhd->bnd", hidden, weights[1]), (x, hidden)


class Memory:
    """The weights that tokens read, and the running ones that become those at the end of a chunk."""

    def __init__(self, weights: list[Tensor], batch: int, chunk_size: int, rule: str, bptt_chunks: int | None) -> None:
        self.at: Weights = tuple(w.expand(batch, *w.shape) for w in weights)
        self.running, self.speed = self.at, tuple(torch.zeros_like(w) for w in self.at)
        self.kept_speed = self.speed
        self.chunk_size, self.rule, self.bptt_chunks, self.seen = chunk_size, rule, bptt_chunks, 0

    def read(self, x: Tensor) -> Tensor:
        return read(self.at, x)[0]

    def write(
        self, k: Tensor, v: Tensor, eta: Tensor, alpha: Tensor | None, beta: Tensor | None, self_target: bool
    ) -> None:
        # The same numbers twice: the inner gradient is taken for `variables`; a target read from `at` is its constant.
        variables = tuple(w.view_as(w) for w in self.at)
        prediction, inputs = read(variables, k)
        target = self.read(v) if self_target else v
        loss = 0.5 * ((prediction - target) ** 2).sum()
        gradients = torch.autograd.grad(loss, variables, create_graph=True)
        eta = eta[..., None, None]
        alpha = 1.0 if alpha is None else alpha[..., None, None]
        running, speed = [], []
        for m, s, g, u in zip(self.running, self.speed, gradients, inputs, strict=True):
            if self.rule == "dgd":
                step = eta / (1 + eta * (u**2).sum(-1)[..., None, None])
                along = torch.einsum("bni,bnj,bnjo->bnio", u, u, m)
                running.append(alpha * m - step * along - step * g)
            elif beta is None:
                running.append(alpha * m - eta * g)
            else:
                speed.append(beta[..., None, None] * s - eta * g)
                running.append(alpha * m + speed[-1])
        self.running, self.speed = tuple(running), tuple(speed) or self.speed
        self.seen += 1
        if self.seen % self.chunk_size == 0:
            if self.bptt_chunks and (self.seen // self.chunk_size) % self.bptt_chunks == 0:
                self.running = tuple(w.detach().requires_grad_() for w in self.running)
                self.speed = tuple(s.detach() for s in self.speed)
            self.at, self.kept_speed = self.running, self.speed


def run(layer: Any, x: Tensor) -> dict[str, Tensor]:
    """Output and final weights (and momentum) of a layer, of which only parameters and settings are used."""
    p = dict(layer.named_parameters())
    batch, length, dim = x.shape
    heads = layer.heads
    slots = {"k": 0, "v": 1, "lr": 2, "retention": 3}
    adaptive = [name for name in slots if name in layer.adaptive]
    self_target = "output.weight" not in p  # the plain layer has an output projection, and targets that are given

    def per_head(y: Tensor) -> Tensor:
        return y.reshape(batch, heads, dim // heads)

    def starting(w_in: Tensor, w_out: Tensor) -> list[Tensor]:
        """W_out divided by the sixteenth root of the sum of its singular values' sixteenth powers, over the bound."""
        if layer.weight_norm_max is None:
            return [w_in, w_out]
        size = (torch.linalg.svdvals(w_out) ** 16).sum(-1) ** (1 / 16) / layer.weight_norm_max
        return [w_in, w_out / torch.where(size > 1, size, 1.0)[:, None, None]]

    main = Memory(starting(p["weights.0"], p["weights.1"]), batch, layer.chunk_size, layer.spec.rule, layer.bptt_chunks)
    projections = {}
    for i, name in enumerate(adaptive):
        own = starting(*(p[f"projections.weights.{j}"][i * heads : (i + 1) * heads] for j in range(2)))
        projections[name] = Memory(own, batch, layer.projection_chunk_size, layer.spec.rule, layer.bptt_chunks)
    linear_gates = [name for name in ("lr", "retention", "momentum") if name in layer.fixed_gates]

    def gate(name: str, x_t: Tensor) -> Tensor:
        if name in projections:
            found = projections[name].read(per_head(x_t)) * p[f"projections.readouts.{name}.weight"]
            return found.sum(-1) + p[f"projections.readouts.{name}.bias"]
        rows = slice(linear_gates.index(name) * heads, (linear_gates.index(name) + 1) * heads)
        return x_t @ p["gates.weight"][rows].T + p["gates.bias"][rows]

    outputs = []
    for t in range(length):
        mixed = sum(p["conv.weight"][j] * x[:, t - j] for j in range(min(4, t + 1)))
        k = projections["k"].read(per_head(mixed)) if "k" in projections else per_head(mixed @ p["key.weight"].T)
        v = projections["v"].read(per_head(mixed)) if "v" in projections else per_head(mixed @ p["value.weight"].T)
        k = norm(k)
        if layer.value_norm_max is not None:
            long = (v**2).sum(-1, keepdim=True) > layer.value_norm_max**2
            v = torch.where(long, layer.value_norm_max * v / (v**2).sum(-1, keepdim=True).sqrt(), v)
        eta = layer.lr_max * sigmoid(gate("lr", x[:, t]))
        alpha = torch.exp(-eta * softplus(gate("retention", x[:, t]))) if layer.retention else None
        beta = sigmoid(gate("momentum", x[:, t])) if layer.momentum else None
        y = main.read(norm(per_head(mixed @ p["query.weight"].T))).reshape(batch, dim)
        outputs.append(y @ p["output.weight"].T if "output.weight" in p else y)
        main.write(k, v, eta, alpha, beta, self_target)
        for memory in projections.values():
            memory.write(k, v, eta, alpha, None, self_target)
    results = {"output": torch.stack(outputs, 1)}
    for i in range(2):
        results[f"memory weight{i}"] = main.at[i]
        if layer.momentum:
            results[f"memory momentum{i}"] = main.kept_speed[i]
        if projections:
            results[f"projections weight{i}"] = torch.cat([memory.at[i] for memory in projections.values()], 1)
    return results
