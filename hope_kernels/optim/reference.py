"""The update in readable PyTorch, tensor by tensor: what the compiled engines must compute."""

from __future__ import annotations

import torch
from torch import Tensor

from hope_kernels.optim.problem import UpdateLevel, UpdateProblem


def level_update(problem: UpdateProblem) -> Tensor:
    """Gathers gradients and updates what is due, in place; returns the norms ``[levels]``.

    The equations are those of :func:`hope_kernels.optim.level_update`. It runs in the dtype of the masters.
    """
    sums = [
        [_gathered(level, i, grad, problem.grad_scale) for i, grad in enumerate(grads)]
        for level, grads in zip(problem.levels, problem.grads, strict=True)
    ]
    due = [level.due(problem.step) for level in problem.levels]
    norms = torch.zeros(len(problem.levels), device=problem.device)
    coefficients = [1.0] * len(problem.levels)
    if problem.max_norm is not None:
        each = [_norm(level, s) for level, s, is_due in zip(problem.levels, sums, due, strict=True) if is_due]
        together = torch.stack(each).norm() if each else torch.zeros(())
        for i, is_due in enumerate(due):
            if is_due:
                norms[i], coefficients[i] = together, _coefficient(problem.max_norm, together)
    else:
        for i, (level, is_due) in enumerate(zip(problem.levels, due, strict=True)):
            if is_due and level.max_norm is not None:
                norms[i] = norm = _norm(level, sums[i])
                coefficients[i] = _coefficient(level.max_norm, norm)
    for level, level_sums, is_due, coefficient in zip(problem.levels, sums, due, coefficients, strict=True):
        for i, gathered in enumerate(level_sums):
            if is_due:
                _apply(level, i, gathered * level.scale * coefficient, problem.step)
                gathered = torch.zeros_like(gathered)
            if level.accumulators is not None:
                level.accumulators[i].copy_(gathered)
    return norms


def _gathered(level: UpdateLevel, i: int, grad: Tensor | None, grad_scale: float) -> Tensor:
    param = level.params[i]
    sum_ = torch.zeros_like(param) if level.accumulators is None else level.accumulators[i]
    return sum_ if grad is None else sum_ + grad_scale * grad.to(param.dtype)


def _norm(level: UpdateLevel, sums: list[Tensor]) -> Tensor:
    if not sums:
        return torch.zeros(())
    return torch.stack([(s * level.scale).norm() for s in sums]).norm()


def _coefficient(max_norm: float, norm: Tensor) -> Tensor:
    return (max_norm / (norm + 1e-6)).clamp(max=1)  # as torch.nn.utils.clip_grad_norm_


def _apply(level: UpdateLevel, i: int, g: Tensor, step: int) -> None:
    param, decay = level.params[i], level.decays()[i]
    beta1, beta2 = level.betas
    if level.rule == "sgd":
        change = g
    elif level.rule == "momentum":
        m = level.first_moments[i]
        m.mul_(beta1).add_(g)
        change = g + beta1 * m if level.nesterov else m
    else:
        m, v = level.first_moments[i], level.second_moments[i]
        m.mul_(beta1).add_((1 - beta1) * g)
        v.mul_(beta2).add_((1 - beta2) * g * g)
        correction1, correction2 = level.corrections(step)
        change = (m / correction1) / ((v / correction2).sqrt() + level.eps)
    param.mul_(1 - level.lr * decay).sub_(level.lr * change)
    if level.copies is not None and level.copies[i] is not None:
        level.copies[i].copy_(param)
