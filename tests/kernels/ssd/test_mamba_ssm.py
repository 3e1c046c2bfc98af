"""What is handed to mamba-ssm is what its scan demands, and what comes back is what `ssd` promises."""

import sys

import pytest
import torch
from cases import assert_close, forced
from cases.ssd import case as draw
from fake_packages import fake_scan

from torchlinearmoe.kernels.operator import operators
from torchlinearmoe.kernels.ssd import mamba_ssm
from torchlinearmoe.segments import Segments

RAGGED, EVEN = (0, 5, 0, 30, 1, 9, 0), (0, 20, 20, 20, 0)


@pytest.mark.parametrize("lengths", [(20,), EVEN, RAGGED, (1, 1, 1)], ids=["one", "even", "ragged", "tokens"])
@pytest.mark.parametrize("states", ["", "in", "out", "in out"])
def test_outputs_states_and_gradients(monkeypatch, lengths, states):
    monkeypatch.setattr(mamba_ssm, "_load", lambda: fake_scan)
    torch.manual_seed(7)
    case = draw(lengths, states, H=4, G=2, K=6, V=5)
    # Steps of zero, at which x = v / dt would not exist.
    case.inputs["dt"] *= torch.rand(case.inputs["dt"].shape) > 0.2
    ssd = operators()["ssd"]
    found = forced(ssd, "mamba_ssm", lambda: case.run("mamba_ssm"))
    expected = forced(ssd, "reference", lambda: case.run("reference"))
    assert_close(found, expected, 2e-6)
    case.options["segments"] = Segments.of_ids(case.options["segments"].ids, len(lengths))
    assert_close(forced(ssd, "mamba_ssm", lambda: case.run("mamba_ssm")), expected, 2e-6)


def test_it_is_imported_without_its_cuda_extension(monkeypatch, tmp_path):
    package = tmp_path / "mamba_ssm" / "ops" / "triton"
    package.mkdir(parents=True)
    (tmp_path / "mamba_ssm" / "__init__.py").write_text("import selective_scan_cuda\n")
    (tmp_path / "mamba_ssm" / "ops" / "__init__.py").write_text("")
    (package / "__init__.py").write_text("")
    (package / "ssd_combined.py").write_text("def mamba_chunk_scan_combined():\n    return 'scan'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = {name for name in sys.modules if name.partition(".")[0] == "mamba_ssm"}
    assert not before
    mamba_ssm._load.cache_clear()
    try:
        assert mamba_ssm._load()() == "scan"
    finally:
        mamba_ssm._load.cache_clear()
        for name in [name for name in sys.modules if name.partition(".")[0] == "mamba_ssm"]:
            del sys.modules[name]
