"""How evenly the experts are loaded, in a few figures.

Legend: N MoE layers, E experts.
"""

import torch


def relative_load(expert_load: torch.Tensor) -> torch.Tensor:
    """Load of each expert over the load it would have if all were equal: 1 is balanced, E is "takes everything".

    expert_load: [N, E] tokens (or any share proportional to them) an expert got in a layer. Returns float32 [N, E]
    on the CPU; a layer without any token counts as balanced.
    """
    load_NE = expert_load.detach().to("cpu", torch.float64)
    mean_N1 = load_NE.mean(dim=1, keepdim=True)
    return torch.where(mean_N1 > 0, load_NE / mean_N1.clamp_min(1e-30), 1.0).to(torch.float32)


def load_figures(expert_load: torch.Tensor) -> dict[str, float]:
    """Figures of a metrics line from `expert_load` [N, E] (as for `relative_load`):

    - `expert_load_max`, `expert_load_min`: the highest and the lowest relative load of any expert in any layer.
    - `expert_load_max_mean`: the highest of a layer, averaged over the layers.
    - `expert_load_entropy`: entropy of the load over log E, averaged over the layers; 1 is balanced, 0 one expert.
    - `experts_unused`: experts without a token, all layers together.
    """
    relative_NE = relative_load(expert_load)
    num_experts = relative_NE.shape[1]
    share_NE = relative_NE / num_experts
    entropy_N = torch.special.entr(share_NE).sum(dim=1)
    top_N = relative_NE.amax(dim=1)
    return {
        "expert_load_max": top_N.max().item(),
        "expert_load_min": relative_NE.min().item(),
        "expert_load_max_mean": top_N.mean().item(),
        "expert_load_entropy": (entropy_N / torch.tensor(max(2, num_experts)).log()).mean().item(),
        "experts_unused": int((relative_NE == 0).sum()),
    }
