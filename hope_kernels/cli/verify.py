"""``hope-kernels verify``: every backend against the token-by-token oracle."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Annotated

import typer

from hope_kernels.bench.machine import stamp
from hope_kernels.bench.parity import DTYPES, ParityReport, check_parity
from hope_kernels.bench.parity_cases import Case, Trial, cases, load_golden
from hope_kernels.cli.output import fail, print_parity, progress, write_json


def verify(
    backend: Annotated[
        list[str] | None, typer.Option(help="A backend to check; repeatable. Default: all that run here.")
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help=f"One of {', '.join(DTYPES)}; repeatable. Default: all.")
    ] = None,
    form: Annotated[str | None, typer.Option(help="Only memories of this form: linear, mlp or glu.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the inputs.")] = 0,
    small: Annotated[bool, typer.Option("--small", help="A dozen cases instead of all.")] = False,
    golden: Annotated[
        Path | None, typer.Option(help="Check the golden cases in this folder (tests/golden) instead.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Also write the report to this file.")] = None,
) -> None:
    """Check output, final state and every gradient of every backend, spec and dtype; exit 1 if any is over budget.

    The truth is a token-by-token float64 oracle that takes inner gradients by automatic differentiation. Budgets:
    1e-10 in float64; in lower precision twice the error of the eager reference in the same dtype plus 4 eps.
    """
    try:
        chosen: list[Case] | list[Trial] = load_golden(golden) if golden is not None else cases(form, small=small)
        if golden is not None and form is not None:
            chosen = [trial for trial in chosen if trial.problem.spec.form == form]
        report = run_parity(chosen, backend or available(), dtype or list(DTYPES), seed)
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        raise fail(str(error)) from error
    print_parity(report)
    if json is not None:
        write_json(stamp("verify") | {"seed": seed} | report.as_dict(), json)
    if not report.passed:
        raise typer.Exit(1)


def available() -> list[str]:
    """Names of the backends that run here, but for interpreted ones."""
    from hope_kernels import available_backends

    return [name for name, status in available_backends().items() if status and not status.interpreted]


def run_parity(trials: list[Case] | list[Trial], backends: list[str], dtypes: list[str], seed: int) -> ParityReport:
    """:func:`check_parity` with a progress bar, for backends that are known to run here.

    Raises:
        ValueError: unknown backend or dtype.
        RuntimeError: a backend does not run here.
    """
    from hope_kernels.bench.speed import implementations_here

    implementations_here(backends)
    with progress() as bar:
        task = bar.add_task("checking parity", total=len(trials), detail="")
        done = count()

        def notify(name: str) -> None:
            bar.update(task, detail=name, completed=next(done))

        return check_parity(trials, backends, dtypes, seed=seed, notify=notify)
