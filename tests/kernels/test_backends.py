"""Which backend takes which call: the guards' table, the order of "auto", and what a user reads when one is refused."""

from dataclasses import replace

import pytest
import torch

from torchlinearmoe.errors import UserError
from torchlinearmoe.kernels import ops
from torchlinearmoe.kernels.backends import choose, guards
from torchlinearmoe.kernels.backends.call import DELTA, LINEAR, Call, linear_kind
from torchlinearmoe.kernels.backends.table import BACKENDS

OTHERS = ("dplr_rule", "slot_attention")
EVERYTHING = frozenset(name for package in guards.PACKAGES.values() for name in package.modules)
HOPPER = guards.Machine((9, 0), (3, 8, 0), EVERYTHING, False)
OLD_TRITON = replace(HOPPER, triton=(3, 6, 0))


def call(operator: str, **changes) -> Call:
    return replace(Call(operator, "cuda", torch.bfloat16, 64, True), **changes)


def choose_on(monkeypatch, machine: guards.Machine, requested: str, facts: Call) -> tuple[str, str]:
    monkeypatch.setattr(guards, "this_machine", lambda: machine)
    monkeypatch.setattr(choose, "_chosen", {})
    return choose.choose(facts.operator, requested, facts.device, facts.dtype, facts.channels, facts.gradients)


@pytest.mark.parametrize("operator", ["scalar", "gated_delta", "ssd"])
@pytest.mark.parametrize(
    "capability, triton, refused",
    [
        ((9, 0), (3, 3, 9), False),
        ((9, 0), (3, 4, 0), True),
        ((9, 0), (3, 6, 0), True),
        ((9, 0), (3, 7, 0), True),
        ((9, 0), (3, 7, 1), False),
        ((8, 9), (3, 6, 0), False),
        ((10, 0), (3, 6, 0), False),
    ],
)
def test_the_hopper_miscompile_is_refused_where_it_happens(operator, capability, triton, refused):
    machine = guards.Machine(capability, triton, EVERYTHING, False)
    reason = guards.refusal("fla", call(operator), machine, auto=False)
    assert (reason is not None) == refused
    if reason is not None:
        assert "issues/640" in reason and "Triton 3.7.1 or newer" in reason


def test_the_miscompile_bars_backward_passes_only_but_auto_stays_with_what_trains():
    facts = call("scalar", gradients=False)
    assert guards.refusal("fla", facts, OLD_TRITON, auto=False) is None
    assert guards.refusal("fla", facts, OLD_TRITON, auto=True) is not None


def test_auto_stays_with_what_the_compiler_can_fuse(monkeypatch):
    assert choose_on(monkeypatch, HOPPER, "auto", call("scalar"))[0] == "fla"
    facts = ("cuda", torch.bfloat16, 64, True)
    assert choose.choose("scalar", "auto", *facts, compiling=True)[0] == "torch"
    assert choose.choose("scalar", "fla", *facts, compiling=True)[0] == "fla"
    seen = []
    monkeypatch.setattr(ops, "choose", lambda *arguments: (seen.append(arguments[-1]), ("torch", ""))[1])
    q, k, v = torch.randn(3, 1, 8, 1, 16).unbind(0)
    torch.compile(lambda q, k, v: ops.linear_recurrence(q, k, v)[0], backend="aot_eager")(q, k, v)
    ops.linear_recurrence(q, k, v)
    assert seen == [True, False]


@pytest.mark.parametrize("operator", [*(name for name in LINEAR if name != "scalar"), *DELTA, *OTHERS])
def test_ungated_kernels_are_not_barred_by_it(operator):
    barred = guards.refusal("fla", call(operator), OLD_TRITON, auto=False) is not None
    assert barred == (operator == "gated_delta")


@pytest.mark.parametrize("operator", ["identity", "constant", "delta"])
@pytest.mark.parametrize(
    "channels, machine, barred", [(32, OLD_TRITON, True), (33, OLD_TRITON, False), (32, HOPPER, False)]
)
def test_narrow_keys_are_kept_from_a_backward_pass_that_reads_elsewhere(operator, channels, machine, barred):
    facts = call(operator, channels=channels)
    for auto in (False, True):
        assert (guards.refusal("fla", facts, machine, auto=auto) is not None) == barred
    assert guards.refusal("fla", replace(facts, gradients=False), machine, auto=False) is None


def test_the_float32_delta_rule_goes_by_the_gated_kernel_and_is_barred_with_it():
    facts = call("delta", dtype=torch.float32)
    assert guards.refusal("fla", facts, HOPPER, auto=False) is None
    assert "640" in (guards.refusal("fla", facts, OLD_TRITON, auto=False) or "")


