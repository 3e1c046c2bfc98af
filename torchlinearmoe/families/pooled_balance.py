"""The balance coefficient of a model whose loss transformers takes over all layers at once.

Here every layer has its own loss, and fractions count assignments; transformers' `load_balancing_loss_func` (Mixtral,
Qwen2-MoE) counts tokens, of which k experts share each, and pools the L layers into one f and one P before they meet:

    ours      c  * sum_l  E * sum_i f_li P_li       f_li = assignments of layer l to expert i / (tokens * k)
    theirs    c' * k * E * sum_i f_i P_i            f_i, P_i = means over the layers of f_li, P_li

so that c = c' * k / L. With it, over the same tokens:

- ours is the mean over the layers of what theirs gives for each layer alone, always, and so are the gradients;
- ours is theirs wherever f_li is the same in every layer, gradients included. Elsewhere the values differ by
  c' * k * E * sum_i cov_l(f_li, P_li), a covariance over layers, and a layer is pushed by its own load where theirs
  pushes it by the load of all layers together: experts that take turns by layer are balanced for theirs alone.

The tokens are those of `moe.balance_scope`, here a sequence or a whole step, there always one forward's batch: the same
for batches of one sequence, and for `balance_scope = "global"` when a step is one batch.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from torchlinearmoe.families.huggingface import Config, Tables

KEY = "router_aux_loss_coef"


def read_pooled_balance(config: Config, tables: Tables) -> None:
    """Turn the table's coefficient, as it was read, into ours."""
    ratio = _ratio(tables)
    theirs = tables["moe"]["balance_coefficient"]
    if ratio is not None and _is_finite(theirs):
        tables["moe"]["balance_coefficient"] = float(Fraction(theirs) * ratio)


def write_pooled_balance(tables: Tables, config: Config) -> None:
    """The same the other way: a number of up to 15 digits that was read comes back as it was.

    Several floats next to each other may be read as one; the shortest of them is the one that somebody wrote.
    """
    ratio = _ratio(tables)
    assert ratio is not None, "a resolved recipe has experts and layers"
    ours = tables["moe"]["balance_coefficient"]
    exact = float(Fraction(ours) / ratio)
    short = float(f"{exact:.15g}")
    config[KEY] = short if float(Fraction(short) * ratio) == ours else exact


def _ratio(tables: Tables) -> Fraction | None:
    """k / L; None for counts that the recipe will refuse."""
    top_k, layers = tables["moe"]["top_k"], tables["model"]["num_layers"]
    if not all(isinstance(count, int) and count > 0 for count in (top_k, layers)):
        return None
    return Fraction(top_k, layers)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")
