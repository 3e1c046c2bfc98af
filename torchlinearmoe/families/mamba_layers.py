"""What published Mamba-2 layers have in common: one projection, one convolution, step sizes without bounds.

in_proj [z; x; B; C; dt], conv1d [x; B; C]      rows, in this order
"""

from __future__ import annotations

from typing import Any

from torchlinearmoe.errors import RecipeError
from torchlinearmoe.families.huggingface import Config, Name, Rows, Tables, of_mixer
from torchlinearmoe.recipe.schema import ModelRecipe

MAMBA = "mamba2"
UNBOUNDED = (0.0, float("inf"))


def widths(model: ModelRecipe) -> dict[str, int]:
    """Rows of each part of the projection."""
    options = model.mixer_options[MAMBA]
    inner, shared = round(model.hidden_size * options.expand), options.groups * options.state
    heads = options.heads or inner // (options.head_dim or 64)
    return {"z": inner, "x": inner, "b": shared, "c": shared, "dt": heads}


def _part(part: str, parts: tuple[str, ...]):
    def rows(model: ModelRecipe) -> Rows:
        found = widths(model)
        return Rows(1, tuple(found[name] for name in parts), parts.index(part))

    return rows


def mamba(theirs: str) -> tuple[Name, ...]:
    """The tensors of a Mamba-2 layer, `theirs` being where it lives."""
    ours, projected, convolved = "layers.{layer}.mixer", ("z", "x", "b", "c", "dt"), ("x", "b", "c")
    return of_mixer(
        MAMBA,
        (
            *(
                Name(f"{ours}.{part}_proj.weight", f"{theirs}.in_proj.weight", rows=_part(part, projected))
                for part in projected
            ),
            *(
                Name(f"{ours}.convs.{part}.weight", f"{theirs}.conv1d.weight", rows=_part(part, convolved), axes=TAPS)
                for part in convolved
            ),
            *(
                Name(f"{ours}.convs.{part}.bias", f"{theirs}.conv1d.bias", rows=_part(part, convolved))
                for part in convolved
            ),
            *(Name(f"{ours}.decay.{name}", f"{theirs}.{name}") for name in ("A_log", "dt_bias", "D")),
            Name(f"{ours}.norm.weight", f"{theirs}.norm.weight"),
            Name(f"{ours}.o_proj.weight", f"{theirs}.out_proj.weight"),
        ),
    )


TAPS = (0, None, 1)
"""[channels, 1, taps]."""


def check_time_steps(config: Config) -> None:
    """Raise RecipeError for bounds of step sizes; transformers writes infinity as `{"__float__": "Infinity"}`."""
    limit = config.get("time_step_limit")
    try:
        found = UNBOUNDED if limit is None else tuple(float(_bare(bound)) for bound in limit)
    except (TypeError, ValueError):
        found = ()
    if found != UNBOUNDED:
        raise RecipeError(f"time_step_limit = {limit!r}: not supported; legal: [0.0, Infinity]")


def _bare(bound: Any) -> Any:
    return bound.get("__float__") if isinstance(bound, dict) else bound


def written_expansion(tables: Tables) -> int:
    """`expand` as published configs have it. Raises RecipeError for a fraction, and for layers without convolutions."""
    expand, conv = (tables[f"mixer.{MAMBA}"][key] for key in ("expand", "conv"))
    if expand != int(expand) or not conv:
        raise RecipeError(f"mixer.{MAMBA}: expand = {expand} and conv = {conv} must be whole and above 0")
    return int(expand)
