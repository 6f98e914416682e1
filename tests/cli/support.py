"""What the tests of the command line share: a runner, a scan small enough to time in milliseconds, and sabotage."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor
from typer.testing import CliRunner, Result

from hope_kernels import available_backends
from hope_kernels.backends import implementation
from hope_kernels.backends.interface import ScanGradients
from hope_kernels.bench.shapes import Shape
from hope_kernels.cli.app import app

TINY = Shape("tiny", "tests", batch=2, tokens=16, heads=2, dim=8, hidden=16, chunk_size=4)

needs_cpu_backend = pytest.mark.skipif(
    not available_backends()["cpu"], reason="the compiled core is not built: see hope-kernels doctor"
)


def run(*words: object) -> Result:
    """``hope-kernels words``, output wide enough that no table wraps."""
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})


def sabotage_output(monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor]) -> None:
    """Make the cpu backend return another output."""
    backend = implementation("cpu")
    honest = backend.scan_forward

    def scan_forward(problem, *, save):
        output, *rest = honest(problem, save=save)
        return change(output), *rest

    monkeypatch.setattr(backend, "scan_forward", scan_forward)


def sabotage_gradient(monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[[Tensor], Tensor]) -> None:
    """Make the cpu backend return another gradient of one of its inputs."""
    backend = implementation("cpu")
    honest = backend.scan_backward

    def scan_backward(*arguments, **options) -> ScanGradients:
        gradients = honest(*arguments, **options)
        value = getattr(gradients, name)
        return gradients if value is None else gradients._replace(**{name: change(value)})

    monkeypatch.setattr(backend, "scan_backward", scan_backward)
