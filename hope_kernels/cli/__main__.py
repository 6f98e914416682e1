"""``python -m hope_kernels.cli`` is the same as ``hope-kernels``."""

import sys

from hope_kernels.cli import main

sys.argv[0] = "hope-kernels"  # what reports name as their command
main()
