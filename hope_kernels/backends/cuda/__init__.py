"""The CUDA engine: hands problems to the part of ``hope_kernels._core`` that nvcc compiled.

It has chunked scans (``scan.py``), the update of several levels (``level_update.py``) and single tokens through a whole
CMS (``step.py``).
"""

from hope_kernels.backends.cuda.level_update import level_update, refuses_level_update
from hope_kernels.backends.cuda.runtime import built
from hope_kernels.backends.cuda.scan import refuses, saved_shapes, scan_backward, scan_forward, status

__all__ = [
    "built",
    "level_update",
    "refuses",
    "refuses_level_update",
    "saved_shapes",
    "scan_backward",
    "scan_forward",
    "status",
]
