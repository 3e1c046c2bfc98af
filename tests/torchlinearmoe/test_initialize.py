"""Initial values: the named distributions, drawn block by block, equal in every process."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchlinearmoe import initialize as init
from torchlinearmoe.initialize import (
    ONES,
    ROWS,
    ZEROS,
    Constant,
    Normal,
    Orthogonal,
    Rows,
    Uniform,
    initialize,
    orthogonal,
    set_initializers,
)
from torchlinearmoe.module import Module


class Holder(nn.Module):
    """Parameters by name, each with its distribution."""

    def __init__(self, dtype: torch.dtype = torch.float32, **parts: tuple[tuple[int, ...], init.Initializer]) -> None:
        super().__init__()
        for name, (shape, _) in parts.items():
            self.register_parameter(name, nn.Parameter(torch.full(shape, torch.nan, dtype=dtype)))
        set_initializers(self, **{name: initializer for name, (_, initializer) in parts.items()})


def _values(seed: int = 0, dtype: torch.dtype = torch.float32, **parts: tuple[tuple[int, ...], init.Initializer]):
    holder = Holder(dtype, **parts)
    initialize(holder, seed)
    return {name: parameter.detach() for name, parameter in holder.named_parameters()}


def test_distributions_have_their_moments():
    values = _values(
        n=((2500, 40), Normal(0.3)),
        u=((2500, 40), Uniform(-1.0, 3.0)),
        l=((100000,), Uniform(1e-4, 16.0, torch.log)),
        c=((3, 2), Constant(7.0)),
    )
    n, u, l = values["n"], values["u"], values["l"]
    assert abs(float(n.mean())) < 0.01 and abs(float(n.std()) - 0.3) < 0.005
    assert abs(float((n / 0.3).pow(4).mean()) - 3) < 0.1
    assert abs(float(u.mean()) - 1) < 0.02 and abs(float(u.var()) - 16 / 12) < 0.02
    assert float(u.min()) >= -1 and float(u.max()) < 3
    assert abs(float(l.exp().mean()) - 8) < 0.1 and float(l.max()) < math.log(16) + 1e-6
    assert values["c"].tolist() == [[7.0, 7.0]] * 3


def test_rows_see_global_indices_across_blocks():
    n = ROWS + 3
    values = _values(
        flat=((n,), Rows(lambda rows: rows / n)),
        wide=((n, 2), Rows(lambda rows: rows / n)),
        square=((4, 4), Rows(lambda rows: rows.float())),
        full=((n, 2), Rows(lambda rows: torch.stack([rows, -rows], 1).float())),
    )
    expected = torch.arange(n) / n
    assert torch.equal(values["flat"], expected)
    assert torch.equal(values["wide"], expected[:, None].expand(n, 2))
    assert torch.equal(values["square"], torch.arange(4.0)[:, None].expand(4, 4))
    assert torch.equal(values["full"][:, 1], -torch.arange(n).float())


def test_orthogonal_blocks_have_orthonormal_rows_or_columns_of_the_named_size():
    shapes = {"wide": (30, 100), "square": (64, 64), "tall": (ROWS + 300, 40), "broad": (ROWS + 300, ROWS + 100)}
    parts: dict[str, Any] = {name: (shape, Orthogonal(0.3)) for name, shape in shapes.items()}
    values = _values(**parts)
    blocks = [block for value in values.values() for block in value.split(ROWS)]
    for block in (*blocks, values["tall"]):
        flat = block.double() if block.shape[0] <= block.shape[1] else block.double().T
        few, many = flat.shape
        torch.testing.assert_close(flat @ flat.T, 0.09 * many * torch.eye(few).double(), rtol=0, atol=1e-4)
        assert float(block.square().mean().sqrt()) == pytest.approx(0.3, rel=1e-5)
    upper, lower = values["broad"].split(ROWS)
    products = (upper @ lower.T) / (0.09 * upper.shape[1])
    assert float(products.square().mean()) == pytest.approx(1 / upper.shape[1], rel=0.1), "independent rows"


def test_orthogonal_values_take_every_sign():
    """Signs are the generator's: the products of two draws have no side that they prefer."""
    stack = _values(a=((200, 3, 3), Orthogonal(1.0)))["a"]
    assert stack.mean(0).abs().max() < 0.3
    assert 60 < int((torch.linalg.det(stack) > 0).sum()) < 140
    torch.testing.assert_close(stack @ stack.mT, 3 * torch.eye(3).expand(200, 3, 3), rtol=0, atol=1e-5)


@pytest.mark.parametrize("inputs, outputs", [(48, 48), (20, 48), (48, 20)])
def test_an_orthogonal_layer_has_torchs_size(inputs: int, outputs: int):
    layer = orthogonal(inputs, outputs, 0.1)
    initialize(layer, 0)
    norm = layer.weight.norm()
    torch.testing.assert_close(norm, nn.init.orthogonal_(torch.empty(outputs, inputs), 0.1).norm())


def test_orthogonal_values_do_not_depend_on_the_number_of_threads():
    draws, threads = [], torch.get_num_threads()
    try:
        for number in (1, 2, 4):
            torch.set_num_threads(number)
            draws.append(_values(a=((ROWS, 600), Orthogonal(1.0)))["a"])
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(draws[0], draws[1]) and torch.equal(draws[0], draws[2])


