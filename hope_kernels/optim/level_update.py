"""``level_update``: gather the gradients of every level of a multi-frequency model, update the levels that are due.

In a Continuum Memory System the weights of level l change every ``C_l`` steps (equation 71). A step of its optimizer
touches every level's gradients and only some levels' weights; here that is one launch over lists of tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hope_kernels import backends
from hope_kernels.optim import reference
from hope_kernels.optim import validation as check
from hope_kernels.optim.problem import UpdateLevel, UpdateProblem

_ENGINES = ("cpu", "cuda")
_OWN_ENGINE = {"cpu": "cpu", "cuda": "cuda"}  # by device type


class LevelUpdate(NamedTuple):
    """What a call did: which levels it updated, and the norms that bounds were compared with.

    ``norms [levels]`` float32, on the device of the masters: the norm of a due level's gathered, scaled gradients
    before clipping; with a common ``max_norm``, their common norm. 0 for a level that was not due or has no bound.
    """

    due: tuple[bool, ...]
    norms: Tensor


@torch.no_grad()
def level_update(
    levels: Sequence[UpdateLevel],
    grads: Sequence[Sequence[Tensor | None]],
    step: int,
    *,
    grad_scale: float = 1.0,
    max_norm: float | None = None,
    backend: str | None = None,
) -> LevelUpdate:
    """Gather this step's gradients, and update the levels whose period ends with it.

    For each element of each tensor, with the level's fields and the tensor's weight decay λ::

        sum = accumulator + grad_scale * grad

    A level that is not due keeps ``accumulator = sum``. One that is due, ``(step + 1) % period == 0``, takes
    ``g = sum * scale * c``, with ``c = min(1, max_norm / (norm + 1e-6))`` where it has a bound, and, u being the number
    of its updates with this one::

        sgd        p = (1 - lr λ) p - lr g
        momentum   m = β1 m + g               p = (1 - lr λ) p - lr (g + β1 m if nesterov else m)
        adam       m = β1 m + (1 - β1) g      p = (1 - lr λ) p - lr m̂ / (sqrt(v̂) + eps)
                   v = β2 v + (1 - β2) g²     m̂ = m / (1 - β1^u), v̂ = v / (1 - β2^u)

    Then its copies are its masters rounded to nearest even, and its accumulators are 0. Everything is written in place.

    Compiled engines take one launch for all levels and read and write each element once; with a bound they read
    gradients twice, since a norm is needed before the first master changes. Sums are taken in an order that depends on
    the sizes of the tensors alone, so results do not depend on the number of threads or blocks, bit for bit. A NaN in
    a bounded level's gradients makes its norm, and with it every master under that bound, NaN.

    Args:
        levels: one :class:`UpdateLevel` each, all on one device. Tensors that are written must be contiguous and must
            not overlap.
        grads: for each level, for each of its tensors, the gradient of this step, shaped like the tensor, float32,
            bfloat16 or float16, any strides (copied if not contiguous); None for none (weight decay and moments act
            all the same when the level is due).
        step: number of this call, counted from 0. It decides what is due and corrects ``adam``'s bias.
        grad_scale: factor of this step's gradients: 1 / loss scale, or a learning rate of this step under ``lr=1``.
        max_norm: bound on the norm over all due levels together, in the place of the levels' own.
        backend: ``"reference"``, ``"cpu"``, ``"cuda"``, obeyed or refused; None for the fastest that runs here.

    Returns:
        :class:`LevelUpdate`. A captured CUDA graph repeats the pattern of the step it was captured at.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it, what it is and what is wanted.
        RuntimeError: the backend asked for cannot run this here; the message says why.
    """
    levels = check.check_levels(levels)
    grads = check.check_grads(grads, levels)
    check.check_int("step", step, 0)
    check.check_number("grad_scale", grad_scale)
    check.check_bound("max_norm", max_norm)
    for i, level in enumerate(levels):
        if max_norm is not None and level.max_norm is not None:
            raise ValueError(f"max_norm: got {max_norm} together with levels[{i}].max_norm; want one of the two")
    written = check.written(levels, step)
    params = [p for level in levels for p in level.params]
    device = params[0].device if params else torch.device("cpu")
    name = _select(backend, device, params[0].dtype if params else torch.float32)
    problem = UpdateProblem(levels, grads, step, float(grad_scale), max_norm, device)
    run = reference.level_update if name == "reference" else backends.implementation(name).level_update
    norms = run(problem)
    if name != "reference":
        # Autograd and every cache keyed on a version must see that these tensors have changed.
        for tensor in written:
            torch.autograd.graph.increment_version(tensor)
    return LevelUpdate(tuple(level.due(step) for level in levels), norms)


def _select(backend: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that runs this call."""
    backends.check_name(backend)
    if backend is None:
        own = _OWN_ENGINE.get(device.type)
        return own if own is not None and _refusal(own, device, dtype) is None else "reference"
    if backend == "reference":
        return backend
    reason = _refusal(backend, device, dtype)
    if reason is not None:
        raise RuntimeError(f"backend={backend!r} cannot run this: {reason}")
    return backend


def _refusal(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if name not in _ENGINES:
        return f"level_update runs on reference, {', '.join(_ENGINES)}"
    reason = backends.implementation(name).refuses_level_update(device)
    if reason is None and dtype != torch.float32:
        reason = f"it takes float32 masters, got {dtype}"
    return reason
