"""The adapters hand other people's kernels what they demand, and hand back what our contract says.

The kernels are stand-ins that compute the definitions (`fake_packages.py`), so layouts, scales, gates, states and
gradients are checked in full on the CPU; what the real kernels compute is `test_backends_on_gpu.py`'s business.
"""

import subprocess
import sys

import pytest
import torch
from fake_packages import fake_scan, install_fla
from oracle import FAMILIES, assert_close, random_call

from torchlinearmoe.kernels import ops
from torchlinearmoe.kernels.backends import borders, mamba_ssm
from torchlinearmoe.kernels.backends.call import States
from torchlinearmoe.kernels.backends.table import BACKENDS

RAGGED = (5, 0, 70, 1, 9)
EVEN = (20, 20, 20)
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
}


@pytest.fixture(autouse=True)
def no_guards(monkeypatch):
    """Calls go to the backend they name, whatever the machine."""
    monkeypatch.setattr(ops, "_choose", lambda operator, backend, q: BACKENDS[backend])


@pytest.fixture
def fla(monkeypatch):
    return install_fla(monkeypatch)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lengths", [None, EVEN, RAGGED], ids=["rows", "even", "ragged"])
@pytest.mark.parametrize("states", ["", "in", "out", "in out"])
def test_fla_gives_outputs_states_and_gradients(fla, family, lengths, states):
    torch.manual_seed(1)
    call = random_call(
        family, T=20, K=7, V=9, lengths=lengths, initial="in" in states, final="out" in states, dtype=torch.float64
    )
    # Gates and states pass through float32, which is what the kernels demand.
    assert_close(call.run("fla"), call.run("reference"), 2e-6)
    assert fla.calls == [FUNCTIONS[family]]


@pytest.mark.parametrize("family", FAMILIES)
def test_fla_takes_documents_by_their_ids(fla, family):
    torch.manual_seed(2)
    lengths = (5, 33, 1)
    call = random_call(family, lengths=lengths)
    expected = call.run("reference")
    call.options.pop("cu_seqlens")
    call.options["document_ids"] = torch.repeat_interleave(torch.tensor([4, 9, 2]), torch.tensor(lengths))
    assert_close(call.run("fla"), expected, 2e-6)


@pytest.mark.parametrize("family", ["gated_delta", "kda"])
def test_fla_gets_float32_gates_and_16_bit_values(fla, family):
    torch.manual_seed(3)
    call = random_call(family, T=9, dtype=torch.float32)
    call.run("fla", dtype=torch.bfloat16)
    kinds = {name: x.dtype for name, x in fla.last.items() if x is not None}
    wide, narrow = torch.float32, torch.bfloat16
    assert kinds == {"q": narrow, "k": narrow, "v": narrow, "g": wide, "beta": wide}


def test_a_fixed_constant_decay_goes_by_gamma_and_a_learned_one_by_token(fla):
    torch.manual_seed(4)
    call = random_call("constant", T=12)
    decay = call.inputs.pop("log_decay")
    call.options["log_decay"] = decay
    assert_close(call.run("fla"), call.run("reference"), 2e-6)
    assert "g" not in fla.last
    call.options["output_final_state"] = True
    assert_close(call.run("fla"), call.run("reference"), 2e-6)
    assert fla.last["g"].shape == (2, 12, 2)


def test_the_delta_rule_in_float32_goes_by_the_gated_kernel(fla):
    torch.manual_seed(5)
    call = random_call("delta", T=9, initial=True, final=True)
    assert_close(call.run("fla", dtype=torch.float32), call.run("reference"), 1e-5)
    assert fla.calls == ["gated_delta"]


def test_the_bound_of_the_decays_reaches_the_kernel_and_changes_no_result(fla):
    torch.manual_seed(9)
    call = random_call("dplr", T=9, K=6, V=8, initial=True)
    assert_close(call.run("fla"), call.run("reference"), 2e-6)
    assert fla.last["lower_bound"] is None
    call.options["lower_bound"] = float(call.inputs["log_decay"].min()) - 1e-3
    assert_close(call.run("fla"), call.run("reference"), 2e-6)
    assert fla.last["lower_bound"] == call.options["lower_bound"]
    assert_close(call.run("torch"), call.run("reference"), 1e-9)


@pytest.mark.parametrize("lengths", [EVEN, RAGGED], ids=["even", "ragged"])
@pytest.mark.parametrize("initial", [False, True])
def test_fla_gives_slot_attention(fla, lengths, initial):
    torch.manual_seed(6)
    T, N, H, K, V, S = sum(lengths), len(lengths), 2, 7, 9, 6
    x = {"q": (1, T, H, K), "k": (1, T, H, K), "v": (1, T, H, V), "s": (1, T, H, S), "log_decay": (1, T, H, S)}
    inputs = {name: torch.randn(*shape, dtype=torch.float64) for name, shape in x.items()}
    inputs["log_decay"] = torch.nn.functional.logsigmoid(inputs["log_decay"])
    if initial:
        inputs["keys"], inputs["values"] = torch.randn(N, H, K, S).double(), torch.randn(N, H, S, V).double()
    results = []
    for backend in ("fla", "reference"):
        leaves = {name: value.clone().requires_grad_() for name, value in inputs.items()}
        first = (leaves["keys"], leaves["values"]) if initial else None
        o, final = ops.slot_attention(
            *(leaves[name] for name in x),
            initial_state=first,
            output_final_state=True,
            cu_seqlens=torch.nn.functional.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int(),
            backend=backend,
        )
        assert final is not None
        parts = [part * torch.linspace(-1, 1, part.numel()).view(part.shape) for part in (o, *final)]
        torch.cat([part.flatten() for part in parts]).sum().backward()
        grads = {f"d_{name}": leaf.grad for name, leaf in leaves.items()}
        results.append({"o": o.detach(), "keys": final[0].detach(), "values": final[1].detach(), **grads})
    assert_close(results[0], results[1], 2e-6)


