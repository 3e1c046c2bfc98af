"""Other people's kernels on a GPU: bfloat16 against the float64 definitions, for every operator that a backend offers.

A backend is skipped, with its reason, where its package is missing or the guards refuse the operator on this machine.
The inputs are bfloat16 numbers, so that only the arithmetic differs from the definition.
"""

import pytest
import torch
from oracle import FAMILIES, random_call, relative_error
from torch.nn import functional as F

from torchlinearmoe.kernels import ops
from torchlinearmoe.kernels.backends import guards
from torchlinearmoe.kernels.backends.call import Call

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("little_tuning")]
TOLERANCE = 2e-2
"""Two to three roundings to bfloat16 (2^-9 each) of values that add up without order."""
LENGTHS = {"rows": None, "even": (64, 64, 64), "ragged": (1, 63, 0, 64, 130, 7)}


def need(backend: str, operator: str) -> None:
    facts = Call(operator, "cuda", torch.bfloat16, channels=64, gradients=True)
    reason = guards.refusal(backend, facts, guards.this_machine(), auto=False)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")


def results(function, inputs: dict[str, torch.Tensor], options: dict, backend: str) -> dict[str, torch.Tensor]:
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    first = next(iter(leaves.values()))
    o, final = function(**leaves, **options, backend=backend)
    parts = {"o": o}
    if isinstance(final, tuple):
        parts |= {f"final_{i}": x for i, x in enumerate(final)}
    elif final is not None:
        parts["final"] = final
    generator = torch.Generator().manual_seed(5)
    total = torch.zeros((), dtype=torch.float64, device=first.device)
    for part in parts.values():
        cotangent = torch.randn(part.shape, generator=generator, dtype=torch.float64)
        total = total + (part.double() * cotangent.to(part.device)).sum()
    total.backward()
    parts |= {f"d_{name}": leaf.grad for name, leaf in leaves.items()}
    return {name: x.detach().double().cpu() for name, x in parts.items()}


def compare(function, inputs: dict[str, torch.Tensor], options: dict, backend: str, narrow: str) -> dict[str, float]:
    """Relative errors; `narrow`: the inputs that a model has in bfloat16."""
    names = narrow.split()
    inputs = {name: (x.bfloat16() if name in names else x.float()).double() for name, x in inputs.items()}
    expected = results(function, inputs, options, "reference")
    low = {name: (x.bfloat16() if name in names else x.float()).cuda() for name, x in inputs.items()}
    there = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    actual = results(function, low, there, backend)
    return {name: relative_error(actual[name], expected[name]) for name in expected}


def assert_small(errors: dict[str, float]) -> None:
    print(" ".join(f"{name} {error:.1e}" for name, error in errors.items()))
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize("packing", LENGTHS)
@pytest.mark.parametrize("states", ["", "in out"])
@pytest.mark.parametrize("family", FAMILIES)
def test_fla_agrees_with_the_definition(family: str, states, packing):
    # A constant decay is an input with a gradient here, so it goes by token.
    operators = {"constant": "scalar", "grouped_delta": "gated_delta", "grouped_kda": "kda", "dplr": "dplr_rule"}
    need("fla", operators.get(family, family))
    torch.manual_seed(1)
    call = random_call(
        family, T=150, K=64, V=96, lengths=LENGTHS[packing], initial="in" in states, final="out" in states
    )
    if "beta" in call.inputs:
        call.inputs["beta"] = call.inputs["beta"] / 2
    assert_small(compare(getattr(ops, call.operator), call.inputs, call.options, "fla", "q k v a b"))


WIDTHS = [(64, 96), (32, 64), (16, 16), (128, 128), (100, 72), (256, 200)]


