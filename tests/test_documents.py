"""The documents keep their word: the README's code runs, links lead somewhere, commands exist."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PLACES = ("*.md", "docs/**/*.md", "examples/**/*.md", "benchmarks/**/*.md", "tests/**/*.md")
DOCUMENTS = sorted(path for place in PLACES for path in ROOT.glob(place))
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_relative_links_lead_to_files(document: Path) -> None:
    text = FENCED.sub("", document.read_text())
    relative = [target for target in LINK.findall(text) if "://" not in target]
    assert [target for target in relative if not (document.parent / target).exists()] == []


def test_the_readmes_code_runs_and_computes_what_it_says() -> None:
    fenced = FENCED.findall((ROOT / "README.md").read_text())
    code, model = [body for language, body in fenced if language == "python"]
    # In the README the second call goes on from the first; one call over both must give the same.
    check = """
both = lambda x: torch.cat([x, x], 1)
whole = memory_scan(both(q), both(k), both(v), both(lr), weights, spec=spec, chunk_size=16)
torch.testing.assert_close(torch.cat([output, more], 1), whole.output, rtol=1e-4, atol=1e-5)
assert y.shape == (2, 100, 128) and y.isfinite().all()
"""
    check_model = """
assert logits.shape == (1, text.shape[1] - 1, 256) and loss.isfinite()
assert written.shape[1] == text.shape[1] + 20 and torch.equal(written[:, : text.shape[1]], text)
"""
    command = [sys.executable, "-c", code + check + model + check_model]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_code_of_the_document_on_models_runs() -> None:
    fenced = FENCED.findall((ROOT / "docs" / "models.md").read_text())
    own, library = [body for language, body in fenced if language == "python"]
    check = "assert written.shape == (1, 27) and state.position == text.shape[1]\n"
    code = own + check
    if importlib.util.find_spec("transformers") is not None:
        code += (
            library
            + """
assert written.shape == (2, 37) and torch.equal(written[:, :17], prompts)
again = TransformersHopeForCausalLM.from_hope(hope).eval()
assert torch.equal(again(prompts).logits, model(prompts).logits)
"""
        )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_page_of_equations_has_all_of_hopes_and_names_what_is_there() -> None:
    rows = re.findall(r"^\| (\(\d.*?) \|.*?\| (.*?) \|", (ROOT / "docs" / "equations.md").read_text(), re.MULTILINE)
    found: set[int] = set()
    for numbers, places in rows:
        for first, last in re.findall(r"\((\d+)\)(?: to \((\d+)\))?", numbers):
            found |= set(range(int(first), int(last or first) + 1))
        text = ""
        for word in re.findall(r"`([^`]+)`", places):
            if "." in word:
                path = next((p for p in (ROOT / "hope_kernels" / word, ROOT / word) if p.exists()), None)
                assert path is not None, f"{numbers}: there is no {word}"
                text = path.read_text()
            elif text:
                pattern = word if word.startswith('"') else rf"(def|class) {word}\b"
                assert re.search(pattern, text), f"{numbers}: {word} is not where it is said to be"
    assert found == {57, 70, 71, 72, 74, *range(83, 98)}


def test_the_pictures_are_those_that_the_code_draws(tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    pictures = ROOT / "docs" / "pictures"
    for picture in pictures.glob("*.svg"):
        if f"Matplotlib v{matplotlib.__version__}," not in picture.read_text():
            pytest.skip(f"another matplotlib than {matplotlib.__version__} drew the pictures")
    shutil.copy(pictures / "draw.py", tmp_path)
    command, environment = [sys.executable, str(tmp_path / "draw.py")], os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    names = sorted(path.name for path in pictures.glob("*.svg"))
    assert names == sorted(path.name for path in tmp_path.glob("*.svg"))
    assert [name for name in names if (tmp_path / name).read_bytes() != (pictures / name).read_bytes()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_make_targets_named_in_documents_exist(document: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", document.read_text(), re.MULTILINE))
    assert named - targets == set()


def test_commands_of_the_readme_are_those_of_the_command_line() -> None:
    pytest.importorskip("typer")
    from hope_kernels.cli.app import app

    commands = {command.name for command in app.registered_commands}
    section = (ROOT / "README.md").read_text().split("## Command line")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == commands
