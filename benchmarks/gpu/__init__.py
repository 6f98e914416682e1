"""The stages of the suite for a machine with a GPU, run by ``benchmarks/gpu_suite.py``.

* ``setting``: where and how large a stage runs;
* ``children``: a process of its own for each stage, and for parts of it;
* ``checks``: build, parity, operators, ``torch.compile``, CUDA graphs, compute-sanitizer;
* ``speed``: the GPU rows of the benchmark, how time and memory grow, decoding, tuning;
* ``report``: targets, tables, the picture.
"""