@pytest.mark.parametrize(
    "backend, facts, machine, words",
    [
        ("fla", call("identity", device="cpu"), HOPPER, "needs a CUDA device, the tensors are on the cpu"),
        ("fla", call("identity"), replace(HOPPER, packages=frozenset(["triton", "einops"])), "fla cannot be imported"),
        ("fla", call("identity", dtype=torch.float64), HOPPER, "does not take float64"),
        ("fla", call("delta", channels=257), HOPPER, "at most 256 channels"),
        ("fla", call("dplr_rule", channels=257), HOPPER, "at most 256 channels"),
        ("fla", call("quadratic_attention"), HOPPER, "it computes"),
        ("mamba_ssm", call("scalar"), HOPPER, "it computes ssd"),
        ("mamba_ssm", call("ssd"), replace(HOPPER, packages=frozenset(["triton"])), "pip install --no-build-isolation"),
    ],
)
def test_what_cannot_be_computed_is_refused_with_a_way_out(monkeypatch, backend, facts, machine, words):
    name, message = choose_on(monkeypatch, machine, backend, facts)
    assert name == ""
    assert message.startswith(f"model.kernel_backend = '{backend}': cannot compute {facts.operator}: ")
    assert words in message and "'auto' or 'torch'" in message and "\n" not in message


def test_wide_keys_are_refused_by_the_delta_rule_only():
    assert guards.refusal("fla", call("diagonal", channels=257), HOPPER, auto=False) is None


@pytest.mark.parametrize(
    "facts, machine",
    [(call("diagonal", dtype=torch.float32), HOPPER), (call("diagonal"), replace(HOPPER, deterministic=True))],
)
def test_auto_leaves_out_what_only_an_explicit_name_asks_for(monkeypatch, facts, machine):
    assert choose_on(monkeypatch, machine, "auto", facts)[0] == "torch"
    assert choose_on(monkeypatch, machine, "fla", facts) == ("fla", "")


@pytest.mark.parametrize(
    "operator, machine, expected",
    [
        *[(operator, HOPPER, "fla") for operator in (*LINEAR, *DELTA, *OTHERS, "ssd")],
        ("quadratic_attention", HOPPER, "torch"),
        ("scalar", OLD_TRITON, "triton"),
        ("gated_delta", OLD_TRITON, "torch"),
        ("ssd", OLD_TRITON, "mamba_ssm"),
        ("ssd", replace(OLD_TRITON, packages=EVERYTHING - {"mamba_ssm"}), "triton"),
        ("identity", replace(HOPPER, packages=frozenset(["triton"])), "triton"),
        ("ssd", replace(HOPPER, packages=EVERYTHING - {"fla"}), "mamba_ssm"),
        ("diagonal", replace(HOPPER, packages=frozenset()), "torch"),
    ],
)
def test_auto_prefers_fla_then_mamba_then_our_own(monkeypatch, operator, machine, expected):
    assert choose_on(monkeypatch, machine, "auto", call(operator)) == (expected, "")
    backend, reason = choose.chosen_backends()[operator]
    assert backend == expected
    if expected != PREFERRED.get(operator, "torch"):
        assert reason.startswith("not fla: ")


PREFERRED = {operator: names[0] for operator, names in choose.PREFERENCE.items()}


@pytest.mark.parametrize("operator", sorted(PREFERRED))
def test_auto_stays_with_our_own_on_the_cpu(monkeypatch, operator):
    name, _ = choose_on(monkeypatch, HOPPER, "auto", call(operator, device="cpu"))
    assert name == "torch"


@pytest.mark.parametrize("change", [{"dtype": torch.float32}, {}])
def test_auto_takes_our_kernels_where_results_must_be_exact(monkeypatch, change):
    machine = replace(HOPPER, deterministic=not change)
    assert choose_on(monkeypatch, machine, "auto", call("scalar", **change)) == ("triton", "")
    assert "it computes constant, identity, scalar, ssd" in choose_on(monkeypatch, machine, "triton", call("kda"))[1]


def test_a_reason_tells_why_without_the_way_out(monkeypatch):
    choose_on(monkeypatch, OLD_TRITON, "auto", call("gated_delta"))
    _, reason = choose.chosen_backends()["gated_delta"]
    assert "issues/640" in reason and "use '" not in reason and "install" not in reason


def test_constant_decays_that_are_learned_or_leave_a_state_count_as_scalar():
    decay = torch.zeros(2)
    assert linear_kind(decay, None, False) == "constant"
    assert linear_kind(decay, None, True) == "scalar"
    assert linear_kind(decay.clone().requires_grad_(), None, False) == "scalar"


def test_names_and_operators_agree_with_the_table():
    assert set(BACKENDS) == set(choose.NAMES)
    for name, package in guards.PACKAGES.items():
        backend = BACKENDS[name]
        for operator in package.operators:
            field = "linear_recurrence" if operator in LINEAR else "delta_rule" if operator in DELTA else operator
            assert getattr(backend, field) is not None or (operator == "ssd" and backend.linear_recurrence is not None)


def test_an_operator_refuses_in_one_line_eager_and_compiled():
    q, k, v = (torch.randn(1, 4, 2, 8) for _ in range(3))
    message = "model.kernel_backend = 'fla': cannot compute identity: it needs a CUDA device"
    with pytest.raises(UserError, match=message):
        ops.linear_recurrence(q, k, v, backend="fla")
    compiled = torch.compile(ops.linear_recurrence, backend="aot_eager")
    with pytest.raises(UserError, match=message):
        compiled(q, k, v, backend="fla")


@pytest.mark.parametrize(
    "text, version", [("3.6.0", (3, 6, 0)), ("3.7.1+git9a8", (3, 7, 1)), ("3.8.0.post1", (3, 8, 0)), ("", ())]
)
def test_versions_are_read_up_to_their_suffix(text, version):
    assert guards.parse_version(text) == version
