"""What is handed to fla is what its kernels demand, and what comes back is what our operators promise.

The kernels are stand-ins that compute the definitions (`fake_packages.py`), so layouts, scales, gates, states and
gradients are checked in full on the CPU; what the real kernels compute is checked on a GPU.
"""

import pytest
import torch
from cases import Case, assert_close, forced
from cases.families import FAMILIES
from fake_packages import FakeFla, install_fla

from torchlinearmoe.kernels.choose import Call
from torchlinearmoe.kernels.operator import operators
from torchlinearmoe.segments import Segments

RAGGED, EVEN = (0, 5, 0, 30, 1, 9, 0), (0, 20, 20, 20, 0)
FUNCTIONS = {
    "identity": "chunk_simple_gla",
    "constant": "chunk_simple_gla",
    "scalar": "chunk_simple_gla",
    "diagonal": "chunk_gla",
    "bonus": "chunk_rwkv6",
    "delta": "chunk_delta_rule",
    "gated_delta": "gated_delta",
    "grouped_delta": "gated_delta",
    "kda": "chunk_kda",
    "grouped_kda": "chunk_kda",
    "dplr": "chunk_rwkv7",
    "slots": "chunk_gsa",
    "ssd": "chunk_simple_gla",
}


@pytest.fixture
def fla(monkeypatch) -> FakeFla:
    return install_fla(monkeypatch)


def run(case: Case, dtype: torch.dtype = torch.float64, backend: str = "fla") -> dict[str, torch.Tensor]:
    return forced(case.operator, backend, lambda: case.run(backend, dtype))


@pytest.mark.parametrize("family", FUNCTIONS)
@pytest.mark.parametrize("lengths", [(20,), EVEN, RAGGED, (1, 1, 1)], ids=["one", "even", "ragged", "tokens"])
@pytest.mark.parametrize("states", ["", "in", "out", "in out"])
def test_outputs_states_and_gradients(fla, family, lengths, states):
    torch.manual_seed(1)
    case = FAMILIES[family](lengths, states, K=7, V=9)
    # Gates and states pass through float32, which is what the kernels demand.
    assert_close(run(case), run(case, backend="reference"), 2e-6)
    assert fla.calls == [FUNCTIONS[family]]
    assert (fla.last["cu_seqlens"] is None) == (lengths is not RAGGED), "plain rows spare the borders"


def test_ungated_heads_are_repeated(fla):
    torch.manual_seed(2)
    case = FAMILIES["delta"](RAGGED, "in out", groups=2, K=6, V=8)
    assert_close(run(case), run(case, backend="reference"), 2e-6)
    assert fla.calls == ["chunk_delta_rule"]


@pytest.mark.parametrize("family", FUNCTIONS)
def test_lengths_that_only_the_device_knows(fla, family):
    torch.manual_seed(2)
    case = FAMILIES[family](RAGGED, "in out")
    expected = run(case, backend="reference")
    case.options["segments"] = Segments.of_ids(case.options["segments"].ids, len(RAGGED))
    assert_close(run(case), expected, 2e-6)


def test_borders_are_one_tensor_for_all_layers(fla):
    """fla caches what it makes of them by identity."""
    case, borders = FAMILIES["scalar"](RAGGED, ""), []
    for _ in range(2):
        forced(case.operator, "fla", lambda: case.function(**case.inputs, **case.options))
        borders.append(fla.last["cu_seqlens"])
    assert borders[0] is borders[1]


@pytest.mark.parametrize("family", ["gated_delta", "kda"])
def test_gates_in_float32_beside_16_bit_values(fla, family):
    torch.manual_seed(3)
    run(FAMILIES[family]((9,), ""), torch.bfloat16)
    kinds = {name: x.dtype for name, x in fla.last.items() if x is not None}
    wide, narrow = torch.float32, torch.bfloat16
    assert kinds == {"q": narrow, "k": narrow, "v": narrow, "g": wide, "beta": wide}


def test_a_fixed_constant_decay_goes_by_gamma_and_one_that_is_learned_or_leaves_a_state_by_token(fla):
    torch.manual_seed(4)
    case = FAMILIES["constant"]((12, 12), "")
    assert_close(run(case), run(case, backend="reference"), 2e-6)
    assert "g" not in fla.last
    case.options["want_final"] = True
    assert_close(run(case), run(case, backend="reference"), 2e-6)
    assert fla.last["g"].shape == (2, 12, 2)
    case.options["want_final"] = False
    case.inputs["log_decay"] = case.options.pop("log_decay")
    assert_close(run(case), run(case, backend="reference"), 2e-6)
    assert fla.last["g"].shape == (2, 12, 2)


def test_the_delta_rule_in_float32_goes_by_the_gated_kernel(fla):
    torch.manual_seed(5)
    case = FAMILIES["delta"]((9,), "in out")
    assert_close(run(case, torch.float32), run(case, backend="reference"), 1e-5)
    assert fla.calls == ["gated_delta"]


def test_the_bound_of_the_decays_reaches_the_kernel_and_changes_no_result(fla):
    torch.manual_seed(9)
    case = FAMILIES["dplr"]((9,), "in", K=6, V=8)
    expected = run(case, backend="reference")
    assert_close(run(case), expected, 2e-6)
    assert fla.last["lower_bound"] is None
    case.options["lower_bound"] = float(case.inputs["log_decay"].min()) - 1e-3
    assert_close(run(case), expected, 2e-6)
    assert fla.last["lower_bound"] == case.options["lower_bound"]
    assert_close(run(case, backend="torch"), expected, 1e-9)


def test_a_call_by_name_and_one_by_the_chooser_are_of_one_kind(fla):
    """What fla declares it computes is what the cases above call it for."""
    by_fla = {o.name: o.find_backends()["fla"] for o in operators().values() if "fla" in o.find_backends()}
    declared = {(name, kind) for name, backend in by_fla.items() for kind in backend.kinds}
    drawn = {(FAMILIES[family]((4,), "").operator.name, FAMILIES[family]((4,), "").kind) for family in FUNCTIONS}
    assert drawn == declared
    assert operators()["linear"].backends["fla"].refuses(Call("scalar", "cuda", torch.bfloat16, 512)) is None
