"""The vocabulary of an update: what a level is, and one call's problem as engines take it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

RULES = ("sgd", "momentum", "adam")
GRADIENT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COPY_DTYPES = (torch.bfloat16, torch.float16)
_DTYPE_NUMBERS = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}


@dataclass(eq=False)
class UpdateLevel:
    """Tensors that are updated together every ``period`` steps, their state, and how they are updated.

    ``UpdateLevel.zeros`` makes one with fresh state. Fields may be set between calls: ``level.lr = schedule(step)``.

    Attributes:
        params: the masters, contiguous float32 (float64: reference backend only) of any shapes, updated in place.
        period: C, steps between updates: due at steps ``C - 1, 2C - 1, ..``, counted from 0.
        rule: ``"sgd"``, ``"momentum"`` or ``"adam"``; see :func:`hope_kernels.optim.level_update` for the equations.
        lr: learning rate, not negative.
        betas: decay of the first and of the second moment, in [0, 1). ``momentum`` uses the first.
        eps: added to the root of the second moment (``adam``).
        nesterov: look one step of momentum ahead (``momentum``).
        weight_decay: decoupled: masters shrink by ``1 - lr * weight_decay``. One number, or one per tensor (0 for
            biases and norms).
        scale: what gathered gradients are multiplied with when they are applied: ``1 / period`` for their mean.
        max_norm: bound on the norm of this level's gathered, scaled gradients; None for none.
        accumulators: the gradients gathered so far, like ``params``. None where the period is 1.
        first_moments, second_moments: like ``params``, where the rule has them.
        copies: bfloat16 or float16 copies of the masters, rewritten with each update; None for none (of this tensor).
    """

    params: Sequence[Tensor]
    period: int = 1
    rule: str = "adam"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    nesterov: bool = False
    weight_decay: float | Sequence[float] = 0.0
    scale: float = 1.0
    max_norm: float | None = None
    accumulators: Sequence[Tensor] | None = field(default=None, repr=False)
    first_moments: Sequence[Tensor] | None = field(default=None, repr=False)
    second_moments: Sequence[Tensor] | None = field(default=None, repr=False)
    copies: Sequence[Tensor | None] | None = field(default=None, repr=False)

    @classmethod
    def zeros(
        cls,
        params: Sequence[Tensor],
        *,
        period: int = 1,
        rule: str = "adam",
        copy_dtype: torch.dtype | None = None,
        **settings: object,
    ) -> UpdateLevel:
        """A level whose state is zero, with copies of the masters in ``copy_dtype`` where that is given.

        ``settings``: the other fields, by name.
        """
        params = list(params)

        def like_params() -> list[Tensor]:
            return [torch.zeros_like(p, memory_format=torch.contiguous_format, requires_grad=False) for p in params]

        return cls(
            params,
            period=period,
            rule=rule,
            accumulators=like_params() if period != 1 else None,
            first_moments=like_params() if rule in ("momentum", "adam") else None,
            second_moments=like_params() if rule == "adam" else None,
            copies=None if copy_dtype is None else [p.detach().to(copy_dtype) for p in params],
            **settings,
        )

    def due(self, step: int) -> bool:
        """Whether this level is updated at the end of step ``step``, counted from 0."""
        return (step + 1) % self.period == 0

    def updates(self, step: int) -> int:
        """How many updates there have been by the end of step ``step``."""
        return (step + 1) // self.period

    def decays(self) -> Sequence[float]:
        """The weight decay of each tensor."""
        if isinstance(self.weight_decay, Sequence):
            return self.weight_decay
        return [self.weight_decay] * len(self.params)

    def corrections(self, step: int) -> tuple[float, float]:
        """``1 - beta ** updates`` for both moments; 1 before the first update, where nothing is corrected."""
        updates = self.updates(step)
        return (1 - self.betas[0] ** updates, 1 - self.betas[1] ** updates) if updates else (1.0, 1.0)


class UpdateProblem(NamedTuple):
    """One checked call: levels, their gradients (each like its parameter and contiguous, or None), and the call's own.

    ``max_norm`` None: no bound over all due levels together.
    """

    levels: Sequence[UpdateLevel]
    grads: Sequence[Sequence[Tensor | None]]
    step: int
    grad_scale: float
    max_norm: float | None
    device: torch.device

    def tables(self) -> tuple[tuple[tuple, ...], tuple[tuple, ...]]:
        """Tensors and levels as the compiled engines take them: one tuple each, of addresses and numbers."""
        tensors, levels = [], []
        for number, (level, grads) in enumerate(zip(self.levels, self.grads, strict=True)):
            nothing = [None] * len(level.params)
            for param, grad, accumulator, first, second, copy, decay in zip(
                level.params,
                grads,
                level.accumulators or nothing,
                level.first_moments or nothing,
                level.second_moments or nothing,
                level.copies or nothing,
                level.decays(),
                strict=True,
            ):
                tensors.append(
                    (
                        param.data_ptr(),
                        None if grad is None else grad.data_ptr(),
                        None if accumulator is None else accumulator.data_ptr(),
                        None if first is None else first.data_ptr(),
                        None if second is None else second.data_ptr(),
                        None if copy is None else copy.data_ptr(),
                        param.numel(),
                        number,
                        0 if grad is None else _DTYPE_NUMBERS[grad.dtype],
                        2 if copy is None else _DTYPE_NUMBERS[copy.dtype],
                        decay,
                    )
                )
            levels.append(
                (
                    RULES.index(level.rule),
                    level.due(self.step),
                    level.nesterov,
                    level.lr,
                    *level.betas,
                    level.eps,
                    1 - level.betas[0],
                    1 - level.betas[1],
                    *level.corrections(self.step),
                    level.scale,
                    level.max_norm or 0.0,
                )
            )
        return tuple(tensors), tuple(levels)
