"""What a compiled kernel takes of a GPU: registers, stack, shared memory, spills, and what its code consists of.

NVIDIA: ``cuobjdump`` (part of Triton) on the binary. AMD: the assembly text that Triton keeps. Spills in innermost
loops are found in the control flow of the listing: natural loops of back edges, without those that only wait (a
barrier polled in a loop of its own neither loads nor multiplies).
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import triton

from hope_kernels.backends.triton.compile_only import Architecture

# A kernel may keep this much on its stack as long as no innermost loop touches it.
TOLERATED_STACK = 64
TENSOR_MEMORY_COLUMNS = 512  # of an sm_100


class Instruction(NamedTuple):
    """One line of a listing: ``target`` is the index it may jump to, ``falls`` whether the next may follow it."""

    opcode: str
    target: int | None
    falls: bool


@dataclass(frozen=True)
class Resources:
    """Per program, unless said otherwise.

    Attributes:
        registers: per thread; on AMD vector registers, accumulators included.
        stack_bytes: per thread: what the compiler put in local memory (AMD: scratch).
        local_bytes: per thread: local memory beyond the stack; 0 on AMD.
        shared_bytes: shared memory (LDS).
        tensor_memory_columns: sm_100 alone, else 0.
        spill_instructions: loads and stores of local memory in the listing.
        inner_spill_instructions: of them, those inside innermost loops.
        spilled_registers: vector registers the AMD compiler reports as spilled, to accumulator registers where it can:
            those that went to memory show as stack; None on NVIDIA.
        scalar_spills: likewise scalar ones, most of which go to lanes of vector registers.
        tensor_core, barriers, special_functions: instructions in the listing: matrix products, barriers of the
            program, exponentials and reciprocals.
        instructions: all of them.
    """

    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int
    tensor_memory_columns: int
    spill_instructions: int
    inner_spill_instructions: int
    spilled_registers: int | None
    scalar_spills: int | None
    tensor_core: int
    barriers: int
    special_functions: int
    instructions: int

    @property
    def clean(self) -> bool:
        """Nothing is spilled to memory."""
        return not (self.stack_bytes or self.local_bytes or self.spill_instructions)

    def failures(self, architecture: Architecture, *, tensor_core: bool) -> list[str]:
        """Why this must not be shipped for ``architecture``; empty if it may.

        Not :attr:`clean` but without failures is a kernel with at most :data:`TOLERATED_STACK` bytes of stack, none of
        it used in an innermost loop.

        Args:
            tensor_core: whether its products are meant to run on tensor cores.
        """
        found = []
        if not self.clean and (self.stack_bytes + self.local_bytes > TOLERATED_STACK or self.inner_spill_instructions):
            found.append(
                f"spills: {self.stack_bytes + self.local_bytes} B of stack and local memory, "
                f"{self.inner_spill_instructions} of {self.spill_instructions} accesses in innermost loops"
            )
        if self.shared_bytes > architecture.shared_limit:
            found.append(f"shared memory: {self.shared_bytes} B, the limit is {architecture.shared_limit}")
        if self.tensor_memory_columns > TENSOR_MEMORY_COLUMNS:
            found.append(f"tensor memory: {self.tensor_memory_columns} columns, there are {TENSOR_MEMORY_COLUMNS}")
        if tensor_core and not self.tensor_core:
            found.append("no tensor-core instruction")
        return found


def read_resources(compiled: Any, architecture: Architecture) -> Resources:
    """Resources of one of Triton's compiled kernels."""
    return (_read_amd if architecture.target.backend == "hip" else _read_nvidia)(compiled)


# ---- NVIDIA ---------------------------------------------------------------------------------------------------------

_TENSOR_CORE = re.compile(r"[HIDQ]MMA|[HIQ]GMMA|UTC[A-Z]*MMA")
_LOCAL = re.compile(r"LDL|STL")
_SASS = re.compile(r"^\s+/\*([0-9a-f]+)\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", re.MULTILINE)


