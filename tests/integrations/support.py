"""Tiny random models of every supported architecture, and the oracle their memories are compared with."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from hope_kernels.integrations.drop_in import memories

transformers = pytest.importorskip("transformers", reason="transformers is not installed (hope_kernels[integrations])")

VOCABULARY = 61
COMMON = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
COMMON |= {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
LLAMA = COMMON | {"intermediate_size": 24, "num_key_value_heads": 1, "max_position_embeddings": 256}
GPT = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0, "vocab_size": VOCABULARY}

ARCHITECTURES = {
    "llama": ("Llama", LLAMA),
    "llama-bias": ("Llama", LLAMA | {"mlp_bias": True}),
    "mistral": ("Mistral", LLAMA | {"sliding_window": 8}),
    "qwen2": ("Qwen2", LLAMA),
    "qwen3": ("Qwen3", LLAMA | {"head_dim": 8}),
    "gemma": ("Gemma", LLAMA | {"head_dim": 8}),
    "gemma2": ("Gemma2", LLAMA | {"head_dim": 8, "sliding_window": 8}),
    "gemma3": ("Gemma3", LLAMA | {"head_dim": 8, "sliding_window": 8}),
    "gpt2": ("GPT2", GPT | {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 256, "n_inner": 24}),
    "gpt_neox": ("GPTNeoX", LLAMA),
}
CLASSES = {
    "Llama": ("LlamaConfig", "LlamaForCausalLM"),
    "Mistral": ("MistralConfig", "MistralForCausalLM"),
    "Qwen2": ("Qwen2Config", "Qwen2ForCausalLM"),
    "Qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
    "Gemma": ("GemmaConfig", "GemmaForCausalLM"),
    "Gemma2": ("Gemma2Config", "Gemma2ForCausalLM"),
    "Gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM"),
    "GPT2": ("GPT2Config", "GPT2LMHeadModel"),
    "GPTNeoX": ("GPTNeoXConfig", "GPTNeoXForCausalLM"),
}


def make(name: str = "llama", dtype: torch.dtype = torch.float32, **changes) -> nn.Module:
    """A random model, large weights so that memories matter, in inference mode."""
    kind, values = ARCHITECTURES[name]
    config, model = (getattr(transformers, part) for part in CLASSES[kind])
    torch.manual_seed(0)
    made = model(config(**(values | changes)))
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.25)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return made.to(dtype).eval()


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    """Random ids ``[rows, length]``, none of them padding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (rows, length), generator=generator)


def switch_on(model: nn.Module, scale: float = 0.1) -> nn.Module:
    """Gates as after some training: the scale set, everything else random."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, module in memories(model):
            gates = module.get_submodule("cms")
            for name, parameter in gates.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
                if name == "scale":
                    parameter.fill_(scale)
                else:
                    parameter.add_(noise, alpha=0.1)
    return model


def oracle_mlp(module: nn.Module, original: nn.Module, x: Tensor, chunk_size: int) -> Tensor:
    """What a memory puts out for ``x [B, T, D]``: the original module, its weights updated token by token.

    Inner gradients come from autograd of each token's loss at the chunk's first weights; biases are left alone.
    """
    gates = module.get_submodule("cms")
    v, lr, retention = gates(x, original(x))
    frozen = {name: p for name, p in original.named_parameters() if name.endswith("bias")}
    first = {name: p for name, p in original.named_parameters() if name not in frozen}
    rows = []
    for row in range(x.shape[0]):
        weights, outputs = first, []
        for start in range(0, x.shape[1], chunk_size):
            span = slice(start, min(start + chunk_size, x.shape[1]))
            outputs.append(functional_call(original, weights | frozen, (x[row, span],)))
            if span.stop - span.start < chunk_size:
                break
            moving = weights
            for t in range(span.start, span.stop):
                # Copies: the target depends on the first weights too, and is a constant of the inner gradient.
                here = {name: w.clone() for name, w in weights.items()}
                found = functional_call(original, here | frozen, (x[row, t : t + 1],))
                loss = 0.5 * (found - v[row, t]).square().sum()
                steps = torch.autograd.grad(loss, list(here.values()), create_graph=True)
                moving = {
                    name: retention[row, t, 0] * w - lr[row, t, 0] * step
                    for (name, w), step in zip(moving.items(), steps, strict=True)
                }
            weights = moving
        rows.append(torch.cat(outputs))
    return torch.stack(rows)


def with_oracle(model: nn.Module) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """A copy of a model with memories whose MLPs are computed by the oracle instead, and those MLPs' parameters.

    For whole sequences from a fresh context, without padding.
    """
    from hope_kernels.integrations.transformers import remove_cms

    plain, parameters = remove_cms(copy.deepcopy(model)), {}
    for name, memory in memories(model):
        mlp = plain.get_submodule(name)
        original = copy.deepcopy(mlp)
        parameters |= {f"{name}.{key}": parameter for key, parameter in original.named_parameters()}
        size = memory.cms_chunk_size
        mlp.forward = lambda x, memory=memory, original=original, size=size: oracle_mlp(memory, original, x, size)
    return plain, parameters


def in_a_process_group(function: Callable[[], None], ranks: int = 1) -> None:
    """Runs a function of a test module in every process of a gloo group, each a process of its own.

    There gloo's threads cannot meet the end of the interpreter, nor hold up the tests that follow. The loopback
    interface is named so that no host name is looked up.
    """
    code = f"""
import os, sys, torch.distributed as dist
from {function.__module__} import {function.__name__}
rank, store = int(sys.argv[1]), dist.FileStore(sys.argv[2], {ranks})
dist.init_process_group("gloo", store=store, rank=rank, world_size={ranks})
{function.__name__}()
dist.barrier()
print("done", flush=True)
os._exit(0)
"""
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", code, str(rank), f"{folder}/store"],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(ranks)
        ]
        try:
            found = [process.communicate(timeout=300) for process in processes]
        finally:  # a group that lost one of its processes waits for ever
            for process in processes:
                process.kill()
    for output, errors in found:
        assert output.endswith("done\n"), errors
