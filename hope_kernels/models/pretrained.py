"""Models on disk: ``config.json`` and ``model.safetensors`` in a folder. Nothing is unpickled."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from hope_kernels.models.config import HopeConfig

if TYPE_CHECKING:
    from hope_kernels.models.hope import HopeForCausalLM

    Model = TypeVar("Model", bound=HopeForCausalLM)

CONFIG, WEIGHTS = "config.json", "model.safetensors"
MODEL_TYPE = "hope"


def save(model: HopeForCausalLM, folder: str | os.PathLike[str]) -> None:
    """See :meth:`HopeForCausalLM.save_pretrained`."""
    save_file = _safetensors().save_file
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    config = {"model_type": MODEL_TYPE, **model.config.to_dict()}
    # Each file appears whole or not at all, the weights first: a folder with a config has weights.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as scratch:
        save_file(tensors, Path(scratch) / WEIGHTS, metadata={"format": "pt"})
        (Path(scratch) / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
        for name in (WEIGHTS, CONFIG):
            os.replace(Path(scratch) / name, folder / name)


def load(
    kind: type[Model],
    folder: str | os.PathLike[str],
    backend: str | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> Model:
    """See :meth:`HopeForCausalLM.from_pretrained`."""
    safetensors = _safetensors()
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"from_pretrained: {folder} has no {name}; want a folder of save_pretrained")
    try:
        values = json.loads((folder / CONFIG).read_text())
    except ValueError as error:
        raise ValueError(f"from_pretrained: {folder / CONFIG} is no JSON: {error}") from None
    found = values.pop("model_type", None) if isinstance(values, dict) else None
    if found != MODEL_TYPE:
        raise ValueError(f"from_pretrained: {folder / CONFIG} has model_type {found!r}; want {MODEL_TYPE!r}")
    try:
        tensors = safetensors.load_file(folder / WEIGHTS)
    except Exception as error:  # the library's own class, which is no public name in all its versions
        raise ValueError(f"from_pretrained: {folder / WEIGHTS} cannot be read: {error}") from error
    model = kind(HopeConfig.from_dict(values), backend, device="meta")
    _check(model, tensors, folder / WEIGHTS)
    model.to_empty(device=device or "cpu")
    kept = next(iter(tensors.values())).dtype
    model.to(dtype or kept)
    model.load_state_dict(tensors)
    return model


def _check(model: HopeForCausalLM, tensors: dict[str, torch.Tensor], path: Path) -> None:
    """That a file has the model's tensors, all of them and no others."""
    want = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    missing, unknown = sorted(want.keys() - tensors.keys()), sorted(tensors.keys() - want.keys())
    if missing or unknown:
        raise ValueError(
            f"from_pretrained: {path} lacks {missing[:3]} and has unknown {unknown[:3]}; want the config's"
        )
    for name, shape in want.items():
        if tuple(tensors[name].shape) != shape:
            raise ValueError(f"from_pretrained: {path} has {name} of {tuple(tensors[name].shape)}; want {shape}")


def _safetensors():
    try:
        import safetensors.torch
    except ImportError:
        raise ImportError("models on disk need safetensors: pip install 'hope_kernels[models]'") from None
    return safetensors.torch