def _cuobjdump(option: str, binary: Path) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    found = subprocess.run([str(tool), option, str(binary)], capture_output=True, text=True, check=False)
    if found.returncode:
        raise RuntimeError(f"{tool.name} {option} failed (exit {found.returncode}): {found.stderr.strip()}")
    return found.stdout


def _read_nvidia(compiled: Any) -> Resources:
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        usage = _cuobjdump("-res-usage", binary)
        listing = sass(_cuobjdump("-sass", binary))

    def used(name: str) -> int:
        return int(re.search(rf"\b{name}:(\d+)", usage).group(1))

    return Resources(
        registers=used("REG"),
        stack_bytes=used("STACK"),
        local_bytes=used("LOCAL"),
        shared_bytes=compiled.metadata.shared,
        tensor_memory_columns=getattr(compiled.metadata, "tmem_size", None) or 0,
        spilled_registers=None,
        scalar_spills=None,
        **_count(
            listing, spill=_LOCAL, tensor_core=_TENSOR_CORE, barrier=re.compile(r"BAR\."), special=re.compile("MUFU")
        ),
    )


def sass(text: str) -> list[Instruction]:
    """The instructions of ``cuobjdump -sass``."""
    lines = _SASS.findall(text)
    index_of = {int(address, 16): i for i, (address, *_) in enumerate(lines)}
    listing = []
    for _, predicate, opcode, operands in lines:
        name = opcode.split(".")[0]
        target, falls = None, True
        if name in ("BRA", "BSSY") or opcode.startswith("BRA"):
            # `BRA 0x10` always jumps; `@P0 BRA 0x10` and `BRA.U UP0, 0x10` may.
            address = re.search(r"0x[0-9a-f]+$", operands)
            if name == "BRA":
                target = index_of.get(int(address.group(), 16)) if address else None
                falls = bool(predicate) or "," in operands
        elif name in ("EXIT", "RET", "BRX", "JMP", "JMX"):
            falls = bool(predicate)
        listing.append(Instruction(opcode, target, falls))
    return listing


# ---- AMD ------------------------------------------------------------------------------------------------------------

