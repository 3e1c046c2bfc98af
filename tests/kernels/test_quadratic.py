"""Quadratic attention equals its definition on explicit features, and never holds the features of all tokens."""

import weakref

import pytest
import torch
from oracle import AWKWARD_LENGTHS, Call, assert_close, relative_error
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from torchlinearmoe.kernels.reference.quadratic import second_order_features

from torchlinearmoe.kernels import flops, ops, step
from torchlinearmoe.kernels.chunked import quadratic
from torchlinearmoe.kernels.quadratic.features import KINDS, QuadraticFeatures, feature_width

LENGTHS = (*AWKWARD_LENGTHS, 128, 129, 1, 300)

every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    """Two chunks a group, so that short inputs have several groups."""
    defaults = quadratic.quadratic_attention.__defaults__
    assert defaults == (quadratic.GROUP,)
    monkeypatch.setattr(quadratic.quadratic_attention, "__defaults__", (2,))


def random_call(
    kind: str,
    *,
    B: int = 2,
    T: int = 700,
    H: int = 2,
    K: int = 4,
    V: int = 3,
    lengths: tuple[int, ...] | None = None,
    initial: bool = False,
    final: bool = False,
    normalize: bool = True,
    dtype: torch.dtype = torch.float64,
) -> Call:
    """A call with fresh random inputs; `lengths` packs documents into one row."""
    options: dict = {"kind": kind, "output_final_state": final, "normalize": normalize, "eps": 1e-2}
    if lengths is not None:
        B, T = 1, sum(lengths)
        options["cu_seqlens"] = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    inputs = {name: torch.randn(B, T, H, K, dtype=dtype) for name in "qk"}
    inputs["v"] = torch.randn(B, T, H, V, dtype=dtype)
    if initial:
        # The state that some earlier tokens left, so that the normaliser is one.
        N, earlier = B if lengths is None else len(lengths), 3
        k, v = torch.randn(N, earlier, H, K, dtype=dtype), torch.randn(N, earlier, H, V, dtype=dtype)
        _, state = ops.quadratic_attention(
            k, k, v, kind=kind, normalize=normalize, output_final_state=True, backend="reference"
        )
        assert state is not None
        inputs["initial_state"] = state
    return Call("quadratic_attention", inputs, options)


@every_kind
@pytest.mark.parametrize("width", [1, 2, 16])
def test_features_have_the_promised_inner_product_and_gradient(kind, width):
    torch.manual_seed(0)
    q, k = torch.randn(2, 5, width).double().unbind(0)
    phi = QuadraticFeatures(kind, width, 0.3, q.device)
    s = 0.3 * (q * k).sum(-1)
    expected = 1 + s + s**2 / 2 if kind == "taylor" else s**2
    torch.testing.assert_close((phi.features(q) * phi.features(k)).sum(-1), expected)
    torch.testing.assert_close(phi.score((q * k).sum(-1)), expected)
    root = 0.3**0.5
    torch.testing.assert_close(phi.features(q), second_order_features(root * q, kind))
    assert phi.features(q).shape[-1] == phi.count == feature_width(kind, width)
    x, cotangent = q.clone().requires_grad_(), torch.randn(5, phi.count).double()
    (naive,) = torch.autograd.grad((second_order_features(root * x, kind) * cotangent).sum(), x)
    torch.testing.assert_close(phi.gradient(q, cotangent), naive)


def test_sixteen_channels_make_153_and_136_features():
    assert feature_width("taylor", 16) == 153
    assert feature_width("square", 16) == 136


@every_kind
@pytest.mark.parametrize("states", ["", "in", "out", "in out"])
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["rows", "packed"])
@pytest.mark.parametrize("normalize", [True, False])
def test_equals_definition_with_every_gradient(kind, states, lengths, normalize):
    torch.manual_seed(1)
    call = random_call(
        kind, B=2, T=390, lengths=lengths, initial="in" in states, final="out" in states, normalize=normalize
    )
    assert_close(call.run("torch"), call.run("reference"), 1e-9)


@every_kind
def test_document_ids_alone_give_the_same_outputs(kind):
    torch.manual_seed(2)
    lengths = (1, 200, 128, 60, 300)
    call = random_call(kind, lengths=lengths)
    expected = call.run("torch")
    del call.options["cu_seqlens"]
    call.options["document_ids"] = torch.repeat_interleave(torch.arange(5), torch.tensor(lengths))
    assert_close(call.run("torch"), expected, 1e-12)
    assert_close(call.run("reference"), expected, 1e-9)


@every_kind
def test_any_cut_into_two_calls_gives_one(kind):
    torch.manual_seed(3)
    call = random_call(kind, T=300, final=True)
    o, final = ops.quadratic_attention(**call.inputs, **call.options)
    for cut in (1, 128, 130, 299):
        first, second = ({name: x[:, part] for name, x in call.inputs.items()} for part in cuts(cut))
        o_first, state = ops.quadratic_attention(**first, **call.options)
        o_second, state = ops.quadratic_attention(**second, **call.options, initial_state=state)
        torch.testing.assert_close(torch.cat([o_first, o_second], 1), o)
        torch.testing.assert_close(state, final)


def cuts(at: int) -> tuple[slice, slice]:
    return slice(None, at), slice(at, None)