@pytest.mark.parametrize("backend", ["torch", "mamba_ssm"])
@pytest.mark.parametrize("lengths", [None, EVEN, RAGGED], ids=["rows", "even", "ragged"])
@pytest.mark.parametrize("states", ["", "in", "out", "in out"])
def test_ssd_gives_outputs_states_and_gradients(monkeypatch, backend, lengths, states):
    monkeypatch.setattr(mamba_ssm, "_load", lambda: fake_scan)
    torch.manual_seed(7)
    H, G, K, V = 4, 2, 6, 5
    R, T = (2, 30) if lengths is None else (1, sum(lengths))
    N = R if lengths is None else len(lengths)
    inputs = {
        "x": torch.randn(R, T, H, V).double(),
        # Steps of zero, at which x = v / dt would not exist.
        "dt": torch.rand(R, T, H).double() * (torch.rand(R, T, H) > 0.2),
        "A": -torch.rand(H).double() * 4,
        "B": torch.randn(R, T, G, K).double(),
        "C": torch.randn(R, T, G, K).double(),
    }
    if "in" in states:
        inputs["initial_state"] = torch.randn(N, H, K, V).double()
    cu_seqlens = None if lengths is None else torch.nn.functional.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    results = []
    for name in (backend, "reference"):
        leaves = {key: value.clone().requires_grad_() for key, value in inputs.items()}
        y, final = ops.ssd(**leaves, output_final_state="out" in states, cu_seqlens=cu_seqlens, backend=name)
        loss = (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum()
        result = {"y": y.detach()}
        if final is not None:
            loss = loss + (final * torch.linspace(-1, 1, final.numel()).view(final.shape)).sum()
            result["final"] = final.detach()
        loss.backward()
        results.append({**result, **{f"d_{key}": leaf.grad for key, leaf in leaves.items()}})
    assert_close(results[0], results[1], 2e-6)


def test_ssd_follows_the_recurrence_token_by_token():
    torch.manual_seed(8)
    x, dt, A = torch.randn(1, 6, 2, 3).double(), torch.rand(1, 6, 2).double(), -torch.rand(2).double()
    B, C = torch.randn(1, 6, 1, 4).double(), torch.randn(1, 6, 1, 4).double()
    y, final = ops.ssd(x, dt, A, B, C, output_final_state=True, backend="torch")
    S = torch.zeros(2, 4, 3).double()
    for t in range(6):
        write = torch.einsum("k,h,hv->hkv", B[0, t, 0], dt[0, t], x[0, t])
        S = (dt[0, t] * A).exp()[:, None, None] * S + write
        torch.testing.assert_close(y[0, t], torch.einsum("k,hkv->hv", C[0, t, 0], S))
    assert final is not None
    torch.testing.assert_close(final[0], S)


def test_ssd_refuses_groups_that_do_not_divide_the_heads():
    x, dt, A = torch.randn(1, 4, 3, 2), torch.rand(1, 4, 3), -torch.rand(3)
    with pytest.raises(ValueError, match="B, C: 2 groups, legal: a divisor of the 3 heads"):
        ops.ssd(x, dt, A, torch.randn(1, 4, 2, 5), torch.randn(1, 4, 2, 5))


def test_borders_are_looked_up_once_for_a_tensor_and_again_after_a_write():
    cu_seqlens = torch.tensor([0, 3, 7], dtype=torch.int32)
    states = States(None, False, cu_seqlens, None)
    first = borders.find_borders(states)
    assert first is not None and first.lengths == (3, 4)
    assert borders.find_borders(states) is first
    cu_seqlens[1] = 5
    changed = borders.find_borders(states)
    assert changed is not None and changed.lengths == (5, 2)
    # fla caches by identity, so other borders must be another tensor.
    assert changed.cu_seqlens is not first.cu_seqlens
    with torch.inference_mode():
        other = torch.tensor([0, 2, 7])
        assert borders.find_borders(States(None, False, other, None)).lengths == (2, 5)  # pyright: ignore
        other[1] = 6
        assert borders.find_borders(States(None, False, other, None)).lengths == (6, 1)  # pyright: ignore


@pytest.mark.parametrize("lengths", [(4, 4), (1, 5, 2)])
def test_rows_and_back(lengths):
    x = torch.randn(1, sum(lengths), 3)
    found = borders.make_borders(list(lengths), x.device)
    rows = found.rows(x)
    assert rows.shape == (len(lengths), max(lengths), 3)
    for row, part in zip(rows, x[0].split(list(lengths))):
        torch.testing.assert_close(row[: len(part)], part)
        assert not row[len(part) :].any()
    torch.testing.assert_close(found.flat(rows), x)


def test_nothing_of_the_packages_is_imported_before_a_call():
    code = "import sys, torchlinearmoe.kernels.ops; assert not {'fla', 'mamba_ssm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_mamba_is_imported_without_its_cuda_extension(monkeypatch, tmp_path):
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
