"""What a mixer declares about itself is true: parameters, placements, initial values, state, FLOPs, precision."""

from __future__ import annotations

import pytest
import torch
from mixer_cases import Case, every_mixer, has_appended_state, make_stack, random_inputs, relative, small_model
from torch import nn
from torch.distributed.tensor import Replicate, Shard

from torchlinearmoe.documents import Documents
from torchlinearmoe.errors import RecipeError
from torchlinearmoe.initialize import initialize, initializers_of
from torchlinearmoe.mixers import MIXERS
from torchlinearmoe.mixers.base import Carry, geometry


@every_mixer
def test_every_parameter_has_one_tensor_parallel_placement(case: Case):
    for mixer in make_stack(case).layers:
        placements = mixer.tensor_parallel()
        assert sorted(placements) == sorted(name for name, _ in mixer.named_parameters())
        for name, placement in placements.items():
            assert isinstance(placement, (Shard, Replicate)), name
            assert not isinstance(placement, Shard) or placement.dim < mixer.get_parameter(name).dim(), name


@every_mixer
def test_every_parameter_has_one_initializer_and_is_drawn(case: Case):
    stack = make_stack(case)
    for path, module in stack.named_modules():
        own = {name for name, _ in module.named_parameters(recurse=False)}
        assert own == set(initializers_of(module)) & own, path
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.fill_(torch.nan)
    initialize(stack, 0)
    assert all(bool(parameter.isfinite().all()) for parameter in stack.parameters())


@every_mixer
def test_declared_state_is_the_state_that_comes_back(case: Case):
    stack = make_stack(case)
    with torch.no_grad():
        empty = stack.empty(3, 12)
        _, read = stack.resumed(random_inputs(9), (2, 6, 1), (0, 0, 0), stack.empty(3, 12))
        _, stepped = stack.step(random_inputs(3), 6, read)
    for mixer, *states in zip(stack.layers, empty, read, stepped):
        spec = mixer.state_spec()
        for state in states:
            assert state.keys() == spec.keys()
            for name, part in spec.items():
                room = (12,) if part.carry is Carry.APPEND else ()
                assert state[name].shape == (3, *room, *part.shape), name
                assert state[name].dtype == torch.float64, name
    low = make_stack(case, dtype=torch.bfloat16)
    for mixer, state in zip(low.layers, low.empty(1, 4, torch.bfloat16)):
        for name, part in mixer.state_spec().items():
            assert state[name].dtype == (torch.float32 if part.fp32 else torch.bfloat16), name
            assert part.fp32 or part.carry is not Carry.RECURRENT, "recurrent states are kept in float32"


@every_mixer
def test_state_does_not_grow_unless_it_is_appended_to(case: Case):
    stack = make_stack(case)
    assert case.mixer.keeps_past or not has_appended_state(stack)

    def size(max_length: int) -> int:
        return sum(value.numel() for state in stack.empty(1, max_length) for value in state.values())

    assert (size(1000) > size(10)) == has_appended_state(stack)


@every_mixer
def test_flops_are_positive_and_grow_with_the_document_only_for_attention(case: Case):
    mixer = make_stack(case).layers[0]
    matrices = sum(p.numel() for p in mixer.parameters() if p.dim() == 2)
    assert mixer.flops_per_token(1) > 2 * matrices
    grows = mixer.flops_per_token(4096) > mixer.flops_per_token(64)
    assert grows == case.mixer.keeps_past


