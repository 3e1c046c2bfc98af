"""The chunk-parallel forms on a GPU, eager and compiled, in bfloat16 against the float64 definitions on the CPU."""

from functools import partial

import pytest
import torch

from torchlinearmoe.kernels import ops

pytestmark = pytest.mark.gpu
TOLERANCE = 2e-2

CASES = {
    "identity": {},
    "constant": {"decay": "head"},
    "scalar": {"decay": "token"},
    "diagonal": {"decay": "channel"},
    "diagonal_bonus": {"decay": "channel", "bonus": True},
    "delta": {"delta": True},
    "gated_delta": {"delta": True, "decay": "token"},
    "kda": {"delta": True, "decay": "channel"},
    "dplr": {"dplr": True, "decay": "channel"},
}


def _inputs(case: dict, lengths: list[int], H: int = 2, K: int = 64, V: int = 96) -> dict[str, torch.Tensor]:
    T = sum(lengths)
    draw = partial(torch.randn, dtype=torch.float64)
    # The inputs are bfloat16 numbers, so that only the arithmetic differs from the definition.
    x = {name: draw(1, T, H, width).bfloat16().double() for name, width in (("q", K), ("k", K), ("v", V))}
    shape = {"head": (H,), "token": (1, T, H), "channel": (1, T, H, K)}.get(case.get("decay", ""))
    if shape:
        decay = -torch.rand(*shape, dtype=torch.float64)
        if len(shape) > 1:
            decay = torch.where(torch.rand(*shape) < 0.05, -20.0, decay)
        x["log_decay"] = decay.float().double()
    if case.get("bonus"):
        x["bonus"] = draw(H, K).float().double()
    if case.get("delta"):
        x["beta"] = torch.rand(1, T, H, dtype=torch.float64).float().double()
    if case.get("dplr"):
        removal = torch.nn.functional.normalize(draw(1, T, H, K), dim=-1)
        x["a"], x["b"] = ((y * removal).bfloat16().double() for y in (-1.0, torch.rand(1, T, H, K).double()))
    return x


def _run(case: dict, x: dict, ids: torch.Tensor, cotangent: torch.Tensor, backend: str, compiled: bool = False):
    def call(ids, **x):
        if case.get("delta"):
            order = [x.pop(name) for name in ("q", "k", "v", "beta")]
            return ops.delta_rule(*order, **x, l2_norm=True, document_ids=ids, backend=backend)[0]
        if case.get("dplr"):
            return ops.dplr_rule(**x, scale=0.1, document_ids=ids, backend=backend)[0]
        return ops.linear_recurrence(**x, scale=0.1, document_ids=ids, backend=backend)[0]

    if compiled:
        torch._dynamo.reset()
        call = torch.compile(call, fullgraph=True)
    leaves = {name: value.clone().requires_grad_() for name, value in x.items()}
    out = call(ids, **leaves)
    out.backward(cotangent.to(out))
    return {"o": out.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", CASES)
def test_bfloat16_agrees_with_the_definition(name: str, compiled: bool):
    if compiled and name not in ("diagonal", "gated_delta", "kda", "scalar", "dplr"):
        pytest.skip("one member of each family is compiled")
    torch.manual_seed(1)
    case, lengths = CASES[name], [3, 64, 130, 187]
    x = _inputs(case, lengths)
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).int()
    cotangent = torch.randn(*x["v"].shape, dtype=torch.float64)
    expected = _run(case, x, ids, cotangent, "reference")
    low = {key: (value.bfloat16() if key in "qkvab" else value.float()).cuda() for key, value in x.items()}
    found = _run(case, low, ids.cuda(), cotangent.cuda(), "torch", compiled)
    for key, value in expected.items():
        if case.get("decay") == "head" and key == "log_decay":
            continue  # a constant in every mixer; its gradient is one sum over all tokens, which cancels
        error = (found[key].cpu().double() - value).norm() / value.norm()
        assert error <= TOLERANCE, f"{key}: relative error {error:.2e}"


def test_nothing_waits_for_the_gpu_without_states():
    q, k, v = (value.cuda().bfloat16() for value in _inputs({}, [128, 128]).values())
    ids = torch.repeat_interleave(torch.arange(2, device="cuda"), 128, output_size=256).int()
    gate = -torch.rand(1, 256, 2, 64, device="cuda")
    torch.cuda.synchronize()
    previous = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.linear_recurrence(q, k, v, gate, document_ids=ids, backend="torch")
        ops.delta_rule(q, k, v, gate[..., 0].exp(), document_ids=ids, backend="torch")
        ops.delta_rule(q, k, v, gate[..., 0].exp(), gate, document_ids=ids, backend="torch")
        ops.dplr_rule(q, k, v, -k, k, gate, document_ids=ids, backend="torch")
    finally:
        torch.cuda.set_sync_debug_mode(previous)
