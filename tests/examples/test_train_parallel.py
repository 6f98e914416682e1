"""Training shared between processes gives the numbers of one process that does all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.examples.training import EXAMPLES, metrics, run, write_inputs

pytest.importorskip("rich", reason="the trainer's progress needs rich")
safetensors = pytest.importorskip("safetensors.torch", reason="the trainer stores its model with safetensors")
if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("processes talk by gloo, which this torch lacks", allow_module_level=True)

from lm_parallel import backend_of  # noqa: E402

ROOT = EXAMPLES.parent
WAYS = {
    "ddp": "--parallel ddp",
    "ddp-through": "--parallel ddp --through",
    "fsdp": "--parallel fsdp",
    "chain": "--sequence-parallel 2",
    "chain-of-attention": "--sequence-parallel 2 --activation-checkpointing --config IN/attention.json",
}


def torchrun(folder: Path, processes: int, ways: dict[str, str]) -> None:
    """Each way, stopped in between and continued."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    runs = [f"{name}:{more}" for name, more in ways.items()]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        [*command, "-m", "tests.examples.parallel_runs", str(folder), *runs],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-4000:]


def assert_same(folder: Path, name: str, alone: str) -> None:
    """Losses, gradient norms and held-out bits of every step, and the weights that came out."""
    found, want = metrics(folder / name), metrics(folder / alone)
    assert len(found) == len(want) == 14
    for told, expected in zip(found, want, strict=True):
        assert told == pytest.approx(expected, rel=1e-9)
    weights = [safetensors.load_file(folder / n / "model" / "model.safetensors") for n in (name, alone)]
    for key, value in weights[1].items():
        torch.testing.assert_close(weights[0][key], value, rtol=1e-7, atol=1e-9)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every way with two processes, and the runs they are compared with."""
    folder = tmp_path_factory.mktemp("parallel")
    write_inputs(folder)
    run(folder, "alone")
    run(folder, "alone-through", "--through")
    run(folder, "alone-of-attention", "--config IN/attention.json")
    assert metrics(folder / "alone") != metrics(folder / "alone-through")
    torchrun(folder, 2, WAYS)
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_train_as_one_does(runs: Path, way: str):
    assert_same(runs, way, way.replace(way.split("-")[0], "alone", 1))


def test_with_fsdp_each_process_stores_its_part(runs: Path):
    sizes = []
    for way in ("fsdp", "ddp"):
        (*_, checkpoint) = sorted((runs / way).glob("checkpoint-*"))
        files = [torch.load(path, weights_only=True) for path in sorted(checkpoint.glob("process-*.pt"))]
        sizes.append([sum(x.numel() for x in values.get("model", {}).values()) for values in files])
    assert sizes[0][0] + sizes[0][1] == sizes[1][0] and sizes[1][1] == 0
    assert max(sizes[0]) < 0.6 * sizes[1][0]


def test_in_a_chain_the_first_process_has_the_state(runs: Path):
    (*_, checkpoint) = sorted((runs / "chain").glob("checkpoint-*"))
    states = [torch.load(path, weights_only=True)["state"] for path in sorted(checkpoint.glob("process-*.pt"))]
    assert states[0] is not None and states[1] is None


@pytest.mark.slow
def test_four_processes_share_rows_and_tokens(tmp_path: Path):
    write_inputs(tmp_path)
    run(tmp_path, "alone")
    ways = {"two-chains": "--sequence-parallel 2", "long-chain": "--sequence-parallel 4", "fsdp": "--parallel fsdp"}
    torchrun(tmp_path, 4, ways)
    for way in ways:
        assert_same(tmp_path, way, "alone")


def test_gpus_talk_by_nccl():
    assert backend_of(torch.device("cuda", 1)) == "nccl"
    assert backend_of(torch.device("cpu")) == "gloo"
