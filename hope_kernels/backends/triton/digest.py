"""What a kernel is compiled from, as a digest: where digests are equal, compiling again gives the same kernel.

Covered are the kernel's source with all of ours that it calls, reads or is handed a type of, the types and constants
it is compiled for, the options of the launch, the target and Triton's version; and how binaries are read
(:mod:`hope_kernels.backends.triton.resources`), since digests stand for what was read.

Source counts as syntax, not as text: neither a comment or docstring nor a line that moved changes a digest. (Triton's
own ``cache_key`` has the text, comments included, and the line a function starts at.)
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import lru_cache
from types import FunctionType, ModuleType
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITCallable, JITFunction

# Their versions say what is in them: Triton's own is part of the digest, the others are not in kernels.
_FOREIGN = {"triton", "torch", *sys.stdlib_module_names}
_ABSENT = object()


def digest(
    kernel: JITFunction,
    arguments: Iterable[Any],
    *,
    signature: Mapping[str, Any],
    constants: Mapping[Any, Any],
    attributes: Mapping[Any, Any],
    options: Mapping[str, Any],
    target: GPUTarget,
) -> str:
    """Sixteen hexadecimal digits.

    Args:
        kernel: the function; arguments: of the launch, for their types.
        signature, constants, attributes, options: what Triton derives from the arguments and compiles for.
        target: what it compiles for.

    Raises:
        TypeError: a constant, or a global value that the source reads, is of a kind not known to be the same in every
            process.
    """
    kept = {name: value for name, value in options.items() if name != "extern_libs"}
    kept["extern_libs"] = [name for name, _ in options.get("extern_libs") or ()]  # the rest is where they lie
    parts = [
        triton.__version__,
        canonical([target.backend, target.arch, target.warp_size]),
        canonical(dict(signature)),
        canonical(dict(constants)),
        canonical(dict(attributes)),
        canonical(dict(sorted(kept.items()))),
        _source([kernel.fn, *_types(arguments)]),
        _reading(),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def source_digest(kernel: JITFunction) -> str:
    """Of the source of a kernel alone, with all it calls and reads."""
    return _source([kernel.fn])


def canonical(value: Any) -> str:
    """Text of a value that is the same in every process, on every machine.

    Raises:
        TypeError: no such text is known for a value of this type.
    """
    value = value.value if isinstance(value, tl.constexpr) else value
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    if isinstance(value, tl.dtype | tl.pointer_type):
        return str(value)
    if isinstance(value, list | tuple | frozenset):
        items = sorted(map(canonical, value)) if isinstance(value, frozenset) else map(canonical, value)
        return f"{type(value).__name__}({', '.join(items)})"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{canonical(key)}: {canonical(item)}' for key, item in value.items())}}}"
    if isinstance(value, JITCallable):
        return _name(value.fn)
    if isinstance(value, type | FunctionType):
        return _name(value)
    if is_dataclass(value):
        return f"{_name(type(value))}({', '.join(canonical(getattr(value, f.name)) for f in fields(value))})"
    raise TypeError(f"{value!r} is a {type(value).__name__}: not known to be the same in every process")


def _name(code: FunctionType | type) -> str:
    return f"{code.__module__}.{code.__qualname__}"


# ---- source ---------------------------------------------------------------------------------------------------------


def _source(roots: list[FunctionType | type]) -> str:
    """Digest of the syntax of functions and classes with all of ours that they lead to."""
    pending, found = list(roots), {}
    while pending:
        code = pending.pop()
        if _name(code) not in found:
            found[_name(code)], leads_to = _described(code)
            pending += leads_to
    return hashlib.sha256(canonical(dict(sorted(found.items()))).encode()).hexdigest()


@lru_cache(maxsize=4096)
def _described(code: FunctionType | type) -> tuple[str, tuple[FunctionType | type, ...]]:
    """Digest of the syntax of one function or class and the global values it reads; and functions and classes of ours
    that it names."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
    scope = dict(vars(sys.modules[code.__module__]))
    if isinstance(code, FunctionType):
        scope |= inspect.getclosurevars(code).nonlocals
    values, leads_to = {}, {}
    for node in ast.walk(tree):
        value = _resolved(node, scope)
        if isinstance(value, JITCallable):
            value = value.fn
        if value is _ABSENT or isinstance(value, ModuleType) or _foreign(value):
            continue
        if isinstance(value, type | FunctionType):
            leads_to[_name(value)] = value
        else:
            values[ast.unparse(node)] = canonical(value)
    text = canonical([_syntax(tree), dict(sorted(values.items()))])
    return hashlib.sha256(text.encode()).hexdigest(), tuple(leads_to[name] for name in sorted(leads_to))


def _resolved(node: ast.AST, scope: Mapping[str, Any]) -> Any:
    """What a name, or a name of a module of ours, stands for; a local one may be taken for a global one of its name,
    which does no harm."""
    if isinstance(node, ast.Name):
        return scope.get(node.id, _ABSENT)
    if isinstance(node, ast.Attribute):
        module = _resolved(node.value, scope)
        if isinstance(module, ModuleType) and module.__name__.partition(".")[0] not in _FOREIGN:
            return getattr(module, node.attr, _ABSENT)
    return _ABSENT


def _foreign(value: Any) -> bool:
    """Whether it is a function or class of others, or a form of ``typing``."""
    if isinstance(value, tl.constexpr | tl.dtype):
        return False
    code = isinstance(value, type) or callable(value)
    root = str((value if code else type(value)).__module__).partition(".")[0]
    return root in _FOREIGN and (code or root != "builtins")


def _syntax(node: Any) -> Any:
    """The tree as nested lists, without docstrings and what versions of Python add or leave out where it is empty."""
    if isinstance(node, list):
        return [_syntax(item) for item in node]
    if not isinstance(node, ast.AST):
        # Bytes, complex numbers and the ellipsis are literals too.
        return node if isinstance(node, bool | int | float | str) else repr(node)
    found: list[Any] = [type(node).__name__]
    for name, value in ast.iter_fields(node):
        if name == "body" and isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            value = value[1:] if ast.get_docstring(node, clean=False) is not None else value
        if value is not None and value != []:
            found.append([name, _syntax(value)])
    return found


def _types(arguments: Iterable[Any]) -> Iterator[type]:
    """The types of ours among arguments and what is in them: their fields, by order, and their properties."""
    for value in arguments:
        inner = value if isinstance(value, tuple | list) else ()
        if hasattr(value, "_fields") or is_dataclass(value):
            yield type(value)
        yield from _types(inner)


@lru_cache(maxsize=1)
def _reading() -> str:
    from hope_kernels.backends.triton import resources

    return canonical(_syntax(ast.parse(inspect.getsource(resources))))
