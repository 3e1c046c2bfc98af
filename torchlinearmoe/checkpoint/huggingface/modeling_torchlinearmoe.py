"""A torchlinearmoe model for transformers, loaded with `trust_remote_code=True`.

This file travels with the weights and hands the work to the installed torchlinearmoe. Nothing in that package imports
it. Decoding keeps torchlinearmoe's state (of constant size in linear layers) in the place of a key-value cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ModelOutput

try:
    from torchlinearmoe.checkpoint.huggingface.own import float32_names
    from torchlinearmoe.generation.padded import forward_masked, prefill_masked, spread
    from torchlinearmoe.models.decoder import Decoder, DecodeState
    from torchlinearmoe.recipe import resolve
except ImportError as error:
    raise ImportError(f"this model needs the torchlinearmoe package: pip install torchlinearmoe ({error})") from None


class TorchLinearMoEConfig(PretrainedConfig):
    """`recipe`: the tables `model`, `moe` and `mixer` of a torchlinearmoe recipe."""

    model_type = "torchlinearmoe"

    def __init__(self, recipe: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.recipe = recipe or {}
        super().__init__(**kwargs)


@dataclass
class Output(ModelOutput):
    """What a forward gives."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    state: Any = None
    hidden_states: tuple[Tensor, ...] | None = None


