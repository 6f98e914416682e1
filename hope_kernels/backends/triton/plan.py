"""Which of two ways to run a scan: resident (one launch, a program per memory) or tiled (products over the whole GPU).

A resident program holds one chunk of tokens and one block of the hidden layer on chip and walks the chunks in order:
the only launch there is, whatever the number of chunks. That stops paying when a chunk no longer fits a program's
registers; then a chunk also has rows enough to fill the GPU with ordinary tiles of matrix products, a few launches per
chunk.

A forward and its backward are chosen for one by one: both plans keep the same checkpoints, and a backward holds more on
chip than its forward does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from hope_kernels.backends.triton import configurations

if TYPE_CHECKING:
    from hope_kernels.backends.interface import ScanProblem

PLANS = ("resident", "tiled")

# Tokens of a chunk, and features of a token, that one program can hold at all.
RESIDENT_CHUNK = 64
RESIDENT_DIM = 128


class PlanChoice(NamedTuple):
    """``name`` is one of :data:`PLANS`; ``required`` says that the other one cannot run this."""

    name: str
    reason: str
    required: bool = False


def choose_plan(problem: ScanProblem, direction: str) -> PlanChoice:
    """The plan for the ``"forward"`` or the ``"backward"`` of a scan. It depends on the memory's spec and sizes, the
    dtype and the device, and on nothing else: a call too short to write anything runs as longer ones do.

    Resident where a chunk fits one program and the table of configurations has one of this direction's kernel for this
    class of shapes on this device, that is one that is known not to spill registers; else tiled.
    """
    chunk_size, dim = problem.chunk_size, problem.tokens.shape[3]
    if chunk_size > RESIDENT_CHUNK:
        return PlanChoice(
            "tiled", f"a chunk of {chunk_size} tokens is over the {RESIDENT_CHUNK} one program holds", True
        )
    if dim > RESIDENT_DIM:
        return PlanChoice("tiled", f"a token of {dim} features is over the {RESIDENT_DIM} one program holds", True)
    shape, device = configurations.shape_class(problem), configurations.device_of(problem.tokens)
    if configurations.choose(f"resident_{direction}", shape, device) is not None:
        return PlanChoice("resident", f"a chunk of {chunk_size} tokens of {dim} features fits one program")
    return PlanChoice("tiled", f"no resident configuration of the {direction} is known for {shape} on {device.name}")
