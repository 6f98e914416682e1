"""``hope-kernels profile`` names the operators that take the time and leaves a trace a browser can read."""

from __future__ import annotations

import json

import pytest

from hope_kernels.bench import shapes as shape_table
from tests.cli.support import TINY, needs_cpu_backend, run


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(shape_table.SHAPES, TINY.name, TINY)


def test_the_naive_path_spends_its_time_in_batched_products(tmp_path):
    trace = tmp_path / "trace.json"
    result = run("profile", "--shape", "tiny", "--backend", "reference", "--calls", 2, "--trace", trace)
    assert result.exit_code == 0, result.output
    # 4 chunks: 2 products to read, 2 and 1 for the error, 2 to write.
    line = next(line.split() for line in result.output.splitlines() if "aten::bmm" in line)
    assert line[1] == "28"
    events = json.loads(trace.read_text())["traceEvents"]
    assert sum(event.get("name") == "aten::bmm" for event in events) == 2 * 28


@needs_cpu_backend
def test_a_compiled_backend_is_one_operator_forward_and_one_backward():
    result = run("profile", "--shape", "tiny", "--backend", "cpu", "--backward")
    assert result.exit_code == 0, result.output
    for operator in ("hope_kernels::scan", "hope_kernels::scan_backward"):
        line = next(line.split() for line in result.output.splitlines() if line.split()[:1] == [operator])
        assert line[1] == "1"
    assert "aten::bmm" not in result.output


@pytest.mark.parametrize("words", [("--shape", "XXL"), ("--dtype", "int8"), ("--backend", "abacus")])
def test_a_request_that_makes_no_sense_is_refused_with_exit_2(words):
    result = run("profile", *words)
    assert result.exit_code == 2
    assert f"is {words[1]!r}; want one of" in " ".join(result.output.split())
