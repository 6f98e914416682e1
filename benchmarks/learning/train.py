"""Train one model on one task and ask it the task's tests; every model in the same way, on the same batches."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.learning.models import Size, config_of
from benchmarks.learning.tasks import NO_LABEL, Questions, Task
from hope_kernels.models import HopeConfig, HopeForCausalLM

LOSS_POINTS = 50  # of a training curve


@dataclass(frozen=True)
class Recipe:
    """How a model is trained: AdamW with a linear warm-up, then a cosine down to a tenth, gradients clipped.

    Attributes:
        steps, batch: updates, and sequences in each.
        warmup: share of the steps.
        weight_decay: of matrices; vectors and initial memories' gates do not decay.
        clip: largest norm of the gradient.
    """

    steps: int
    batch: int
    warmup: float = 0.1
    weight_decay: float = 0.01
    clip: float = 1.0

    def lr(self, step: int, peak: float) -> float:
        """The learning rate of step 0, 1, .."""
        warmup = max(1, round(self.warmup * self.steps))
        if step < warmup:
            return peak * (step + 1) / warmup
        return peak * (0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, self.steps - warmup)))


@dataclass(frozen=True)
class Run:
    """What came of one training.

    Attributes:
        scores: by condition, accuracy (0 to 1) or bits per byte; None where that is not finite, and no conditions
            where training broke off.
        final_loss: nats, mean over the last tenth of the steps; None where training broke off.
        losses: nats, means over equal parts of the training.
        gradient_norm: median over the steps, before clipping; None without a step.
        broke_off: the step whose loss or gradient was not finite, or None.
        seconds: of processor time, training alone.
    """

    model: str
    seed: int
    lr: float
    steps: int
    scores: dict[str, float | None]
    final_loss: float | None
    losses: list[float]
    gradient_norm: float | None
    broke_off: int | None
    seconds: float


def train(
    name: str,
    task: Task,
    size: Size,
    recipe: Recipe,
    lr: float,
    seed: int,
    *,
    test: bool = True,
    config: HopeConfig | None = None,
) -> Run:
    """Train ``name`` on ``task`` with one thread; ``seed`` decides parameters and batches, these for all models alike.

    ``lr`` is the highest learning rate. ``test`` False leaves the tests, and the scores, away. ``config`` takes the
    place of the one that ``name`` and ``size`` make.
    """
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = HopeForCausalLM(config_of(name, task.vocab_size, size) if config is None else config)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": recipe.weight_decay},
            {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
    )
    generator = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    norms: list[float] = []
    broke_off = None
    start = time.process_time()
    for step in range(recipe.steps):
        ids, labels = task.batch(recipe.batch, generator)
        loss = model(ids, labels=labels).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        if not (loss.isfinite() and norm.isfinite()):
            broke_off = step
            break
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr(step, lr)
        optimizer.step()
        losses.append(loss.item())
        norms.append(norm.item())
    seconds = time.process_time() - start
    return Run(
        model=name,
        seed=seed,
        lr=lr,
        steps=recipe.steps,
        scores=score(model, task) if test and broke_off is None else {},
        final_loss=None if broke_off is not None else statistics.fmean(losses[-max(1, recipe.steps // 10) :]),
        losses=means(losses, LOSS_POINTS),
        gradient_norm=statistics.median(norms) if norms else None,
        broke_off=broke_off,
        seconds=round(seconds, 1),
    )


def means(values: list[float], parts: int) -> list[float]:
    """Means over at most ``parts`` parts of about equal length."""
    count = min(parts, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)] if count else [0]
    return [round(statistics.fmean(values[a:b]), 4) for a, b in pairwise(edges)]


@torch.no_grad()
def score(model: nn.Module, task: Task) -> dict[str, float | None]:
    """By condition of the task's tests, the share of right answers or the bits per byte, None where not finite."""
    found: dict[str, float | None] = {}
    for test in task.tests():
        found.update(score_test(model, test, task.metric))
    return found


def score_test(model: nn.Module, test: Questions, metric: str, rows: int = 32) -> dict[str, float | None]:
    """One test's conditions, read ``rows`` sequences at a time.

    Raises:
        ValueError: the metric is unknown.
    """
    if metric not in ("accuracy", "bits"):
        raise ValueError(f"metric is {metric!r}; want 'accuracy' or 'bits'")
    values = []
    for ids, labels in zip(test.ids.split(rows), test.labels.split(rows), strict=True):
        logits = model(ids).logits
        values.append(_right(logits, labels) if metric == "accuracy" else _bits(logits, labels))
    value = torch.cat(values)
    averages = {name: value[counted].double().mean().item() for name, counted in test.conditions.items()}
    return {name: average if math.isfinite(average) else None for name, average in averages.items()}


def _right(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(-1) == labels).float()


def _bits(logits: Tensor, labels: Tensor) -> Tensor:
    """``[B, T]``; 0 where there is no label."""
    nats = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=NO_LABEL, reduction="none")
    return nats.view_as(labels) / math.log(2)
