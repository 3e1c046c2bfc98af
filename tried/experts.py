"""Experts and head on a GPU: compare with the definition, then time before and after in one process. Run in the root of
the branch `experts`:  PYTHONPATH=. python /path/experts.py [compare parts whole head step]   (default: all but step)
On the CPU: TRITON_INTERPRET=1 PYTHONPATH=. python experts.py --cpu      (the comparing half, small sizes, float16)
`parts` times every tile; a better one than the default belongs into kernels/experts/gated.py (INTO, BACK), or, where
`passes` wins, `takes` should refuse. A short table comes last."""

import os
import sys
import time
from collections import defaultdict
from functools import partial

CPU = "--cpu" in sys.argv
if CPU:
    os.environ["TRITON_INTERPRET"] = "1"
ASKED = [a for a in sys.argv[1:] if not a.startswith("--")] or ["compare", "parts", "whole", "head"]
import torch
import torch.nn.functional as F
import triton
import triton.language as tl


from torchlinearmoe.kernels.cross_entropy import chunk_loss
from torchlinearmoe.kernels.cross_entropy import triton as head
from torchlinearmoe.kernels.dispatch import triton as dispatch
from torchlinearmoe.kernels.experts import gated
from torchlinearmoe.kernels.experts import triton as ours
from torchlinearmoe.kernels.grouped_mm import fused
from torchlinearmoe.kernels.swiglu import triton as gates

DEVICE = "cpu" if CPU else "cuda"
HALF = torch.float16 if CPU else torch.bfloat16
TABLE: list[str] = []
started = time.time()


def say(line: str, keep: bool = True) -> None:
    print(f"[{time.time() - started:5.1f}] {line}", flush=True)
    if keep:
        TABLE.append(line)


def off(x, y) -> float:
    error = float((x.double() - y.double()).norm() / y.double().norm().clamp(min=1e-30))
    return error if error == error else float("inf")


# ---------------------------------------------------------------------------------------------------------- inputs
def draw(tokens, experts, top_k, width, hidden, busy=0, kept=1.0, dtype=HALF):
    g = torch.Generator().manual_seed(tokens + width)
    x = torch.randn(tokens, width, generator=g)
    ids = torch.rand(tokens, busy or experts, generator=g).argsort(-1)[:, :top_k].contiguous()
    weights = torch.rand(tokens, top_k, generator=g)
    keep = None if kept == 1 else torch.rand(tokens, top_k, generator=g) < kept
    gate_up = torch.randn(experts, width, 2 * hidden, generator=g) * width**-0.5
    down = torch.randn(experts, hidden, width, generator=g) * hidden**-0.5
    dy = torch.randn(tokens, width, generator=g)
    move = lambda z: z.to(DEVICE, dtype)
    return move(x), ids.to(DEVICE), weights.to(DEVICE), move(gate_up), move(down), None if keep is None else keep.to(DEVICE), move(dy)


def definition(x, ids, weights, gate_up, down, keep, dy):
    """Expert after expert in float64."""
    x, weights, gate_up, down, dy = (z.double().requires_grad_() for z in (x, weights, gate_up, down, dy))
    y = torch.zeros_like(x)
    for e in range(gate_up.shape[0]):
        chosen = (ids == e) if keep is None else (ids == e) & keep
        t, j = chosen.nonzero(as_tuple=True)
        g, u = (x[t] @ gate_up[e]).chunk(2, -1)
        y = y.index_add(0, t, (F.silu(g) * u) @ down[e] * weights[t, j].unsqueeze(1))
    return [y, *torch.autograd.grad(y, (x, weights, gate_up, down), dy.detach())]


def run(x, ids, weights, gate_up, down, keep, dy, products="grouped_mm"):
    inputs = [z.detach().requires_grad_() for z in (x, weights, gate_up, down)]
    y = ours.whole(inputs[0], ids, *inputs[1:], keep, products)[0]
    return [y, *torch.autograd.grad(y, inputs, dy)]


def without(function):
    """Call with products and gates one by one."""
    real = gated.takes
    gated.takes = lambda x, hidden: False
    try:
        return function()
    finally:
        gated.takes = real


NAMES = ("y", "dx", "dweights", "dgate_up", "ddown")
if CPU:
    CASES = [(37, 5, 2, 64, 64), (41, 6, 3, 128, 192, 4, 0.6), (140, 2, 1, 64, 128)]
