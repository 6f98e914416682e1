"""Triton's interpreter without work it does again and again: half of what a test of kernels takes.

Whenever one of a kernel's functions calls another, the interpreter looks through its whole language for functions to
put its own in place of. It does so here once per launch, and afterwards puts back what was there.
"""

from __future__ import annotations

from types import SimpleNamespace


def patch_once_per_launch() -> None:
    """From now on, in this process. Both modules that functions see are patched: Triton's own see the second."""
    from triton import language
    from triton.runtime import interpreter

    patch = interpreter._patch_lang
    modules = SimpleNamespace(__globals__={"language": language, "core": language.core})

    def patch_if_needed(function: object) -> object:
        if language.core.is_builtin(language.load):
            return patch(modules)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_if_needed