@every_mixer
def test_half_precision_stays_close_to_float32(case: Case):
    exact = make_stack(case, dtype=torch.float32)
    half = _half(make_stack(case, dtype=torch.float32))
    x_TD, documents = random_inputs(130, dtype=torch.bfloat16), Documents.packed([0, 60, 130])
    contexts, carried = [stack.context(documents) for stack in (half, exact)], ({}, {})
    # Each layer of both is given the same input: a choice between two near equals may fall differently.
    for low, high in zip(half.layers, exact.layers):
        y_TD, _, low_carried = low(x_TD, contexts[0], None, carried[0])
        assert y_TD.dtype == torch.bfloat16
        with torch.no_grad():
            expected_TD, _, high_carried = high(x_TD.float(), contexts[1], None, carried[1])
        carried = (low_carried, high_carried)
        assert relative((x_TD + y_TD).detach(), x_TD.detach() + expected_TD) < 2e-2
        x_TD = x_TD + y_TD
    x_TD.float().square().sum().backward()
    for name, parameter in half.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name


@every_mixer
def test_half_precision_steps_stay_close_to_one_pass(case: Case):
    half = _half(make_stack(case, dtype=torch.float32))
    x_TD = random_inputs(20, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = half.packed(x_TD, [20])
        states, outputs = half.empty(1, 20, torch.bfloat16), []
        for t in range(20):
            y_TD, states = half.step(x_TD[t : t + 1], t, states)
            outputs.append(y_TD)
    assert relative(torch.cat(outputs), expected) < 2e-2


@every_mixer
def test_parameters_without_weight_decay_by_name_stay_in_float32(case: Case):
    """Decays and bounds: rounding them to half precision before use changes the model. Low-rank factors may be."""
    for path, module in make_stack(case).named_modules():
        names = set(getattr(module, "no_weight_decay", ()))
        assert names <= {name for name, _ in module.named_parameters()}, path
        factors = {name for name in names if name.removesuffix(".weight").endswith(("up", "down"))}
        assert names == factors or getattr(module, "keep_fp32", False), path


@every_mixer
def test_initial_values_keep_the_residual_stream_alive(case: Case):
    """As initialised, outputs are finite and neither vanish nor drown the input."""
    stack = make_stack(case, dtype=torch.float32)
    initialize(stack, 0)
    x_TD = random_inputs(100, dtype=torch.float32)
    with torch.no_grad():
        change = relative(stack.packed(x_TD, [100]), x_TD)
    assert 1e-5 < change < 1.0


@pytest.mark.parametrize("name", MIXERS.names())
def test_negative_counts_and_impossible_heads_are_refused(name: str):
    mixer, dims = MIXERS[name], small_model()
    assert mixer.check(mixer.Options(), dims) is None
    for overrides in ({"heads": -1}, {"head_dim": -4}):
        with pytest.raises(RecipeError, match=f"^mixer.{name}.{next(iter(overrides))} = -.*must not be negative$"):
            mixer.check(mixer.Options(**overrides), dims)
    if not mixer.keeps_past:
        with pytest.raises(RecipeError, match=f"^mixer.{name}.heads"):
            mixer.check(mixer.Options(heads=7), dims)


def test_default_heads_are_the_familys_where_they_suit_else_heads_of_128():
    def default(width: int, heads: int) -> tuple[int, int]:
        options = MIXERS["hgrn2"].Options()
        return geometry(options, small_model(hidden_size=width, num_heads=heads))

    assert default(1024, 8) == (8, 128)
    assert default(2048, 8) == (8, 256)
    assert default(64, 4) == (4, 16)
    assert default(1024, 128) == (8, 128)  # heads of 8
    assert default(4096, 8) == (32, 128)  # heads of 512
    assert default(640, 16) == (5, 128)  # heads of 40
    assert default(896, 10) == (7, 128)  # not whole
    chosen = MIXERS["hgrn2"].Options
    dims = small_model(hidden_size=1024, num_heads=8)
    assert geometry(chosen(heads=4), dims) == (4, 256)
    assert geometry(chosen(head_dim=64), dims) == (16, 64)
    assert geometry(chosen(heads=3, head_dim=64), dims) == (3, 64)


def _half(stack):
    """bfloat16 but for the modules that declare that they stay in float32, as under FSDP."""
    for module in stack.modules():
        if getattr(module, "keep_fp32", False):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(parameter.detach().to(torch.bfloat16)))
    return stack
