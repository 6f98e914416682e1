"""Models on disk: ``config.json`` and ``model.safetensors`` in a folder. Nothing is unpickled."""

from __future__ import annotations

import dataclasses
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
    save_file = _safetensors().torch.save_file
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    config = json.dumps({"model_type": MODEL_TYPE, **model.config.to_dict()}, indent=1)
    # Each file appears whole or not at all. The weights name their config: with another one beside them, as when only
    # one of the two was replaced, they are refused.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as scratch:
        # One entry: the library writes several in any order, and the same model is to be the same file.
        save_file(tensors, Path(scratch) / WEIGHTS, metadata={MODEL_TYPE: config})
        (Path(scratch) / CONFIG).write_text(config + "\n")
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
    if "transformers_version" in values:
        raise ValueError(
            f"from_pretrained: {folder} was written by transformers; want "
            "transformers.AutoModelForCausalLM.from_pretrained(folder).to_hope(), behind an import of "
            "hope_kernels.integrations.transformers_model"
        )
    missing = [field.name for field in dataclasses.fields(HopeConfig) if field.name not in values]
    if missing:
        raise ValueError(f"from_pretrained: {folder / CONFIG} lacks {missing}")
    try:
        config = HopeConfig.from_dict(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"from_pretrained: {folder / CONFIG}: {error}") from None
    try:
        with safetensors.safe_open(folder / WEIGHTS, framework="pt") as file:
            written_with = json.loads((file.metadata() or {}).get(MODEL_TYPE, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dictionary)
    except Exception as error:  # the library's own class, which is no public name in all its versions
        raise ValueError(f"from_pretrained: {folder / WEIGHTS} cannot be read: {error}") from error
    if written_with is not None and written_with != {"model_type": found, **values}:
        raise ValueError(f"from_pretrained: {folder / WEIGHTS} was written with another config than {CONFIG}'s")
    model = kind(config, backend, device="meta")
    kept = _checked_dtype(model, tensors, folder / WEIGHTS)
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"from_pretrained: dtype is {dtype}; want a floating one, or None")
    model.to_empty(device=device or "cpu")
    model.to(dtype or kept)
    model.load_state_dict(tensors)
    return model


def _checked_dtype(model: HopeForCausalLM, tensors: dict[str, torch.Tensor], path: Path) -> torch.dtype:
    """The dtype of a file's tensors, which are the model's, all of them and no others."""
    want = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    missing, unknown = sorted(want.keys() - tensors.keys()), sorted(tensors.keys() - want.keys())
    if missing or unknown:
        raise ValueError(
            f"from_pretrained: {path} lacks {missing[:3]} and has unknown {unknown[:3]}; want the config's"
        )
    for name, shape in want.items():
        if tuple(tensors[name].shape) != shape:
            raise ValueError(f"from_pretrained: {path} has {name} of {tuple(tensors[name].shape)}; want {shape}")
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) > 1 or not next(iter(dtypes)).is_floating_point:
        raise ValueError(f"from_pretrained: {path} has tensors of {sorted(map(str, dtypes))}; want one floating dtype")
    return dtypes.pop()


def _safetensors():
    try:
        import safetensors.torch
    except ImportError:
        raise ImportError("models on disk need safetensors: pip install 'hope_kernels[models]'") from None
    return safetensors
