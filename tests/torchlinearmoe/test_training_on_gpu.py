"""A few real training steps on one GPU: bfloat16, compiled or not, with layers run again or not, learn the same."""

import math

import pytest
import torch

from torchlinearmoe.parallel.mesh import resolve_degrees, tokens_per_step
from torchlinearmoe.recipe import resolve
from torchlinearmoe.run_folder import with_tokens_per_step
from torchlinearmoe.runtime import choose_device, process_group

pytestmark = pytest.mark.gpu


def _losses(folder, mixer: str, dtype: str, compiled: bool = False, checkpointing: str = "none") -> list[float]:
    from torchlinearmoe.trainer import Trainer

    recipe = resolve(
        {
            "model": {"mixer": mixer, "layout": "LN", "num_layers": 2, "hidden_size": 128, "num_heads": 2}
            | {"kernel_backend": "torch"},  # the packages' kernels have tests of their own
            "data": {"cache": str(folder / "cache")},
            "training": {
                "steps": 16,
                "sequence_length": 256,
                "micro_batch_size": 4,
                "output_dir": str(folder / f"{mixer}-{dtype}-{compiled}-{checkpointing}"),
                "compile": compiled,
                "activation_checkpointing": checkpointing,
                "dtype": dtype,
            },
            "optimizer": {"lr": 1e-3, "warmup_steps": 2},
            "metrics": {"tensorboard": False},
        }
    )
    degrees = resolve_degrees(recipe.parallel, 1)
    recipe = with_tokens_per_step(recipe, tokens_per_step(recipe.training, degrees))
    device = choose_device(recipe.training)
    with process_group(device):
        trainer = Trainer(recipe, degrees, device)
        losses = [trainer.train_step(batches)[0].item() for batches in trainer.loader]
        trainer.metrics.close()
    return losses


@pytest.mark.parametrize("mixer", ["hgrn2", "gated_delta_net", "kda", "linear_attention"])
def test_bfloat16_compiled_and_checkpointed_training_follow_float32(mixer: str, tmp_path):
    exact = _losses(tmp_path, mixer, "float32")
    assert exact[-1] < exact[0] - 0.2
    for compiled, checkpointing in ((False, "none"), (True, "none"), (True, "selective")):
        torch._dynamo.reset()
        losses = _losses(tmp_path, mixer, "bfloat16", compiled, checkpointing)
        assert all(math.isclose(a, b, rel_tol=1e-2) for a, b in zip(losses, exact, strict=True)), (losses, exact)
