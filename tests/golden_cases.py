"""Loads `tests/golden/*.npz`, see the README there."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hope_kernels import MemorySpec
from tests.cases import Evaluation, Problem, Results, evaluate

DIRECTORY = Path(__file__).parent / "golden"
GOLDEN = sorted(path.stem for path in DIRECTORY.glob("*.npz"))


@dataclass(frozen=True)
class GoldenCase:
    problem: Problem
    cotangents: dict[str, Tensor]  # of output and weight{i}
    expected: Evaluation

    def evaluate(self, compute: Callable[[Problem], Results]) -> Evaluation:
        return evaluate(self.problem, compute, self.cotangents)

    def assert_matches(self, found: Evaluation, tolerance: float) -> None:
        actual, wrong = found.named(), []
        for name, want in self.expected.named().items():
            error = (actual[name] - want).abs().max().item()
            if not error <= tolerance * max(1.0, want.abs().max().item()):
                wrong.append(f"{name}: error {error:.2e}")
        assert not wrong, "; ".join(wrong)


def load_golden(name: str) -> GoldenCase:
    with np.load(DIRECTORY / f"{name}.npz") as file:
        meta = json.loads(str(file["meta"]))
        arrays = {key: torch.from_numpy(file[key]) for key in file.files if key != "meta"}
    chunk_size = meta.pop("chunk_size")

    def part(prefix: str) -> dict[str, Tensor]:
        return {key[len(prefix) :].replace("final", "weight"): t for key, t in arrays.items() if key.startswith(prefix)}

    inputs = part("in.")
    cotangents = {key[2:]: inputs.pop(key) for key in list(inputs) if key.startswith("d_")}
    return GoldenCase(
        Problem(MemorySpec(**meta), chunk_size, inputs), cotangents, Evaluation(part("out."), part("grad."))
    )
