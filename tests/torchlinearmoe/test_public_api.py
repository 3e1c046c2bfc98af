"""What users import from the package, and what importing it must not bring along."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def _python(code: str, folder: Path = ROOT) -> str:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_is_light_and_takes_no_foreign_name(tmp_path: Path):
    code = (
        "import sys, torchlinearmoe; print([n for n in ('torch', 'kernels', 'parallel', 'numpy') if n in sys.modules])"
    )
    assert _python(code, tmp_path) == "[]"


def test_using_the_package_from_the_repository_root_leaves_kernels_and_parallel_alone():
    code = (
        "import sys; from torchlinearmoe import load_recipe, build_model, load_model, MIXERS, FAMILIES;"
        "import torchlinearmoe.trainer;"
        "print([n for n in ('kernels', 'parallel') if n in sys.modules], "
        "'torchlinearmoe.kernels.linear' in sys.modules)"
    )
    assert _python(code) == "[] True"


def test_the_registries_hold_the_published_names():
    from torchlinearmoe import FAMILIES, MIXERS

    assert {"linear_attention", "delta_net", "gated_delta_net", "kda", "hgrn2", "softmax_attention"} <= set(MIXERS)
    assert "lasp2" in MIXERS and "lasp2" not in set(MIXERS)
    assert MIXERS["lasp2"] is MIXERS["linear_attention"]
    assert "mla" in MIXERS and "mla" not in set(MIXERS)
    assert all(MIXERS[name].name == name for name in MIXERS.names())
    assert "qwen2" in set(FAMILIES) and all("debug" in FAMILIES[name].presets for name in FAMILIES)


def test_every_public_name_resolves_and_an_unknown_one_is_an_attribute_error():
    import torchlinearmoe

    for name in torchlinearmoe.__all__:
        assert getattr(torchlinearmoe, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        getattr(torchlinearmoe, "non" + "sense")