_SCRATCH = re.compile(r"scratch_(load|store)")
_MATRIX = re.compile(r"v_s?mfmac?_")
_TRANSCENDENTAL = re.compile(r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_")
_AMDGCN = re.compile(r"^(?:(\.LBB\w+):|\t([a-z]\w+)(?:[ \t]+(\S+))?)", re.MULTILINE)


def _read_amd(compiled: Any) -> Resources:
    text = compiled.asm["amdgcn"]

    def noted(name: str) -> int:
        return int(re.search(rf"^\s+(?:- )?\.{name}:\s+(\d+)", text, re.MULTILINE).group(1))

    return Resources(
        registers=noted("vgpr_count"),
        stack_bytes=noted("private_segment_fixed_size"),
        local_bytes=0,
        shared_bytes=max(compiled.metadata.shared, noted("group_segment_fixed_size")),
        tensor_memory_columns=0,
        spilled_registers=noted("vgpr_spill_count"),
        scalar_spills=noted("sgpr_spill_count"),
        **_count(
            amdgcn(text), spill=_SCRATCH, tensor_core=_MATRIX, barrier=re.compile("s_barrier"), special=_TRANSCENDENTAL
        ),
    )


def amdgcn(text: str) -> list[Instruction]:
    """The instructions of an AMDGCN assembly text."""
    index_of: dict[str, int] = {}
    lines: list[tuple[str, str]] = []
    for label, opcode, operand in _AMDGCN.findall(text):
        if label:
            index_of[label] = len(lines)
        else:
            lines.append((opcode, operand))
    listing = []
    for opcode, operand in lines:
        target = index_of.get(operand) if opcode.startswith(("s_branch", "s_cbranch")) else None
        listing.append(Instruction(opcode, target, opcode not in ("s_branch", "s_endpgm", "s_setpc_b64")))
    return listing


# ---- listings -------------------------------------------------------------------------------------------------------

_WORK = re.compile(r"LDG|STG|LDS|STS|LDL|STL|.*MMA|(global|buffer|ds|scratch|flat)_|v_s?mfmac?_")


def _count(
    listing: list[Instruction],
    *,
    spill: re.Pattern[str],
    tensor_core: re.Pattern[str],
    barrier: re.Pattern[str],
    special: re.Pattern[str],
) -> dict[str, int]:
    def count(pattern: re.Pattern[str]) -> int:
        return sum(bool(pattern.match(line.opcode)) for line in listing)

    inner = set().union(*innermost_loops(listing))
    return {
        "spill_instructions": count(spill),
        "inner_spill_instructions": sum(bool(spill.match(listing[i].opcode)) for i in inner),
        "tensor_core": count(tensor_core),
        "barriers": count(barrier),
        "special_functions": count(special),
        "instructions": len(listing),
    }


def innermost_loops(listing: list[Instruction]) -> list[set[int]]:
    """The instructions of every working loop that holds no other working loop.

    A loop is a natural loop (a jump to an instruction that every way to the jump has passed); it works when it touches
    memory or multiplies matrices.
    """
    starts, blocks, successors = _blocks(listing)
    dominators = _dominators(successors)
    loops: dict[int, set[int]] = {}  # by header: loops of one header are one loop
    predecessors: list[list[int]] = [[] for _ in starts]
    for block, following in enumerate(successors):
        for successor in following:
            predecessors[successor].append(block)
    for block, following in enumerate(successors):
        for header in following:
            if not dominators[block] >> header & 1:
                continue
            body, pending = {header}, [block]
            while pending:
                member = pending.pop()
                if member not in body:
                    body.add(member)
                    pending += predecessors[member]
            loops.setdefault(header, set()).update(body)
    working = [
        body for body in loops.values() if any(_WORK.match(listing[i].opcode) for block in body for i in blocks[block])
    ]
    return [
        {i for block in body for i in blocks[block]} for body in working if not any(other < body for other in working)
    ]


def _blocks(listing: list[Instruction]) -> tuple[list[int], list[range], list[list[int]]]:
    """First instructions of the basic blocks, the blocks, and the blocks that may follow each."""
    marks = {0} | {line.target for line in listing if line.target is not None}
    marks |= {i + 1 for i, line in enumerate(listing) if line.target is not None or not line.falls}
    starts = sorted(mark for mark in marks if mark < len(listing))
    block_of = {start: block for block, start in enumerate(starts)}
    blocks = [range(start, end) for start, end in zip(starts, [*starts[1:], len(listing)], strict=True)]
    successors = []
    for block in blocks:
        last = listing[block[-1]]
        following = [] if last.target is None else [block_of[last.target]]
        if last.falls and block.stop in block_of:
            following.append(block_of[block.stop])
        successors.append(following)
    return starts, blocks, successors


def _dominators(successors: list[list[int]]) -> list[int]:
    """For each block the set (bits) of blocks on every way to it from the first; nothing for those never reached."""
    reached, pending = {0}, [0]
    while pending:
        for successor in successors[pending.pop()]:
            if successor not in reached:
                reached.add(successor)
                pending.append(successor)
    everything = (1 << len(successors)) - 1
    dominators = [everything if block in reached else 0 for block in range(len(successors))]
    dominators[0] = 1
    changed = True
    while changed:
        changed = False
        incoming = [everything] * len(successors)
        for block in reached:
            for successor in successors[block]:
                incoming[successor] &= dominators[block]
        for block in reached - {0}:
            new = incoming[block] | 1 << block
            if new != dominators[block]:
                dominators[block], changed = new, True
    return dominators
