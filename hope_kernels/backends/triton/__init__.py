"""The Triton engine: whole chunked scans on a GPU, in one launch or, for large memories, a few launches per chunk.

Two plans compute the same thing (see :mod:`hope_kernels.backends.triton.plan` for the rule that picks one);
``backend="triton:resident"`` and ``"triton:tiled"`` ask for one by name. With ``TRITON_INTERPRET=1`` in the environment
before Triton is first used, kernels run in Triton's interpreter on CPU tensors: slow, and exact enough to test them.

Triton and the kernels are imported on first use.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

from hope_kernels.backends.interface import BackendStatus, ScanGradients, ScanProblem, ScanRequest

if TYPE_CHECKING:
    from types import ModuleType

    from torch import Tensor

__all__ = [
    "Engine",
    "pair_gradients",
    "pair_products",
    "refuses",
    "refuses_operands",
    "saved_shapes",
    "scan_backward",
    "scan_forward",
    "scans_backward",
    "scans_forward",
    "status",
    "with_option",
]

OLDEST = (3, 6)  # Triton that the kernels compile with
_INSTALL = "install it with: pip install 'hope_kernels[triton]'"


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter. Fixed when the kernels are first imported."""
    from triton.runtime.interpreter import InterpretedFunction

    from hope_kernels.backends.triton.resident_forward import forward_kernel

    return isinstance(forward_kernel, InterpretedFunction)


@cache
def status() -> BackendStatus:
    """Whether Triton is installed and has something to run on, or why not."""
    try:
        import triton
    except ImportError as error:
        return BackendStatus("triton", False, f"Triton does not import ({error}); {_INSTALL}")
    # Before any kernel is imported: older ones lack what the kernels are written with.
    if tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        return BackendStatus("triton", False, f"Triton {triton.__version__} is older than {wanted}; {_INSTALL}")
    if interpreted():
        return BackendStatus(
            "triton",
            True,
            f"Triton {triton.__version__}, interpreted on CPU tensors (TRITON_INTERPRET=1): for tests",
            interpreted=True,
        )
    if not torch.cuda.is_available():
        return BackendStatus(
            "triton", False, f"Triton {triton.__version__} needs a GPU; to test without one, set TRITON_INTERPRET=1"
        )
    return BackendStatus("triton", True, f"Triton {triton.__version__} on {torch.cuda.get_device_name()}")


def refuses(request: ScanRequest) -> str | None:
    """None when this engine can run such calls, else the reason it cannot."""
    return refuses_operands(request.dtype, request.device)


def refuses_operands(dtype: torch.dtype, device: torch.device) -> str | None:
    """None when this engine can multiply tensors of that dtype on that device, else the reason it cannot."""
    state = status()
    if not state:
        return state.reason
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it takes float32, bfloat16 or float16 tokens, got {dtype}"
    if interpreted():
        if dtype == torch.bfloat16:
            return "Triton's interpreter computes bfloat16 wrongly; it takes float32 or float16 tokens"
        return None if device.type == "cpu" else f"interpreted, it needs CPU tensors, got {device}"
    return None if device.type == "cuda" else f"it needs GPU tensors, got {device}"


def _on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the one the tensors are on."""
    device = tensor.device
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@dataclass(frozen=True)
class Engine:
    """The engine with a plan: ``"resident"``, ``"tiled"``, or None for the one that suits the problem."""

    plan: str | None = None

    @staticmethod
    def status() -> BackendStatus:
        return status()

    @staticmethod
    def refuses(request: ScanRequest) -> str | None:
        return refuses(request)

    def _module(self, problem: ScanProblem, direction: str) -> ModuleType:
        """The plan that runs the ``"forward"`` or the ``"backward"``; a backward takes the checkpoints of either."""
        from hope_kernels.backends.triton.plan import choose_plan

        choice = choose_plan(problem, direction)
        if self.plan == "resident" and choice.required:
            raise RuntimeError(f"backend='triton:resident' cannot run this: {choice.reason}")
        return import_module(f"hope_kernels.backends.triton.{self.plan or choice.name}")

    @staticmethod
    def saved_shapes(problem: ScanProblem) -> list[tuple[int, ...]]:
        """Shapes of the checkpoints; both plans keep the same."""
        from hope_kernels.backends.triton.launch import saved_shapes

        return saved_shapes(problem)

    def scan_forward(
        self, problem: ScanProblem, *, save: bool
    ) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
        """As :meth:`hope_kernels.backends.interface.Backend.scan_forward` says."""
        with _on_device_of(problem.tokens):
            return self._module(problem, "forward").scan_forward(problem, save=save)

    def scan_backward(
        self,
        problem: ScanProblem,
        saved: list[Tensor],
        grad_output: Tensor | None,
        grad_weights: list[Tensor | None],
        grad_momentum: list[Tensor | None],
    ) -> ScanGradients:
        """As :meth:`hope_kernels.backends.interface.Backend.scan_backward` says."""
        with _on_device_of(problem.tokens):
            module = self._module(problem, "backward")
            return module.scan_backward(problem, saved, grad_output, grad_weights, grad_momentum)

    def scans_forward(
        self, problems: list[ScanProblem], *, save: bool
    ) -> list[tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]]:
        """Scans that do not depend on one another: those of the resident plan in one launch."""
        return self._grouped(problems, "forward", lambda i: (problems[i],), save=save)

    def scans_backward(
        self,
        problems: list[ScanProblem],
        saved: list[list[Tensor]],
        upstream: list[tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]],
    ) -> list[ScanGradients]:
        """Their gradients, given those of output, final weights and final momentum of each."""
        return self._grouped(problems, "backward", lambda i: (problems[i], saved[i], upstream[i]))

    def _grouped(
        self, problems: list[ScanProblem], direction: str, arguments: Callable[[int], tuple], **options: Any
    ) -> list:
        """The scans of each problem's plan, called once with the problems that share it; results in their order."""
        groups: dict[ModuleType, list[int]] = {}
        for i, problem in enumerate(problems):
            groups.setdefault(self._module(problem, direction), []).append(i)
        results: dict[int, Any] = {}
        for module, indices in groups.items():
            columns = zip(*map(arguments, indices), strict=True)
            with _on_device_of(problems[0].tokens):
                results |= zip(
                    indices, getattr(module, f"scans_{direction}")(*map(list, columns), **options), strict=True
                )
        return [results[i] for i in range(len(problems))]


def pair_products(u: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """As :class:`hope_kernels.memory.joined_pairs.PairEngine` says."""
    from hope_kernels.backends.triton.pairs import products

    with _on_device_of(u):
        return products(u, *arguments)


def pair_gradients(u: Tensor, *arguments: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None, list]:
    """Their gradients, likewise."""
    from hope_kernels.backends.triton.pairs import gradients

    with _on_device_of(u):
        return gradients(u, *arguments)


_default = Engine()
saved_shapes = _default.saved_shapes
scan_forward = _default.scan_forward
scan_backward = _default.scan_backward
scans_forward = _default.scans_forward
scans_backward = _default.scans_backward


def with_option(option: str) -> Engine:
    """The engine that ``backend="triton:<option>"`` names.

    Raises:
        ValueError: there is no such plan.
    """
    from hope_kernels.backends.triton.plan import PLANS

    if option not in PLANS:
        raise ValueError(f"backend is 'triton:{option}'; want 'triton', 'triton:resident' or 'triton:tiled'")
    return Engine(option)
