"""The example that adapts a pre-trained model does what it says, in small."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed (hope_kernels[integrations])")
pytest.importorskip("matplotlib")

from hope_kernels.cli.demo_training import load_example

SMALL = [
    "--context",
    "48",
    "--batch",
    "2",
    "--levels",
    "8",
    "16",
    "--gate-steps",
    "3",
    "--test-files",
    "3",
    "--scale",
    "1",
]


@pytest.fixture
def example(monkeypatch):
    found = load_example("adapt_pretrained")
    texts = found.Texts(
        ["To be read and to be learned from, again and again. " * 8] * 3,
        {f"module{i}.py": f"def function_{i}(argument):\n    return argument + {i}\n" * 9 for i in range(4)},
    )
    monkeypatch.setattr(found, "library_texts", lambda: texts)
    return found


def check(out):
    values = json.loads((out / "adapt.json").read_text())
    readings = values["readings"]
    assert list(readings) == ["off", "untrained gates", "trained gates"]
    assert len({reading["bits"] for reading in readings.values()}) == 3, "a memory changed nothing"
    assert values["test_files"] == 3 and values["test_bytes"] == 3 * 48 and len(values["gate_losses"]) == 3
    assert all(scale != 0 for scale in values["trained_scales"].values())
    for reading in readings.values():  # bytes are tokens here, so both count the same bits
        assert sum(reading["by_position"]) / 16 == pytest.approx(reading["bits"], rel=1e-5)
    assert (out / "adapt.png").stat().st_size > 1000 and (out / "cms.safetensors").exists()
    return values


def check_run(example, words, out):
    example.main([*words, *SMALL])
    return check(out)


def test_it_trains_a_model_and_then_its_gates(example, tmp_path):
    values = check_run(example, ["--out", str(tmp_path), "--steps", "3"], tmp_path)
    assert values["gate_parameters"] < 0.05 * values["parameters"]


def test_it_takes_a_local_checkpoint_with_its_tokenizer(example, tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    example.small_llama(48).save_pretrained(tmp_path / "model")
    check_run(example, ["--out", str(tmp_path / "out"), "--model", str(tmp_path / "model")], tmp_path / "out")


def test_docstrings_of_tested_modules_are_not_trained_on():
    example = load_example("adapt_pretrained")
    texts = example.library_texts()
    documentation = "\n".join(texts.documentation)
    assert len(texts.sources) > 20 and len(documentation) > 500_000
    seen = 0
    for source in texts.sources.values():
        first = source.split('"""')[1] if source.startswith('"""') else ""
        if len(first) > 300:
            seen += 1
            assert first[:200] not in documentation
    assert seen > 3