else:
    CASES = [(1031, 64, 8, 1024, 896), (1031, 64, 8, 1024, 896, 0, 0.7), (515, 160, 6, 2048, 1408), (300, 5, 2, 64, 192, 0, 0.6),
             (4096, 8, 2, 1024, 896, 3), (1, 8, 2, 128, 64), (700, 4, 4, 512, 1280, 0, 0.0)]


def compare():
    worst = 0.0
    for case in CASES:
        inputs = draw(*case)
        assert gated.takes(inputs[0], case[4]) or CPU, "not taken: is this no Hopper?"
        expected, found = definition(*inputs), run(*inputs)
        errors = [off(a, b) if float(b.abs().max()) > 0 else float(a.abs().max()) for a, b in zip(found, expected)]
        before = without(lambda: run(*inputs))
        old = [off(a, b) if float(b.abs().max()) > 0 else float(a.abs().max()) for a, b in zip(before, expected)]
        same = all(torch.equal(a, b) for a, b in zip(found, run(*inputs)))
        worst = max(worst, *errors)
        print(case, "now", *(f"{n} {e:.1e}" for n, e in zip(NAMES, errors)), "| passes", *(f"{e:.1e}" for e in old), "| same bits twice:", same, flush=True)
        assert same and max(errors) < 1e-2, "WRONG"
    say(f"compare: {len(CASES)} cases, worst {worst:.1e} (passes: see above), bits equal twice")


# ---------------------------------------------------------------------------------------------------------- clocks
def wall(function, steps=10, warm=3):
    for _ in range(warm):
        function()
    torch.cuda.synchronize()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    marks[0].record()
    for mark in marks[1:]:
        function()
        mark.record()
    torch.cuda.synchronize()
    return sorted(a.elapsed_time(b) for a, b in zip(marks, marks[1:]))[steps // 2]


def kernels(function, steps=5):
    """ms a call by name, and what lies between them: {name: ms}, gaps ms, [(gap us, after, before)], launches."""
    function()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]) as prof:
        for _ in range(steps):
            function()
        torch.cuda.synchronize()
    labels = ("Torch-Compiled", "CompiledFunction", "## Call", "ProfilerStep", "Optimizer.", "nccl:", "autograd::")  # of the host, drawn over kernels
    found = [
        e for e in prof.profiler.kineto_results.events()
        if "CUDA" in str(e.device_type()) and e.duration_ns() > 0 and not e.name().startswith(labels)
        and not (hasattr(e, "activity_type") and "annotation" in str(e.activity_type()))
        and not (hasattr(e, "is_user_annotation") and e.is_user_annotation())
    ]
    found = sorted((e.start_ns(), e.start_ns() + e.duration_ns(), e.name()) for e in found)
    sums, gaps, end = defaultdict(float), [], None
    for begin, until, name in found:
        sums[name] += (until - begin) / 1e6 / steps
        if end is not None and begin > end[0]:
            gaps.append(((begin - end[0]) / 1e3, end[1], name))
        end = (until, name) if end is None or until > end[0] else end
    return sums, sum(g for g, *_ in gaps) / 1e3 / steps, sorted(gaps, reverse=True), len(found) / steps


def group(name):
    n = name.lower()
    for key, parts in {"products": ("cutlass", "grouped_mm", "gemm", "nvjet"), "gates": ("swiglu",), "rows": ("gather", "scatter", "spread"), "sort": ("sort",)}.items():
        if any(p in n for p in parts):
            return key
    return "rest"


# ---------------------------------------------------------------------------------------------------------- parts
@triton.jit(do_not_specialize=["R"])
def gather_rows(x, order, y, R, D, stride, K: tl.constexpr, ROWS: tl.constexpr, B: tl.constexpr):
    """As before: row by row."""
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * B + tl.arange(0, B)
    inside = rows < R
    token = tl.load(order + rows, mask=inside, other=0) // K
    mask = inside[:, None] & (columns < D)[None, :]
    values = tl.load(x + token[:, None] * stride + columns[None, :], mask=mask)
    tl.store(y + rows.to(tl.int64)[:, None] * D + columns[None, :], values, mask=mask)


