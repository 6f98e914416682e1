"""The Hope model as a model of Hugging Face transformers; importing this file registers it with the Auto classes.

The classes hold :class:`hope_kernels.models.HopeModel` and compute nothing themselves: they say in the library's words
what the model already does. Parameters have the names that they have in :class:`hope_kernels.models.HopeForCausalLM`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

try:
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        GenerationMixin,
        PreTrainedConfig,
        PreTrainedModel,
    )
    from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
except ImportError as error:
    raise ImportError(
        f"a Hope model of transformers needs transformers 5.22 or newer: pip install 'hope_kernels[integrations]' "
        f"({error})"
    ) from error

from hope_kernels.integrations.hope_cache import HopeCache, read_fresh
from hope_kernels.integrations.masks import check_not_packed, check_one_sequence, real_tokens
from hope_kernels.layers import CMSLevel
from hope_kernels.models import HopeConfig, HopeForCausalLM, HopeModel
from hope_kernels.models.hope import IGNORED_LABEL, checked_labels
from hope_kernels.models.pretrained import MODEL_TYPE

__all__ = ["HopeCache", "TransformersHopeConfig", "TransformersHopeForCausalLM", "TransformersHopeModel"]


class TransformersHopeConfig(PreTrainedConfig):
    """A :class:`hope_kernels.models.HopeConfig` in the library's form, with all of its fields under their names.

    ``hidden_size``, ``num_hidden_layers``, ``num_attention_heads`` and ``tie_word_embeddings`` are other names of
    ``dim``, ``depth``, ``heads`` and ``tie_embeddings``. ``levels`` is a list of dictionaries, as in ``config.json``;
    :class:`hope_kernels.CMSLevel` are taken too.

    Args:
        use_cache: whether a call outside training returns a cache unless told otherwise.
        bos_token_id, eos_token_id, pad_token_id: as in every config of the library; None where there is none.
        The others as in :class:`hope_kernels.models.HopeConfig`.

    Raises:
        ValueError, TypeError: a field is out of range, as :class:`hope_kernels.models.HopeConfig` says.
    """

    model_type = MODEL_TYPE
    # The library's own forms: its dataclass would take an annotation for a field.
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012
    attribute_map = {  # noqa: RUF012
        "hidden_size": "dim",
        "num_hidden_layers": "depth",
        "num_attention_heads": "heads",
        "tie_word_embeddings": "tie_embeddings",
    }

    vocab_size: int = HopeConfig.vocab_size
    dim: int = HopeConfig.dim
    depth: int = HopeConfig.depth
    heads: int = HopeConfig.heads
    mixer: str = HopeConfig.mixer
    chunk_size: int = HopeConfig.chunk_size
    projection_chunk_size: int = HopeConfig.projection_chunk_size
    rule: str = HopeConfig.rule
    retention: bool = HopeConfig.retention
    momentum: bool | None = HopeConfig.momentum
    adaptive: list[str] | tuple[str, ...] | None = HopeConfig.adaptive
    lr_max: float | None = HopeConfig.lr_max
    value_norm_max: float | None = HopeConfig.value_norm_max
    weight_norm_max: float | None = HopeConfig.weight_norm_max
    window: int | None = HopeConfig.window
    rope_base: float = HopeConfig.rope_base
    levels: list[dict[str, Any]] | tuple[CMSLevel, ...] = HopeConfig.levels
    cms_variant: str = HopeConfig.cms_variant
    tie_embeddings: bool = HopeConfig.tie_embeddings
    norm_eps: float = HopeConfig.norm_eps
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.levels, list | tuple):  # dictionaries, before an error prints the config
            self.levels = [dataclasses.asdict(x) if isinstance(x, CMSLevel) else x for x in self.levels]
        super().__post_init__(**kwargs)
        values = self.to_hope().to_dict()
        self.adaptive, self.levels = values["adaptive"], values["levels"]

    @property
    def initializer_range(self) -> float:
        """The deviation of fresh embeddings, for tokens that ``resize_token_embeddings`` adds."""
        return self.dim**-0.5

    @initializer_range.setter
    def initializer_range(self, value: float) -> None:
        raise ValueError(f"initializer_range: got {value}; it follows from dim, dim**-0.5: want it left out")

    def to_hope(self) -> HopeConfig:
        """The same as a :class:`hope_kernels.models.HopeConfig`.

        Raises:
            ValueError, TypeError: a field is out of range.
        """
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(HopeConfig)}
        return HopeConfig.from_dict(values)

    @classmethod
    def from_hope(cls, config: HopeConfig, **values: Any) -> TransformersHopeConfig:
        """The config of the same model; ``values`` are further fields, such as ``eos_token_id``."""
        return cls(**config.to_dict(), **values)


class TransformersHopePreTrainedModel(PreTrainedModel):
    """What the bare model and the language model share: :meth:`forward` is the bare model's.

    Args:
        config: sizes and parts.
        backend: of every memory, as in :func:`hope_kernels.memory_scan`; None picks the fastest. ``from_pretrained``
            and ``from_config`` pass it on.
    """

    config_class = TransformersHopeConfig
    # The bare model has its parameters under the names of the language model, so there is no prefix to put before them.
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _input_embed_layer = "embedding"
    _no_split_modules = ("HopeBlock",)  # what is sharded: the one part whose own call does all that it does
    _skip_keys_device_placement = ("past_key_values",)
    _supports_context_parallel = False  # a state runs along the sequence

    config: TransformersHopeConfig
    model: HopeModel

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in the library; see its documentation for the arguments.

        Raises:
            ValueError: ``device_map`` puts parts of the model on several devices or offloads them: states pass by
                the calls of modules, which is where the library moves tensors between devices.
        """
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        places = {str(place) for place in getattr(model, "hf_device_map", {}).values()}
        if len(places) > 1 or "disk" in places:
            raise ValueError(
                f"device_map: the model would lie on {sorted(places)}; want one device, such as device_map='cpu' or "
                "device_map='cuda:0'"
            )
        return loaded

    def init_weights(self) -> None:
        """Nothing: the model's own constructors drew them, and its one tied weight is one parameter."""

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Parameters that a checkpoint lacked begin as those of a fresh model."""
        missing = [name for name, p in self.named_parameters() if not getattr(p, "_is_hf_initialized", False)]
        if missing:
            fresh = HopeForCausalLM(self.config.to_hope(), device=self.device, dtype=self.dtype)
            drawn = dict(fresh.named_parameters())
            for name in missing:
                self.get_parameter(name).copy_(drawn[name])

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As in the library; see its documentation for the arguments."""
        embedding = super().resize_token_embeddings(*args, **kwargs)
        self.model.config = self.config.to_hope()
        return embedding

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether training keeps the blocks' inputs alone: ``activation_checkpointing`` of the Hope model."""
        return self.model.activation_checkpointing

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = checkpoint, every_n_layers: int = 1
    ) -> None:
        function = getattr(gradient_checkpointing_func, "func", gradient_checkpointing_func)
        options = {"use_reentrant": False, **getattr(gradient_checkpointing_func, "keywords", {})}
        if enable and (function is not checkpoint or options != {"use_reentrant": False} or every_n_layers != 1):
            raise ValueError(
                f"gradient checkpointing: got options {options}, every_n_layers {every_n_layers}"
                f"{'' if function is checkpoint else ', offload'}; want use_reentrant=False, every layer, no offload"
            )
        self.model.activation_checkpointing = enable

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: HopeCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """Features ``[B, T, dim]`` of ``input_ids [B, T]``.

        Args:
            input_ids: any integer dtype.
            attention_mask: ``[B, tokens in the cache and new ones]``, 0 for padding, left or right, which is neither
                counted nor written; its features and logits are 0.
            position_ids: a memory has none, and attention counts by itself; several sequences packed into a row, which
                they would show, are refused.
            past_key_values: of the tokens before; it is moved on.
            inputs_embeds: ``[B, T, dim]``, rows of the embedding, in place of ``input_ids``.
            use_cache: whether the cache is returned; None takes the config's answer, no in training.
            output_attentions: there are none.
            output_hidden_states: whether what each block reads is returned, and the features.
            return_dict: False returns a tuple.
            **kwargs: of the loss; ``cu_seq_lens_q`` is refused, and so is ``seq_idx`` that changes within a row.

        Raises:
            ValueError, TypeError: naming the argument that does not fit.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(
                f"input_ids, inputs_embeds: got {'neither' if input_ids is None else 'both'}; want one of them"
            )
        if output_attentions or (output_attentions is None and self.config.output_attentions):
            raise ValueError("output_attentions: got True; a Hope model has no attention weights to put out")
        if past_key_values is not None and not isinstance(past_key_values, HopeCache):
            raise TypeError(f"past_key_values: got a {type(past_key_values).__name__}; want a HopeCache, or None")
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        stateful = (use_cache or past_key_values is not None) and not torch.compiler.is_compiling()
        if stateful and isinstance(self.model.blocks[0].mixer_norm.weight, DTensor):
            raise ValueError(
                "use_cache, past_key_values: the parameters are sharded, and states refer to whole ones; want "
                "use_cache=False and no cache"
            )
        x = self.model.embed(input_ids) if inputs_embeds is None else self._embedded(inputs_embeds)
        valid = self._valid(attention_mask, past_key_values, *x.shape[:2])
        check_not_packed(kwargs.get("cu_seq_lens_q") is not None, position_ids, x.shape[1], valid)
        check_one_sequence(kwargs.get("seq_idx"), x.shape[1], valid)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        layers: list[Tensor] | None = [] if output_hidden_states else None
        if past_key_values is None and use_cache:
            past_key_values = HopeCache()
        if past_key_values is None:
            features = read_fresh(self.model, x, valid, layers)
        else:
            features = past_key_values.read(self.model, x, valid, layers)
        output = BaseModelOutputWithPast(
            last_hidden_state=features,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=None if layers is None else tuple(layers),
        )
        return output if _wants_dict(return_dict, self.config) else output.to_tuple()

    def _embedded(self, inputs_embeds: Tensor) -> Tensor:
        shape = tuple(inputs_embeds.shape) if isinstance(inputs_embeds, Tensor) else type(inputs_embeds).__name__
        if not isinstance(inputs_embeds, Tensor) or inputs_embeds.dim() != 3 or shape[-1] != self.config.dim:
            raise ValueError(f"inputs_embeds: got {shape}; want [B, T, {self.config.dim}]")
        return self.model.scale(inputs_embeds)

    def _valid(self, mask: Tensor | None, cache: HopeCache | None, rows: int, length: int) -> Tensor | None:
        """First and one past the last real token of each row of this call; None where all are real."""
        if mask is None:
            return None
        past = 0 if cache is None else cache.get_seq_length()
        want = (rows, past + length)
        if not isinstance(mask, Tensor) or tuple(mask.shape) != want:
            came = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"attention_mask: got {came}; want {want}: a row for each sequence, {past} tokens in the cache and "
                f"{length} new ones"
            )
        if past:
            seen, told = cache.positions(), (mask[:, :past] != 0).sum(1).tolist()
            if seen != told:
                raise ValueError(
                    f"attention_mask: has {told} real tokens in the rows of the cache, which was given {seen}; "
                    "memories cannot unlearn tokens that a later mask hides: want the masks of the earlier calls "
                    "continued, or an empty cache"
                )
        return real_tokens(mask, length, past)


class TransformersHopeModel(TransformersHopePreTrainedModel):
    """Token embeddings, Hope blocks and a last norm: what ``AutoModel`` makes of a Hope config."""

    _keys_to_ignore_on_load_unexpected = (r"^head\.weight$",)  # a language model's

    def __init__(self, config: TransformersHopeConfig, backend: str | None = None) -> None:
        super().__init__(config)
        self.model = HopeModel(config.to_hope(), backend)
        self.post_init()


class TransformersHopeForCausalLM(TransformersHopePreTrainedModel, GenerationMixin):
    """A Hope language model: what ``AutoModelForCausalLM`` makes of a Hope config.

    ``generate`` does what it does for every model of the library: greedy, sampling, beams, assisted. The cache is a
    :class:`HopeCache`.
    """

    def __init__(self, config: TransformersHopeConfig, backend: str | None = None) -> None:
        super().__init__(config)
        hope = HopeForCausalLM(config.to_hope(), backend)
        self.model, self.head = hope.model, hope.head
        self.post_init()

    logits = HopeForCausalLM.logits  # with the two parts, ``model`` and ``head``, that this class has as well

    @classmethod
    def from_hope(cls, hope: HopeForCausalLM, **values: Any) -> TransformersHopeForCausalLM:
        """The same model for transformers; parameters are shared, not copied.

        Args:
            values: further fields of the config, such as ``eos_token_id``.
        """
        config = TransformersHopeConfig.from_hope(hope.config, dtype=next(hope.parameters()).dtype, **values)
        with torch.device("meta"):
            made = cls(config)
        made.model, made.head = hope.model, hope.head
        return made.train(hope.training)

    def to_hope(self) -> HopeForCausalLM:
        """The same model without transformers; parameters are shared, not copied."""
        hope = HopeForCausalLM(self.config.to_hope(), device="meta")
        hope.model, hope.head = self.model, self.head
        return hope.train(self.training)

    def get_output_embeddings(self) -> nn.Linear | None:
        """The head; None where the embeddings are the head as well."""
        return self.head

    def set_output_embeddings(self, new_embeddings: nn.Linear | None) -> None:
        self.head = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: HopeCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits ``[B, T, vocab_size]`` of the token behind each of ``input_ids [B, T]``.

        Args:
            labels: integers ``[B, T]``, ``input_ids`` once more or -100 where there is no loss; they are shifted here,
                as in every model of the library (and not in :class:`hope_kernels.models.HopeForCausalLM`). The loss
                is 0 where there are none.
            logits_to_keep: of the last so many tokens, or of the places in a tensor; 0 of all.
            **kwargs: ``num_items_in_batch``, by which the loss is divided in place of the number of labels.
            The others as in :meth:`TransformersHopeModel.forward`.

        Raises:
            ValueError, TypeError: naming the argument that does not fit.
        """
        read = super().forward(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_attentions,
            output_hidden_states,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.logits(read.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self._loss(logits, labels, kwargs)
        output = CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=read.past_key_values, hidden_states=read.hidden_states
        )
        return output if _wants_dict(return_dict, self.config) else output.to_tuple()

    def _loss(self, logits: Tensor, labels: Tensor, options: dict[str, Any]) -> Tensor:
        """The library's loss with its options, and 0 where no label counts."""
        ignored, shifted = options.get("ignore_index", IGNORED_LABEL), options.get("shift_labels")
        labels = checked_labels(type(self).__name__, labels, logits, ignored)
        if options.get("num_items_in_batch") is None:
            count = ((labels[:, 1:] if shifted is None else shifted) != ignored).sum()
            options = options | {"num_items_in_batch": count.clamp_min(1)}
        return self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **options)

    def _prepare_attention_mask_for_generation(
        self, inputs_tensor: Tensor, generation_config: Any, model_kwargs: dict[str, Any]
    ) -> Tensor:
        mask = super()._prepare_attention_mask_for_generation(inputs_tensor, generation_config, model_kwargs)
        if generation_config.is_assistant:  # told nothing where the caller's mask is of ones alone
            return torch.ones_like(mask)
        # The id of padding between other tokens is one of the text.
        return ((mask.cumsum(1) > 0) & (mask.flip(1).cumsum(1).flip(1) > 0)).to(mask)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise ValueError(f"cache_implementation: got {kind!r}; a Hope model's cache is a HopeCache: want None")
        if generation_config.assistant_early_exit is not None:
            raise ValueError(
                f"assistant_early_exit: got {generation_config.assistant_early_exit}; a Hope model writes with all of "
                "its blocks: want None, and an assistant_model or prompt_lookup_num_tokens"
            )
        mask, cache = model_kwargs.get("attention_mask"), model_kwargs.get("past_key_values")
        # The library leaves masks of ones out.
        length = generation_config._mask_length if mask is None else mask.shape[1]
        if length == 0:
            raise ValueError("input_ids: got a prompt without a token; want at least one")
        if mask is not None and bool((mask[:, -1] == 0).any()):
            raise ValueError(
                "attention_mask: the last token of a prompt is padding, and text goes on behind it; generate wants "
                "prompts padded on the left"
            )
        if isinstance(cache, HopeCache):
            # The library reads a prompt once more of which it has nothing left to read.
            if length <= cache.get_seq_length():
                raise ValueError(
                    f"past_key_values: holds {cache.get_seq_length()} tokens, and input_ids has {length}; want the "
                    "whole text, with at least one new token"
                )
            if not generation_config.is_assistant:
                cache.deactivate_past_recording()  # of an earlier assisted call; another one starts its own
        if cache is not None or generation_config.use_cache is False:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
            return
        cache = model_kwargs["past_key_values"] = HopeCache()
        if generation_config.is_assistant:
            cache.activate_past_recording()

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: it packs all sequences into one row.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "continuous batching (generate_batch, cache_implementation='paged') packs all sequences into one row, and "
            "memories want a row for each: use generate on a padded batch"
        )


def _wants_dict(return_dict: bool | None, config: TransformersHopeConfig) -> bool:
    return config.return_dict if return_dict is None else return_dict


AutoConfig.register(MODEL_TYPE, TransformersHopeConfig, exist_ok=True)
AutoModel.register(TransformersHopeConfig, TransformersHopeModel, exist_ok=True)
AutoModelForCausalLM.register(TransformersHopeConfig, TransformersHopeForCausalLM, exist_ok=True)
# By this table, which registering leaves as it is, Trainer knows whose labels its label smoothing has to shift.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[MODEL_TYPE] = TransformersHopeForCausalLM.__name__
