"""A linear mixer in three steps, between which others can put something (`mom.py` does).

    parts = prepare(project(x))     what a token reads with and writes by
    o, state = read(parts)          convolutions, features, the recurrence
    y = output(o, other reads)      norm, gate, output projection

A subclass names its linear layers in `reads` and `writes`, keeps its short convolutions in `convs` under the names of
the parts, and says the three steps; nothing in them may know how many rows a token has.

Shapes: T tokens, D width, H heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from torchlinearmoe.layers.convolution import Convolutions
from torchlinearmoe.layers.past import After, Past
from torchlinearmoe.mixers.base import Context, Mixer, O

Parts = dict[str, Any]
"""What the tokens read with and write by: tensors [T, ...] by name, and the tables and bounds that go with them."""
Layers = Mapping[str, tuple[str, ...]]
"""Parts by name, and the linear layers of the mixer that make each of the input, in order."""


class LinearMixer(Mixer[O]):
    """See the module's docstring."""

    regions = ("project", "mix")
    reads: Layers
    """What a token reads with: the query `q` first, then what `output` takes beside the read."""
    writes: Layers
    """What a token writes by."""
    convs: Convolutions

    def project(self, x_TD: Tensor) -> Parts:
        """Every part as its layers leave it, [T, ...] each."""
        return self.apply_layers(self.reads, x_TD) | self.apply_layers(self.writes, x_TD)

    def apply_layers(self, layers: Layers, x_TD: Tensor) -> Parts:
        """The parts that `layers` make of x."""
        parts = {}
        for part, names in layers.items():
            parts[part] = x_TD
            for name in names:
                parts[part] = self.get_submodule(name)(parts[part])
        return parts

    def prepare(self, parts: Parts, context: Context) -> Parts:
        """What `read` takes of the projected parts: some have passed fp32 units, tables and bounds have joined them."""
        return parts

    def read(self, parts: Parts, past: Past) -> tuple[Tensor, After]:
        """What the prepared parts read, [T, H, ...], and every part of the state that comes out; head counts are taken
        from the shapes."""
        raise NotImplementedError

    def output(self, o: Tensor, *reads: Tensor) -> Tensor:
        """What was read [T, H, ...], and the parts in `reads` after the query -> [T, D]."""
        raise NotImplementedError

    def mix(self, parts: Parts, past: Past) -> tuple[Tensor, After]:
        """From the prepared parts to the output, [T, D]."""
        _, *others = self.reads
        o, after = self.read(parts, past)
        return self.output(o, *(parts[name] for name in others)), after

    def run(self, x_TD: Tensor, context: Context, past: Past) -> tuple[Tensor, After]:
        return self.region("mix", past)(self.prepare(self.project(x_TD), context), past)
