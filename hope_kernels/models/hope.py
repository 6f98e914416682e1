"""The Hope model: blocks of a token mixer and a Continuum Memory System, and a language model on top.

A Hope block (94)-(97) is ``x = x + mixer(norm(x))``, then ``x = x + CMS(norm(x))``. Everything a model carries from
call to call is one :class:`HopeState`; with Titans as the mixer its size does not depend on how much was read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hope_kernels.layers import CMS, CausalAttention, CMSState, NeuralMemory, SelfModifyingTitans
from hope_kernels.layers.attention import AttentionState
from hope_kernels.layers.level import PlainLevel
from hope_kernels.layers.titans_state import TitansState
from hope_kernels.models import generation, pretrained
from hope_kernels.models.config import HopeConfig
from hope_kernels.models.state import BlockState, HopeState

IGNORED_LABEL = -100  # where no token follows: there is no loss
_MIXER_STATES = {"attention": AttentionState, "titans": TitansState, "neural_memory": TitansState}


class HopeOutput(NamedTuple):
    """Logits ``[B, T, vocab_size]``; ``loss``, a scalar in nats, with labels; ``state``, where one was given."""

    logits: Tensor
    loss: Tensor | None
    state: HopeState | None


class HopeBlock(nn.Module):
    """A token mixer, then a CMS, each behind an RMS norm and with a residual; ``[B, T, dim] -> [B, T, dim]``.

    Where no level is ever written a plain MLP takes the place of the CMS: with attention, a Transformer's block.
    """

    def __init__(self, config: HopeConfig, backend: str | None = None, **factory: Any) -> None:
        super().__init__()
        dim, heads = config.dim, config.heads
        self.mixer_norm = nn.RMSNorm(dim, eps=config.norm_eps, **factory)
        if config.mixer == "attention":
            self.mixer = CausalAttention(dim, heads, window=config.window, rope_base=config.rope_base, **factory)
        else:
            options = {"retention": config.retention, "lr_max": config.lr_max, "backend": backend, **factory}
            if config.momentum is not None:
                options["momentum"] = config.momentum
            if config.mixer == "titans":
                names = ("projection_chunk_size", "rule", "adaptive", "value_norm_max", "weight_norm_max")
                options |= {name: getattr(config, name) for name in names}
            kind = SelfModifyingTitans if config.mixer == "titans" else NeuralMemory
            self.mixer = kind(dim, heads, config.chunk_size, **options)
        self.cms_norm = nn.RMSNorm(dim, eps=config.norm_eps, **factory)
        self.cms = self.mlp = None
        if config.has_cms:
            self.cms = CMS(dim, config.levels, heads=heads, variant=config.cms_variant, backend=backend, **factory)
        else:
            self.mlp = PlainLevel(dim, config.levels[0], bare=True, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` as fresh sequences."""
        x = x + self.mixer(self.mixer_norm(x))
        return x + (self.mlp(self.cms_norm(x))[0] if self.cms is None else self.cms(self.cms_norm(x)))

    def init_state(self, batch_size: int) -> BlockState:
        """The state before the first token; it refers to the parameters."""
        cms = None if self.cms is None else self.cms.init_state(batch_size)
        return BlockState(self.mixer.init_state(batch_size), cms)

    def stream(self, x: Tensor, state: BlockState) -> tuple[Tensor, BlockState]:
        """``x`` behind the tokens of ``state``, which stays as it is."""
        y, mixer = self.mixer.stream(self.mixer_norm(x), state.mixer)
        x = x + y
        memory = self.mlp if self.cms is None else self.cms.stream
        y, cms = memory(self.cms_norm(x), state.cms)
        return x + y, BlockState(mixer, cms)


