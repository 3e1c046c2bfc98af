"""Which mixer each layer runs, from `model.layout` or `model.mixers`."""

from __future__ import annotations

from torchlinearmoe.families import FAMILIES
from torchlinearmoe.mixers import MIXERS
from torchlinearmoe.recipe.schema import ModelRecipe

ATTENTION = ("N", "*")
"""Letters of `model.layout` for the family's own softmax attention; `L` is `model.mixer`."""
MAMBA = "mamba2"
"""What `M` is: patterns of Mamba-2 hybrids, such as `MMM*`, mean the same as in Megatron."""
LETTERS = ("L", *ATTENTION, "M")


def layer_mixers(model: ModelRecipe) -> list[str]:
    """One registered mixer name a layer, from `mixers` or `layout`."""
    period = _period(model)
    return [period[i % len(period)] for i in range(model.num_layers)]


def used_mixers(model: ModelRecipe) -> list[str]:
    """The mixers in use, in the order of their first layer."""
    return list(dict.fromkeys(_period(model)[: model.num_layers]))


def used_sections(model: ModelRecipe) -> list[str]:
    """The `[mixer.NAME]` sections that the layers read."""
    names = (name for used in used_mixers(model) for name in MIXERS[used].sections(model.mixer_options[used]))
    return list(dict.fromkeys(names))


def _period(model: ModelRecipe) -> list[str]:
    """The registered names that the layers repeat: aliases resolved, softmax attention in the family's form."""
    attention = FAMILIES[model.family].attention
    letters = {"L": model.mixer, "M": MAMBA, **dict.fromkeys(ATTENTION, attention)}
    names = [MIXERS.canonical(name) for name in model.mixers or (letters[letter] for letter in model.layout)]
    return [attention if name == "softmax_attention" else name for name in names]
