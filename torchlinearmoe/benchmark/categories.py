"""What a kernel is for, told by its name, the host-side events around its launch and the label of the code it serves.

matmul       dense and grouped products, the router's too
recurrence   what linear mixers do beside their dense products: gates, convolutions, the scan, its batched products
attention    what softmax mixers do beside their dense products
moe          movement of tokens: top-k, sort, index arithmetic, counts, gather, weighted sum
head         projection to the vocabulary and loss, products included
optimizer    sums of gradients, their norm, clipping, the update
sharding     copies of FSDP, collectives
other        norms, activations, casts, residual sums, embedding, and whatever nothing tells
"""

from __future__ import annotations

import re
from collections.abc import Sequence

CATEGORIES = ("matmul", "recurrence", "attention", "moe", "head", "optimizer", "sharding", "other")
LAYER = "layer"
"""Label of code of a layer that is of no category as a whole: names decide, and what they do not tell is "other"."""

_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "_grouped_mm", "_scaled_mm"}
_BATCHED = {"bmm", "baddbmm"}
_PRODUCT = re.compile(r"nvjet|gemm|gemv|xmma|splitkreduce|triton_tem_.*mm|triton_mm|grouped_mm")
_ATTENTION = re.compile(r"flash|fmha|sdpa|attention|varlen_attn")
_RECURRENCE = re.compile(r"^_?chunk_|fused_recurrent|causal_conv1d|^convolve_|selective_scan")
_MOVEMENT = re.compile(
    r"topk|sort|gather|scatter|index_?select|index_put|indexing|index_elementwise|searchsorted|histogram|bincount"
)
_HEAD = re.compile(r"logsumexp|nll_loss|log_?softmax|cross_?entropy")
_OPTIMIZER = re.compile(r"^_adamw$|^_square_sum$|^_add$|multi_tensor_apply|fused_?adam|_foreach_|lpnorm")
_SHARDING = re.compile(
    r"nccl|gloo:|^c10d::|^fsdp::|allgather|all_gather|reduce_?scatter|split_with_sizes_copy|chunk_cat"
)


def categorise(name: str, around: Sequence[str] = (), label: str | None = None) -> str:
    """A member of CATEGORIES.

    name: of the kernel; around: names of the host-side events that its launch lies in, innermost first; label: a
    category or LAYER, what the code says that the kernel was launched for (in a backward: what its forward said).
    """
    name = name.lower()
    hosts = [host.lower() for host in around]
    innermost = hosts[0].removeprefix("aten::") if hosts else ""
    if any(_SHARDING.search(text) for text in (name, *hosts)):
        return "sharding"
    if label in ("head", "optimizer", "sharding"):
        return label
    if _OPTIMIZER.search(name) or any("accumulategrad" in host or "optimizer.step" in host for host in hosts):
        return "optimizer"
    if _ATTENTION.search(name) and not _PRODUCT.search(name):
        return "attention"
    if innermost in _PRODUCTS or _PRODUCT.search(name):
        return label if innermost in _BATCHED and label in ("recurrence", "attention") else "matmul"
    if label is not None and label != LAYER:
        return label
    if any("embedding" in host for host in hosts):
        return "other"
    for pattern, category in ((_RECURRENCE, "recurrence"), (_HEAD, "head"), (_MOVEMENT, "moe")):
        if pattern.search(name):
            return category
    return "other"
