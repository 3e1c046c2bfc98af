"""Halves give their master back; roundings by chance are unbiased and know no layout."""

import torch

from torchlinearmoe.kernels.optimizer.definition import Place
from torchlinearmoe.kernels.optimizer.rounding import (
    join_halves,
    random_bits,
    round_by_chance,
    split_halves,
    tensor_key,
)


def test_halves_give_every_master_back_and_the_weight_is_the_nearest():
    generator = torch.Generator().manual_seed(1)
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=generator).to(torch.int32)
    master = bits.view(torch.float32)
    master = torch.cat(
        [master[master.abs() < 3e38], torch.tensor([0.0, -0.0, 1e-45, 1.005859375, torch.inf, -torch.inf])]
    )
    weight, rest = split_halves(master)
    assert weight.dtype == torch.bfloat16 and rest.dtype == torch.int16
    assert torch.equal(join_halves(weight, rest).view(torch.int32), master.view(torch.int32))
    tie = rest == -(2**15)
    assert torch.equal(weight[~tie], master.bfloat16()[~tie])
    assert ((weight.double() - master.double()).abs() <= (master.bfloat16().double() - master.double()).abs())[
        tie
    ].all()


def test_rounding_by_chance_keeps_the_mean_and_only_ever_takes_a_neighbour():
    x = torch.tensor([1.0 + 1 / 512, -3.3, 1e-30, 7.0]).repeat(50_000)
    bits = random_bits(99, torch.tensor(3.0), torch.arange(x.numel()))
    for part in (bits & 0xFFFF, bits >> 16):
        rounded = round_by_chance(x, part).double()
        assert ((rounded - x.double()).abs() < x.double().abs() / 128).all()
        means, expected = rounded.view(-1, 4).mean(0), x[:4].double()
        assert ((means - expected).abs() < expected.abs() * 1e-4).all(), means / expected
    exact = torch.tensor([7.0, -0.5, 0.0]).repeat(100)
    assert torch.equal(
        round_by_chance(exact, random_bits(1, torch.tensor(1.0), torch.arange(300)) >> 16).float(), exact
    )


def test_bits_depend_on_the_name_the_step_and_the_place_alone():
    index = torch.arange(2**32 - 1000, 2**32 + 1000)
    bits = random_bits(tensor_key(0, "a"), torch.tensor(1.0), index)
    assert bits.unique().numel() > 1990 and int(bits.min()) >= 0 and int(bits.max()) < 2**32
    for other in (
        random_bits(tensor_key(0, "b"), torch.tensor(1.0), index),
        random_bits(tensor_key(1, "a"), torch.tensor(1.0), index),
        random_bits(tensor_key(0, "a"), torch.tensor(2.0), index),
    ):
        assert (bits == other).sum() < 5
    for shift in range(0, 32, 8):  # every byte is spread evenly
        counts = torch.bincount((bits >> shift) & 0xFF, minlength=256)
        assert counts.max() < 30


def test_a_part_of_a_tensor_draws_the_bits_of_its_place():
    whole = torch.arange(24).view(4, 6)
    part = Place(base=12, inner=3, stride=6).index(0, 6, torch.device("cpu"))
    assert torch.equal(part, whole[2:4, 0:3].reshape(-1))
    assert torch.equal(Place(5).index(2, 3, torch.device("cpu")), torch.arange(7, 10))
