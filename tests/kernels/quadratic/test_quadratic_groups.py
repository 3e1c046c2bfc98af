"""Quadratic attention in several groups of chunks, and that it never holds the features of all tokens."""

import weakref

import pytest
import torch
from cases import assert_close
from cases.quadratic import case as draw
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from torchlinearmoe.kernels.quadratic import chunked, quadratic_attention
from torchlinearmoe.kernels.quadratic.features import KINDS, feature_width
from torchlinearmoe.segments import Segments

AWKWARD = (1, 15, 16, 17, 40, 0, 5, 2, 3, 0, 32, 1)
"""For chunks of 16."""
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    """Two chunks a group, so that short inputs have several groups."""
    assert chunked.quadratic_attention.__defaults__ == (chunked.GROUP,)
    monkeypatch.setattr(chunked.quadratic_attention, "__defaults__", (2,))


@every_kind
@pytest.mark.parametrize("states", ["", "in", "out", "in out"])
@pytest.mark.parametrize("lengths", [(77,), AWKWARD], ids=["one", "packed"])
@pytest.mark.parametrize("normalize", [True, False])
def test_equals_the_definition_with_every_gradient(kind, states, lengths, normalize, monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK_SIZE", 16)
    torch.manual_seed(1)
    case = draw(kind, lengths, states, V=3, normalize=normalize)
    assert_close(case.run("torch"), case.run("reference"), 1e-9)


@every_kind
def test_any_cut_into_two_calls_gives_one(kind):
    torch.manual_seed(3)
    case = draw(kind, (300,), "out")
    options = {name: x for name, x in case.options.items() if name != "segments"}
    o, final = quadratic_attention(**case.inputs, **case.options)
    for cut in (1, 128, 130, 299):
        outputs, state = [], None
        for part in (slice(None, cut), slice(cut, None)):
            inputs = {name: x[part] for name, x in case.inputs.items()}
            segments = Segments.of_lengths((inputs["q"].shape[0],))
            part_o, state = quadratic_attention(**inputs, **options, segments=segments, initial_state=state)
            outputs.append(part_o)
        torch.testing.assert_close(torch.cat(outputs), o)
        torch.testing.assert_close(state, final)


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
@pytest.mark.parametrize("lengths", [(4096,), (1000, 3, 3093)], ids=["one", "packed"])
def test_the_features_of_all_tokens_are_never_held(kind, lengths):
    """Neither at once in one tensor, forward or backward, nor in what stays until the backward pass."""
    torch.manual_seed(7)
    T, K, V = 4096, 16, 8
    q, k, v = (torch.randn(T, 1, width).requires_grad_() for width in (K, K, V))
    all_features = 4 * T * feature_width(kind, K)
    saved: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with Allocations() as allocations:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            o, _ = quadratic_attention(q, k, v, kind=kind, segments=Segments.of_lengths(lengths))
        o.sum().backward()
    kept = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in saved}
    plain = sum(4 * T * width for width in (K, K, V + 1, V, V + 1))  # q, k, [v, 1], o and its two parts
    states = 4 * feature_width(kind, K) * (V + 1) * (T // (2 * chunked.CHUNK_SIZE))
    masks = T * (chunked.CHUNK_SIZE + 64)
    assert len(kept) > 3 and sum(kept.values()) < 1.5 * plain + states + masks
    assert max(kept.values()) < all_features / 4
    assert allocations.largest() < all_features / 4
