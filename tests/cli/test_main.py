"""The entry point without its libraries, and the measuring code without any."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hope_kernels import cli
from tests.cli.support import run

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_a_missing_library_is_one_helpful_line(missing, monkeypatch):
    for name in list(sys.modules):
        if name.startswith(("hope_kernels.cli.", missing)):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setattr(sys, "argv", ["hope-kernels", "verify"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == (f"hope-kernels: the command line needs {missing}: pip install 'hope-kernels[cli]'")


def test_measuring_and_checking_import_torch_only():
    code = (
        "import sys, hope_kernels.bench.speed, hope_kernels.bench.parity, hope_kernels.bench.plots\n"
        "bad = {'typer', 'rich', 'matplotlib', 'psutil', 'click'} & set(sys.modules)\n"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_help_names_every_command():
    result = run("--help")
    assert result.exit_code == 0
    for command in ("doctor", "verify", "bench", "profile", "demo"):
        assert command in result.output