@pytest.mark.parametrize("packing", LENGTHS)
@pytest.mark.parametrize("K, V", WIDTHS)
@pytest.mark.parametrize("family", ["identity", "constant", "scalar"])
def test_our_kernels_agree_with_the_definition(family: str, K: int, V: int, packing):
    torch.manual_seed(1)
    call = random_call(family, T=150, K=K, V=V, lengths=LENGTHS[packing], initial=True, final=True)
    errors = compare(getattr(ops, call.operator), call.inputs, call.options, "triton", "q k v")
    if family == "constant":
        errors["d_log_decay"] /= 3  # the terms of all tokens cancel in one number a head, their roundings do not
    assert_small(errors)
    # In float32 the products are exact to its rounding.
    errors = compare(getattr(ops, call.operator), call.inputs, call.options, "triton", "")
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_our_kernels_are_accurate_over_32768_tokens_of_mixed_decays(dtype: torch.dtype, tolerance: float):
    torch.manual_seed(9)
    call = random_call("scalar", B=1, T=32768, H=2, K=64, V=64, initial=True, final=True)
    sizes = torch.tensor([0.0, -1e-6, -1e-3, -0.1, -1.0, -20.0, -1e4, -torch.inf], dtype=torch.float64)
    weights = torch.tensor([8.0, 8.0, 8.0, 4.0, 2.0, 1.0, 1.0, 1.0])
    shape = call.inputs["log_decay"].shape
    call.inputs["log_decay"] = sizes[torch.multinomial(weights, shape.numel(), replacement=True)].view(shape)
    inputs = {name: (x.to(dtype) if name in "qkv" else x.float()).cuda() for name, x in call.inputs.items()}
    wide = {name: x.double() for name, x in inputs.items()}
    expected = results(ops.linear_recurrence, wide, call.options, "torch")
    found = results(ops.linear_recurrence, inputs, call.options, "triton")
    errors = {name: relative_error(found[name], expected[name]) for name in expected}
    assert max(errors.values()) < tolerance, errors


@pytest.mark.parametrize("packing", LENGTHS)
@pytest.mark.parametrize("bound", [-0.6065306597126334, -4.0, None], ids=str)
def test_fla_agrees_for_bounded_and_strong_decays(bound, packing):
    need("fla", "dplr_rule")
    torch.manual_seed(8)
    call = random_call("dplr", T=150, K=64, V=64, lengths=LENGTHS[packing], initial=True, final=True)
    log_decay = call.inputs["log_decay"]
    lowest = -20.0 if bound is None else bound
    call.inputs["log_decay"] = torch.where(torch.rand_like(log_decay) < 0.1, lowest, log_decay.clamp(min=lowest))
    if bound is not None:
        call.inputs["log_decay"] *= 1 - 1e-6  # float32 must not round below the bound
        call.options["lower_bound"] = bound
    assert_small(compare(ops.dplr_rule, call.inputs, call.options, "fla", "q k v a b"))


@pytest.mark.parametrize("packing", LENGTHS)
def test_fla_agrees_for_a_fixed_constant_decay(packing):
    need("fla", "constant")
    torch.manual_seed(2)
    call = random_call("constant", T=150, K=64, V=96, lengths=LENGTHS[packing], initial=True)
    # Lightning attention's strongest decay, with which short chunks leave NaN in final states.
    call.options["log_decay"] = torch.tensor([-0.1, -8.0], dtype=torch.float64)
    del call.inputs["log_decay"]
    assert_small(compare(ops.linear_recurrence, call.inputs, call.options, "fla", "q k v"))


def test_fla_leaves_finite_states_under_strong_constant_decays():
    need("fla", "identity")
    torch.manual_seed(3)
    call = random_call("constant", T=70, K=64, V=64, final=True)
    q, k, v = (call.inputs[name].bfloat16().cuda() for name in "qkv")
    decay = torch.tensor([-0.1, -8.0], device="cuda")
    with torch.no_grad():
        _, final = ops.linear_recurrence(q, k, v, decay, output_final_state=True, backend="fla")
    assert final is not None and bool(final.isfinite().all())


