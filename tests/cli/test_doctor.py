"""doctor: the report says what is here, why the core is missing, and how to get what is missing."""

from __future__ import annotations

import io
import json
import platform
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("psutil")

from rich.console import Console

import hope_kernels
from hope_kernels.cli import doctor


def rendered(report: dict[str, Any], width: int = 100) -> str:
    """What ``render`` prints, its line breaks and table borders taken out."""
    stream = io.StringIO()
    doctor.render(report, Console(file=stream, width=width, color_system=None))
    return " ".join("".join(" " if letter in "│┃\n" else letter for letter in stream.getvalue()).split())


def write_build_info(monkeypatch: pytest.MonkeyPatch, folder: Path, **changes: str | None) -> None:
    info = {"core": "built", "reason": None, "compiler": "g++ 99", "cmake": "cmake 9", "python": "3.10.0"}
    file = folder / "_build_info.json"
    file.write_text(json.dumps(info | changes))
    monkeypatch.setattr(doctor, "BUILD_INFO", file)


@pytest.fixture
def no_core(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As on a machine where the core was never built."""
    monkeypatch.setitem(sys.modules, "hope_kernels._core", None)
    monkeypatch.setattr(doctor, "BUILD_INFO", tmp_path / "nothing.json")


def test_the_report_is_json_and_names_the_versions_in_use() -> None:
    report = json.loads(json.dumps(doctor.collect()))
    assert set(report) == {"machine", "versions", "tools", "core", "backends", "engines"}
    assert report["versions"]["python"] == platform.python_version()
    assert report["versions"]["torch"] == torch.__version__
    assert report["versions"]["hope_kernels"] == hope_kernels.__version__
    assert report["machine"]["torch_threads"] == torch.get_num_threads()
    assert 0 < report["machine"]["memory_available_bytes"] <= report["machine"]["memory_bytes"]


def test_every_backend_is_reported_with_its_own_reason() -> None:
    report = doctor.collect()
    statuses = hope_kernels.available_backends()
    assert report["backends"] == {
        name: {"available": bool(status), "reason": status.reason} for name, status in statuses.items()
    }
    text = rendered(report, width=400)
    for status in statuses.values():
        assert status.reason in text


def test_which_engine_runs_on_a_gpu_is_shown_with_its_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    measured = {"device": "NVIDIA H200", "torch": "2.13", "date": "2026-01-01", "ms": {"cuda": 1.0, "triton": 2.0}}
    entry = {"device": "NVIDIA H200", "form": ["mlp", "glu"], "engine": "cuda", "measured": measured, "reason": ""}
    (tmp_path / "engines.json").write_text(json.dumps({"format": 1, "entries": [entry]}))
    monkeypatch.setenv("HOPE_KERNELS_ENGINES", str(tmp_path / "engines.json"))
    report = doctor.collect()
    assert report["engines"][0]["file"] == str(tmp_path / "engines.json")
    assert report["engines"][-1]["device"] == "any"
    text = rendered(report, width=400)
    assert "form mlp/glu" in text
    assert "measured on NVIDIA H200, 2026-01-01: cuda 1 ms, triton 2 ms" in text
    for shown in report["engines"]:
        assert shown["because"] in text


def test_a_core_in_place_is_described_by_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    core = types.ModuleType("hope_kernels._core")
    core.__file__ = "/somewhere/_core.so"
    core.isa, core.isas = lambda: "avx9", lambda: ["portable", "avx9"]
    monkeypatch.setitem(sys.modules, "hope_kernels._core", core)
    write_build_info(monkeypatch, tmp_path)
    monkeypatch.setattr("hope_kernels.backends.cuda.runtime.build_info", lambda: {"cuda_reason": "nvcc was not found"})
    report = doctor.collect()
    assert report["core"]["built"] is True
    assert "without CUDA kernels: nvcc was not found" in report["core"]["cuda"]
    assert (report["core"]["isa"], report["core"]["isas"]) == ("avx9", ["portable", "avx9"])
    text = rendered(report)
    assert "avx9 (also here: portable)" in text
    assert "CUDA kernels" in text
    assert "built with compiler g++ 99" in text
    assert "The compiled core is in place." in text
    assert doctor.REBUILD not in text


def test_a_core_that_could_not_be_built_repeats_the_reason_of_the_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_core: None
) -> None:
    # Square brackets are what compilers print, and what rich takes for markup.
    reason = "error: expected ';' [-Wsyntax] [/bold]"
    write_build_info(monkeypatch, tmp_path, core="missing", reason=reason, compiler=None)
    report = doctor.collect()
    assert report["core"] == {
        "built": False,
        "reason": reason,
        "how": doctor.REBUILD,
        "build": json.loads(doctor.BUILD_INFO.read_text()),
    }
    for width in (60, 100, 400):
        text = rendered(report, width)
        assert reason in text
        assert f"To get the core, {doctor.REBUILD}." in text


def test_a_source_tree_that_was_never_installed_is_recognised(no_core: None) -> None:
    core = doctor.collect()["core"]
    assert core["built"] is False
    assert "never built" in core["reason"]


def test_a_core_of_another_python_is_recognised(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_core: None) -> None:
    write_build_info(monkeypatch, tmp_path, python="2.7.18")
    reason = doctor.collect()["core"]["reason"]
    assert reason == f"it was built for Python 2.7.18; this is Python {platform.python_version()}"


def test_a_core_that_does_not_load_says_what_the_loader_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_core: None
) -> None:
    write_build_info(monkeypatch, tmp_path, python=platform.python_version())
    reason = doctor.collect()["core"]["reason"]
    assert reason.startswith("it was built, but does not load: ")
    assert "hope_kernels._core" in reason


def test_missing_tools_are_listed_with_what_they_are_for_and_how_to_get_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    report = doctor.collect()
    compiler = report["tools"]["C++ compiler"]
    assert (compiler["path"], compiler["version"]) == (None, None)
    assert "apt install g++" in compiler["how"]
    assert "C++ compiler not found (for building the core): apt install g++" in rendered(report)


def test_the_compiler_that_cxx_names_is_the_only_one_looked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = tmp_path / "my-compiler"
    compiler.write_text("#!/bin/sh\necho my compiler 1.2\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", f"ccache {compiler} -m64")
    found = doctor.collect()["tools"]["C++ compiler"]
    assert (found["path"], found["version"], found["how"]) == (str(compiler), "my compiler 1.2", None)
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    assert doctor.collect()["tools"]["C++ compiler"]["path"] is None


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx2 fma avx512f avx512_bf16\n", "fma avx2 avx512f avx512_bf16"),
        ("processor\t: 0\nFeatures\t: fp asimd sve bf16\n", "asimd bf16 sve"),
        ("processor\t: 0\n", ""),
    ],
)
def test_the_instruction_sets_are_those_the_processor_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cpuinfo: str, expected: str
) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(cpuinfo)
    monkeypatch.setattr(doctor, "CPU_INFO", file)
    report = doctor.collect()
    assert report["machine"]["instruction_sets"] == expected.split()
    assert f"instruction sets {expected or 'unknown'} memory" in rendered(report)
