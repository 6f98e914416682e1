"""A memory is a small network with per-sequence weights, read by every token and written once per chunk."""

from hope_kernels.memory.scan import MemoryOutput, memory_read, memory_scan, memory_write
from hope_kernels.memory.spec import MemorySpec
from hope_kernels.memory.state import MemoryState

__all__ = ["MemoryOutput", "MemorySpec", "MemoryState", "memory_read", "memory_scan", "memory_write"]
