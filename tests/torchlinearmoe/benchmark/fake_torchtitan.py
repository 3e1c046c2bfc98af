"""A stand-in for torchtitan: configurations that remember what they were given, and a trainer that takes their steps.

The trainer demands of its caller what the real one does: a launcher's environment, batches of its loader, counted
steps. Its model is an embedding and a head of the configured sizes.
"""

import dataclasses
import sys
import types
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


class Given(types.SimpleNamespace):
    """A configuration: what it was given."""


def configurable(*_: Any, **__: Any) -> type:
    """A class whose `Config` takes anything."""
    return type("Configurable", (), {"Config": Given})


class Buildable:
    """torchtitan's `Configurable`: its `Config` builds the class that it lies in."""

    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config:
        def build(self, **runtime: Any) -> Any:
            return type(self).owner(self, **runtime)  # pyright: ignore[reportAttributeAccessIssue]

    def __init_subclass__(cls) -> None:
        cls.Config.owner = cls  # pyright: ignore[reportAttributeAccessIssue]


@dataclasses.dataclass
class ModelSpec:
    """What `model_registry` gives."""

    flavor: str
    model: Any = None
    state_dict_adapter: Any = "an adapter"


class Trainer:
    """A step is an update of the embedding and the head on the loader's batch."""

    class Config(Given):
        def build(self) -> "Trainer":
            return Trainer(self)

    failure: Exception | None = None
    """Raised by the next trainers' first step."""
    last: "Trainer"

    def __init__(self, config: Given) -> None:
        Trainer.last = self
        dist.init_process_group("gloo")
        assert dist.get_world_size() == 1
        self.config, self.step, self.steps = config, 0, []
        self.device = torch.device("cpu")
        model, training = config.model_spec.model, config.training
        self.tokenizer = config.tokenizer.build(tokenizer_path="")
        self.dataloader = config.dataloader.build(
            seq_len=training.seq_len,
            local_batch_size=training.local_batch_size,
            dp_rank=0,
        )
        self.shape = (training.local_batch_size, training.seq_len)
        self.model_parts = [
            nn.Sequential(nn.Embedding(model.vocab_size, model.dim), nn.Linear(model.dim, model.vocab_size, bias=False))
        ]
        self.loss_fn = lambda logits, labels: nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        self.optimizers = Optimizers([torch.optim.AdamW(self.model_parts[0].parameters())])
        self.gc_handler = types.SimpleNamespace(run=lambda step: self.steps.append(step))

    batch_generator = staticmethod(iter)

    def train_step(self, batches: Any) -> None:
        if self.failure is not None:
            dist.destroy_process_group()
            raise self.failure
        assert self.step == self.steps[-1]
        inputs, labels = next(batches)
        assert inputs["input"].shape == inputs["positions"].shape == labels.shape == self.shape
        assert bool((inputs["positions"][:, 0] == 0).all())
        self.loss_fn(self.model_parts[0](inputs["input"]), labels).backward()
        clip_grad_norm_(self.model_parts[0].parameters(), 1.0)
        self.optimizers.step()

    def close(self) -> None:
        self.closed = True


class Optimizers(list):
    """All of them as one."""

    def step(self) -> None:
        for optimizer in self:
            optimizer.step()
            optimizer.zero_grad()


def clip_grad_norm_(parameters: Any, norm: float) -> None:
    """torchtitan's own."""
    nn.utils.clip_grad_norm_(parameters, norm)


def given(**options: Any) -> Given:
    """A function that makes a configuration."""
    return Given(**options)


def install(monkeypatch: Any) -> type[Trainer]:
    """Put the stand-in where `import torchtitan` finds it."""
    monkeypatch.setattr(Trainer, "failure", None)
    contents: dict[str, dict[str, Any]] = {
        "components.dataloader": {"BaseDataLoader": Buildable},
        "components.loss": dict.fromkeys(("ChunkedLossWrapper", "CrossEntropyLoss"), configurable()),
        "components.metrics": {"MetricsProcessor": configurable()},
        "components.optimizer": {"default_adamw": given},
        "components.tokenizer": {"BaseTokenizer": Buildable},
        "config": dict.fromkeys(("CompileConfig", "TrainingConfig"), Given),
        "config.configs": {"DebugConfig": Given},
        "distributed.utils": {"clip_grad_norm_": clip_grad_norm_},
        "models.qwen3": {"model_registry": ModelSpec, "Qwen3Model": configurable()},
        "models.qwen3.model": {"Qwen3TransformerBlock": configurable()},
        "models.common": dict.fromkeys(("CosSinRoPE", "Embedding", "Linear"), configurable()),
        "models.common.config_utils": {
            **dict.fromkeys(
                ("make_gqa_config", "make_moe_config", "make_router_config", "make_routed_experts_config"), given
            ),
            "make_ffn_config": given,
            "get_attention_config": lambda backend: backend,
        },
        "models.common.nn_modules": {"RMSNorm": configurable()},
        "models.common.param_init": {"skip_param_init": "skipped"},
        "trainer": {"Trainer": Trainer},
    }
    modules: dict[str, types.ModuleType] = {}
    for name, attributes in contents.items():
        path = ["torchtitan", *name.split(".")]
        for depth in range(1, len(path) + 1):
            module = modules.setdefault(".".join(path[:depth]), types.ModuleType(".".join(path[:depth])))
            module.__path__ = []
            if depth > 1:
                setattr(modules[".".join(path[: depth - 1])], path[depth - 1], module)
        vars(module).update(attributes)  # pyright: ignore[reportPossiblyUnboundVariable]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return Trainer
