"""What the check of definitions catches: a state that is read before its decay, a gradient that stops, no definition.

The toy is linear attention with a diagonal decay, S_t = diag(a_t) S_{t-1} + k_t v_t^T and o_t = S_t^T q_t: a whole
mixer, which keeps the contract whichever state it reads, because the contract compares it with itself.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import test_mixer_definitions as every
import torch
from definition_check import NoDefinition, check_definition
from definitions.plain import Layer, join, recurrence, sigmoid, split
from mixer_cases import Case
from torch import Tensor
from torch.distributed.tensor import Placement, Shard
from torch.nn import functional as F

from torchlinearmoe.initialize import linear
from torchlinearmoe.kernels.linear import linear_recurrence_flops
from torchlinearmoe.layers.convolution import Convolutions
from torchlinearmoe.layers.past import After, Past
from torchlinearmoe.mixers import MIXERS
from torchlinearmoe.mixers.base import (
    Carry,
    LayerPlace,
    MixerOptions,
    StateSpec,
    geometry,
    register,
)
from torchlinearmoe.mixers.linear_mixer import LinearMixer, Parts
from torchlinearmoe.mixers.recurrence import linear_recurrence
from torchlinearmoe.precision import in_float32
from torchlinearmoe.recipe.schema import ModelRecipe


class Toy(LinearMixer):
    """The right formula."""

    reads = {"q": ("q_proj",)}
    writes = {"k": ("k_proj",), "v": ("v_proj",), "decay": ("decay_proj",)}

    def __init__(self, options: MixerOptions, model: ModelRecipe, place: LayerPlace) -> None:
        super().__init__(options, model, place)
        self.heads, self.head_dim = geometry(options, model)
        self.backend = model.kernel_backend
        self.convs = Convolutions({}, 0)
        for name in ("q_proj", "k_proj", "v_proj", "decay_proj"):
            setattr(self, name, linear(model.hidden_size, self.heads * self.head_dim, model.init_std))
        self.o_proj = linear(self.heads * self.head_dim, model.hidden_size, model.init_std)

    def state_spec(self) -> dict[str, StateSpec]:
        return {"recurrent": StateSpec((self.heads, self.head_dim, self.head_dim), Carry.RECURRENT)}

    def tensor_parallel(self) -> dict[str, Placement]:
        placements: dict[str, Placement] = {
            f"{name}.weight": Shard(0) for name in ("q_proj", "k_proj", "v_proj", "decay_proj")
        }
        return placements | {"o_proj.weight": Shard(1)}

    def mixing_flops(self, length: int) -> float:
        return linear_recurrence_flops(self.heads, self.head_dim, self.head_dim)

    def read(self, parts: Parts, past: Past) -> tuple[Tensor, After]:
        q, k, v, logits = (parts[name].unflatten(-1, (-1, self.head_dim)) for name in ("q", "k", "v", "decay"))
        log_decay = self.log_decay(logits)
        bonus = self.bonus(log_decay)
        state = past.state.get("recurrent")
        o, state = linear_recurrence(q, k, v, log_decay, past, state, scale=1.0, bonus=bonus, backend=self.backend)
        return o, {"recurrent": state}

    def log_decay(self, logits: Tensor) -> Tensor:
        return F.logsigmoid(in_float32(logits))

    def bonus(self, log_decay: Tensor) -> Tensor | None:
        """The weight of a token's own write beside the state before it, [H, K]; None reads the state after it."""
        return None

    def output(self, o: Tensor) -> Tensor:
        return self.o_proj(o.flatten(-2))


class ReadBeforeTheDecay(Toy):
    """o_t = (S_{t-1} + k_t v_t^T)^T q_t."""

    def bonus(self, log_decay: Tensor) -> Tensor | None:
        return torch.ones_like(log_decay[0])


class DecayWithoutGradient(Toy):
    """The right outputs."""

    def log_decay(self, logits: Tensor) -> Tensor:
        return super().log_decay(logits).detach()


def definition(layer: Layer, x: Tensor) -> Tensor:
    q, k, v, logits = (split(layer.linear(f"{name}_proj", x), layer.width) for name in ("q", "k", "v", "decay"))
    return layer.linear("o_proj", join(recurrence(step, q, k, v, sigmoid(logits))))


def step(S: Tensor, k: Tensor, v: Tensor, alpha: Tensor) -> Tensor:
    return torch.diag(alpha) @ S + torch.outer(k, v)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Callable[[type[Toy]], Case]:
    """Puts a toy among the mixers until the end of the test."""
    for table in ("_things", "_aliases", "_unlisted"):
        monkeypatch.setattr(MIXERS, table, getattr(MIXERS, table).copy())

    def put(toy: type[Toy]) -> Case:
        register("toy_decay")(toy)
        return Case("toy_decay", {})

    return put


def test_a_right_mixer_passes(registered: Callable[[type[Toy]], Case]):
    check_definition(registered(Toy), definition)


def test_a_mixer_that_reads_its_state_before_the_decay_is_refused(registered: Callable[[type[Toy]], Case]):
    with pytest.raises(AssertionError, match=r"^toy_decay: the output of layer 0 is .* from its definition"):
        check_definition(registered(ReadBeforeTheDecay), definition)


def test_a_mixer_whose_gradient_stops_is_refused(registered: Callable[[type[Toy]], Case]):
    with pytest.raises(AssertionError, match=r"^toy_decay: the gradient by .* from its definition's"):
        check_definition(registered(DecayWithoutGradient), definition)


def test_a_mixer_without_a_definition_is_refused(registered: Callable[[type[Toy]], Case]):
    message = r"^the mixer 'toy_decay' has no definition: write tests/.*/definitions/toy_decay\.py with definition\("
    with pytest.raises(NoDefinition, match=message):
        every.test_a_mixer_is_its_definition_in_outputs_and_gradients(registered(Toy))
