"""What the other rooms ask of a module, each trait declared and documented here.

Whoever shards, compiles, optimizes or saves a model asks its modules for what they can and need, never for their names.
A class says a trait by an attribute:

    class Decay(Module):
        keep_fp32 = True
        no_weight_decay = ("A_log",)

An attribute of a class that none of its bases declares is an error where the class is made, so that a mistyped trait is
not one that was left out; what is new is declared by an annotation.
"""

from __future__ import annotations

from functools import cached_property
from types import FunctionType
from typing import Any

from torch import nn

from torchlinearmoe.errors import nearest


class Module(nn.Module):
    """A module with traits; these are their defaults.

    Two more are said of modules of any kind: the distributions of their initial values, by
    `initialize.set_initializers`, and the calls of kernels that they make, by a method `kernel_calls`
    (`kernels.choose.CallsKernels`).
    """

    keep_fp32: bool = False
    """Parameters and products stay in float32: decays, routers. FSDP gathers such modules by themselves, the optimizer
    holds no bfloat16 weights of them, and no cast reaches them."""
    no_weight_decay: tuple[str, ...] = ()
    """Parameters of two or more dimensions, by their names in the module, that are not pulled towards zero."""
    float8: tuple[str, ...] = ()
    """Linear layers, by their names in the module, that may compute in float8 (`training.float8`); one that this module
    was built without is passed over. Not what makes decays, choices or numbers of whole heads, nor what is narrow."""
    regions: tuple[str, ...] = ()
    """Methods that are compiled, `name` or `part.name`; units that FSDP gathers by themselves stay outside them."""

    def reset_buffers(self) -> None:
        """Give the module's own buffers their first values. Whoever has buffers says how."""
        if any(True for _ in self.buffers(recurse=False)):
            raise NotImplementedError(f"{type(self).__name__}: has buffers and no reset_buffers")

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        said = (name for name, value in vars(cls).items() if not (name.startswith("_") or _is_code(value)))
        declared = {name for base in cls.__mro__ for name in base.__dict__.get("__annotations__", ())}
        declared |= {name for base in cls.__mro__[1:] for name in vars(base)}
        for name in said:
            if name not in declared:
                raise TypeError(f"{cls.__name__}.{name}: no trait of that name; {nearest(name, _known(cls))}")


PLAIN = Module()
"""What has no traits: the defaults."""


def traits(module: nn.Module) -> Module:
    """The traits of any module; those of torch's own are the defaults.

    Raises TypeError for one that says traits and is no `Module`.
    """
    if isinstance(module, Module):
        return module
    for name in ("keep_fp32", "no_weight_decay", "float8", "regions", "reset_buffers"):
        if hasattr(type(module), name):
            raise TypeError(f"{type(module).__name__}.{name}: only a torchlinearmoe.module.Module has traits")
    return PLAIN


def _known(cls: type[Module]) -> set[str]:
    ours = (base for base in cls.__mro__ if issubclass(base, Module))
    return {name for base in ours for name in base.__dict__.get("__annotations__", ())}


def _is_code(value: Any) -> bool:
    return isinstance(value, (FunctionType, property, cached_property, classmethod, staticmethod))
