"""What every operator promises of a call: types, states, scales, and one line for what it refuses."""

import logging

import pytest
import torch
from cases import convolution, forced, token_shift
from cases.families import FAMILIES

from torchlinearmoe.kernels import choose
from torchlinearmoe.kernels.convolution import short_convolution
from torchlinearmoe.kernels.delta import delta_rule
from torchlinearmoe.kernels.dplr import dplr_rule
from torchlinearmoe.kernels.linear import linear_recurrence
from torchlinearmoe.kernels.quadratic import quadratic_attention
from torchlinearmoe.kernels.slots import slot_attention
from torchlinearmoe.kernels.ssd import ssd
from torchlinearmoe.kernels.token_shift import token_shift as shift
from torchlinearmoe.segments import Segments

ALL = FAMILIES | {"convolution": convolution.case, "token_shift": token_shift.case}
BACKENDS = (("torch", (9, 3)), ("reference", (9, 3)), ("step", (1, 1, 1)))
every_backend = pytest.mark.parametrize("backend, lengths", BACKENDS, ids=[name for name, _ in BACKENDS])


def flat(outputs) -> list[torch.Tensor]:
    o, final = outputs
    return [o, *(final if isinstance(final, tuple) else [final])]


@pytest.mark.parametrize("family", ALL)
@every_backend
def test_16_bits_go_in_and_out_beside_float32_states(family, backend, lengths):
    torch.manual_seed(1)
    case = ALL[family](lengths, "in out")
    inputs = {name: x.to(torch.float32 if name in case.wide else torch.bfloat16) for name, x in case.inputs.items()}
    o, *finals = flat(forced(case.operator, backend, lambda: case.function(**inputs, **case.options)))
    assert o.dtype == torch.bfloat16
    # The last inputs are states as they are.
    assert {x.dtype for x in finals} == {torch.float32 if family in FAMILIES else torch.bfloat16}