class HopeModel(nn.Module):
    """Token embeddings, blocks and a last norm: ids ``[B, T]`` -> features ``[B, T, dim]``.

    ``model(ids)`` reads fresh sequences; :meth:`stream` carries a state: any split of a sequence into calls gives the
    same features, states and gradients, to rounding. Rows of a batch never influence each other.

    Args:
        config: sizes and parts.
        backend: of every memory, as in :func:`hope_kernels.memory_scan`; None picks the fastest.
        device, dtype: of the parameters.

    Attributes:
        activation_checkpointing: whether training keeps only each block's input and computes the rest again in the
            backward; off at first.
    """

    def __init__(
        self,
        config: HopeConfig,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.config, self.activation_checkpointing = config, False
        self.embedding = nn.Embedding(config.vocab_size, config.dim, **factory)
        nn.init.normal_(self.embedding.weight, std=config.dim**-0.5)
        self.blocks = nn.ModuleList(HopeBlock(config, backend, **factory) for _ in range(config.depth))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps, **factory)
        # The stream keeps much of the token's embedding, so a tied head would say that every token repeats itself, the
        # surer the wider the model. So small, features leave all logits near 0; how large they become is learned.
        nn.init.constant_(self.norm.weight, config.dim**-0.5)

    def forward(self, ids: Tensor) -> Tensor:
        """Features ``[B, T, dim]`` of ids ``[B, T]`` (any integer dtype), as fresh sequences.

        Raises:
            ValueError, TypeError: ``ids`` is no integer tensor ``[B, T]``, or (on the CPU) has one that is none of
                the vocabulary.
        """
        return self.read(self.embed(ids))[0]

    def init_state(self, batch_size: int) -> HopeState:
        """The state before the first token. It refers to the parameters, so gradients reach them."""
        return HopeState(0, batch_size, tuple(block.init_state(batch_size) for block in self.blocks))

    def stream(self, ids: Tensor, state: HopeState) -> tuple[Tensor, HopeState]:
        """The same behind the tokens of ``state``, which stays as it is; returns the state after them.

        Raises:
            ValueError, TypeError: as :meth:`forward`; or the state is of another batch size or model.
        """
        x = self.embed(ids)
        self.check_state(state, ids.shape[0])
        return self.read(x, state)

    def read(
        self, x: Tensor, state: HopeState | None = None, layers: list[Tensor] | None = None
    ) -> tuple[Tensor, HopeState | None]:
        """Features ``[B, T, dim]`` of tokens ``x [B, T, dim]`` that :meth:`embed` made, and the state after them.

        Args:
            state: of the tokens before, for as many sequences, and of a model like this one; None for fresh sequences,
                which leave none.
            layers: a list that is given what each block reads, and the features.
        """
        after = []
        for block, held in zip(self.blocks, [None] * len(self.blocks) if state is None else state.blocks, strict=True):
            if layers is not None:
                layers.append(x)
            if held is None:
                x = self._run(block, x)
            else:
                x, held = self._run(block.stream, x, held)
                after.append(held)
        features = self.norm(x)
        if layers is not None:
            layers.append(features)
        if state is None:
            return features, None
        return features, HopeState(state.position + x.shape[1], state.batch_size, tuple(after))

    def load_state(self, state_dict: dict[str, Any]) -> HopeState:
        """A state from :meth:`HopeState.state_dict`.

        Raises:
            ValueError: a name is missing or unknown, or there are other blocks than this model's.
        """
        _check_names(state_dict, {"position", "batch_size", "blocks"})
        if len(state_dict["blocks"]) != len(self.blocks):
            raise ValueError(f"state_dict: got {len(state_dict['blocks'])} blocks; want {len(self.blocks)}")
        mixer, blocks = _MIXER_STATES[self.config.mixer], []
        for block in state_dict["blocks"]:
            _check_names(block, {"mixer", "cms"})
            cms = None if block["cms"] is None else CMSState.from_state_dict(block["cms"])
            blocks.append(BlockState(mixer.from_state_dict(block["mixer"]), cms))
        return HopeState(state_dict["position"], state_dict["batch_size"], tuple(blocks))

    def check_state(self, state: HopeState, batch_size: int | None = None) -> None:
        """That a state is of a model like this one, and of ``batch_size`` sequences where that is given.

        Raises:
            ValueError, TypeError: it is not; the message says what it is of.
        """
        if not isinstance(state, HopeState):
            raise TypeError(f"HopeModel: state is a {type(state).__name__}; want a HopeState")
        batch_size = state.batch_size if batch_size is None else batch_size
        if state.batch_size != batch_size or len(state.blocks) != len(self.blocks):
            raise ValueError(
                f"HopeModel: state is of {state.batch_size} sequences and {len(state.blocks)} blocks; want "
                f"{batch_size} and {len(self.blocks)}"
            )
        want = _MIXER_STATES[self.config.mixer]
        for index, block in enumerate(state.blocks):
            if not isinstance(block.mixer, want) or (block.cms is None) == self.config.has_cms:
                came = f"{type(block.mixer).__name__} and {type(block.cms).__name__}"
                cms = "CMSState" if self.config.has_cms else "NoneType"
                raise ValueError(f"HopeModel: state of block {index} is {came}; want {want.__name__} and {cms}")

    def embed(self, ids: Tensor) -> Tensor:
        """``[B, T, dim]``, after looking at the ids; errors as :meth:`forward`."""
        if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            came = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
            raise TypeError(f"HopeModel: input_ids is {came}; want an integer tensor")
        if ids.dim() != 2:
            raise ValueError(f"HopeModel: input_ids has shape {tuple(ids.shape)}; want [B, T]")
        ids = ids.long()
        # On a GPU the embedding's own assertion answers: a look would wait for the device.
        if ids.device.type == "cpu" and ids.numel() and not torch.compiler.is_compiling():
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(
                    f"HopeModel: input_ids has ids from {low} to {high}; want 0 to {self.config.vocab_size - 1}"
                )
        return self.scale(self.embedding(ids))

    def scale(self, embeddings: Tensor) -> Tensor:
        """Rows of the embedding, ``[.., dim]``, as blocks read them."""
        # Unit entries, about what the blocks add: of smaller ones little is left behind the first block, and later ones
        # learn late or never which token is where.
        return embeddings * self.config.dim**0.5

    def _run(self, function: Callable[..., Any], *args: Any) -> Any:
        if self.activation_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(function, *args, use_reentrant=False)
        return function(*args)


