"""A torchlinearmoe model for transformers, loaded with `trust_remote_code=True`.

This file travels with the weights and hands the work to the installed torchlinearmoe. Nothing in that package imports
it. Decoding keeps torchlinearmoe's state (of constant size in linear layers) in the place of a key-value cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ModelOutput

try:
    from torchlinearmoe.checkpoint.huggingface.own import float32_names
    from torchlinearmoe.generation.padded import forward_masked, prefill_masked
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


class TorchLinearMoEForCausalLM(PreTrainedModel, GenerationMixin):
    """A decoder of any layout, under transformers' interface."""

    config_class = TorchLinearMoEConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _is_stateful = True
    _no_split_modules = ["Block"]

    def __init__(self, config: TorchLinearMoEConfig) -> None:
        super().__init__(config)
        model = resolve({**config.recipe, "training": {"steps": 1}}).model
        self.model = Decoder(model)
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
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        state: Any = None,
        use_cache: bool = False,
        max_state_length: int | None = None,
        return_dict: bool | None = True,
    ) -> Output | tuple[Any, ...]:
        """Logits [B, T, V] of tokens [B, T].

        attention_mask: [B, T], or longer when a `state` holds the tokens before. use_cache: return a `state` to go on
        from; `max_state_length` bounds what softmax layers keep (default: the recipe's model.max_length).
        """
        batch, length = input_ids.shape
        mask = None if attention_mask is None else attention_mask[:, -length:]
        if state is None and not use_cache:
            logits = forward_masked(self.model, input_ids, mask)
        elif state is not None and length == 1 and (mask is None or bool(mask.all())):
            logits, state = self.model.step(input_ids[:, 0], state)
            logits = logits[:, None]
        else:
            state = self.model.init_state(batch, max_state_length) if state is None else state
            logits, state = prefill_masked(self.model, input_ids, mask, state)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        output = Output(loss=loss, logits=logits, state=state)
        return output if return_dict is not False else output.to_tuple()

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
        model_kwargs["max_state_length"] = generation_config.max_length
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
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What one forward reads: with a `state`, every token that it has not seen. Raises ValueError."""
        if attention_mask is not None and not bool(attention_mask[:, -1].all()):
            raise ValueError("attention_mask: a prompt ends in padding; pad on the left")
        if state is not None:
            input_ids, attention_mask = _unread(input_ids, attention_mask, state)
        return {
            "input_ids": input_ids,
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
