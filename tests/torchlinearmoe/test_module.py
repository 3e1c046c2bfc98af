"""Traits of modules are said where they are declared: a mistyped one does not pass for one that was left out."""

from __future__ import annotations

import pytest
from torch import nn

from torchlinearmoe.families import FAMILIES
from torchlinearmoe.mixers import MIXERS
from torchlinearmoe.mixers.base import Mixer
from torchlinearmoe.module import PLAIN, Module, traits


def test_traits_are_inherited_and_read_off_the_module():
    class Exact(Module):
        keep_fp32 = True

    class More(Exact):
        no_weight_decay = ("table",)

    assert traits(More()).keep_fp32 and traits(More()).no_weight_decay == ("table",)
    assert traits(nn.Linear(2, 2)) is PLAIN and not PLAIN.keep_fp32


@pytest.mark.parametrize("name, told", [("keep_fp_32", "did you mean 'keep_fp32'? "), ("zzz", "")])
def test_a_mistyped_trait_is_an_error_where_the_class_is_made(name: str, told: str):
    with pytest.raises(TypeError) as error:
        type("Decay", (Module,), {name: True})
    legal = "legal: float8, keep_fp32, no_weight_decay, regions"
    assert str(error.value) == f"Decay.{name}: no trait of that name; {told}{legal}"


def test_a_mistyped_declaration_of_a_mixer_names_the_right_one():
    with pytest.raises(TypeError, match=r"^Wrong.varients: no trait of that name; did you mean 'variants'\? legal: "):
        type("Wrong", (Mixer,), {"varients": ()})


def test_an_annotation_declares_a_new_one_for_classes_below():
    class Wide(Module):
        width: int = 1

    assert type("Wider", (Wide,), {"width": 2})().width == 2


def test_traits_of_a_class_that_has_none_are_an_error():
    class Foreign(nn.Module):
        keep_fp32 = True

    with pytest.raises(TypeError, match="^Foreign.keep_fp32: only a torchlinearmoe.module.Module has traits"):
        traits(Foreign())


def test_all_modules_of_the_library_have_traits():
    assert MIXERS and FAMILIES  # imports the library's modules
    pending, plain = [nn.Module], set()
    while pending:
        for cls in pending.pop().__subclasses__():
            pending.append(cls)
            if cls.__module__.startswith("torchlinearmoe.") and not issubclass(cls, Module):
                plain.add(cls.__name__)
    assert plain - {"Convolutions", "TorchLinearMoEForCausalLM"} == set()
