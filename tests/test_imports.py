"""What the package imports: torch alone at import time, and inside it only along the arrows of its architecture."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hope_kernels

PACKAGE = Path(hope_kernels.__file__).parent


def run_python(code: str) -> str:
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, timeout=300, check=False
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_importing_the_package_brings_in_torch_and_nothing_else():
    new = run_python(
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import hope_kernels\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)\n"
        "print(*sorted(new))\n"
        "print('core' if 'hope_kernels._core' in sys.modules else 'lazy')"
    ).split()
    assert set(new[:-1]) <= {"hope_kernels", "torch"}, f"import hope_kernels also imports {new[:-1]}"
    assert new[-1] == "lazy", "the compiled core is loaded before anyone asks for it"


def test_it_works_where_only_torch_is_installed():
    """The reference runs, the compiled core and everything optional being absent; the status says what is missing."""
    report = run_python(
        "import sys\n"
        "blocked = ('triton', 'numpy', 'typer', 'rich', 'matplotlib', 'psutil', 'hope_kernels._core')\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if any(name == b or name.startswith(b + '.') for b in blocked):\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "import warnings; warnings.simplefilter('ignore')\n"
        "import torch\n"
        "from hope_kernels import MemorySpec, available_backends, memory_scan\n"
        "q, lr, w = torch.ones(1, 4, 1, 2), torch.ones(1, 4, 1), torch.zeros(1, 2, 2)\n"
        "out = memory_scan(q, q, q, lr, (w,), spec=MemorySpec('linear', residual=False), chunk_size=2)\n"
        "print(out.output[0, :, 0, 0].tolist())\n"
        "status = available_backends()['cpu']\n"
        "print(bool(status), len(status.reason) > 20 and 'core' in status.reason)"
    ).splitlines()
    # W = 0 for two tokens; then two steps of W += k^T v with k = v = (1, 1): q W = 2 * (1 + 1).
    assert report == ["[0.0, 0.0, 4.0, 4.0]", "False True"]


def modules() -> dict[str, ast.Module]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = [PACKAGE.name, *path.relative_to(PACKAGE).with_suffix("").parts]
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(), filename=str(path))
    return found


MODULES = modules()


def imports_of(name: str) -> set[str]:
    """Modules of the package that a module names in an import statement, wherever it stands."""
    found = set()
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} uses a relative import"
            full = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found |= {path if path in MODULES else node.module for path in full.values()}
    return {module for module in found if module in MODULES}


# From the top: a module may import from its own layer and those below.
LAYERS = (
    ("cli", "bench", "integrations"),
    ("models",),
    ("layers",),
    ("memory", "optim"),
    ("backends",),
)
# Words that every layer shares: what a memory is, and what a backend is given.
VOCABULARY = {"hope_kernels.memory.spec", "hope_kernels.backends.interface", "hope_kernels.optim.problem"}
# What backends share: the compiled core's view of a problem, and how a table of choices is read.
SHARED = {"hope_kernels.backends.core_problem", "hope_kernels.backends.tables"}


def layer_of(module: str) -> int | None:
    part = module.split(".")[1] if "." in module else None
    return next((i for i, names in enumerate(LAYERS) if part in names), None)


@pytest.mark.parametrize("name", [m for m in MODULES if layer_of(m) is not None])
def test_arrows_point_one_way(name):
    for module in imports_of(name) - VOCABULARY:
        # The package itself is its public face, made of the layers: for those who stand above them.
        target = layer_of("hope_kernels.models.") if module == "hope_kernels" else layer_of(module)
        assert target >= layer_of(name), f"{name} imports {module}, which lies above it"


@pytest.mark.parametrize("name", [m for m in MODULES if m.startswith("hope_kernels.backends.")])
def test_a_backend_imports_the_vocabulary_and_itself_alone(name):
    family = ".".join(name.split(".")[:3])
    others = {m for m in imports_of(name) - VOCABULARY - SHARED if m != family and not m.startswith(family + ".")}
    assert not others, f"{name} imports {sorted(others)}"


def test_the_reference_imports_the_vocabulary_and_products_of_gates_alone():
    """`products` is arithmetic on tensors that knows nothing of a memory; it imports nothing of the package itself."""
    assert imports_of("hope_kernels.memory.reference") <= VOCABULARY | {"hope_kernels.memory.products"}
    assert not imports_of("hope_kernels.memory.products")


def test_every_module_of_the_package_has_a_place():
    top = {name.split(".")[1] for name in MODULES if "." in name}
    assert top <= {part for layer in LAYERS for part in layer}, "give the new package a layer above"
