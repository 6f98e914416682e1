"""``benchmarks/call_overhead.py``: what is timed is right, and the report's numbers belong together."""

from __future__ import annotations

import pytest

from hope_kernels.bench import call_overhead
from tests.cli.support import needs_cpu_backend, sabotage_output

pytestmark = needs_cpu_backend


def test_every_call_is_timed_beside_the_core_alone():
    rows = call_overhead.measure(samples=2)
    assert [row.call for row in rows] == ["the core alone, memory_read", *call_overhead.calls("cpu")]
    assert all(0 < row.minimum_us <= row.median_us and row.samples == 2 for row in rows)


def test_rates_of_reads_are_of_all_weights_that_sequences_have():
    (row,) = call_overhead.measure_reads(samples=2, shapes=[(3, 2, 8, 16)])
    assert row.sizes == "B3 N2 D8 H16" and row.weight_bytes == 3 * 2 * 2 * 8 * 16 * 4
    assert row.gbytes == pytest.approx(row.weight_bytes / row.median_us / 1e3) and row.summed > 0


def test_streams_in_a_long_chunk_are_timed_beside_a_read():
    (row,) = call_overhead.measure_pending(samples=2, shapes=[(3, 2, 8, 16, 16)])
    assert row.sizes == "B3 N2 D8 H16 C16" and row.pending == 8 and row.median_us > 0 and row.read_us > 0
    with pytest.raises(ValueError, match="samples: got 5; want fewer than 5 at B3"):
        call_overhead.measure_pending(samples=5, shapes=[(3, 2, 8, 16, 16)])


def test_wrong_reads_are_never_timed(monkeypatch):
    sabotage_output(monkeypatch, lambda output: output * 1.01)
    with pytest.raises(RuntimeError, match=r"memory_read differs from the reference by 1\.0"):
        call_overhead.measure(samples=1)
    with pytest.raises(RuntimeError, match=r"memory_read at B1 N1 D4 H4 differs from the reference by 1\.0"):
        call_overhead.measure_reads(samples=1, shapes=[(1, 1, 4, 4)])
