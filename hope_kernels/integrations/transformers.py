"""Drop-in for pre-trained Hugging Face decoders: ``add_cms(model, levels=[512, 2048])`` makes memories of their MLPs.

The model's own classes stay. Hooks tell the MLPs what they are not given: on the model, which tokens are padding; on
each decoder layer, the cache, in which the memories' states are carried.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hope_kernels.integrations.caches import context_of
from hope_kernels.integrations.context import Call, current_call, during, enter, leave
from hope_kernels.integrations.drop_in import (
    DEFAULT_RANK,
    cms_parameters,
    fill_cms,
    install,
    memories,
    read_cms,
    replace_mlps,
    save_cms,
    uninstall,
)
from hope_kernels.integrations.in_context import MemoryMLP, MLPStructure
from hope_kernels.integrations.levels import Levels, chunk_sizes
from hope_kernels.integrations.masks import check_not_packed, real_tokens

__all__ = ["add_cms", "cms_parameters", "load_cms", "remove_cms", "replace_mlps", "save_cms"]

Model = TypeVar("Model", bound=nn.Module)

GLU = MLPStructure(("gate_proj", "up_proj", "down_proj"), "act_fn")
# The MLP of each decoder layer that is known, by the layer's class; its child is called ``mlp`` in all of them.
DECODER_LAYERS = {
    "LlamaDecoderLayer": GLU,
    "MistralDecoderLayer": GLU,
    "Qwen2DecoderLayer": GLU,
    "Qwen3DecoderLayer": GLU,
    "GemmaDecoderLayer": GLU,
    "Gemma2DecoderLayer": GLU,
    "Gemma3DecoderLayer": GLU,
    "GPT2Block": MLPStructure(("c_fc", "c_proj"), "act", dropout="dropout"),
    "GPTNeoXLayer": MLPStructure(("dense_h_to_4h", "dense_4h_to_h"), "act"),
}
_HANDLES = "_cms_hooks"


def add_cms(model: Model, levels: Levels, *, layers: str | Sequence[int] = "all", rank: int = DEFAULT_RANK) -> Model:
    """Give the MLPs of a pre-trained decoder fast memories: in place, and exactly what they were at first.

    Each MLP becomes a memory whose learned initial weights are the pre-trained ones, where they are and under their
    names; see :func:`replace_mlps` for what it computes and :class:`hope_kernels.integrations.in_context.CMSGates`
    for the parameters that are new. With their ``scale`` at 0, where it starts, logits are the model's own bit for
    bit, and without gradients they cost what they cost before. States are carried by the cache
    (``past_key_values``); a call without one is a context of its own. Padding, by ``attention_mask``, is neither
    counted nor written.

    Args:
        model: Llama, Mistral, Qwen 2 or 3, Gemma 1 to 3, GPT-2 or GPT-NeoX (Pythia), bare or with a head, a PEFT
            model of one too.
        levels: chunk sizes in tokens, fastest first, each a multiple of the one before it: MLP i of L gets
            ``levels[i * len(levels) // L]``; or ``{layer number: chunk size}``.
        layers: ``"all"``, or the numbers of the decoder layers to spread them over.
        rank: of the low-rank part of the target's correction; 0 for none.

    Returns:
        ``model``.

    Raises:
        ValueError, TypeError: the architecture is not supported, its MLPs are mixtures of experts, quantised,
            sharded or have memories already, or an argument does not fit. The message says what to do; the model is
            then unchanged.
        ImportError: transformers is not installed.
    """
    owner, decoders = _decoders(model)
    mlps = [(f"{name}.mlp", layer.mlp, structure) for name, layer, structure in decoders]
    install(mlps, chunk_sizes(levels, layers, len(mlps)), rank, told=True)
    handles = [
        owner.register_forward_pre_hook(_enter_model, with_kwargs=True),
        owner.register_forward_hook(_leave_model, always_call=True),
    ]
    handles += [layer.register_forward_pre_hook(_enter_layer, with_kwargs=True) for _, layer, _ in decoders]
    setattr(owner, _HANDLES, handles)
    return model


def remove_cms(model: Model) -> Model:
    """Take the memories out again: modules, classes and hooks are those that were there before; changed in place.

    Also undoes :func:`replace_mlps`.

    Raises:
        ValueError: the model has no CMS.
    """
    uninstall(model)
    for module in model.modules():
        for handle in module.__dict__.pop(_HANDLES, []):
            handle.remove()
        checkpoint = getattr(module, "_gradient_checkpointing_func", None)
        if isinstance(checkpoint, _Checkpoint):
            module._gradient_checkpointing_func = checkpoint.function
    return model


def load_cms(model: Model, path: str | os.PathLike[str]) -> Model:
    """Put the CMS that :func:`save_cms` stored into a model: added first where the model has none.

    Args:
        model: the base model, as its own ``from_pretrained`` gives it.
        path: the file, or its folder.

    Returns:
        ``model``.

    Raises:
        ValueError, FileNotFoundError: the file does not fit the model, or is none. The model is then unchanged.
    """
    settings, tensors = read_cms(path)
    added = not any(True for _ in memories(model))
    if added:
        levels = {int(number): size for number, size in settings["levels"].items()}
        add_cms(model, levels, rank=settings["rank"])
    try:
        fill_cms(model, settings, tensors)
    except ValueError:
        if added:
            remove_cms(model)
        raise
    return model


def _decoders(model: nn.Module) -> tuple[nn.Module, list[tuple[str, nn.Module, MLPStructure]]]:
    """The module that runs the decoder layers, and the layers in order with the structure of their MLPs.

    Raises:
        ValueError, TypeError: what :func:`add_cms` says.
    """
    try:
        from transformers import PreTrainedModel
    except ImportError:
        raise ImportError("add_cms needs transformers: pip install 'hope_kernels[integrations]'") from None
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}; want a Hugging Face decoder")
    modules = dict(model.named_modules())
    found = [(name, module, _structure(module)) for name, module in modules.items() if _structure(module) is not None]
    pretrained = [module for module in modules.values() if isinstance(module, PreTrainedModel)]
    if not pretrained:
        raise TypeError(
            f"model: {type(model).__name__} is no transformers model; want one, or replace_mlps for other modules"
        )
    _check_weights(pretrained[0])
    if not found:
        raise ValueError(_unsupported(pretrained[0]))
    owners = {name.rpartition(".")[0].rpartition(".")[0] for name, _, _ in found}
    if len(owners) > 1:
        raise ValueError(f"model: has decoder layers in {sorted(owners)}; want one of these parts at a time")
    return modules[owners.pop()], found


def _structure(module: nn.Module) -> MLPStructure | None:
    """By the class or one above it: FSDP, for example, makes classes of its own."""
    return next(
        (DECODER_LAYERS[kind.__name__] for kind in type(module).__mro__ if kind.__name__ in DECODER_LAYERS), None
    )


def _unsupported(model: nn.Module) -> str:
    kind = getattr(model.config, "model_type", type(model).__name__)
    names = ", ".join(layer.removesuffix("DecoderLayer").removesuffix("Layer") for layer in DECODER_LAYERS)
    experts = ("num_experts", "num_local_experts", "n_routed_experts")
    if any(getattr(model.config, name, None) for name in experts):
        return (
            f"model: {kind} has mixtures of experts, whose tokens do not reach one MLP in order; want a dense model "
            f"({names}), or "
            "replace_mlps for its dense MLPs (a shared expert)"
        )
    return (
        f"model: {kind} is not an architecture that add_cms knows ({names}); want one of them, or "
        "replace_mlps(model, match, "
        "levels) with a match that names its MLPs"
    )


def _check_weights(model: nn.Module) -> None:
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise TypeError(
            f"model: {type(model).__name__} has quantised weights; want floating-point ones: load it without a "
            "quantization_config, "
            "or call model.dequantize() first"
        )
    if (getattr(model, "_tp_size", None) or 1) > 1:
        raise TypeError(
            f"model: {type(model).__name__} is tensor-parallel (tp_size {model._tp_size}); want it loaded without "
            "tp_plan"
        )


# Compiled code breaks off at what the hooks do: it is about Python objects, and about values on the host.
@torch.compiler.disable
def _enter_model(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before the model's forward: which tokens of this call are real."""
    given = dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | kwargs
    if module.training:
        # Here rather than before each layer, whose hooks run inside the checkpoint in some versions of the library.
        for layer in module.modules():
            checkpoint = getattr(layer, "_gradient_checkpointing_func", None)
            if _is_checkpointed(layer) and checkpoint is not None and not isinstance(checkpoint, _Checkpoint):
                layer._gradient_checkpointing_func = _Checkpoint(checkpoint)
    tokens = given.get("input_ids")
    tokens = given.get("inputs_embeds") if tokens is None else tokens
    enter(Call() if tokens is None else _call(given, tokens.shape[1]))


@torch.compiler.disable
def _leave_model(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    leave()


@torch.compiler.disable
def _enter_layer(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a decoder layer's forward: its cache, however the architecture calls and passes it."""
    from transformers import Cache

    call = current_call()
    cache = next((x for x in (*kwargs.values(), *args) if isinstance(x, Cache)), None)
    if call is None:  # a layer called by itself
        memory = getattr(module, "mlp", None)
        if cache is not None and isinstance(memory, MemoryMLP) and not memory.cms.is_off():
            raise RuntimeError(
                f"{memory.cms_name}: its decoder layer is called with a cache outside its model's forward, which says "
                "which tokens are padding; want the model called, or the layer without a cache"
            )
        return
    if _is_checkpointed(module):  # the library drops the cache
        call.carried = None
        return
    call.carried = None if cache is None else context_of(cache)


def _is_checkpointed(layer: nn.Module) -> bool:
    return layer.training and getattr(layer, "gradient_checkpointing", False)


class _Checkpoint:
    """A checkpointing function whose second run knows what the first one was told."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(self, layer: Any, *args: Any) -> Any:
        return self.function(partial(_as_told, current_call(), layer), *args)


def _as_told(call: Call | None, layer: Any, *args: Any) -> Any:
    with during(call):
        return layer(*args)


def _call(given: dict[str, Any], length: int) -> Call:
    """A call with arguments ``given`` and ``length`` tokens, which finds later which of them are real.

    The cache grows before anyone asks, so how long it is is noted now.
    """
    mask, cache = given.get("attention_mask"), given.get("past_key_values")
    layer = 0
    if isinstance(mask, dict):  # one for each kind of layer
        if mask.get("full_attention") is not None and cache is not None:
            layer = list(cache.is_sliding).index(False)
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    past: int | Tensor = 0
    if isinstance(mask, Tensor) and cache is not None:
        past = cache.get_seq_length(layer)
        if mask.dim() == 4:
            past = past - cache.get_mask_sizes(length, layer)[1]
        elif isinstance(past, Tensor):  # a static cache's own, which it will change
            past = past.clone()
    packed = given.get("cu_seq_lens_q") is not None
    positions = given.get("position_ids") if mask is None and cache is None else None

    def find_valid() -> Tensor | None:
        check_not_packed(packed, positions, length)
        return None if mask is None else real_tokens(mask, length, past)

    def find_seen() -> list[int] | None:
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            return None
        return (mask[:, : int(past)] != 0).sum(1).tolist()

    return Call(find_valid=find_valid, find_seen=find_seen)
