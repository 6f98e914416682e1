"""Measuring and checking: what ``hope-kernels verify``, ``bench`` and ``demo`` and the suites in ``benchmarks/`` share.

Needs torch only (plots need matplotlib), so that a script on a machine without a command line library can use it.

* ``shapes``: the named problem sizes and the floating point operations each one stands for;
* ``problems``: inputs for them;
* ``implementations``: a backend (plain or through ``torch.compile``) as a function to call, and whether two agree;
* ``timing``: several implementations timed side by side;
* ``peak_memory``: peak memory of one call, in a process of its own;
* ``gpu``: a GPU's measured peaks, what calls take of its memory, CUDA graphs;
* ``decode``: one token at a time through a Continuum Memory System;
* ``call_overhead``: what one-token calls take beside their arithmetic;
* ``kernel_resources``: registers, memory and spills of the compiled Triton kernels (needs Triton, no GPU);
* ``machine``: what ran: processor, versions, measured peaks;
* ``parity_cases``, ``parity``: every backend against the token-by-token oracle in float64;
* ``speed``: the comparison of backends over the shapes;
* ``scaling``: a backend's time by threads and by the length of a sequence;
* ``plots``: pictures of the above.
"""
