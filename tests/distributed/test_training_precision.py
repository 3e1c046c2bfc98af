"""Under bf16 FSDP the decays and the router still compute in float32, from unrounded float32 weights, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import RankPool
from tiny_run import Settings, build, settings, unsettle, whole, write_corpus

from torchlinearmoe import build_model
from torchlinearmoe.mixers import hgrn2
from torchlinearmoe.mixers.gated_delta_net import HeadDecay
from torchlinearmoe.mixers.hgrn2 import LowerBounds
from torchlinearmoe.moe.router import Router


def exact_units(rank: int, tables: Settings) -> dict[str, bool]:
    """After one bf16 step: whether each unit gave what a plain float32 module with the whole weights gives."""
    trainer = build(tables)
    unsettle(trainer.model)
    plain = build_model(trainer.recipe.model)
    plain.load_state_dict({name: whole(value) for name, value in trainer.model.state_dict().items()})
    units = {name: m for name, m in plain.named_modules() if isinstance(m, (HeadDecay, LowerBounds, Router))}

    calls: list[tuple[str, Any, Any]] = []
    gates: list[tuple[Any, Any]] = []

    def listen(name: str):
        return lambda module, args, output: calls.append((name, args, output))

    for name, module in trainer.model.named_modules():
        if name in units:
            module.register_forward_hook(listen(name))
    gate = hgrn2.forget_gate

    def gate_watched(*args: Any) -> Any:
        gates.append((args, gate(*args)))
        return gates[-1][1]

    hgrn2.forget_gate = gate_watched
    try:
        trainer.train_step(next(iter(trainer.loader)))
    finally:
        hgrn2.forget_gate = gate

    exact: dict[str, bool] = {}
    for name, args, output in calls:
        assert all(x.dtype == torch.bfloat16 for x in args), "the run does not compute in bf16"
        expected = units[name](*args)
        pairs = zip(output, expected) if isinstance(output, tuple) else [(output, expected)]
        exact[name] = all(torch.equal(a, b) for a, b in pairs)
    for layer, ((logits, _), found) in enumerate(gates):
        assert logits.dtype == torch.bfloat16
        expected = gate(logits, units["shared.hgrn2"]()[layer])
        exact[f"gate of layer {layer}"] = all(torch.equal(a, b) for a, b in zip(found, expected))
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())
    return exact


@pytest.mark.parametrize(
    "mixer, decays",
    [
        ("gated_delta_net", {"layers.0.mixer.decay", "layers.1.mixer.decay"}),
        ("hgrn2", {"shared.hgrn2", "gate of layer 0", "gate of layer 1"}),
    ],
)
def test_decays_and_routers_are_exact_under_bf16_fsdp(
    ranks: RankPool, tmp_path: Path, mixer: str, decays: set[str]
) -> None:
    change: Settings = {
        "model": {"mixer": mixer, "layout": "LLN", "num_layers": 3},
        "training": {"dtype": "bfloat16", "tokens_per_step": None},
    }
    tables = settings(write_corpus(tmp_path), tmp_path / "run", change)
    for exact in ranks(2, exact_units, tables):
        assert exact.keys() == decays | {f"layers.{i}.ffn.router" for i in range(3)}
        assert all(exact.values()), exact
