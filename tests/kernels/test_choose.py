"""Which backend takes which call: defects, the order of "auto", and what a user reads when one is refused."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from torchlinearmoe.errors import UserError
from torchlinearmoe.kernels import choose
from torchlinearmoe.kernels.choose import Machine, decide, parse_version, refuse
from torchlinearmoe.kernels.linear import linear_recurrence
from torchlinearmoe.kernels.linear.kinds import linear_kind
from torchlinearmoe.kernels.operator import Backend, Call, Operator, legal_names, operators
from torchlinearmoe.segments import Segments

HOPPER = Machine((9, 0), (3, 8, 0), frozenset(), False)
OLD_TRITON = replace(HOPPER, triton=(3, 6, 0))
KERNELS = [(o.name, kind) for o in operators().values() if o.key == "model.kernel_backend" for kind in o.kinds]
by_fla = pytest.mark.parametrize(
    "operator, kind", [(name, kind) for name, kind in KERNELS if "fla" in operators()[name].find_backends()]
)


def lacking(*modules: str) -> Machine:
    return replace(HOPPER, missing=frozenset(modules))


def call(kind: str, **changes) -> Call:
    return replace(Call(kind, "cuda", torch.bfloat16, 64), **changes)


def fla(operator: str, facts: Call, machine: Machine, auto: bool = False) -> str | None:
    """Why fla may not take a call."""
    return refuse(operators()[operator].find_backends()["fla"], facts, machine, auto=auto)


def auto(operator: str, facts: Call, machine: Machine, **options) -> tuple[str, str]:
    return decide(operators()[operator], "auto", facts, machine, **options)


@pytest.mark.parametrize("operator, kind", [("linear", "scalar"), ("delta", "gated"), ("ssd", "ssd")])
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
def test_the_hopper_miscompile_is_refused_where_it_happens(operator, kind, capability, triton, refused):
    reason = fla(operator, call(kind), replace(HOPPER, capability=capability, triton=triton))
    assert (reason is not None) == refused
    if reason is not None:
        assert "issues/640" in reason and "Triton 3.7.1 or newer" in reason


def test_the_miscompile_bars_backward_passes_only_but_auto_stays_with_what_trains():
    facts = call("scalar", gradients=False)
    assert fla("linear", facts, OLD_TRITON) is None
    assert fla("linear", facts, OLD_TRITON, auto=True) is not None


@by_fla
def test_kernels_without_a_gate_per_head_are_not_barred_by_it(operator, kind):
    barred = fla(operator, call(kind), OLD_TRITON) is not None
    assert barred == (kind in ("scalar", "gated", "ssd"))


@pytest.mark.parametrize(
    "operator, kind, widest", [("linear", "identity", 32), ("linear", "constant", 32), ("delta", "plain", 63)]
)
@pytest.mark.parametrize("wider, machine, barred", [(0, OLD_TRITON, True), (1, OLD_TRITON, False), (0, HOPPER, False)])
def test_narrow_keys_are_kept_from_a_backward_pass_that_reads_elsewhere(operator, kind, widest, wider, machine, barred):
    facts = call(kind, channels=widest + wider)
    for by_itself in (False, True):
        assert (fla(operator, facts, machine, by_itself) is not None) == barred
    assert fla(operator, replace(facts, gradients=False), machine) is None


@pytest.mark.parametrize(
    "channels, triton, expected",
    [(32, (3, 6, 0), "triton"), (33, (3, 6, 0), "torch"), (33, (3, 7, 1), "torch"), (33, (3, 8, 0), "triton")],
)
def test_features_of_wide_keys_are_kept_from_a_compiler_that_gets_them_wrong(channels, triton, expected):
    facts = call("square", channels=channels)
    assert auto("quadratic", facts, replace(HOPPER, triton=triton))[0] == expected


def test_the_float32_delta_rule_goes_by_the_gated_kernel_and_is_barred_with_it():
    facts = call("plain", dtype=torch.float32)
    assert fla("delta", facts, HOPPER) is None
    assert "640" in (fla("delta", facts, OLD_TRITON) or "")
    assert fla("delta", replace(facts, dtype=torch.bfloat16), OLD_TRITON) is None


@pytest.mark.parametrize(
    "operator, name, facts, machine, words",
    [
        ("linear", "fla", call("identity", device="cpu"), HOPPER, "needs a CUDA device, the tensors are on the cpu"),
        ("linear", "fla", call("identity"), lacking("fla"), "fla cannot be imported; pip install fla-core"),
        ("linear", "fla", call("identity"), lacking("fla", "einops"), "fla, einops cannot be imported"),
        ("linear", "fla", call("identity", dtype=torch.float64), HOPPER, "does not take float64"),
        ("delta", "fla", call("plain", channels=257), HOPPER, "at most 256 channels"),
        ("dplr", "fla", call("dplr", channels=257), HOPPER, "at most 256 channels"),
        ("delta", "fla", call("gated"), OLD_TRITON, "install Triton 3.7.1 or newer"),
        ("quadratic", "fla", call("taylor"), HOPPER, "it computes delta (channels), delta (gated)"),
        ("linear", "mamba_ssm", call("scalar"), HOPPER, "it computes ssd"),
        ("ssd", "mamba_ssm", call("ssd"), lacking("mamba_ssm"), "pip install --no-build-isolation"),
        ("delta", "triton", call("plain", channels=257), HOPPER, "at most 256 channels"),
    ],
)  # fmt: skip
def test_what_cannot_be_computed_is_refused_in_one_line_with_key_reason_and_way_out(
    operator, name, facts, machine, words
):
    chosen, message = decide(operators()[operator], name, facts, machine)
    assert chosen == ""
    label = operators()[operator].label(facts.kind)
    assert message.startswith(f"model.kernel_backend = '{name}': cannot compute {label}: ")
    assert words in message and "'auto'" in message and "\n" not in message


def test_an_unknown_name_is_answered_with_the_legal_ones():
    _, message = decide(operators()["linear"], "cuda", call("scalar"), HOPPER)
    names = legal_names("model.kernel_backend")
    assert message == f"model.kernel_backend = 'cuda': legal: {', '.join(names)}"
    assert set(names) == {"auto", "torch", "reference", "fla", "mamba_ssm", "triton"}
    _, message = decide(operators()["convolution"], "cuda", call("convolution"), HOPPER)
    assert message == "convolution = 'cuda': legal: torch, reference, triton"


def test_wide_keys_are_refused_by_delta_rules_only():
    assert fla("linear", call("diagonal", channels=257), HOPPER) is None


@pytest.mark.parametrize(
    "facts, machine, words",
    [
        (call("slots", dtype=torch.float32), HOPPER, "TF32"),
        (call("slots"), replace(HOPPER, deterministic=True), "training.deterministic"),
    ],
)
def test_auto_leaves_out_what_only_an_explicit_name_asks_for(facts, machine, words):
    reason = fla("slots", facts, machine, auto=True)
    assert reason is not None and words in reason
    assert auto("slots", facts, machine)[0] == "triton"
    assert decide(operators()["slots"], "fla", facts, machine)[0] == "fla"


ORDER = [
    *[(operator, kind, machine, "triton") for operator, kind in KERNELS for machine in (HOPPER, OLD_TRITON)],
    *[(operator, kind, lacking("fla", "einops", "mamba_ssm"), "triton") for operator, kind in KERNELS],
    *[(operator, kind, lacking("fla", "triton", "einops", "mamba_ssm"), "torch") for operator, kind in KERNELS],
    ("convolution", "convolution", HOPPER, "triton"),
    ("convolution", "convolution", lacking("triton"), "torch"),
    ("token_shift", "token_shift", HOPPER, "triton"),
    ("token_shift", "token_shift", lacking("triton"), "torch"),
]


@pytest.mark.parametrize("operator, kind, machine, expected", ORDER)
def test_auto_takes_our_own_kernels_then_plain_pytorch(operator, kind, machine, expected):
    name, reason = auto(operator, call(kind, channels=16 if operator == "quadratic" else 64), machine)
    assert name == expected
    first = max(operators()[operator].backends.values(), key=lambda b: b.order if b.order and kind in b.kinds else -1)
    if name != first.name:
        assert reason.startswith(f"not {first.name}: ")


@pytest.mark.parametrize("operator, kind", KERNELS)
def test_auto_stays_with_plain_pytorch_on_the_cpu(operator, kind):
    assert auto(operator, call(kind, device="cpu"), HOPPER)[0] == "torch"


@pytest.mark.parametrize("operator, kind", KERNELS)
@pytest.mark.parametrize("exact", ["float32", "deterministic"])
def test_auto_takes_our_kernels_where_results_must_be_exact(operator, kind, exact):
    machine = replace(HOPPER, deterministic=exact == "deterministic")
    facts = call(kind, dtype=torch.float32 if exact == "float32" else torch.bfloat16)
    assert auto(operator, facts, machine)[0] == "triton"


def test_a_reason_tells_why_without_the_way_out():
    _, reason = auto("linear", call("scalar"), lacking("triton"))
    assert reason.startswith("not triton: ") and "use '" not in reason and "install" not in reason
    assert auto("delta", call("gated"), HOPPER) == ("triton", "preferred")


@pytest.mark.parametrize("name", ["fla", "triton"])
def test_under_the_compiler_a_name_gets_what_it_names(name):
    assert decide(operators()["linear"], name, call("scalar"), HOPPER, True)[0] == name


@pytest.mark.parametrize(
    "changes, machine, name",
    [
        ({}, HOPPER, "triton"),
        ({"dtype": torch.float32}, replace(HOPPER, deterministic=True), "triton"),
        ({"single": True}, HOPPER, "step"),
        ({"dtype": torch.float64}, HOPPER, "torch"),
        ({"device": "cpu"}, HOPPER, "torch"),
        ({}, lacking("triton"), "torch"),
    ],
)
@pytest.mark.parametrize("operator, kind", [("convolution", "convolution"), *KERNELS])
def test_under_the_compiler_auto_takes_an_operator_that_is_faster_than_what_it_would_fuse(
    operator, kind, changes, machine, name
):
    found, reason = auto(operator, call(kind, **changes), machine, compiling=True)
    assert (found, reason) == (name, "an operator of the compiler" if name == "triton" else "torch.compile fuses it")


def test_a_call_knows_whether_it_is_compiled(monkeypatch):
    seen = []

    def spy(*arguments):
        seen.append(arguments[-1])
        return "torch", "spied"

    monkeypatch.setattr(choose, "decide", spy)
    torch._dynamo.reset()
    q, k, v = torch.randn(3, 8, 1, 16).unbind(0)
    segments = Segments.of_lengths((8,))
    torch.compile(lambda q, k, v: linear_recurrence(q, k, v, segments=segments)[0], backend="eager")(q, k, v)
    linear_recurrence(q, k, v, segments=segments)
    assert seen == [True, False]


@pytest.mark.parametrize("name", ["auto", "torch", "reference", "fla"])
@pytest.mark.parametrize("operator, kind", [*KERNELS, ("convolution", "convolution"), ("token_shift", "token_shift")])
def test_single_tokens_go_by_the_step_whatever_is_named(operator, kind, name):
    assert decide(operators()[operator], name, call(kind, single=True), HOPPER)[0] == "step"
    assert "step" not in legal_names("model.kernel_backend")


def test_where_nothing_computes_a_call_every_reason_is_told():
    backends = {
        "fast": Backend("fast", print, ("mystery",), order=2, devices=frozenset(("cuda",))),
        "slow": Backend("slow", print, ("mystery",), order=1, dtypes=frozenset((torch.float64,))),
    }
    operator = Operator("mystery", ("mystery",), backends=backends)
    facts = call("mystery", device="cpu")
    told = "not fast: it needs a CUDA device, the tensors are on the cpu; not slow: it does not take bfloat16"
    assert decide(operator, "auto", facts, HOPPER) == ("", f"mystery: nothing computes it here: {told}")


def test_gradients_count_where_they_are_recorded_only(monkeypatch):
    seen = []
    monkeypatch.setattr(choose, "_answers", {})
    monkeypatch.setattr(
        choose, "decide", lambda operator, name, facts, *_: (seen.append(facts.gradients), ("torch", ""))[1]
    )
    q, k, v = torch.randn(3, 8, 1, 16).unbind(0)
    segments = Segments.of_lengths((8,))
    linear_recurrence(q, k, v, segments=segments)
    with torch.no_grad():
        linear_recurrence(q, k, v, segments=segments)
    assert seen == [True, False]


def test_calls_are_checked_ahead_of_the_first(monkeypatch):
    monkeypatch.setattr(choose, "this_machine", lambda: lacking("fla"))
    monkeypatch.setattr(choose, "_chosen", {})
    linear, delta = operators()["linear"], operators()["delta"]
    choose.check([(linear, "auto", call("scalar")), (delta, "torch", call("gated"))])
    assert {name: backend for name, (backend, _) in choose.chosen_backends().items()} == {
        "delta (gated)": "torch",
        "linear (scalar)": "triton",
    }
    with pytest.raises(UserError, match=r"model.kernel_backend = 'fla': cannot compute delta \(gated\)"):
        choose.check([(linear, "auto", call("scalar")), (delta, "fla", call("gated"))])


def test_constant_decays_that_are_learned_or_leave_a_state_count_as_scalar():
    decay = torch.zeros(2)
    assert linear_kind(decay, None, False) == "constant"
    assert linear_kind(decay, None, True) == "scalar"
    assert linear_kind(decay.clone().requires_grad_(), None, False) == "scalar"


def test_an_operator_refuses_in_one_line_eager_and_compiled():
    q, k, v = (torch.randn(4, 2, 8) for _ in range(3))
    segments = Segments.of_lengths((4,))
    message = (
        r"^model.kernel_backend = 'fla': cannot compute linear \(identity\): it needs a CUDA device, the tensors .*$"
    )
    with pytest.raises(UserError, match=message):
        linear_recurrence(q, k, v, segments=segments, backend="fla")
    compiled = torch.compile(linear_recurrence, backend="eager")
    with pytest.raises(UserError, match=message):
        compiled(q, k, v, segments=segments, backend="fla")


@pytest.mark.parametrize(
    "text, version", [("3.6.0", (3, 6, 0)), ("3.7.1+git9a8", (3, 7, 1)), ("3.8.0.post1", (3, 8, 0)), ("", ())]
)
def test_versions_are_read_up_to_their_suffix(text, version):
    assert parse_version(text) == version


def test_backends_are_found_without_the_packages_that_they_need():
    code = (
        "import sys; sys.modules |= dict.fromkeys(('fla', 'mamba_ssm', 'triton', 'einops')); "  # None: not importable
        "from torchlinearmoe.kernels import operator; "
        "assert {'fla', 'triton', 'mamba_ssm'} <= set(operator.operators()['ssd'].find_backends())"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
