"""How reports of kernels' resources are shown and written: a table on the terminal, JSON with Markdown beside it."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

# How lines that end with these words are shown.
STYLES = {"FAILS": "red", "does not compile": "red", "tolerated": "yellow"}


def show(title: str, columns: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """Prints a table; without rich in plain columns."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(columns, *lines, strict=True)]
        print(title)
        for line in (columns, *lines):
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        return
    table = Table(title=title, header_style="bold")
    for column in columns:
        table.add_column(column, no_wrap=True)
    for line in lines:
        table.add_row(*line, style=STYLES.get(line[-1]))
    Console(width=None if sys.stdout.isatty() else 180).print(table)


def markdown_table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """The same in Markdown; the column without a name is the verdict."""
    return [
        "| " + " | ".join(column or "verdict" for column in columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(line) + " |" for line in lines),
    ]


def write(target: Path, report: Mapping[str, object], markdown: Sequence[str]) -> None:
    """The report as JSON at ``target``, and for people beside it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(report, indent=1) + "\n")
    target.with_suffix(".md").write_text("\n".join(markdown) + "\n")
    print(f"written: {target} and {target.with_suffix('.md').name}")
