"""The command line: ``hope-kernels doctor | verify | bench | profile | demo``.

``main`` is the console script. It needs typer, rich and matplotlib, which ``import hope_kernels`` never does.
"""

from __future__ import annotations

import sys

_REQUIRED = {"typer", "rich", "matplotlib", "psutil", "numpy"}


def main() -> None:
    """Run the command line; one helpful line instead of a traceback where its libraries are missing."""
    try:
        from hope_kernels.cli.app import app

        app(prog_name="hope-kernels")
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library not in _REQUIRED:
            raise
        sys.exit(f"hope-kernels: the command line needs {library}: pip install 'hope-kernels[cli]'")
