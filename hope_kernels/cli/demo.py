"""``hope-kernels demo``: is it right, is it fast, does it learn real text; and a folder that shows it."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.panel import Panel
from rich.text import Text

from hope_kernels.bench.machine import stamp
from hope_kernels.bench.parity import DTYPES, ParityReport
from hope_kernels.bench.parity_cases import cases
from hope_kernels.bench.shapes import MODES, get_shape
from hope_kernels.bench.speed import DisagreementError, SpeedReport, implementations_here
from hope_kernels.cli.bench import run_speed
from hope_kernels.cli.demo_summary import summary
from hope_kernels.cli.demo_training import (
    FAST,
    NAIVE,
    PLAIN,
    TrainingReport,
    TrainingSize,
    load_example,
    train_side_by_side,
)
from hope_kernels.cli.output import (
    console,
    fail,
    pairs_table,
    print_parity,
    print_speed,
    progress,
)
from hope_kernels.cli.verify import available, run_parity


@dataclass(frozen=True)
class DemoSize:
    """How much each part of the demo does.

    Attributes:
        all_cases: parity on all cases, not on a dozen.
        shapes, repeats, memory_modes: of the speed comparison.
        training: of the three models.
    """

    all_cases: bool
    shapes: tuple[str, ...]
    repeats: int
    memory_modes: tuple[str, ...]
    training: TrainingSize


FULL = DemoSize(True, ("S1", "S16", "S64"), 5, ("forward+backward",), TrainingSize(steps=240, batch=4))
QUICK = DemoSize(False, ("S16", "S64"), 5, (), TrainingSize(steps=40, batch=4, held_out_windows=24))


def demo(
    quick: Annotated[bool, typer.Option("--quick", help="About a minute instead of several.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for results.json, the pictures and summary.md.")] = Path(
        "demo_output"
    ),
    seed: Annotated[int, typer.Option(help="Of all inputs, parameters and batches.")] = 0,
) -> None:
    """Verify, measure, and train on real text with the naive and the fast path; exit 1 if a result is wrong."""
    if not run_demo(QUICK if quick else FULL, out, seed):
        raise typer.Exit(1)


def run_demo(size: DemoSize, out: Path, seed: int) -> bool:
    """All three parts, the folder, the verdict: True when every result is right."""
    started = time.perf_counter()
    try:
        load_example("byte_transformer")  # before minutes are spent on what comes first
    except FileNotFoundError as error:
        raise fail(str(error)) from error
    _introduce()

    _heading("1. Is it right?", "Every backend against a token-by-token oracle in float64.")
    parity = run_parity(cases(small=not size.all_cases), available(), list(DTYPES), seed)
    console.print(_parity_overview(parity))
    print_parity(parity, tables=False)

    _heading("2. Is it fast?", "The naive path (eager PyTorch) and every backend, side by side on the same inputs.")
    try:
        speed = run_speed(
            [get_shape(name) for name in size.shapes],
            implementations_here(),
            modes=list(MODES),
            repeats=size.repeats,
            memory_modes=size.memory_modes,
            seed=seed,
        )
    except DisagreementError as error:
        console.print(f"[bold red]wrong results[/]: {error}")
        return False
    print_speed(speed)

    _heading(
        "3. Does it learn real text?",
        "A byte-level Transformer reads CPython's documentation: with plain MLPs, with CMS layers on the naive path, "
        "with the same CMS layers on the fast path.",
    )
    training = _train(size.training, seed)
    _print_training(training)

    checks = claims(parity, training)
    _write_folder(out, seed, parity, speed, training, checks)
    lines = [Text.assemble(("yes  ", "bold green") if ok else ("NO   ", "bold red"), claim) for ok, claim in checks]
    seconds = time.perf_counter() - started
    lines.append(Text(f"\n{out / 'summary.md'} has it all on one page ({seconds:.0f} s).", style="dim"))
    console.print(Panel(Text("\n").join(lines), title="What was shown", title_align="left"))
    # Speed is shown, not judged: on a busy machine a time says nothing about the code.
    return parity.passed and training.curves_coincide


def claims(parity: ParityReport, training: TrainingReport) -> list[tuple[bool, str]]:
    """What the demo says it shows, and whether it did."""
    checks = [
        (parity.passed, f"all {len(parity.rows)} parity runs are within budget of the float64 oracle"),
        (
            training.curves_coincide,
            f"naive and fast path train alike: the loss curves are at most {training.curve_distance:.1e} nats apart "
            f"(tolerance {training.tolerance:.0e})",
        ),
    ]
    if training.fast_backend == "reference":
        reasons = unavailable_reasons()
        return [*checks, (True, f"no compiled backend runs here, so fast is the naive path too: {reasons}")]
    return [
        *checks,
        (
            training.ratio > 1,
            f"the fast path ({training.fast_backend}) trains {training.ratio:.2f}x as fast as the naive one",
        ),
    ]


def unavailable_reasons() -> str:
    """Why the backends that do not run here do not."""
    from hope_kernels import available_backends

    return "; ".join(f"{name}: {status.reason}" for name, status in available_backends().items() if not status)


def _introduce() -> None:
    console.print(
        Panel(
            "A memory is a small network with weights of its own for every sequence. Every token reads it; once per "
            "chunk it is written, by a step of gradient descent. CMS layers stack such memories at several "
            "frequencies, in the place of a Transformer's MLPs. The three parts below check them, time them, and let "
            "them learn.",
            title="hope_kernels",
            title_align="left",
        )
    )


def _heading(title: str, text: str) -> None:
    console.print()
    console.rule(f"[bold]{title}[/]", align="left")
    console.print(f"[dim]{text}[/]")


def _parity_overview(parity: ParityReport):
    dtypes = list(dict.fromkeys(row.dtype for row in parity.rows))
    rows = []
    for backend in dict.fromkeys(row.backend for row in parity.rows):
        worst = [
            max(
                (row.worst_error for row in parity.rows if (row.backend, row.dtype) == (backend, dtype)),
                default=None,
            )
            for dtype in dtypes
        ]
        rows.append([backend, *("-" if error is None else f"{error:.1e}" for error in worst)])
    count = len({row.case for row in parity.rows})
    return pairs_table(f"Worst relative error over {count} cases", ["backend", *dtypes], rows)


def _train(size: TrainingSize, seed: int) -> TrainingReport:
    with progress() as bar:
        task = bar.add_task("training", total=size.steps, detail="")

        def notify(losses: str) -> None:
            bar.update(task, advance=1, detail=losses)

        return train_side_by_side(size, seed=seed, notify=notify)


def _print_training(training: TrainingReport) -> None:
    rows = [
        [
            name,
            f"{training.parameters[name]:,}",
            f"{training.losses[name][0]:.3f} -> {training.losses[name][-1]:.3f}",
            f"{training.bits_per_byte[name]:.3f}",
            f"{training.tokens_per_second[name]:,.0f}",
        ]
        for name in (PLAIN, NAIVE, FAST)
    ]
    title = f"{training.size.steps} steps on {training.train_bytes:,} bytes of documentation, one seed"
    console.print(pairs_table(title, ["model", "parameters", "loss (nats)", "bits/byte", "tokens/s"], rows))
    console.print(
        "[dim]loss: before the first and the last step; bits/byte: on held-out topics, lower is better;"
        " tokens/s: training, from the median step[/]"
    )


def _write_folder(
    out: Path,
    seed: int,
    parity: ParityReport,
    speed: SpeedReport,
    training: TrainingReport,
    checks: list[tuple[bool, str]],
) -> None:
    from hope_kernels.bench import plots

    out.mkdir(parents=True, exist_ok=True)
    head = stamp("demo")
    results = head | {
        "seed": seed,
        "claims": [{"holds": ok, "claim": claim} for ok, claim in checks],
        "parity": parity.as_dict(),
        "speed": speed.as_dict(),
        "training": training.as_dict(),
    }
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (out / "summary.md").write_text(summary(head, parity, speed, training, checks))
    plots.plot_parity(parity, out / "parity.png")
    plots.plot_speed(speed, out / "speed.png")
    plots.plot_losses(training.losses, (NAIVE, FAST), training.tolerance, out / "losses.png")
    plots.plot_throughput(training.tokens_per_second, out / "throughput.png")
