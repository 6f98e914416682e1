"""What an update must compute: PyTorch's own optimizers in float64, one per level, on gradients gathered here.

``torch.optim`` couples the weight decay of its SGD to the gradient; there it is applied by hand, ahead of the step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hope_kernels.optim import UpdateLevel


class Oracle:
    """The levels' masters in float64, updated as :func:`hope_kernels.optim.level_update` says."""

    def __init__(self, levels: Sequence[UpdateLevel]):
        self.levels = [(level.period, level.scale, level.max_norm) for level in levels]
        self.params = [[p.detach().double().clone().requires_grad_() for p in level.params] for level in levels]
        self.sums = [[torch.zeros_like(p) for p in params] for params in self.params]
        self.decays, self.optimizers = [], []
        for level, params in zip(levels, self.params, strict=True):
            decays = list(level.decays())
            if level.rule == "adam":
                groups = [{"params": [p], "weight_decay": d} for p, d in zip(params, decays, strict=True)]
                options = {"lr": level.lr, "betas": level.betas, "eps": level.eps, "foreach": False}
                optimizer = torch.optim.AdamW(groups, **options) if groups else None
                decays = [0.0] * len(decays)
            else:
                momentum = level.betas[0] if level.rule == "momentum" else 0.0
                nesterov = level.rule == "momentum" and level.nesterov and momentum > 0
                options = {"lr": level.lr, "momentum": momentum, "nesterov": nesterov, "foreach": False}
                optimizer = torch.optim.SGD(params, **options) if params else None
            self.decays.append([1 - level.lr * d for d in decays])
            self.optimizers.append(optimizer)

    @torch.no_grad()
    def step(
        self,
        grads: Sequence[Sequence[Tensor | None]],
        step: int,
        grad_scale: float = 1.0,
        max_norm: float | None = None,
    ) -> list[float]:
        """One call; returns the norms."""
        due = [(step + 1) % period == 0 for period, _, _ in self.levels]
        for sums, of_level in zip(self.sums, grads, strict=True):
            for total, grad in zip(sums, of_level, strict=True):
                if grad is not None:
                    total += grad_scale * grad.double()
        for i, (_, scale, _) in enumerate(self.levels):
            if due[i]:
                for param, total in zip(self.params[i], self.sums[i], strict=True):
                    param.grad = total * scale
                    total.zero_()
        norms = [0.0] * len(self.levels)
        if max_norm is not None:
            every = [p for i, params in enumerate(self.params) if due[i] for p in params]
            norm = float(torch.nn.utils.clip_grad_norm_(every, max_norm)) if every else 0.0
            norms = [norm if is_due else 0.0 for is_due in due]
        for i, (_, _, bound) in enumerate(self.levels):
            if not due[i] or self.optimizers[i] is None:
                continue
            if bound is not None and max_norm is None:
                norms[i] = float(torch.nn.utils.clip_grad_norm_(self.params[i], bound))
            for param, kept in zip(self.params[i], self.decays[i], strict=True):
                param *= kept
            self.optimizers[i].step()
        return norms