def _check_names(state_dict: dict[str, Any], names: set[str]) -> None:
    if set(state_dict) != names:
        raise ValueError(f"state_dict: got names {sorted(state_dict)}; want {sorted(names)}")


class HopeForCausalLM(nn.Module):
    """A :class:`HopeModel` that predicts the next token.

    Args:
        config, backend, device, dtype: as :class:`HopeModel`.
    """

    def __init__(
        self,
        config: HopeConfig,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.model = HopeModel(config, backend, device=device, dtype=dtype)
        self.head = None
        if not config.tie_embeddings:
            self.head = nn.Linear(config.dim, config.vocab_size, bias=False, device=device, dtype=dtype)
            nn.init.normal_(self.head.weight, std=config.dim**-0.5)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, state: HopeState | None = None) -> HopeOutput:
        """Logits of the token behind each of ``input_ids [B, T]``.

        Args:
            input_ids: any integer dtype.
            labels: ``[B, T]``, ``labels[b, t]`` is the token behind ``input_ids[b, t]`` (the caller has shifted
                them, so that windows of one text, one behind the other, lose none); -100 where there is none. The
                loss is the mean over the others, in float32; 0 where there are no others.
            state: of the tokens before; None for fresh sequences. Begin with ``model.init_state(B)`` to get one back.

        Raises:
            ValueError, TypeError: naming the argument that does not fit.
        """
        if state is None:
            features = self.model(input_ids)
        else:
            features, state = self.model.stream(input_ids, state)
        logits = self.logits(features)
        return HopeOutput(logits, None if labels is None else self._loss(logits, labels), state)

    def init_state(self, batch_size: int) -> HopeState:
        """The state before the first token, see :meth:`HopeModel.init_state`."""
        return self.model.init_state(batch_size)

    def logits(self, features: Tensor) -> Tensor:
        """``[.., dim]`` -> ``[.., vocab_size]``."""
        return F.linear(features, self.model.embedding.weight) if self.head is None else self.head(features)

    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        *,
        state: HopeState | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        callback: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """Prompts and what the model writes behind them, ``[B, T + written]``, in the dtype of ``input_ids``.

        The prompt is read in one call; then one token per sequence at a time. With a Titans mixer, or attention with
        a window, memory does not grow with the number of tokens.

        Args:
            input_ids: prompts ``[B, T]`` of one length, at least one token.
            max_new_tokens: how many to write.
            state: of what was read before the prompts; it does not change.
            temperature: 0 always takes the most likely token; else probabilities are ``softmax(logits / temperature)``.
            top_k: draw among the k most likely tokens.
            top_p: draw among as few of the most likely as have this probability together.
            eos_token_id: ids that end a sequence, which then repeats the first of them; all ended, it stops.
            generator: of the draws.
            callback: called with each new token of every sequence, ``[B]``, as it is written.

        Raises:
            ValueError, TypeError: naming the argument that does not fit.
        """
        options = {"state": state, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        options |= {"eos_token_id": eos_token_id, "generator": generator, "callback": callback}
        return generation.generate(self, input_ids, max_new_tokens, **options)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``config.json`` and ``model.safetensors`` into a folder, made where there is none.

        Raises:
            ImportError: safetensors is not installed.
        """
        pretrained.save(self, folder)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> HopeForCausalLM:
        """The model that :meth:`save_pretrained` wrote; ``dtype`` None keeps the one it was written in, a floating one.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is no model's, or config and weights do not belong together.
            ImportError: safetensors is not installed.
        """
        return pretrained.load(cls, folder, backend, device, dtype)

    @property
    def activation_checkpointing(self) -> bool:
        """As :attr:`HopeModel.activation_checkpointing`."""
        return self.model.activation_checkpointing

    @activation_checkpointing.setter
    def activation_checkpointing(self, on: bool) -> None:
        self.model.activation_checkpointing = on

    def parameter_count(self) -> int:
        """Numbers in all parameters; tied ones count once."""
        return sum(p.numel() for p in self.parameters())

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        labels = checked_labels("HopeForCausalLM", labels, logits)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        total = F.cross_entropy(logits.flatten(0, 1).to(dtype), labels.flatten(), reduction="sum")
        return total / (labels != IGNORED_LABEL).sum().clamp_min(1)


def checked_labels(model: str, labels: Tensor, logits: Tensor, ignored: int = IGNORED_LABEL) -> Tensor:
    """Labels ``[B, T]`` of logits ``[B, T, vocab_size]`` as int64.

    Raises:
        ValueError, TypeError: they are no integers of that shape or (on the CPU) none of the vocabulary; it begins
            with the name of the model.
    """
    if not isinstance(labels, Tensor):
        raise TypeError(f"{model}: labels is a {type(labels).__name__}; want an integer tensor [B, T]")
    if labels.shape != logits.shape[:-1] or labels.is_floating_point():
        raise ValueError(
            f"{model}: labels is {labels.dtype} of shape {tuple(labels.shape)}; want integers of shape "
            f"{tuple(logits.shape[:-1])}, as input_ids"
        )
    labels = labels.long()
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        there = labels[labels != ignored]
        if there.numel() and not 0 <= int(there.min()) <= int(there.max()) < logits.shape[-1]:
            raise ValueError(
                f"{model}: labels has ids from {int(there.min())} to {int(there.max())}; want 0 to "
                f"{logits.shape[-1] - 1}, or {ignored} where there is none"
            )
    return labels