@pytest.mark.parametrize("family", ALL)
@every_backend
def test_states_come_out_where_they_are_wanted_and_leave_those_that_went_in_alone(family, backend, lengths):
    torch.manual_seed(2)
    case = ALL[family](lengths, "in out")
    before = {name: x.clone() for name, x in case.inputs.items()}
    wanted = flat(forced(case.operator, backend, lambda: case.function(**case.inputs, **case.options)))
    assert all(torch.equal(x, before[name]) for name, x in case.inputs.items())
    unwanted = case.options | {"want_final": False}
    o, final = forced(case.operator, backend, lambda: case.function(**case.inputs, **unwanted))
    assert final is None and all(x is not None for x in wanted)
    torch.testing.assert_close(o, wanted[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", ALL)
def test_single_tokens_that_go_on_from_a_state_go_by_the_step(family, monkeypatch):
    monkeypatch.setattr(choose, "_chosen", {})
    for states, name in (("in out", "step"), ("", "torch")):
        case = ALL[family]((1, 1, 1), states)
        case.function(**case.inputs, **case.options)
        assert [backend for backend, _ in choose.chosen_backends().values()][0] == name
        choose._chosen.clear()


@pytest.mark.parametrize("family", ["scalar", "diagonal", "gated_delta", "dplr", "slots"])
@every_backend
def test_scale_defaults_to_one_over_root_of_the_key_dim(family, backend, lengths):
    torch.manual_seed(3)
    case = FAMILIES[family](lengths, "in out", K=16)
    default = forced(case.operator, backend, lambda: case.function(**case.inputs, **case.options))
    scaled = forced(case.operator, backend, lambda: case.function(**case.inputs, **case.options, scale=0.25))
    torch.testing.assert_close(default, scaled)
    other = forced(case.operator, backend, lambda: case.function(**case.inputs, **case.options, scale=0.5))
    assert not torch.allclose(default[0], other[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_recorded_where_nothing_has_a_gradient(family):
    case = FAMILIES[family]((70, 3), "in out")
    assert not any(x.requires_grad for x in flat(case.function(**case.inputs, **case.options)))


@pytest.mark.parametrize("family", FAMILIES)
def test_one_input_alone_may_have_a_gradient(family):
    torch.manual_seed(4)
    case = FAMILIES[family]((70, 3), "in out")
    together = case.run("torch")
    for name in case.inputs:
        leaf = case.inputs[name].clone().requires_grad_()
        found = flat(case.function(**(case.inputs | {name: leaf}), **case.options))
        generator, loss = torch.Generator().manual_seed(11), torch.zeros((), dtype=torch.float64)
        for x in found:
            loss = loss + (x * torch.randn(x.shape, generator=generator, dtype=torch.float64)).sum()
        (gradient,) = torch.autograd.grad(loss, leaf)
        torch.testing.assert_close(gradient, together[f"d_{name}"], rtol=1e-9, atol=1e-9)


def test_the_choice_is_said_once(caplog, monkeypatch):
    monkeypatch.setattr(choose, "_chosen", {})
    case, other = FAMILIES["identity"]((4,), ""), FAMILIES["delta"]((4,), "")
    with caplog.at_level(logging.INFO, logger="torchlinearmoe.kernels"):
        for each in (case, case, other):
            each.function(**each.inputs, **each.options)
    said = [record.getMessage().partition(":")[0] for record in caplog.records]
    assert said == ["linear (identity) runs on the torch backend", "delta (plain) runs on the torch backend"]
    assert {name: backend for name, (backend, _) in choose.chosen_backends().items()} == {
        "linear (identity)": "torch",
        "delta (plain)": "torch",
    }


T, H, K, V, N = 4, 2, 3, 5, 1
ONE = Segments.of_lengths((T,))


def zeros(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.zeros(shape) for shape in shapes]


def linear(**changes):
    q, k, v = zeros((T, H, K), (T, H, K), (T, H, V))
    return linear_recurrence(**{"q": q, "k": k, "v": v, "segments": ONE, **changes})


def delta(**changes):
    q, k, v, beta = zeros((T, H, K), (T, H, K), (T, H, V), (T, H))
    return delta_rule(**{"q": q, "k": k, "v": v, "beta": beta, "segments": ONE, **changes})


def dplr(**changes):
    q, k, v, a, b, g = zeros((T, H, K), (T, H, K), (T, H, V), *[(T, H, K)] * 3)
    return dplr_rule(**{"q": q, "k": k, "v": v, "a": a, "b": b, "log_decay": g, "segments": ONE, **changes})


def slots(**changes):
    q, k, v, s, g = zeros((T, H, K), (T, H, K), (T, H, V), (T, H, 7), (T, H, 7))
    return slot_attention(**{"q": q, "k": k, "v": v, "s": s, "log_decay": g, "segments": ONE, **changes})


def quadratic(**changes):
    q, k, v = zeros((T, H, K), (T, H, K), (T, H, V))
    return quadratic_attention(**{"q": q, "k": k, "v": v, "kind": "taylor", "segments": ONE, **changes})


def dual(**changes):
    x, dt, A, B, C = zeros((T, 3, V), (T, 3), (3,), (T, 1, K), (T, 1, K))
    return ssd(**{"x": x, "dt": dt, "A": A, "B": B, "C": C, "segments": ONE, **changes})


def conv(**changes):
    return short_convolution(**{"x": torch.zeros(T, 3), "weight": torch.zeros(3, 4), "segments": ONE, **changes})


def shifted(**changes):
    return shift(**{"x": torch.zeros(T, 3), "segments": ONE, **changes})


@pytest.mark.parametrize(
    "function, changes, message",
    [
        (linear, {"segments": Segments.of_lengths((3,))}, "segments: shape (3,), legal: (4,)"),
        (linear, {"k": (T, H, 4)}, "k: shape (4, 2, 4), legal: (4, 2, 3)"),
        (linear, {"v": (T, 1, V)}, "v: shape (4, 1, 5), legal: (4, 2, 5)"),
        (linear, {"log_decay": (3,)}, "log_decay: shape (3,), legal: (2,), (4, 2), (4, 2, 3)"),
        (linear, {"bonus": (2, 3)}, "bonus: needs log_decay per channel, [T, H, K]"),
        (linear, {"bonus": (3,)}, "bonus: shape (3,), legal: (2, 3)"),
        (linear, {"initial_state": (2, H, K, V)}, "initial_state: shape (2, 2, 3, 5), legal: (1, 2, 3, 5)"),
        (delta, {"v": (T, 3, V), "beta": (T, 3)}, "v: 3 value heads, legal: a multiple of the 2 query heads"),
        (delta, {"beta": (T,)}, "beta: shape (4,), legal: (4, 2)"),
        (delta, {"k": (T, H, 4)}, "k: shape (4, 2, 4), legal: (4, 2, 3)"),
        (delta, {"v": (3, H, V)}, "v: shape (3, 2, 5), legal: (4, 2, 5)"),
        (delta, {"log_decay": (T, H, V)}, "log_decay: shape (4, 2, 5), legal: (4, 2), (4, 2, 3)"),
        (delta, {"initial_state": (N, H, V, K)}, "initial_state: shape (1, 2, 5, 3), legal: (1, 2, 3, 5)"),
        (dplr, {"b": (T, H)}, "b: shape (4, 2), legal: (4, 2, 3)"),
        (dplr, {"log_decay": (T, H)}, "log_decay: shape (4, 2), legal: (4, 2, 3)"),
        (dplr, {"lower_bound": 0.0}, "lower_bound: 0.0, legal: None, numbers below 0"),
        (dplr, {"initial_state": (2, H, K, V)}, "initial_state: shape (2, 2, 3, 5), legal: (1, 2, 3, 5)"),
        (slots, {"s": (T, H, 6), "log_decay": (T, H, 7)}, "log_decay: shape (4, 2, 7), legal: (4, 2, 6)"),
        (slots, {"s": (3, H, 7)}, "s: shape (3, 2, 7), legal: (4, 2, 7)"),
        (slots, {"k": (T, H, 5)}, "k: shape (4, 2, 5), legal: (4, 2, 3)"),
        (
            slots,
            {"initial_state": (torch.zeros(1, 2, 7, 3), torch.zeros(1, 2, 7, 5))},
            "initial_state: shape (1, 2, 7, 3), legal: (1, 2, 3, 7)",
        ),
        (quadratic, {"kind": "cubic"}, "kind: 'cubic', legal: taylor, square"),
        (quadratic, {"scale": 0.0}, "scale: 0.0, legal: positive numbers"),
        (quadratic, {"initial_state": (N, H, 10, 3)}, "initial_state: shape (1, 2, 10, 3), legal: (1, 2, 10, 6)"),
        (dual, {"B": (T, 2, K), "C": (T, 2, K)}, "B, C: 2 groups, legal: a divisor of the 3 heads"),
        (dual, {"C": (T, 3, K)}, "C: shape (4, 3, 3), legal: (4, 1, 3)"),
        (dual, {"dt": (T, 2)}, "dt: shape (4, 2), legal: (4, 3)"),
        (dual, {"A": (T, 3)}, "A: shape (4, 3), legal: (3,)"),
        (conv, {"activation": "relu"}, "activation: 'relu', legal: None, 'silu'"),
        (conv, {"weight": (4, 4)}, "weight: shape (4, 4), legal: (3, 4)"),
        (conv, {"bias": (4,)}, "bias: shape (4,), legal: (3,)"),
        (conv, {"initial_state": (N, 4, 3)}, "initial_state: shape (1, 4, 3), legal: (1, 3, 3)"),
        (shifted, {"initial_state": (1, 3)}, "initial_state: shape (1, 3), legal: (1, 1, 3)"),
        (shifted, {"segments": Segments.of_lengths((3,))}, "segments: shape (3,), legal: (4,)"),
    ],
)
def test_wrong_calls_are_refused_in_one_line(function, changes, message):
    changes = {
        name: torch.zeros(x) if isinstance(x, tuple) and isinstance(x[0], int) else x for name, x in changes.items()
    }
    with pytest.raises(ValueError) as error:
        function(**changes)
    assert str(error.value) == message
