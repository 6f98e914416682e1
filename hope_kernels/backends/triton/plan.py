"""Which of two ways to run a scan: resident (one launch, a program per memory) or tiled (products over the whole GPU).

A resident program holds one chunk of tokens and one block of the hidden layer on chip and walks the chunks in order:
the only launch there is, whatever the number of chunks. That stops paying when a chunk no longer fits a program's
registers; then a chunk also has rows enough to fill the GPU with ordinary tiles of matrix products, a few launches per
chunk.
"""

from __future__ import annotations

from typing import NamedTuple

from triton import next_power_of_2

PLANS = ("resident", "tiled")

# Tokens of a chunk, and features of a token, that one program holds without spilling registers.
RESIDENT_CHUNK = 64
RESIDENT_DIM = 128


class PlanChoice(NamedTuple):
    """``name`` is one of :data:`PLANS`."""

    name: str
    reason: str


def choose_plan(chunk_size: int, dim: int) -> PlanChoice:
    """The plan for chunks of ``chunk_size`` tokens of ``dim`` features; it depends on nothing else."""
    block_chunk, block_dim = max(16, next_power_of_2(chunk_size)), max(16, next_power_of_2(dim))
    if block_chunk > RESIDENT_CHUNK:
        return PlanChoice("tiled", f"a chunk of {chunk_size} tokens is over the {RESIDENT_CHUNK} one program holds")
    if block_dim > RESIDENT_DIM:
        return PlanChoice("tiled", f"a token of {dim} features is over the {RESIDENT_DIM} one program holds")
    return PlanChoice("resident", f"a chunk of {chunk_size} tokens of {dim} features fits one program")
