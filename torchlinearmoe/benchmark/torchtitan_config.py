"""torchtitan's `Trainer.Config` for a recipe's shape: its Qwen3-MoE, fed with random tokens.

Imported only where torchtitan is: nothing here works without it. Written for torchtitan 0.3.0.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import default_adamw
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config import CompileConfig, TrainingConfig
from torchtitan.config.configs import DebugConfig
from torchtitan.models import qwen3
from torchtitan.models.common import CosSinRoPE, Embedding, Linear
from torchtitan.models.common import config_utils as make
from torchtitan.models.common.nn_modules import RMSNorm
from torchtitan.models.common.param_init import skip_param_init
from torchtitan.models.qwen3.model import Qwen3TransformerBlock
from torchtitan.trainer import Trainer

from torchlinearmoe.recipe.schema import ModelRecipe


def trainer_config(recipe: ModelRecipe, sequences: int, length: int, *, graphs: bool, folder: str) -> Any:
    """Compiled steps of `sequences` documents of `length` tokens on one GPU.

    graphs: replay forward and backward as a CUDA graph; folder: where it writes.
    """
    return Trainer.Config(
        model_spec=replace(
            qwen3.model_registry("debugmodel_moe"),
            flavor="recipe",
            model=model_config(recipe, length),
            state_dict_adapter=None,
        ),
        tokenizer=NoTokenizer.Config(),
        dataloader=RandomTokens.Config(vocab_size=recipe.vocab_size),
        loss=ChunkedLossWrapper.Config(loss_fn=CrossEntropyLoss.Config(global_vocab_size=recipe.vocab_size)),
        optimizer=default_adamw(lr=1e-4),
        training=TrainingConfig(
            local_batch_size=sequences, seq_len=length, dtype="float32", disable_cuda_graphs=not graphs
        ),
        activation_checkpoint=None,
        compile=CompileConfig(enable=True),
        metrics=MetricsProcessor.Config(log_freq=10**9),  # a logged step waits for the GPU
        debug=DebugConfig(seed=0, enable_structured_logging=False),
        dump_folder=folder,
    )


def model_config(recipe: ModelRecipe, length: int) -> Any:
    """Its Qwen3 with the recipe's dimensions and softmax attention in every layer."""
    normal = {"weight": partial(nn.init.normal_, std=recipe.init_std)}
    embedding = {"weight": partial(nn.init.normal_, std=recipe.embed_std)}
    return qwen3.Qwen3Model.Config(
        vocab_size=recipe.vocab_size,
        dim=recipe.hidden_size,
        tok_embeddings=Embedding.Config(
            num_embeddings=recipe.vocab_size,
            embedding_dim=recipe.hidden_size,
            param_init={"weight": skip_param_init} if recipe.tie_embeddings else embedding,
        ),
        layers=[_layer(recipe, index, length, normal) for index in range(recipe.num_layers)],
        norm=_norm(recipe.hidden_size, recipe.norm_eps),
        lm_head=Linear.Config(in_features=recipe.hidden_size, out_features=recipe.vocab_size, param_init=normal),
        enable_weight_tying=recipe.tie_embeddings,
    )


def _layer(recipe: ModelRecipe, index: int, length: int, normal: dict[str, Any]) -> Any:
    sparse = recipe.moe.num_experts > 0 and index >= recipe.moe.first_dense_layers
    return Qwen3TransformerBlock.Config(
        attention_norm=_norm(recipe.hidden_size, recipe.norm_eps),
        attention=make.make_gqa_config(
            dim=recipe.hidden_size,
            n_heads=recipe.num_heads,
            n_kv_heads=recipe.num_kv_heads,
            head_dim=recipe.head_dim,
            wqkv_param_init=normal,
            wo_param_init=normal,
            inner_attention=make.get_attention_config("flex"),
            fuse_qkv=True,
            rope=CosSinRoPE.Config(dim=recipe.head_dim, max_seq_len=length, theta=recipe.rope_theta),
            qk_norm=_norm(recipe.head_dim, recipe.norm_eps),
        ),
        ffn_norm=_norm(recipe.hidden_size, recipe.norm_eps),
        moe=_moe(recipe, normal) if sparse else None,
        feed_forward=None if sparse else _dense(recipe.hidden_size, recipe.ffn_hidden_size, normal),
    )


def _moe(recipe: ModelRecipe, normal: dict[str, Any]) -> Any:
    width, moe = recipe.hidden_size, recipe.moe
    return make.make_moe_config(
        num_experts=moe.num_experts,
        router=make.make_router_config(
            dim=width,
            num_experts=moe.num_experts,
            gate_param_init=normal,
            top_k=moe.top_k,
            score_func="softmax",
            route_norm=moe.renormalize,
        ),
        routed_experts=make.make_routed_experts_config(
            dim=width,
            hidden_dim=moe.hidden_size,
            num_experts=moe.num_experts,
            top_k=moe.top_k,
            param_init=dict.fromkeys(("w1_EFD", "w2_EDF", "w3_EFD"), normal["weight"]),
            comm_backend="standard",
        ),
        shared_experts=_dense(width, moe.shared_hidden_size, normal) if moe.shared_hidden_size else None,
    )


def _dense(width: int, hidden: int, normal: dict[str, Any]) -> Any:
    return make.make_ffn_config(dim=width, hidden_dim=hidden, w1_param_init=normal, w2w3_param_init=normal)


def _norm(width: int, eps: float) -> Any:
    return RMSNorm.Config(normalized_shape=width, eps=eps, param_init={"weight": nn.init.ones_})


class RandomTokens(BaseDataLoader):
    """The same batch at every step, one document a sequence."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        """torchtitan builds the loader from it."""

        vocab_size: int

    def __init__(self, config: Config, *, seq_len: int, local_batch_size: int, **_: Any):
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(0, config.vocab_size, (local_batch_size, seq_len), generator=generator)
        self.positions = torch.arange(seq_len).repeat(local_batch_size, 1)

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        while True:
            yield {"input": self.tokens, "positions": self.positions}, self.tokens.roll(-1, dims=1)

    def state_dict(self) -> dict[str, Any]:
        """Nothing to save."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to load."""


class NoTokenizer(BaseTokenizer):
    """In the place of the one that torchtitan would read from a folder."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        """torchtitan builds the tokenizer from it."""

    def __init__(self, config: Config, *, tokenizer_path: str):
        super().__init__()

    def encode(self, *_: Any, **__: Any) -> list[int]:
        """There is no text."""
        raise NotImplementedError

    def decode(self, *_: Any, **__: Any) -> str:
        """There is no text."""
        raise NotImplementedError

    def get_vocab_size(self) -> int:
        """There is no vocabulary."""
        raise NotImplementedError
