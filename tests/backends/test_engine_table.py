"""Which engine runs on a GPU where none is named: the entry of a table that holds, what is no table, who reads it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hope_kernels import backends
from hope_kernels.backends import choice, tables
from hope_kernels.backends.choice import CallClass, Device, Entry
from hope_kernels.backends.interface import BackendStatus
from tests.cases import make_request

H200 = Device("NVIDIA H200", "sm_90")
GPU = torch.device("cuda", 0)
CALL = CallClass("mlp", "gd", 16, 64, 64, True)
MEASURED = {"device": "NVIDIA H200", "torch": "2.13", "date": "2026-01-01", "ms": {"cuda": 1.0, "triton": 2.0}}
SHIPPED = choice.SHIPPED


def item(**changed: object) -> dict:
    return {"device": "any", "engine": "triton", "measured": None, "reason": "a test"} | changed


def write(path: Path, *items: dict) -> Path:
    path.write_text(json.dumps({"format": 1, "entries": list(items)}))
    return path


@pytest.fixture(autouse=True)
def fresh_tables(monkeypatch, tmp_path):
    """A shipped table and a user's (absent at first) of the test's own, nothing remembered from others."""
    monkeypatch.setattr(choice, "SHIPPED", write(tmp_path / "shipped.json", item()))
    monkeypatch.setenv(choice.USER_FILE_VARIABLE, str(tmp_path / "user.json"))
    monkeypatch.setattr(tables, "gpu", lambda device: H200)
    for cached in (choice.load, choice._choose):
        cached.cache_clear()
    yield
    for cached in (choice.load, choice._choose):
        cached.cache_clear()


def test_the_shipped_table_is_valid_has_an_answer_for_everything_and_a_reason_for_what_was_not_measured(monkeypatch):
    monkeypatch.setattr(choice, "SHIPPED", SHIPPED)
    entries = choice.load(SHIPPED)
    assert any(entry.device == "any" and not entry.classes for entry in entries)
    for entry in entries:
        assert entry.measured or "measured" in entry.reason
    for device in (H200, Device("something new", "sm_120")):
        assert choice.choose(CALL, device).engine in choice.ENGINES


def test_a_close_entry_comes_before_a_general_one_and_the_users_file_before_the_shipped_one(tmp_path):
    write(tmp_path / "shipped.json", item(), item(device="sm_90", engine="cuda", gradients=[True]))
    assert choice.choose(CALL, H200).engine == "cuda"
    assert choice.choose(CALL, Device("A100", "sm_80")).engine == "triton"
    assert choice.choose(CALL._replace(gradients=False), H200).engine == "triton"
    write(tmp_path / "user.json", item(device="sm_90", block_chunk=[64]), item(engine="cuda", operand_bits=[32]))
    choice._choose.cache_clear()
    assert choice.choose(CALL, H200).engine == "triton"
    assert choice.choose(CALL._replace(block_chunk=16), H200).engine == "cuda"
    assert choice.choose(CALL._replace(operand_bits=32), Device("A100", "sm_80")).engine == "cuda"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"engine": "reference"}, "engine is 'reference'; want one of 'triton', 'cuda'"),
        ({"device": ""}, "device is no name"),
        ({"reason": ""}, "lacks a reason"),
        ({"measured": {"device": "x"}}, "measured is"),
        ({"gradients": [1]}, "gradients has 1"),
        ({"block_chunk": [20]}, "block_chunk has 20"),
        ({"block_chunk": 16}, "want a list of values"),
        ({"batch": [1]}, "unknown fields batch"),
    ],
)
def test_an_entry_that_is_not_valid_is_named(tmp_path, change, said):
    path = write(tmp_path / "shipped.json", item(**change))
    with pytest.raises(ValueError, match=r"shipped.json: entry 0: .*") as error:
        choice.load(path)
    assert said in str(error.value)


def test_two_entries_for_one_call_are_an_error(tmp_path):
    path = write(tmp_path / "shipped.json", item(form=["mlp", "glu"]), item(form=["glu"], engine="cuda"))
    with pytest.raises(ValueError, match="entries 0 and 1 both hold"):
        choice.load(path)


def test_what_is_recorded_takes_the_place_of_what_it_contradicts(tmp_path):
    path = tmp_path / "user.json"
    classes = {name: (value,) for name, value in CALL._asdict().items()}
    kept = Entry("NVIDIA H200", classes | {"gradients": (False,)}, "triton", MEASURED, "")
    choice.record(path, [kept, Entry("NVIDIA H200", classes, "triton", MEASURED, "")])
    choice.record(path, [Entry("NVIDIA H200", classes, "cuda", MEASURED, "")])
    assert choice.choose(CALL, H200).engine == "cuda"
    assert choice.choose(CALL._replace(gradients=False), H200).engine == "triton"
    assert len(choice.load(path)) == 2
    assert choice.choose(CALL, H200).because() == "measured on NVIDIA H200, 2026-01-01: cuda 1 ms, triton 2 ms"


# ---- who reads it ----------------------------------------------------------------------------------------------------


@pytest.fixture
def engines(monkeypatch):
    """Both engines, able to run everything but what `refuse` names."""
    found = SimpleNamespace(refuse=set())

    def engine(name: str) -> SimpleNamespace:
        return SimpleNamespace(
            status=lambda: BackendStatus(name, True, "for this test"),
            refuses=lambda request: "no" if name in found.refuse else None,
        )

    monkeypatch.setattr(backends, "implementation", engine)
    return found


def test_no_name_means_the_engine_of_the_table_then_the_other_one_then_the_reference(engines, tmp_path):
    request = make_request(device=GPU, dtype=torch.bfloat16)
    assert backends.select(None, request) == "triton"
    write(tmp_path / "user.json", item(engine="cuda", measured=MEASURED))
    choice._choose.cache_clear()
    assert backends.select(None, request) == "cuda"
    engines.refuse = {"cuda"}
    assert backends.select(None, request) == "triton"
    engines.refuse = {"cuda", "triton"}
    assert backends.select(None, request) == "reference"
    with pytest.raises(RuntimeError, match="backend='cuda' cannot run this: no"):
        backends.select("cuda", request)


def test_a_name_asks_no_table_and_neither_does_the_processor(engines, tmp_path):
    write(tmp_path / "user.json", {"nonsense": True})
    assert backends.select("cuda", make_request(device=GPU, dtype=torch.bfloat16)) == "cuda"
    assert backends.select(None, make_request()) == "cpu"
    assert backends.select(None, make_request(device=GPU, dtype=torch.float64)) == "reference"
    with pytest.raises(ValueError, match=r"user.json: entry 0"):
        backends.select(None, make_request(device=GPU, dtype=torch.bfloat16))
