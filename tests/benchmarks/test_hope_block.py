"""``benchmarks/hope_block.py``: every part is timed in both modes, and the scan does what the projections do."""

from __future__ import annotations

import pytest

from benchmarks import hope_block
from tests.cli.support import needs_cpu_backend

SIZES = {"dim": 16, "heads": 2, "batch": 1, "tokens": 70}


@needs_cpu_backend
def test_every_part_is_timed_and_shown_as_a_share_of_the_block():
    row = hope_block.measure(**SIZES, repeats=1)
    for mode in ("forward", "forward and backward"):
        assert list(row[mode]) == list(hope_block.PARTS) and all(t["median"] > 0 for t in row[mode].values())
    row["forward"] = {name: {"median": 0.002 if name == "block" else 0.001} for name in hope_block.PARTS}
    assert "| 1 x 70 tokens, forward | 2 ms | 1 ms, 50% |" in hope_block.table([row])


def test_a_scan_that_reads_other_keys_is_never_timed(monkeypatch):
    honest = hope_block.memory_scan
    monkeypatch.setattr(hope_block, "memory_scan", lambda q, *args, **options: honest(q.flip(1), *args, **options))
    with pytest.raises(AssertionError):
        hope_block.parts(**SIZES)