@pytest.mark.parametrize("packing", ["even", "ragged"])
def test_fla_agrees_for_slot_attention(packing):
    need("fla", "slot_attention")
    torch.manual_seed(4)
    lengths = LENGTHS[packing]
    assert lengths is not None
    T, N, H, K, V, S = sum(lengths), len(lengths), 2, 64, 96, 32
    shapes = {"q": K, "k": K, "v": V, "s": S, "log_decay": S}
    inputs = {name: torch.randn(1, T, H, width, dtype=torch.float64) for name, width in shapes.items()}
    inputs["log_decay"] = F.logsigmoid(inputs["log_decay"] + 2)
    inputs["s"] = 1 - inputs["log_decay"].exp()
    inputs |= {"keys": torch.randn(N, H, K, S).double(), "values": torch.randn(N, H, S, V).double()}

    def function(keys, values, **rest):
        return ops.slot_attention(initial_state=(keys, values), **rest)

    options = {"output_final_state": True, "cu_seqlens": F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()}
    assert_small(compare(function, inputs, options, "fla", "q k v s"))


@pytest.mark.parametrize("packing", LENGTHS)
@pytest.mark.parametrize("states", ["", "in", "in out"])
@pytest.mark.parametrize("backend", ["mamba_ssm", "fla", "triton"])
def test_ssd_agrees_with_the_definition(backend, states, packing):
    need(backend, "ssd")
    torch.manual_seed(6)
    lengths = LENGTHS[packing]
    R, T = (2, 300) if lengths is None else (1, sum(lengths))
    H, G, K, V = 4, 2, 64, 64
    inputs = {
        "x": torch.randn(R, T, H, V).double(),
        "dt": F.softplus(torch.randn(R, T, H).double() - 2),
        "A": -torch.rand(H).double() * 4,
        "B": torch.randn(R, T, G, K).double(),
        "C": torch.randn(R, T, G, K).double(),
    }
    options: dict = {"output_final_state": "out" in states}
    if lengths is not None:
        options["cu_seqlens"] = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    if "in" in states:
        inputs["initial_state"] = torch.randn(R if lengths is None else len(lengths), H, K, V).double()
    # A's gradient sums a term of either sign for each token, so it is small beside the errors of its terms. The terms
    # themselves stand in d_dt; the sum is judged by how large it would be if they did not cancel. The terms of a chunk
    # share the roundings of its states, so that the errors do not average out: half of them may lie on one side.
    errors = compare(ops.ssd, inputs, options, backend, "x B C")
    errors["d_A"] *= cancellation(inputs, options) / 2
    assert_small(errors)


def cancellation(inputs: dict[str, torch.Tensor], options: dict) -> float:
    """|sum of the terms| / sqrt(sum of their squares) of A's gradient, the terms from the definition."""
    captured = {}

    def by_token(x, dt, A, B, C, initial_state=None, **rest):
        q, k = (part.repeat_interleave(x.shape[2] // B.shape[2], 2) for part in (C, B))
        gate = captured["gate"] = dt * A
        gate.retain_grad()
        v = x * dt.unsqueeze(-1)
        return ops.linear_recurrence(q, k, v, gate, scale=1.0, initial_state=initial_state, **rest)

    low = {name: (x.bfloat16() if name in ("x", "B", "C") else x.float()).double() for name, x in inputs.items()}
    total = results(by_token, low, options, "reference")["d_A"]
    terms = captured["gate"].grad * low["dt"]
    return float(total.norm() / terms.square().sum((0, 1)).sqrt().norm())


@pytest.mark.parametrize("family", ["diagonal", "delta", "kda"])
def test_a_compiled_caller_breaks_at_the_kernel_and_agrees(family):
    need("fla", family)
    torch.manual_seed(7)
    call = random_call(family, K=64, V=64, lengths=(64, 130, 7))
    ids = torch.repeat_interleave(torch.arange(3), call.options.pop("cu_seqlens").diff().long()).int().cuda()
    inputs = {name: (x.bfloat16() if name in "qkv" else x.float()).cuda() for name, x in call.inputs.items()}
    function = getattr(ops, call.operator)

    def mix(ids, q, **rest):
        o, _ = function(q=q * 2, document_ids=ids, backend="fla", **rest)
        return o.float().square().sum()

    gradients = []
    for run in (mix, torch.compile(mix)):
        leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
        run(ids, **leaves).backward()
        gradients.append({name: leaf.grad for name, leaf in leaves.items()})
    for name, eager in gradients[0].items():
        assert relative_error(gradients[1][name], eager) < TOLERANCE, name