class TorchLinearMoEForCausalLM(PreTrainedModel, GenerationMixin):
    """A decoder of any layout, under transformers' interface."""

    config_class = TorchLinearMoEConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _is_stateful = True
    _no_split_modules = ["Block"]
    supports_gradient_checkpointing = True

    def __init__(self, config: TorchLinearMoEConfig) -> None:
        super().__init__(config)
        model = resolve({**config.recipe, "training": {"steps": 1}}).model
        self.model = Decoder(model)
        self.gradient_checkpointing = False  # transformers sets it
        self._keep_in_fp32_modules_strict = {f"model.{name}" for name in float32_names(model)}
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed

    def get_output_embeddings(self) -> None:
        """None: the decoder has its own head, and ties it by itself."""
        return

    def resize_token_embeddings(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *args: Any, **kwargs: Any
    ) -> nn.Module:
        """The embedding as it is. Raises ValueError, before anything is touched, for another size than it has."""
        size = self.model.recipe.vocab_size
        multiple = pad_to_multiple_of or 1
        wanted = -(-(size if new_num_tokens is None else new_num_tokens) // multiple) * multiple
        if wanted != size:
            raise ValueError(f"a vocabulary of {wanted}: this model has {size} ids, and its size cannot be changed")
        return self.get_input_embeddings()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Fill what no file has: fresh parameters, and buffers that are not saved."""
        for name, initial in getattr(module, "initializers", {}).items():
            parameter = getattr(module, name)
            if parameter is not None and not getattr(parameter, "_is_hf_initialized", False):
                generator = torch.Generator(parameter.device).manual_seed(torch.initial_seed())
                parameter.copy_(initial.draw(tuple(parameter.shape), 0, generator))
        reset: Any = getattr(module, "reset_buffers", None)
        if reset is not None:
            buffers = module.named_buffers(recurse=False)
            loaded = {name: value.clone() for name, value in buffers if getattr(value, "_is_hf_initialized", False)}
            reset()
            for name, value in loaded.items():
                getattr(module, name).copy_(value)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        state: Any = None,
        use_cache: bool = False,
        max_state_length: int | None = None,
        return_dict: bool | None = True,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
    ) -> Output | tuple[Any, ...]:
        """Logits [B, T, V] of tokens [B, T], or of embeddings [B, T, D] in their place.

        output_hidden_states: also what each layer reads, and what the head does, [B, T, D] each.
        attention_mask: [B, T], or longer when a `state` holds the tokens before. use_cache: return a `state` to go on
        from; `max_state_length` bounds what softmax layers keep (default: the recipe's model.max_length).
        """
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        if inputs is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("input_ids and inputs_embeds: give exactly one of them")
        batch, length = inputs.shape[:2]
        mask = None if attention_mask is None else attention_mask[:, -length:]
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        seen: list[Tensor] = []
        with self._watched(seen if wanted else None), self._checkpointed():
            if state is None and not use_cache:
                logits = forward_masked(self.model, inputs, mask)
            elif state is not None and length == 1 and (mask is None or bool(mask.all())):
                logits, state = self.model.step(inputs[:, 0], state)
                logits = logits[:, None]
            else:
                state = self.model.init_state(batch, max_state_length) if state is None else state
                logits, state = prefill_masked(self.model, inputs, mask, state)
        valid = torch.ones(batch, length, dtype=torch.bool, device=inputs.device) if mask is None else mask.bool()
        hidden_states = tuple(spread(h, valid) for h in seen) if wanted else None
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        output = Output(loss=loss, logits=logits, state=state, hidden_states=hidden_states)
        return output if return_dict is not False else output.to_tuple()

    @contextmanager
    def _watched(self, seen: list[Tensor] | None) -> Iterator[None]:
        """Inside, `seen` gets what each layer reads and what the head does, of all valid tokens, row after row."""
        hooks: list[Any] = []
        if seen is not None:
            for block in self.model.layers.values():
                hooks.append(block.register_forward_pre_hook(lambda module, args: seen.append(args[0])))

            def keep(module: nn.Module, arguments: Any, output: Any) -> None:
                seen.append(output)

            hooks.append(self.model.norm.register_forward_hook(keep))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def _checkpointed(self) -> Iterator[None]:
        """Inside, blocks keep their inputs alone and run again in the backward, where that was asked for."""
        blocks = list(self.model.layers.values()) if self.gradient_checkpointing and self.training else []
        for block in blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        try:
            yield
        finally:
            for block in blocks:
                del block.forward

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Tell the state how long the text may become, and how long a text is of which it has seen a part.

        generate drops a mask of ones, which may be longer than input_ids, and notes its length.
        """
        if (generation_config.num_beams or 1) > 1:
            raise ValueError(f"num_beams = {generation_config.num_beams}: beams cannot share a state; use num_beams=1")
        embedded = model_kwargs.get("inputs_embeds")  # which max_length does not count
        model_kwargs["max_state_length"] = generation_config.max_length + (0 if embedded is None else embedded.shape[1])
        state, length = model_kwargs.get("state"), getattr(generation_config, "_mask_length", None)
        if state is not None and length is not None and model_kwargs.get("attention_mask") is None:
            model_kwargs["attention_mask"] = state.positions.new_ones(len(state.seen), length)

    def prepare_inputs_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        state: Any = None,
        use_cache: bool | None = True,
        max_state_length: int | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What one forward reads: with a `state`, every token that it has not seen. Raises ValueError."""
        if attention_mask is not None and not bool(attention_mask[:, -1].all()):
            raise ValueError("attention_mask: a prompt ends in padding; pad on the left")
        if state is not None:
            input_ids, attention_mask = _unread(input_ids, attention_mask, state)
        embedded = state is None and inputs_embeds is not None
        return {
            "input_ids": None if embedded else input_ids,
            "inputs_embeds": inputs_embeds if embedded else None,
            "attention_mask": attention_mask,
            "state": state,
            "use_cache": use_cache is not False,
            "max_state_length": max_state_length,
        }

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        return model_kwargs | {"state": outputs.state}


def _unread(tokens: Tensor, mask: Tensor | None, state: DecodeState) -> tuple[Tensor, Tensor]:
    """The last columns of `tokens` [B, T] that hold all a state has not seen, and the mask of what to read in them.

    mask: [B, T], or longer when `tokens` lacks columns before that the state has seen. A state of three tokens of the
    first sequence and one of the second:

        tokens   . a b c d e      read   d e          mask   0 1 1
                 . . . f g h               g h               0 1 1

    Raises ValueError where a sequence has no token that is new, or the mask tells of new ones that are not there.
    """
    if len(state.seen) != tokens.shape[0]:
        raise ValueError(f"state: of {len(state.seen)} sequences, but input_ids has {tokens.shape[0]}")
    valid = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
    if valid.shape[1] < tokens.shape[1]:
        raise ValueError(f"attention_mask: of {valid.shape[1]} tokens, but input_ids has {tokens.shape[1]}")
    new = valid & (valid.cumsum(1) > state.positions[:, None])
    if not bool(new[:, -1].all()):
        raise ValueError(
            f"state: has seen {list(state.seen)} tokens of texts of {valid.sum(1).tolist()}; each must go on beyond it "
            "(input_ids is the whole text, or its end beside an attention_mask of the whole)"
        )
    width = new.shape[1] - int(new.any(0).int().argmax())
    if width > tokens.shape[1]:
        raise ValueError(f"input_ids: holds {tokens.shape[1]} tokens of {width} that the state has not seen")
    return tokens[:, -width:], new[:, -width:].long()
