"""The demo's third part: three models learn the same text in lockstep, plain MLPs, CMS naive and CMS fast.

Every step gives one batch to each model in turn, so that the three see the same bytes in the same order and their
times are taken side by side.
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

PLAIN, NAIVE, FAST = "plain MLP", "CMS, naive path", "CMS, fast path"

# How far the losses (nats per byte) of the two CMS models may be apart at any step. Both compute the same in float32
# and differ by rounding, about 1e-7 of a gradient per step; changing every initial parameter by 1e-7 of itself moved
# no loss of 240 steps by more than 5e-7. The tolerance leaves other processors 200 times that.
CURVE_TOLERANCE = 1e-4


@dataclass(frozen=True)
class TrainingSize:
    """How long and how large: steps, windows per step, bytes per window, model width and depth, held-out windows.

    ``held_out_windows`` None evaluates all of the held-out text.
    """

    steps: int
    batch: int = 8
    context: int = 256
    dim: int = 128
    depth: int = 2
    held_out_windows: int | None = None


@dataclass
class TrainingReport:
    """What came out, by model name (:data:`PLAIN`, :data:`NAIVE`, :data:`FAST`).

    Attributes:
        size: what was run.
        fast_backend: the backend that the fast path runs on.
        train_bytes, held_out_bytes: lengths of the texts.
        parameters: of each model.
        losses: nats per byte of every step, before the step's update.
        seconds: of every step (forward, backward and optimizer).
        bits_per_byte: on held-out text, after training.
        tolerance: how far the two CMS curves may be apart at any step, see :data:`CURVE_TOLERANCE`.
    """

    size: TrainingSize
    fast_backend: str
    train_bytes: int
    held_out_bytes: int
    tolerance: float
    parameters: dict[str, int] = field(default_factory=dict)
    losses: dict[str, list[float]] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    bits_per_byte: dict[str, float] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> dict[str, float]:
        """Training throughput from the median step."""
        tokens = self.size.batch * self.size.context
        return {name: tokens / statistics.median(times) for name, times in self.seconds.items()}

    @property
    def ratio(self) -> float:
        """How many times faster the fast path trains than the naive one."""
        return self.tokens_per_second[FAST] / self.tokens_per_second[NAIVE]

    @property
    def curve_distance(self) -> float:
        """The largest difference between the two CMS losses at any step, nats per byte; inf if one is not finite."""
        distances = [abs(a - b) for a, b in zip(self.losses[NAIVE], self.losses[FAST], strict=True)]
        return max(distance if distance == distance else float("inf") for distance in distances)

    @property
    def curves_coincide(self) -> bool:
        return self.curve_distance <= self.tolerance

    def as_dict(self) -> dict[str, object]:
        from dataclasses import asdict

        return asdict(self) | {
            "tokens_per_second": self.tokens_per_second,
            "ratio": self.ratio,
            "curve_distance": self.curve_distance,
            "curves_coincide": self.curves_coincide,
        }


def load_example(name: str) -> ModuleType:
    """A module of ``examples/``, which comes with the source checkout: beside the package, or in the working directory.

    Raises:
        FileNotFoundError: it is in neither place.
    """
    folders = [Path(__file__).parents[2] / "examples", Path.cwd() / "examples"]
    for folder in folders:
        path = folder / f"{name}.py"
        if path.exists():
            spec = importlib.util.spec_from_file_location(f"hope_kernels_examples_{name}", path)
            module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
            sys.modules[spec.name] = module  # type: ignore[union-attr]
            spec.loader.exec_module(module)  # type: ignore[union-attr]
            return module
    raise FileNotFoundError(
        f"examples/{name}.py is in neither {folders[0]} nor {folders[1]}; run the demo from a source checkout"
    )


def train_side_by_side(
    size: TrainingSize, *, seed: int = 0, notify: Callable[[str], None] = lambda message: None
) -> TrainingReport:
    """Train the three models from one seed on CPython's documentation text, then read the held-out part.

    Args:
        size: how long and how large.
        seed: of parameters and batches; the two CMS models start with the same parameters.
        notify: told the losses after every step.
    """
    example = load_example("byte_transformer")
    train, held_out = example.documentation()
    builds = {PLAIN: (False, None), NAIVE: (True, "reference"), FAST: (True, None)}
    models = {
        name: example.build(cms, seed=seed, dim=size.dim, depth=size.depth, context=size.context, backend=backend)
        for name, (cms, backend) in builds.items()
    }
    trainers = {name: example.Trainer(model, size.steps) for name, model in models.items()}
    report = TrainingReport(
        size=size,
        fast_backend=_fast_backend(models[FAST]),
        train_bytes=len(train),
        held_out_bytes=len(held_out),
        tolerance=CURVE_TOLERANCE,
        parameters={name: sum(p.numel() for p in model.parameters()) for name, model in models.items()},
        losses={name: [] for name in models},
        seconds={name: [] for name in models},
    )
    source = example.batches(train, batch=size.batch, context=size.context, seed=seed)
    for _ in range(size.steps):
        window = next(source)
        for name, trainer in trainers.items():
            start = time.perf_counter()
            report.losses[name].append(trainer.step(window))
            report.seconds[name].append(time.perf_counter() - start)
        notify("   ".join(f"{name} {losses[-1]:.3f}" for name, losses in report.losses.items()))
    for name, model in models.items():
        report.bits_per_byte[name] = example.bits_per_byte(
            model, held_out, batch=size.batch, limit=size.held_out_windows
        )
    return report


def _fast_backend(model) -> str:
    """The backend that ``backend=None`` picks for the written levels of a CMS model."""
    from hope_kernels.backends import select

    parameter = next(model.parameters())
    level = next(level for level in model.blocks[0].mlp.levels if hasattr(level, "chunk_size"))
    return select(None, level.request("scan", parameter.dtype, gradients=True))