@triton.jit
def gathered_weight(
    x, order, dy, offsets, dw, M, N, stride, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):
    """A trial, in no product yet: dw[e] = x[order // K of its rows]^T dy[its rows]; dy: [R, N], dw: [E, M, N], contiguous; BM, BN divide M, N."""
    across = N // BN
    tiles = M // BM * across
    expert, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    end = tl.load(offsets + expert)
    start = tl.load(offsets + expert - 1, mask=expert > 0, other=0)
    rows = tile // across * BM + tl.arange(0, BM)
    columns = tile % across * BN + tl.arange(0, BN)
    total = tl.zeros([BM, BN], tl.float32)
    for first in range(start, end, BK):
        r = first + tl.arange(0, BK)
        inside = r < end
        token = tl.load(order + r, mask=inside, other=0) // K
        a = tl.load(x + token[:, None] * stride + rows[None, :], mask=inside[:, None], other=0.0)
        b = tl.load(dy + r.to(tl.int64)[:, None] * N + columns[None, :], mask=inside[:, None], other=0.0)
        total = tl.dot(tl.trans(a), b, total)
    places = dw + expert.to(tl.int64) * M * N + rows[:, None] * N + columns[None, :]
    tl.store(places, total.to(dw.dtype.element_ty))


def gather_before(x, order, k):
    R, D = order.shape[0], x.shape[1]
    y, B = x.new_empty(R, D), min(1024, D)
    gather_rows[(-(-R // (2048 // B)), -(-D // B))](x, order, y, R, D, x.stride(0), K=k, ROWS=2048 // B, B=B, num_warps=4)
    return y


SHAPE = (16384, 64, 8, 1024, 896)
T_ = gated.Tile
INTO = [gated.INTO, T_(128, 128, 64, 8, 3), T_(128, 64, 64, 8, 3, 128), T_(128, 64, 64, 4, 3), T_(256, 64, 64, 8, 3), T_(128, 128, 128, 8, 2)]
BACK = [gated.BACK, T_(128, 128, 64, 8, 4), T_(128, 128, 64, 8, 3), T_(256, 128, 64, 16, 3), T_(128, 64, 64, 4, 4), T_(128, 128, 128, 8, 3)]


def parts():
    x, ids, weights, gate_up, down, _, dy = draw(*SHAPE)
    T, E, k, D, Fh = SHAPE
    R = T * k
    order, inverse, _, offsets = dispatch.sorted_rows(ids, E, None)
    say(f"gather row by row {wall(lambda: gather_before(x, order, k)):.3f} ms, token by token {wall(lambda: dispatch.spread_tokens(x, inverse)):.3f}")
    assert torch.equal(gather_before(x, order, k), dispatch.spread_tokens(x, inverse))
    rows, drows = dispatch.spread_tokens(x, inverse), dispatch.spread_tokens(dy, inverse)
    gu = fused.product(rows, gate_up, offsets)
    h = gates.forward(gu, weights, order)
    dh = fused.product(drows, down.transpose(1, 2), offsets)
    dgu, again, dw = gates.backward(gu, weights, order, dh, None, again=True)
    flops = 2.0 * R * D * Fh
    for name, n, f in (
        ("x gate_up", 2, lambda: fused.product(rows, gate_up, offsets)), ("h down", 1, lambda: fused.product(h, down, offsets)),
        ("dy down^T", 1, lambda: fused.product(drows, down.transpose(1, 2), offsets)), ("h^T dy", 1, lambda: fused.weight_product(h, drows, offsets)),
        ("x^T dgate_up", 2, lambda: fused.weight_product(rows, dgu, offsets)), ("dgate_up gate_up^T", 2, lambda: fused.product(dgu, gate_up.transpose(1, 2), offsets)),
    ):
        ms = wall(f)
        print(f"    F.grouped_mm {name}: {ms:.3f} ms {n * flops / ms / 1e9:.0f} TFLOP/s", flush=True)
    print(f"    gates forward {wall(lambda: gates.forward(gu, weights, order)):.3f}, backward {wall(lambda: gates.backward(gu, weights, order, dh, None, again=True)):.3f}, sum {wall(lambda: dispatch.gather_sum(rows, None, inverse)):.3f}, sort {wall(lambda: dispatch.sorted_rows(ids, E, None)):.3f}, tiles {wall(lambda: gated._tiles(offsets, R, 128)):.3f}", flush=True)
    passes = wall(lambda: gates.forward(fused.product(dispatch.spread_tokens(x, inverse), gate_up, offsets), weights, order))
    say(f"into gates: passes {passes:.3f} ms")
    default = gated.INTO
    for tile in INTO:
        gated.INTO = tile
        try:
            found = gated.into_gates(x, order, weights, gate_up, offsets)
            errors = [off(a, b) for a, b in zip(found, (gu, h))]
            ms = wall(lambda: gated.into_gates(x, order, weights, gate_up, offsets))
            say(f"    {tuple(tile)} {ms:.3f} ms, {2 * flops / ms / 1e9:.0f} TFLOP/s, off {max(errors):.1e}")
        except Exception as e:
            say(f"    {tuple(tile)} {type(e).__name__} {str(e)[:80]}")
    gated.INTO = default
    passes = wall(lambda: gates.backward(gu, weights, order, fused.product(drows, down.transpose(1, 2), offsets), None, again=True))
    say(f"back through gates: passes {passes:.3f} ms")
    default = gated.BACK
    for tile in BACK:
        gated.BACK = tile
        try:
            found = gated.back_through_gates(dy, order, weights, down, offsets, gu, False)
            errors = [off(a, b) for a, b in zip(found, (dgu, again, dw))]
            ms = wall(lambda: gated.back_through_gates(dy, order, weights, down, offsets, gu, False))
            say(f"    {tuple(tile)} {ms:.3f} ms, {flops / ms / 1e9:.0f} TFLOP/s, off {max(errors):.1e}")
        except Exception as e:
            say(f"    {tuple(tile)} {type(e).__name__} {str(e)[:80]}")
    gated.BACK = default


    expected = fused.weight_product(rows, dgu, offsets)
    passes = wall(lambda: fused.weight_product(dispatch.spread_tokens(x, inverse), dgu, offsets))
    say(f"x^T dgate_up with its gather: passes {passes:.3f} ms")
    dw = torch.empty_like(expected)
    for bm, bn, warps, stages in ((128, 256, 8, 3), (128, 256, 8, 4), (256, 128, 8, 4), (128, 128, 4, 3)):
        if D % bm or 2 * Fh % bn:
            continue
        way = lambda: gathered_weight[(E * (D // bm) * (2 * Fh // bn),)](x, order, dgu, offsets, dw, D, 2 * Fh, x.stride(0), K=k, BM=bm, BN=bn, BK=64, num_warps=warps, num_stages=stages)
        try:
            way()
            ms = wall(way)
            say(f"    trial {(bm, bn, 64, warps, stages)} {ms:.3f} ms, {2 * flops / ms / 1e9:.0f} TFLOP/s, off {off(dw, expected):.1e}")
        except Exception as e:
            say(f"    trial {(bm, bn, 64, warps, stages)} {type(e).__name__} {str(e)[:80]}")


# ---------------------------------------------------------------------------------------------------------- whole
def whole():
    from torchlinearmoe.benchmark.moe import indexed_experts

    x, ids, weights, gate_up, down, _, dy = draw(*SHAPE)
    T, E, k, D, Fh = SHAPE
    flops = 18.0 * T * k * D * Fh
    leaves = [z.requires_grad_() for z in (x, weights, gate_up, down)]

    def step(function):
        return torch.autograd.grad(function(), leaves, dy)

    now = partial(step, lambda: ours.whole(x, ids, weights, gate_up, down, None, "grouped_mm")[0])
    compiled = torch.compile(indexed_experts)
    ways = {"torch compiled": partial(step, lambda: compiled(x, ids, weights, gate_up, down)), "triton, passes": partial(without, now), "triton, gates inside": now}
    for name, way in ways.items():
        ms = wall(way, steps=20, warm=5)
        sums, gaps, _, launches = kernels(way)
        by = defaultdict(float)
        for kernel, t in sums.items():
            by[group(kernel)] += t
        say(f"experts, {name}: wall {ms:.2f} ms = {flops / ms / 1e9:.0f} TFLOP/s, kernels {sum(sums.values()):.2f}, gaps {gaps:.2f}, {launches:.0f} launches; "
            + ", ".join(f"{key} {t:.2f}" for key, t in sorted(by.items(), key=lambda kv: -kv[1])))
        if name != "torch compiled":
            for kernel, t in sorted(sums.items(), key=lambda kv: -kv[1])[:14]:
                print(f"        {t:.3f} {kernel[:110]}", flush=True)


# ---------------------------------------------------------------------------------------------------------- head
def the_head():
    T, D, V = 16384, 1024, 151936
    torch.manual_seed(0)
    hidden = torch.randn(T, D, device=DEVICE).to(HALF).requires_grad_()
    weight = (torch.randn(V, D, device=DEVICE) * D**-0.5).to(HALF).requires_grad_()
    labels = torch.randint(0, V, (T,), device=DEVICE)
    logits = (hidden[:256] @ weight.t()).detach()
    loss, gradient = chunk_loss(logits.double(), labels[:256])
    one = torch.ones((), device=DEVICE)
    way = lambda: torch.autograd.grad(head.loss(hidden, weight, labels, chunk_loss), (hidden, weight), one)
    saved = head.STAGES, head.LANES, head.CHUNK_BYTES
    for stages, lanes, mebi in ((1, 4096, 640), (2, 4096, 640), (3, 2048, 640), (2, 2048, 640), (1, 4096, 1280)):
        head.STAGES, head.LANES, head.CHUNK_BYTES = stages, lanes, mebi * 2**20
        losses, there = head.chunk_losses(logits.clone(), labels[:256])
        errors = off(losses.sum(), loss), off(there, gradient)
        ms = wall(way, steps=8, warm=2)
        sums, gaps, list_of_gaps, launches = kernels(way, steps=4)
        rows = sum(t for n, t in sums.items() if "cross_entropy" in n)
        products = sum(t for n, t in sums.items() if group(n) == "products")
        say(f"head, {stages} stages of {lanes} lanes, {mebi} MiB: wall {ms:.2f} ms, kernels {sum(sums.values()):.2f} (products {products:.2f}, rows {rows:.2f}), gaps {gaps:.2f}, {launches:.0f} launches, off {max(errors):.1e}")
        if (stages, mebi) == (1, 640):
            for us, after, before in list_of_gaps[:8]:
                print(f"        gap {us:.0f} us after {after[:60]} before {before[:60]}", flush=True)
            for kernel, t in sorted(sums.items(), key=lambda kv: -kv[1])[:8]:
                print(f"        {t:.3f} {kernel[:110]}", flush=True)
            a = wall(way, steps=8, warm=0)
            b = wall(lambda: (way(), torch.cuda.synchronize()), steps=8, warm=0)
            print(f"        again {a:.2f}, waiting after each {b:.2f}: clocks or the host?", flush=True)
    head.STAGES, head.LANES, head.CHUNK_BYTES = saved


# ---------------------------------------------------------------------------------------------------------- step
def step():
    """Launches of a step of N, A0.3B, 8x2048: compiles the model first."""
    import json
    import tempfile

    from torchlinearmoe.benchmark.train_ours import synthetic_batch
    from torchlinearmoe.parallel.mesh import resolve_degrees, tokens_per_step
    from torchlinearmoe.recipe import load_recipe
    from torchlinearmoe.run_folder import with_tokens_per_step
    from torchlinearmoe.runtime import choose_device, process_group

    with tempfile.TemporaryDirectory() as folder:
        recipe = load_recipe("recipes/qwen2_hgrn2.toml", ["model.layout=N", "training.steps=20", "training.sequence_length=2048", "training.micro_batch_size=8",
            "training.tokens_per_step=16384", f"training.output_dir={json.dumps(folder)}", "checkpoint.resume=never", "metrics.tensorboard=false"])
        degrees = resolve_degrees(recipe.parallel, 1)
        recipe = with_tokens_per_step(recipe, tokens_per_step(recipe.training, degrees))
        device = choose_device(recipe.training)
        with process_group(device):
            from torchlinearmoe.trainer import Trainer

            trainer = Trainer(recipe, degrees, device)
            batch = synthetic_batch(recipe.model.vocab_size, 8, 2048).pin_memory()
            way = lambda: trainer.train_step([batch])
            ms = wall(way, steps=6, warm=4)
            sums, gaps, _, launches = kernels(way, steps=3)
            say(f"N 8x2048: {ms:.1f} ms = {16384 / ms:.1f}K tok/s, kernels {sum(sums.values()):.1f}, gaps {gaps:.1f}, {launches:.0f} launches")
            for kernel, t in sorted(sums.items(), key=lambda kv: -kv[1])[:40]:
                print(f"        {t:.3f} {kernel[:110]}", flush=True)


if __name__ == "__main__":
    if CPU:
        gated.takes = lambda x, hidden: True
        compare()
    else:
        print(torch.__version__, triton.__version__, torch.cuda.get_device_name(), flush=True)
        for name, function in {"compare": compare, "parts": parts, "whole": whole, "head": the_head, "step": step}.items():
            if name in ASKED:
                try:
                    function()
                except Exception as e:
                    import traceback

                    traceback.print_exc()
                    say(f"{name} FAILED: {type(e).__name__} {str(e)[:200]}")
    print("=" * 100, *TABLE, sep="\n")