@every_kind
@pytest.mark.parametrize("normalize", [True, False])
def test_steps_equal_the_definition(kind, normalize):
    torch.manual_seed(4)
    call = random_call(kind, B=3, T=5, initial=True, final=True, normalize=normalize)
    expected, final = ops.quadratic_attention(**call.inputs, **call.options, backend="reference")
    state = call.inputs["initial_state"]
    for t in range(5):
        q, k, v = (call.inputs[name][:, t] for name in "qkv")
        o, state = step.quadratic_step(q, k, v, state, kind=kind, normalize=normalize, eps=1e-2)
        torch.testing.assert_close(o, expected[:, t])
    torch.testing.assert_close(state, final)
    q, k, v = (call.inputs[name][:, 0].bfloat16() for name in "qkv")
    o, state = step.quadratic_step(q, k, v, state.float(), kind=kind, normalize=normalize)
    assert o.dtype == torch.bfloat16 and state.dtype == torch.float32


@every_kind
def test_half_precision_is_close_and_keeps_fp32_states(kind):
    torch.manual_seed(5)
    call = random_call(kind, B=1, T=600, H=2, K=16, V=16, initial=True, final=True, dtype=torch.float32)
    call.inputs["q"], call.inputs["k"] = call.inputs["q"].abs(), call.inputs["k"].abs()
    exact, half = call.run("reference", torch.float64), call.run("torch", torch.bfloat16)
    assert half["o"].dtype == torch.bfloat16 and half["final"].dtype == torch.float32
    for name, value in half.items():
        assert relative_error(value, exact[name]) < 2e-2, name
    for name, value in call.run("torch").items():
        assert relative_error(value, exact[name]) < 2e-5, name


@every_kind
def test_compiles_without_a_graph_break(kind):
    torch.manual_seed(6)
    torch._dynamo.reset()
    call = random_call(kind, lengths=(200, 170), dtype=torch.float32)
    del call.options["cu_seqlens"]
    call.options["document_ids"] = torch.repeat_interleave(torch.arange(2), torch.tensor([200, 170]))
    expected = call.run("torch")
    compiled = torch.compile(ops.quadratic_attention, fullgraph=True, backend="aot_eager")
    inputs = {name: x.clone().requires_grad_() for name, x in call.inputs.items()}
    o, _ = compiled(**inputs, **call.options)
    o.backward(torch.randn(o.shape, generator=torch.Generator().manual_seed(11), dtype=torch.float64).float())
    actual = {"o": o.detach()} | {f"d_{name}": x.grad for name, x in inputs.items() if x.grad is not None}
    assert_close(actual, expected, 1e-4)


class Allocations(TorchDispatchMode):
    """Bytes of every storage made while the mode is on."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[weakref.ref, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                self.made[storage.data_ptr()] = (weakref.ref(storage), storage.nbytes())
        return out

    def largest(self) -> int:
        return max(size for _, size in self.made.values())


@every_kind
@pytest.mark.parametrize("packed", [False, True])
def test_the_features_of_all_tokens_are_never_held(kind, packed):
    """Neither at once in one tensor, forward or backward, nor in what stays until the backward pass."""
    torch.manual_seed(7)
    T, K, V = 4096, 16, 8
    lengths = (1000, 3, 3093) if packed else None
    call = random_call(kind, B=1, T=T, H=1, K=K, V=V, lengths=lengths, dtype=torch.float32)
    if packed:
        call.options["document_ids"] = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    inputs = {name: x.requires_grad_() for name, x in call.inputs.items()}
    all_features = 4 * T * feature_width(kind, K)
    saved: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with Allocations() as allocations:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            o, _ = ops.quadratic_attention(**inputs, **call.options)
        o.sum().backward()
    kept = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in saved}
    plain = sum(4 * T * width for width in (K, K, V + 1, V, V + 1))  # q, k, [v, 1], o and its two parts
    states = 4 * feature_width(kind, K) * (V + 1) * (T // (2 * quadratic.CHUNK_SIZE))
    masks = T * (quadratic.CHUNK_SIZE + 64)
    assert len(kept) > 3 and sum(kept.values()) < 1.5 * plain + states + masks
    assert max(kept.values()) < all_features / 4
    assert allocations.largest() < all_features / 4


def test_flops_are_those_of_the_issued_matmuls():
    T, H, K, V, C = 4096, 2, 16, 31, quadratic.CHUNK_SIZE
    q, k, v = torch.randn(1, T, H, K), torch.randn(1, T, H, K), torch.randn(1, T, H, V)
    with FlopCounterMode(display=False) as counter:
        ops.quadratic_attention(q, k, v, kind="taylor")
    masked_half = H * C * (K + V + 1)
    scan = H * 2 * 153 * (V + 1) * 9 / (2 * C)  # two chunks a group: a matrix of 3 x 3
    expected = flops.quadratic_attention_flops(H, K, 153, V + 1, C) + masked_half + scan
    assert counter.get_total_flops() / T == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kind": "cubic"}, "kind: 'cubic', legal: taylor, square"),
        ({"scale": 0.0}, "scale: 0.0, legal: positive numbers"),
        ({"initial_state": torch.zeros(1, 2, 10, 3)}, "initial_state: shape (1, 2, 10, 3), legal: (1, 2, 10, 6)"),
        ({"backend": "cuda"}, "model.kernel_backend = 'cuda': legal: auto, torch, reference, fla, mamba_ssm"),
    ],
)
def test_wrong_calls_are_refused_in_one_line(options, message):
    q, k, v = torch.randn(1, 4, 2, 3), torch.randn(1, 4, 2, 3), torch.randn(1, 4, 2, 5)
    with pytest.raises(ValueError) as error:
        ops.quadratic_attention(q, k, v, **{"kind": "taylor", **options})
    assert message in str(error.value) and "\n" not in str(error.value)
