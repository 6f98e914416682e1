"""Fused kernels for memories that learn while they read: chunked, multi-frequency updates and retrieval."""

from hope_kernels.backends import BackendStatus, available_backends
from hope_kernels.layers import CMS, CMSLevel, NeuralMemory, SelfModifyingTitans
from hope_kernels.memory import MemoryOutput, MemorySpec, MemoryState, memory_read, memory_scan, memory_write

__version__ = "0.1.0"

__all__ = [
    "CMS",
    "BackendStatus",
    "CMSLevel",
    "MemoryOutput",
    "MemorySpec",
    "MemoryState",
    "NeuralMemory",
    "SelfModifyingTitans",
    "available_backends",
    "memory_read",
    "memory_scan",
    "memory_write",
]