def test_blocks_names_and_seeds_all_draw_different_values():
    shape = (2 * ROWS, 3)
    values = _values(a=(shape, Normal(1.0)), b=(shape, Normal(1.0)), e=((3, ROWS, 3), Normal(1.0)))
    blocks = [*values["a"].split(ROWS), *values["b"].split(ROWS), *values["e"]]
    blocks += [*_values(1, a=(shape, Normal(1.0)))["a"].split(ROWS)]
    for i, x in enumerate(blocks):
        for y in blocks[:i]:
            assert abs(float((x * y).mean())) < 0.1


def test_an_expert_is_a_block_and_so_are_1024_rows_of_anything_else(monkeypatch):
    keys: list[str] = []
    original = init._generator

    def recording(key: str, device: torch.device) -> torch.Generator:
        keys.append(key)
        return original(key, device)

    monkeypatch.setattr(init, "_generator", recording)
    _values(4, e=((3, 2, 2), Normal(1.0)), m=((ROWS + 1, 2), Normal(1.0)), v=((ROWS,), Normal(1.0)))
    assert keys == ["4/e/0", "4/e/1", "4/e/2", "4/m/0", "4/m/1", "4/v/0"]


def test_a_longer_parameter_begins_with_the_same_whole_blocks():
    short = _values(a=((ROWS, 3), Normal(1.0)))["a"]
    long = _values(a=((ROWS + 5, 3), Normal(1.0)))["a"]
    assert torch.equal(short, long[:ROWS])


def test_values_do_not_depend_on_the_parameters_type_or_the_default_type():
    parts = {"a": ((5, 3), Normal(1.0)), "b": ((7,), Uniform(0.0, 1.0)), "c": ((2,), ONES)}
    parts |= {"o": ((5, 3), Orthogonal(1.0))}
    plain, wide = _values(**parts), _values(dtype=torch.float64, **parts)
    torch.set_default_dtype(torch.float64)
    try:
        under_double = _values(**parts)
    finally:
        torch.set_default_dtype(torch.float32)
    for name in parts:
        assert torch.equal(plain[name].double(), wide[name]) and wide[name].dtype == torch.float64
        assert torch.equal(plain[name], under_double[name])


def test_scalars_and_long_vectors_are_drawn_in_full():
    values = _values(s=((), Normal(1.0)), v=((3 * ROWS + 1,), Normal(1.0)), z=((3,), ZEROS))
    assert bool(values["s"].isfinite()) and bool(values["v"].isfinite().all()) and not values["z"].any()


def test_a_shared_parameter_is_drawn_once_under_its_first_name():
    model = nn.Module()
    model.a, model.b = Holder(w=((4, 4), Normal(1.0))), Holder(w=((4, 4), Normal(1.0)))
    model.b.w = model.a.w
    initialize(model, 0)
    alone = nn.Module()
    alone.a = Holder(w=((4, 4), Normal(1.0)))
    initialize(alone, 0)
    assert torch.equal(model.get_parameter("a.w"), alone.get_parameter("a.w"))
    assert model.b.w is model.a.w


def test_a_parameter_without_an_initializer_is_named():
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="^0.weight: no initializer"):
        initialize(model, 0)


def test_buffers_are_reset():
    class Counter(Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.full((2,), 5.0))

        def reset_buffers(self) -> None:
            assert isinstance(self.count, Tensor)
            self.count.zero_()

    model = nn.Sequential(Counter())
    initialize(model, 0)
    assert not next(model.buffers()).any()


def test_buffers_that_nobody_resets_are_an_error():
    class Counter(Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(2))

    with pytest.raises(NotImplementedError, match="^Counter: has buffers and no reset_buffers"):
        initialize(nn.Sequential(Counter()), 0)


def test_a_distribution_of_no_parameter_is_an_error():
    with pytest.raises(ValueError, match="^Linear.wieght: no such parameter; did you mean 'weight'?"):
        set_initializers(nn.Linear(2, 2), wieght=ONES)


SCRIPT = """
import torch
from torchlinearmoe.initialize import Normal, Orthogonal, _generator
torch.manual_seed({noise})
for distribution in (Normal(1.0), Orthogonal(1.0)):
    print(distribution.draw((3, 2), 0, _generator("0/layers.1.weight/2", torch.device("cpu"))).tolist())
"""


def test_every_process_draws_the_same_whatever_its_hash_seed():
    outputs = set()
    for noise, hash_seed in enumerate(("0", "12345")):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-c", SCRIPT.format(noise=noise)]
        outputs.add(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert len(outputs) == 1


def test_the_generators_seed_is_pinned():
    """Changing how names become seeds changes every model: let it be a decision."""
    generator = init._generator("0/embed.weight/0", torch.device("cpu"))
    assert generator.initial_seed() == int.from_bytes(bytes.fromhex(PINNED), "little") >> 1


PINNED = "377bda0e52f9c713"
"""blake2b of "0/embed.weight/0", 8 bytes."""
