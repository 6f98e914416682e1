"""Models on disk: the same model comes back, and what is no model is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hope_kernels import CMSLevel
from hope_kernels.models import HopeConfig, HopeForCausalLM
from tests.models.common import MIXERS, ids_of, make_model

try:
    import safetensors.torch
except ImportError:
    safetensors = None
stored = pytest.mark.skipif(safetensors is None, reason="safetensors is not installed")


@stored
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("mixer", MIXERS)
def test_what_is_saved_comes_back(mixer, tied, tmp_path) -> None:
    model = make_model(mixer, torch.bfloat16, tie_embeddings=tied)
    model.save_pretrained(tmp_path / "new" / "folder")
    assert sorted(p.name for p in (tmp_path / "new/folder").iterdir()) == ["config.json", "model.safetensors"]
    again = HopeForCausalLM.from_pretrained(tmp_path / "new" / "folder")
    for copy in range(4):
        again.save_pretrained(tmp_path / str(copy))
        for name in ("config.json", "model.safetensors"):
            assert (tmp_path / str(copy) / name).read_bytes() == (tmp_path / "new/folder" / name).read_bytes()
    assert again.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert torch.equal(model(ids_of(1, 7)).logits, again(ids_of(1, 7)).logits)
    wide = HopeForCausalLM.from_pretrained(tmp_path / "new" / "folder", backend="reference", dtype=torch.float64)
    assert all(p.dtype == torch.float64 for p in wide.parameters())


@stored
def test_a_model_takes_anothers_place(tmp_path) -> None:
    make_model("attention").save_pretrained(tmp_path)
    small = make_model("attention", depth=1)
    small.save_pretrained(tmp_path)
    assert HopeForCausalLM.from_pretrained(tmp_path).config == small.config


@stored
def test_what_is_no_model_is_refused(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no config\.json; want a folder of save_pretrained"):
        HopeForCausalLM.from_pretrained(tmp_path)
    model = make_model("attention")
    model.save_pretrained(tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    written, values = config.read_text(), json.loads(config.read_text())

    def refused(match: str, kind: type[Exception] = ValueError) -> None:
        with pytest.raises(kind, match=match):
            HopeForCausalLM.from_pretrained(tmp_path)

    for text, match in (
        ("{", r"config\.json is no JSON"),
        (json.dumps({**values, "model_type": "llama"}), r"model_type 'llama'; want 'hope'"),
        (json.dumps({**values, "sizes": 3}), r"HopeConfig: got unknown names \['sizes'\]"),
        (json.dumps({**values, "levels": [{"chunk": 3}]}), r"CMSLevel: got unknown names \['chunk'\]"),
        (json.dumps({**values, "levels": [{"expansion": 3}]}), r"config\.json: CMSLevel: got .*; want a chunk_size"),
        (json.dumps({**values, "levels": 3}), r"config\.json: HopeConfig: levels is 3"),
        (json.dumps({**values, "dim": 7}), r"config\.json: HopeConfig: dim is 7 and heads is 2"),
        (json.dumps({**values, "norm_eps": None}), r"norm_eps is None; want a positive float"),
        (json.dumps({name: value for name, value in values.items() if name != "window"}), r"lacks \['window'\]"),
        (json.dumps({**values, "window": 5}), r"model\.safetensors was written with another config"),
    ):
        config.write_text(text)
        refused(match)
    config.write_text(written)
    with pytest.raises(TypeError, match=r"dtype is torch\.int32; want a floating one"):
        HopeForCausalLM.from_pretrained(tmp_path, dtype=torch.int32)
    content = weights.read_bytes()
    # Files of others say nothing of a config; then names, shapes and dtypes are compared.
    tensors = safetensors.torch.load_file(weights)
    for changes, match in (
        ({"dim": 16}, r"model\.safetensors has .* of \(.*\); want \("),
        ({"depth": 3}, r"lacks \['model\.blocks\.2\."),
        ({"depth": 1}, r"unknown \['model\.blocks\.1\."),
    ):
        safetensors.torch.save_file(tensors, weights)
        config.write_text(json.dumps({**values, **changes}))
        refused(match)
    config.write_text(written)
    for dtypes in ([torch.int32], [torch.float32, torch.bfloat16]):
        mixed = {name: x.to(dtypes[i % len(dtypes)]) for i, (name, x) in enumerate(tensors.items())}
        safetensors.torch.save_file(mixed, weights)
        refused("want one floating dtype")
    weights.write_bytes(content[: len(content) // 2])
    refused(r"model\.safetensors cannot be read")
    weights.unlink()
    refused(r"has no model\.safetensors", FileNotFoundError)


@stored
def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch) -> None:
    model = make_model("attention")
    model.save_pretrained(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def fail(tensors, path, metadata) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        make_model("attention", depth=1).save_pretrained(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_configurations_are_json_and_back() -> None:
    config = HopeConfig(mixer="attention", window=9, levels=(CMSLevel(4, momentum=True), CMSLevel(None)))
    assert HopeConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert HopeConfig.from_dict({}) == HopeConfig()


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"dim": 0}, ValueError, "dim is 0; want at least 1"),
        ({"depth": True}, TypeError, "depth is True; want a positive int"),
        ({"heads": 3}, ValueError, "want dim divisible by heads"),
        ({"window": 0}, ValueError, "window is 0; want at least 1"),
        ({"mixer": "mamba"}, ValueError, "mixer is 'mamba'; want one of 'titans'"),
        ({"cms_variant": "x"}, ValueError, "cms_variant is 'x'; want one of 'sequential'"),
        ({"levels": ()}, TypeError, "HopeConfig: levels is .*; want a non-empty sequence of CMSLevel"),
        ({"levels": (16,)}, TypeError, "HopeConfig: levels is .*; want a non-empty sequence of CMSLevel"),
        ({"levels": None}, TypeError, "HopeConfig: levels is None; want a non-empty sequence of CMSLevel"),
        (
            {"levels": (CMSLevel(4), CMSLevel(3))},
            ValueError,
            r"HopeConfig: levels\[0\] and \[1\] have chunk_size 4 and 3",
        ),
        ({"norm_eps": -1.0}, ValueError, "norm_eps is -1.0; want a finite number above 0"),
        ({"rope_base": "x"}, TypeError, "rope_base is 'x'"),
        ({"lr_max": -1}, ValueError, "lr_max is -1"),
        ({"rule": "adam"}, ValueError, "rule is 'adam'; want one of 'gd', 'dgd'"),
        ({"retention": None}, TypeError, "HopeConfig: retention is None; want True or False"),
        ({"momentum": 1}, TypeError, "HopeConfig: momentum is 1; want True or False"),
        ({"momentum": True}, ValueError, "HopeConfig: momentum is True with rule 'dgd'; momentum goes with rule 'gd'"),
        ({"adaptive": ("q",)}, ValueError, "HopeConfig: adaptive has 'q'; want some of 'k', 'v', 'lr', 'retention'"),
        ({"adaptive": ("retention",), "retention": False}, ValueError, "HopeConfig: adaptive has 'retention' with"),
        ({"tie_embeddings": "no"}, TypeError, "tie_embeddings is 'no'; want True or False"),
        ({"mixer": "attention", "dim": 12, "heads": 4}, ValueError, "attention wants an even width"),
    ],
)
def test_a_field_that_is_out_of_range_is_named(changes, error, match) -> None:
    with pytest.raises(error, match=match):
        HopeConfig(**changes)


@pytest.mark.parametrize(("name", "millions"), [("1m", 1), ("20m", 20), ("340m", 340), ("760m", 760), ("1.3b", 1300)])
def test_presets_have_the_size_in_their_name_and_in_the_documentation(name, millions) -> None:
    model = HopeForCausalLM(HopeConfig.preset(name), device="meta")
    assert model.parameter_count() / 1e6 == pytest.approx(millions, rel=0.05)
    config, document = model.config, Path(__file__).parents[2] / "docs" / "models.md"
    levels = ", ".join(str(level.chunk_size) for level in config.levels[:-1])
    sizes = f"{config.dim} | {config.depth} | {config.heads} | {config.vocab_size:,} | {levels}"
    assert f'| `"{name}"` | {sizes} | {model.parameter_count():,} |' in document.read_text()


def test_there_is_no_other_preset() -> None:
    with pytest.raises(ValueError, match=r"preset: got '7b'; want one of '1m', '20m', '340m', '760m', '1\.3b'"):
        HopeConfig.preset("7b")
