"""Memories inside models of other libraries: :mod:`hope_kernels.integrations.transformers`, and what it is made of."""
