"""The table of launch configurations: which entry holds, what is refused, what a choice may depend on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hope_kernels import MemorySpec
from hope_kernels.backends.interface import ScanProblem
from hope_kernels.backends.triton import configurations as table
from hope_kernels.backends.triton.configurations import ANY, Configuration, Device, Entry, ShapeClass, choose

SHAPE = ShapeClass("mlp", "gd", 16, 64, 64)
H200 = Device("NVIDIA H200", "sm_90")


def item(**changed: object) -> dict:
    """A valid entry, as the JSON has it."""
    return {
        "kernel": "resident_forward",
        "device": ANY,
        "form": ["mlp"],
        "rule": ["gd"],
        "operand_bits": [16],
        "block_chunk": [64],
        "block_dim": [64],
        "block_hidden": 32,
        "num_warps": 4,
        "measured": None,
        "reason": "a test",
    } | changed


def write(path: Path, *items: dict) -> Path:
    path.write_text(json.dumps({"format": 1, "entries": list(items)}))
    return path


@pytest.fixture(autouse=True)
def fresh_tables(monkeypatch, tmp_path):
    """A shipped table and a user's (absent at first) of the test's own, nothing remembered from others."""
    monkeypatch.setattr(table, "SHIPPED", write(tmp_path / "shipped.json", item()))
    monkeypatch.setenv(table.USER_FILE_VARIABLE, str(tmp_path / "user.json"))
    table.load.cache_clear()
    table._choose.cache_clear()
    yield
    table.load.cache_clear()
    table._choose.cache_clear()


def warps_of(device: Device = H200, shape: ShapeClass = SHAPE) -> int | None:
    chosen = choose("resident_forward", shape, device)
    return None if chosen is None else chosen.num_warps


# ---- which entry holds -----------------------------------------------------------------------------------------------


def test_the_device_comes_before_its_architecture_and_that_before_any(tmp_path):
    write(
        tmp_path / "shipped.json",
        item(num_warps=1),
        item(device="sm_90", num_warps=2),
        item(device="NVIDIA H200", num_warps=8),
    )
    assert [warps_of(Device(*names)) for names in (("NVIDIA H200", "sm_90"), ("H100", "sm_90"), ("A100", "sm_80"))] == [
        8,
        2,
        1,
    ]


def test_the_users_table_comes_first_among_equals_and_after_a_closer_match(tmp_path):
    write(tmp_path / "shipped.json", item(num_warps=1), item(device="sm_90", num_warps=2))
    write(tmp_path / "user.json", item(num_warps=16))
    assert warps_of(Device("A100", "sm_80")) == 16
    assert warps_of(H200) == 2


def test_a_class_that_no_entry_lists_has_no_configuration():
    assert warps_of(shape=SHAPE._replace(block_chunk=32)) is None
    assert choose("resident_backward", SHAPE, H200) is None


def test_a_field_of_the_class_that_an_entry_does_not_list_may_have_any_value(tmp_path):
    anything = {name: value for name, value in item().items() if name not in ("form", "block_chunk")}
    write(tmp_path / "shipped.json", anything)
    for shape in (SHAPE, SHAPE._replace(form="glu"), SHAPE._replace(block_chunk=1024)):
        assert warps_of(shape=shape) == 4
    assert warps_of(shape=SHAPE._replace(rule="dgd")) is None


def test_an_unknown_kernel_is_an_error():
    with pytest.raises(ValueError, match="resident_sideways"):
        choose("resident_sideways", SHAPE, H200)


def problem(batch: int, tokens: int, chunk_size: int, dim: int, dtype: torch.dtype) -> ScanProblem:
    x = torch.empty(batch, tokens, 3, dim, dtype=dtype, device="meta")
    absent = dict.fromkeys(
        ("pending_k", "pending_v", "retention", "decay", "momentum_step", "momentum_carry", "momentum_decay")
    )
    return ScanProblem(
        q=x,
        k=x,
        v=x,
        step=None,
        weights=(),
        momentum=(),
        sequences=None,
        spec=MemorySpec("glu", rule="dgd"),
        chunk_size=chunk_size,
        chunks=tokens // chunk_size,
        first_chunk=0,
        bptt_chunks=0,
        **absent,
    )


def test_the_class_of_a_scan_does_not_depend_on_batch_and_length():
    shapes = {table.shape_class(problem(b, t, 20, 50, torch.bfloat16)) for b, t in ((1, 20), (64, 20), (3, 100_000))}
    assert shapes == {ShapeClass("glu", "dgd", 16, 32, 64)}


@pytest.mark.parametrize(("size", "padded"), [(1, 16), (16, 16), (17, 32), (64, 64), (65, 128)])
def test_sizes_are_padded_to_powers_of_two(size, padded):
    assert table.padded(size) == padded
    assert table.shape_class(problem(1, 8, size, size, torch.float32)) == ShapeClass("glu", "dgd", 32, padded, padded)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"kernel": "resident"}, "kernel is 'resident'"),
        ({"device": ""}, "device is no name"),
        ({"form": "mlp"}, "form is 'mlp'; want a list"),
        ({"form": ["cnn"]}, "form has 'cnn'"),
        ({"rule": []}, "rule is"),
        ({"operand_bits": [8]}, "operand_bits has 8"),
        ({"block_chunk": [48]}, "block_chunk has 48"),
        ({"block_dim": [8]}, "block_dim has 8"),
        ({"block_hidden": 24}, "block_hidden is 24"),
        ({"num_warps": 3}, "num_warps is 3"),
        ({"num_warps": True}, "num_warps is True"),
        ({"num_stages": 0}, "num_stages is 0"),
        ({"blok_hidden": 32}, "unknown fields blok_hidden"),
        ({"measured": {"device": "NVIDIA H200"}}, "measured is"),
        ({"reason": ""}, "lacks a reason"),
    ],
)
def test_an_entry_that_is_wrong_is_named(tmp_path, changed, message):
    write(tmp_path / "user.json", item(block_chunk=[16]), item(**changed))
    with pytest.raises(ValueError, match=message) as raised:
        warps_of()
    assert "user.json: entry 1" in str(raised.value)


@pytest.mark.parametrize("missing", sorted(item().keys() - ShapeClass._fields))
def test_an_entry_that_lacks_a_field_is_named(tmp_path, missing):
    write(tmp_path / "user.json", {name: value for name, value in item().items() if name != missing})
    with pytest.raises(ValueError, match=missing) as raised:
        warps_of()
    assert "entry 0" in str(raised.value)


def without(name: str, **changed: object) -> dict:
    return {key: value for key, value in item(**changed).items() if key != name}


@pytest.mark.parametrize("first", [item(block_dim=[16, 32]), without("block_dim"), without("form", block_dim=[32])])
@pytest.mark.parametrize("second", [item(block_dim=[32, 64]), without("block_dim")])
def test_two_entries_for_one_class_are_refused(tmp_path, first, second):
    write(tmp_path / "user.json", first, item(device="sm_90"), second)
    with pytest.raises(ValueError, match="entries 0 and 2 both hold"):
        warps_of()


def test_entries_that_differ_in_a_field_both_list_may_leave_out_others(tmp_path):
    write(tmp_path / "shipped.json", without("form", rule=["gd"]), without("block_dim", rule=["dgd"], num_warps=8))
    assert warps_of() == 4
    assert warps_of(shape=SHAPE._replace(rule="dgd", block_dim=512)) == 8


@pytest.mark.parametrize("text", ["", "[]", '{"format": 2, "entries": []}', '{"format": 1}'])
def test_a_file_that_is_no_table_is_refused_by_name(tmp_path, text):
    (tmp_path / "user.json").write_text(text)
    with pytest.raises(ValueError, match=r"user\.json"):
        warps_of()


# ---- tuning and assuming ---------------------------------------------------------------------------------------------


def test_what_is_written_is_read_back(tmp_path):
    entry = Entry(
        kernel="resident_forward",
        device="NVIDIA H200",
        classes={name: (value,) for name, value in SHAPE._asdict().items()},
        configuration=Configuration.of(block_hidden=128, num_warps=8, num_stages=2),
        measured={"device": "NVIDIA H200", "torch": "2.11", "triton": "3.6", "date": "2026-01-31"},
        reason="",
    )
    path = tmp_path / "folder" / "user.json"
    table.write(path, [entry])
    assert [found.as_dict() for found in table.load(path)] == [entry.as_dict()]


def test_an_assumption_holds_inside_its_block_alone():
    assumed = Configuration.of(block_hidden=16, num_warps=2)
    tensor = torch.empty(1)

    def inside() -> None:
        with table.assume({"resident_forward": assumed}, Device("H100", "sm_90")):
            assert choose("resident_forward", SHAPE, H200) is assumed
            assert table.device_of(tensor) == Device("H100", "sm_90")
            raise KeyError

    with pytest.raises(KeyError):
        inside()
    assert warps_of() == 4
    assert table.device_of(tensor) == Device(ANY, ANY)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tuning_without_a_gpu_says_so_and_runs_nothing():
    def run() -> None:
        raise AssertionError("it ran")

    with pytest.raises(RuntimeError, match="GPU"):
        table.tune("resident_forward", SHAPE, run, [Configuration.of(block_hidden=16, num_warps=2)])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_tuning_writes_the_fastest_candidate_where_choose_finds_it(tmp_path):
    a = torch.randn(2048, 2048, device="cuda")
    device = table.device_of(a)

    def run() -> None:
        for _ in range(choose("resident_forward", SHAPE, device).num_warps):
            a @ a

    candidates = [Configuration.of(block_hidden=32, num_warps=warps) for warps in (16, 1, 8)]
    times = table.tune("resident_forward", SHAPE, run, candidates)
    assert times.keys() == set(candidates)
    assert choose("resident_forward", SHAPE, device) == candidates[1]
    assert table.load(tmp_path / "user.json")[0].measured["device"] == device.name


# ---- the shipped table -----------------------------------------------------------------------------------------------


def test_the_shipped_table_is_valid_and_says_where_each_entry_comes_from():
    entries = table.load(Path(table.__file__).with_name("configurations.json"))
    assert {entry.kernel for entry in entries} <= table.KERNELS.keys()
    assert "resident_forward" in {entry.kernel for entry in entries}
    assert all(entry.measured or entry.reason for entry in entries)


@pytest.mark.parametrize("device", [Device("a GPU", "sm_75"), Device("NVIDIA H200", "sm_90"), Device("?", "gfx942")])
def test_every_kernel_of_the_tiled_plan_and_for_pairs_has_a_configuration_on_every_device(monkeypatch, device):
    monkeypatch.setattr(table, "SHIPPED", Path(table.__file__).with_name("configurations.json"))
    shapes = [
        ShapeClass(form, rule, bits, block_chunk, block_dim)
        for form in ("linear", "mlp", "glu")
        for rule in ("gd", "dgd")
        for bits in (16, 32)
        for block_chunk, block_dim in ((16, 16), (64, 1024), (4096, 128))
    ]
    kernels = [kernel for kernel in table.KERNELS if kernel.startswith(("tiled_", "pairs_"))]
    assert len(kernels) > 14
    lacking = [(kernel, shape) for kernel in kernels for shape in shapes if choose(kernel, shape, device) is None]
    assert not lacking


def resident_shapes(kernel: str, form: str, rule: str, bits: int, architecture: str) -> str:
    """The largest chunks and widths of a resident kernel, as the documentation has them."""
    device = Device(architecture, architecture)
    listed = [
        (chunk, dim)
        for chunk in (16, 32, 64)
        for dim in (16, 32, 64, 128)
        if choose(kernel, ShapeClass(form, rule, bits, chunk, dim), device) is not None
    ]
    largest = [
        (chunk, dim)
        for chunk, dim in listed
        if not any((c, d) != (chunk, dim) and c >= chunk and d >= dim for c, d in listed)
    ]
    return ", ".join(f"{chunk}×{dim}" for chunk, dim in largest) or "–"


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_documentation_says_what_is_resident(monkeypatch, direction):
    monkeypatch.setattr(table, "SHIPPED", Path(table.__file__).with_name("configurations.json"))
    text = (Path(__file__).parents[2] / "docs" / "triton.md").read_text()
    for bits in (16, 32):
        for form in ("linear", "mlp", "glu"):
            for rule in ("gd", "dgd"):
                cells = [
                    resident_shapes(f"resident_{direction}", form, rule, bits, architecture)
                    for architecture in ("sm_80", "sm_90", "sm_100", "gfx942", ANY)
                ]
                line = " | ".join([direction, f"{bits} bits", f"`{form}`, `{rule}`", *cells])
                assert f"| {line} |" in text, f"docs/triton.md lacks: | {line} |"


def test_the_table_is_read_without_triton():
    code = (
        "import sys\n"
        "sys.modules['triton'] = None\n"
        "from hope_kernels.backends.triton import configurations as table\n"
        "print(len(table.load(table.SHIPPED)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == 0, found.stderr
    assert int(found.stdout) > 0
