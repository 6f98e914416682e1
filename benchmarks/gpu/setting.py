"""Where and how large a stage runs: on the GPU, or, as a dry run, a stand-in on the CPU with interpreted kernels."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.children import Child, leave, run_children
from hope_kernels import MemorySpec, available_backends
from hope_kernels.backends import refusal, runs_together
from hope_kernels.backends.interface import ScanRequest
from hope_kernels.bench.implementations import Results
from hope_kernels.bench.problems import Problem, make_problem

ROOT = Path(__file__).resolve().parents[2]


class Setting:
    """What the stage named ``name`` is given: options of the suite, its folder, and the seconds it may take."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name, self.options, self.out = name, options, options.out
        self.dry: bool = options.dry_run
        self.deadline = time.monotonic() + options.limit
        self.device = "cpu" if self.dry else "cuda"
        self.dtype = torch.float32 if self.dry else torch.bfloat16
        self.compiler = "aot_eager" if self.dry else "inductor"

    def leave(self, **result: Any) -> None:
        """The result so far, kept if the stage is stopped here."""
        leave(self.out, self.name, {"passed": False, "summary": "not finished"} | result)

    def parts(
        self, names: Iterable[str], *, at_once: int, finished: Callable[[str, dict], None] = lambda name, result: None
    ) -> dict[str, dict]:
        """Run parts ``stage:argument`` in processes of their own; results by name, none where time ran out."""
        starts = [partial(Child, name, self.options) for name in names]
        # Some seconds to spare: this process is to end in time itself.
        return run_children(starts, at_once=at_once, deadline=self.deadline - 8, finished=finished)

    def backends(self, request: ScanRequest | None = None) -> list[str]:
        """The compiled backends that run this (default: :meth:`problem`) on this device, then the plans of each."""
        request = self.problem(dtype=self.dtype).request() if request is None else request
        found = []
        for name, status in available_backends().items():
            if not status or name in ("reference", "cpu"):
                continue
            if refusal(name, request) is None:
                found += [name, *(f"{name}:{plan}" for plan in ("resident", "tiled") if name == "triton")]
        if not found:
            raise RuntimeError(f"no compiled backend runs on {self.device} tensors here")
        return found

    def refused(self, request: ScanRequest) -> list[str]:
        """Backends that take tensors on this device but do not run this, each with its reason."""
        names = [name for name in self.backends() if ":" not in name]
        reasons = ((name, refusal(name, request)) for name in names)
        return [f"{name}: {reason}" for name, reason in reasons if reason is not None]

    def distinct_backends(self) -> list[str]:
        """Those of :meth:`backends` that run :meth:`problem` differently: all but Triton's plan for it, by its name."""
        found = self.backends()
        return found[:1] if self.dry else [name for name in found if not name.endswith(":resident")]

    def kinds(self, backend: str) -> list[str]:
        """The operators of :data:`FUNCTIONS` that a backend runs."""
        return [kind for kind in FUNCTIONS if kind == "scan" or runs_together(backend)]

    def plain_dtype(self, backend: str) -> torch.dtype:
        """float32, or where a backend does not take that the dtype of the benchmark."""
        return torch.float32 if refusal(backend, self.problem().request()) is None else self.dtype

    def problem(
        self,
        *,
        tokens: int = 40,
        chunk_size: int = 16,
        dim: int = 24,
        hidden: int = 40,
        rule: str = "gd",
        dtype: torch.dtype = torch.float32,
    ) -> Problem:
        """A small scan with every gate of its rule."""
        part = 4 if self.dry else 1
        return make_problem(
            MemorySpec(rule=rule),  # type: ignore[arg-type]
            batch=2,
            tokens=tokens // part,
            heads=2 // min(2, part),
            dim=dim // part,
            hidden=hidden // part,
            chunk_size=chunk_size // part,
            retention=True,
            momentum=rule == "gd",
            dtype=dtype,
            device=self.device,
        )


def scan_function(problem: Problem, backend: str) -> Callable[[Results], Tensor]:
    """Output of one scan as a function of its named inputs; of ``problem`` it keeps spec and chunk size alone."""
    from hope_kernels import memory_scan

    spec, chunk_size = problem.spec, problem.chunk_size

    def scan(named: Results) -> Tensor:
        return memory_scan(**_arguments(named, spec, chunk_size, backend)).output

    return scan


def scans_function(problem: Problem, backend: str) -> Callable[[Results], Tensor]:
    """The same for two scans handed over at once, of which the second writes half as often."""
    from hope_kernels.memory.scan import scan_together

    spec, chunk_size = problem.spec, problem.chunk_size

    def scans(named: Results) -> Tensor:
        both = scan_together([_arguments(named, spec, size, backend) for size in (chunk_size, 2 * chunk_size)])
        return both[0].output + 0.5 * both[1].output

    return scans


def _arguments(named: Results, spec: MemorySpec, chunk_size: int, backend: str) -> dict[str, Any]:
    return {
        **{name: named.get(name) for name in ("q", "k", "v", "lr", "retention", "momentum")},
        "memory": tuple(named[name] for name in spec.weight_names),
        "spec": spec,
        "chunk_size": chunk_size,
        "backend": backend,
    }


# What the operators are called through: one of them each.
FUNCTIONS = {"scan": scan_function, "scans": scans_function}


def with_gradients(problem: Problem, function: Callable[[Results], Tensor]) -> Results:
    """Output and the gradient of every input."""
    leaves = problem.requires_grad()
    inputs = leaves.inputs()
    output = function(inputs)
    gradients = torch.autograd.grad(output, list(inputs.values()), leaves.d_output)
    return {"output": output.detach()} | {f"d {name}": g for name, g in zip(inputs, gradients, strict=True)}
