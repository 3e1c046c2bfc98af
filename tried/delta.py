"""Delta rules and DPLR on one GPU: compare with the fp32 definition, then time. PYTHONPATH must hold the repository root.

    python delta.py [--compare-only | --time-only] [--tokens 131072] [--no-variants]

1. compiles all configurations, a process a case beside each other (they are only compiled if the cache is cold);
2. compares bf16 with the definition, and two runs bit for bit;
3. times forward + backward by torch.profiler's kernel sums, top 12 kernels; then variants of the constants;
4. prints a short table.
On a CPU (`TRITON_INTERPRET=1 python delta.py --compare-only --small`) the comparing half runs interpreted, in float32.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

from torchlinearmoe.kernels.delta.definition import delta_rule as delta_definition
from torchlinearmoe.kernels.delta.triton import delta_rule
from torchlinearmoe.kernels.dplr.definition import dplr_rule as dplr_definition
from torchlinearmoe.kernels.dplr.triton import dplr_rule
from torchlinearmoe.segments import Segments

RWKV7 = -math.exp(-0.5)
LENGTHS = (1, 63, 64, 65, 0, 130, 7, 1100, 2, 500)
SMALL = (1, 65, 0, 70)
SHAPES = [(33, 17), (24, 40), (128, 128), (256, 200)]
CASES = [(kind, K, V) for K, V in SHAPES for kind in ("plain", "gated", "grouped", "channels", "grouped_channels")]
CASES += [(kind, K, V) for K, V in ((64, 64), (128, 128), (40, 72)) for kind in ("dplr", "dplr_bound")]
TIMED = [("plain", 8, 128), ("gated", 8, 128), ("channels", 8, 128), ("dplr_bound", 8, 128), ("dplr_bound", 16, 64)]
VARIANTS = [
    ("delta", {"COLUMNS": 64, "WALK_WARPS": 4, "WALK_STAGES": 2}, ("plain", "gated")),
    ("delta", {"COLUMNS": 128, "WALK_WARPS": 8, "WALK_STAGES": 2}, ("plain", "gated")),
    ("delta", {"LONGEST": 32}, ("plain", "gated")),
    ("delta", {"PAIR_WARPS": 8}, ("plain", "gated")),
    ("delta", {"PREPARE_WARPS": 4}, ("plain", "gated")),
    ("delta", {"GRADIENT_COLUMNS": 128, "GRADIENT_WARPS": 8}, ("plain", "gated")),
    ("delta", {"CHANNEL_REGISTERS": None}, ("channels",)),
    ("dplr", {"GRADIENT_REGISTERS": None}, ("dplr_bound",)),
]
TOLERANCE = {"d_log_decay": 3e-2}
"""All others: 1.5e-2."""


def case(kind, K, V, lengths, device, dtype, H=2, mixed=False):
    """Inputs of narrow numbers, as float32, on the CPU's generator."""
    T, HV = sum(lengths), H * 2 if "grouped" in kind else H
    low = lambda x: x.to(dtype).float()  # noqa: E731
    q, k, v = torch.randn(T, H, K), F.normalize(torch.randn(T, H, K), dim=-1), torch.randn(T, HV, V)
    x = {"q": low(F.normalize(q, dim=-1)), "k": low(k), "v": low(v)}
    shape = (T, HV, K) if "channels" in kind or "dplr" in kind else (T, HV)
    decay = F.logsigmoid(torch.randn(shape) + 3)
    if kind == "dplr_bound":
        decay = RWKV7 * torch.rand(shape)
    elif mixed:
        sizes = torch.tensor([0.0, -1e-6, -1e-3, -0.1, -1.0, -20.0, -1e4, -torch.inf])
        decay = sizes[torch.multinomial(torch.tensor([8.0, 8, 8, 4, 2, 1, 1, 1]), decay.numel(), True)].view(shape)
    if "dplr" in kind:
        removal = F.normalize(torch.randn(T, H, K), dim=-1)
        x |= {"a": low(-removal), "b": low(removal * torch.rand(T, H, K)), "log_decay": decay}
    else:
        x["beta"] = 2 * torch.rand(T, HV)
        if kind != "plain":
            x["log_decay"] = decay
    x["initial_state"] = torch.randn(len(lengths), HV, K, V)
    return {name: y.to(device) for name, y in x.items()}


WIDE = ("beta", "log_decay", "initial_state")


def outputs(kind, x, segments, definition):
    scale = x["q"].shape[2] ** -0.5
    if "dplr" in kind:
        bound = RWKV7 - 1e-6 if kind == "dplr_bound" else None
        a = (*(x[n] for n in ("q", "k", "v", "a", "b", "log_decay")), bound, scale, segments, x["initial_state"], True)
        return (dplr_definition if definition else dplr_rule)(*a)
    a = (x["q"], x["k"], x["v"], x["beta"], x.get("log_decay"), scale, segments, x["initial_state"], True)
    return (delta_definition if definition else delta_rule)(*a)


def run(kind, x, segments, dtype, definition, weights):
    leaves = {n: (y if n in WIDE or definition else y.to(dtype)).clone().requires_grad_() for n, y in x.items()}
    o, final = outputs(kind, leaves, segments, definition)
    ((o.float() * weights[0]).sum() + (final.float() * weights[1]).sum()).backward()
    found = {"o": o.detach(), "final": final.detach()}
    return found | {f"d_{n}": y.grad for n, y in leaves.items()}


def compare(kind, K, V, lengths, device, dtype, mixed=False):
    """Errors by name, and whether two runs are equal."""
    torch.manual_seed(K + V + len(kind))
    x = case(kind, K, V, lengths, device, dtype, mixed=mixed)
    segments = Segments.of_lengths(lengths, device)
    HV = x["initial_state"].shape[1]
    weights = torch.randn(sum(lengths), HV, V).to(dtype).float().to(device), torch.randn(len(lengths), HV, K, V).to(device)
    first, second = (run(kind, x, segments, dtype, False, weights) for _ in range(2))
    expected = run(kind, x, segments, dtype, True, weights)
    errors = {}
    for n, e in expected.items():
        e, f = e.float(), first[n].float()
        errors[n] = float((f - e).norm() / e.norm().clamp(min=1e-6)) if bool(f.isfinite().all()) else math.inf
    return errors, all(torch.equal(first[n], second[n]) for n in first)


def show(kind, K, V, errors, same, seconds, bad):
    worst = max((e / TOLERANCE.get(n, 1.5e-2), n) for n, e in errors.items())
    wrong = worst[0] > 1 or not same
    bad += [f"{kind} {K} {V} {errors}"] * wrong
    print(f"{'WRONG' if wrong else 'ok':5s} {kind:17s} {K:3d} {V:3d} worst {worst[1]} {errors[worst[1]]:.1e} of all "
          f"{max(errors.values()):.1e} same bits {same} {seconds:.1f} s", flush=True)


def timed_inputs(kind, heads, width, tokens):
    low = lambda *s: torch.randn(*s, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    unit = lambda: F.normalize(torch.randn(tokens, heads, width, device="cuda"), dim=-1).bfloat16()  # noqa: E731
    shape = (tokens, heads, width)
    x = {"q": unit(), "k": unit(), "v": low(*shape)}
    if "dplr" in kind:
        removal = unit()
        x |= {"a": -removal, "b": removal * torch.rand_like(removal)}
        x["log_decay"] = RWKV7 * torch.sigmoid(torch.randn(shape, device="cuda"))
    else:
        x["beta"] = torch.rand(tokens, heads, device="cuda")
        if kind != "plain":
            x["log_decay"] = F.logsigmoid(torch.randn(shape if kind == "channels" else shape[:2], device="cuda") + 3)
    return {n: y.requires_grad_() for n, y in x.items()}


def measure(kind, heads, width, tokens, top=12, repeats=3):
    """Milliseconds of forward + backward by kernel sums, GiB kept and at most, and prints the kernels."""
    x = timed_inputs(kind, heads, width, tokens)
    segments = Segments.of_lengths((tokens,), "cuda")
    leaves = list(x.values())
    if "dplr" in kind:
        call = lambda: dplr_rule(*leaves, RWKV7 - 1e-6, width**-0.5, segments, None, False)[0]  # noqa: E731
    else:
        g = x.get("log_decay")
        call = lambda: delta_rule(*leaves[:4], g, width**-0.5, segments, None, False)[0]  # noqa: E731
    d = torch.randn(tokens, heads, width, device="cuda", dtype=torch.bfloat16)
    before = torch.cuda.memory_allocated()

    def both():
        for y in leaves:
            y.grad = None
        o = call()
        o.backward(d)

    both()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(repeats):
            both()
        torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    rows = [(e.self_device_time_total / 1e3 / repeats, e.count // repeats, e.key) for e in profile.key_averages()]
    rows = sorted((r for r in rows if r[0] > 0), reverse=True)
    total = sum(r[0] for r in rows)
    if top:
        print(f"\n{kind} 1x{tokens} {heads}x{width}: {total:.2f} ms, peak {peak / 2**30:.2f} GiB above the inputs")
        for ms, count, name in rows[:top]:
            print(f"  {ms:7.3f} ms {count:3d}x  {name[:90]}")
    sys.stdout.flush()
    return total


def module(name):
    return importlib.import_module(f"torchlinearmoe.kernels.{name}.rule")


class Changed:
    def __init__(self, name, constants):
        self.module, self.constants = module(name), constants

    def __enter__(self):
        self.before = {n: getattr(self.module, n) for n in self.constants}
        for n, v in self.constants.items():
            setattr(self.module, n, v)

    def __exit__(self, *_):
        for n, v in self.before.items():
            setattr(self.module, n, v)


def warm(job: str, tokens: int) -> None:
    """In a process of its own: compile what a case or a timing needs."""
    what, index = job.split(":")
    if what == "case":
        kind, K, V = CASES[int(index)]
        torch.manual_seed(0)
        x = case(kind, K, V, LENGTHS, "cuda", torch.bfloat16)
        segments = Segments.of_lengths(LENGTHS, "cuda")
        HV = x["initial_state"].shape[1]
        weights = torch.ones(sum(LENGTHS), HV, V, device="cuda"), torch.ones(len(LENGTHS), HV, K, V, device="cuda")
        run(kind, x, segments, torch.bfloat16, False, weights)
    elif what == "time":
        measure(*TIMED[int(index)], tokens, top=0, repeats=1)
    else:
        name, constants, kinds = VARIANTS[int(index)]
        with Changed(name, constants):
            for t in TIMED:
                if t[0] in kinds:
                    measure(*t, tokens, top=0, repeats=1)


def warm_all(jobs, processes, tokens):
    started, running, failed = time.time(), [], []
    jobs = list(jobs)
    while jobs or running:
        while jobs and len(running) < processes:
            command = [sys.executable, __file__, "--warm", jobs[0], "--tokens", str(tokens)]
            running.append((jobs.pop(0), subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)))
        for job in list(running):
            if job[1].poll() is not None:
                running.remove(job)
                if job[1].returncode:
                    failed.append(job[0])
                    print(f"FAILED to run {job[0]}: {job[1].stdout.read().decode()[-1500:]}", flush=True)
        time.sleep(0.2)
    print(f"compiled in {time.time() - started:.0f} s, failed: {failed}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    for flag in ("--compare-only", "--time-only", "--small", "--no-variants", "--compile-only", "--compiled"):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--processes", type=int, default=min(14, os.cpu_count() or 1))
    parser.add_argument("--warm")
    o = parser.parse_args()
    if o.warm:
        return warm(o.warm, o.tokens)
    gpu = torch.cuda.is_available()
    if gpu:
        import triton

        print(torch.cuda.get_device_name(), torch.__version__, triton.__version__, flush=True)
        jobs = [f"case:{i}" for i in range(len(CASES))] * (not o.time_only)
        # Timing wants memory: the shape of few tokens compiles the same kernels where stretches are as many.
        small = 64 * 1100
        jobs += [f"time:{i}" for i in range(len(TIMED))] * (not o.compare_only)
        jobs += [f"variant:{i}" for i in range(len(VARIANTS))] * (not o.compare_only and not o.no_variants)
        if not o.compiled:
            warm_all(jobs, o.processes, small)
        if o.compile_only:
            return
    bad, table = [], []
    if not o.time_only:
        device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
        lengths = SMALL if o.small else LENGTHS
        cases = [c for c in CASES if c[1] in (24, 40)] if o.small else CASES
        for kind, K, V in cases:
            started = time.time()
            errors, same = compare(kind, K, V, lengths, device, dtype)
            show(kind, K, V, errors, same, time.time() - started, bad)
        for kind, K, V in [("gated", 24, 40)] if o.small else [("gated", 128, 128), ("channels", 128, 128), ("dplr", 64, 64)]:
            started = time.time()
            errors, same = compare(kind, K, V, lengths, device, dtype, mixed=True)
            show(kind + " mixed", K, V, errors, same, time.time() - started, bad)
    if gpu and not o.compare_only:
        for t in TIMED:
            table.append((f"{t[0]} {t[1]}x{t[2]}", measure(*t, o.tokens)))
        if not o.no_variants:
            for name, constants, kinds in VARIANTS:
                for t in TIMED:
                    if t[0] not in kinds:
                        continue
                    try:
                        with Changed(name, constants):
                            table.append((f"  {t[0]} {t[1]}x{t[2]} {constants}", measure(*t, o.tokens, top=0)))
                    except Exception as error:  # a variant may not fit
                        print("variant", constants, t, repr(error)[:200])
    print("\n--- table")
    for name, ms in table:
        print(f"{ms:7.2f} ms  {name}")
    goals = "goals: plain 8, gated 8, channels (KDA) 30, dplr_bound (RWKV7) 35"
    print(goals, "| all agree" if not bad else f"| WRONG: {len(bad)}")
    for line in bad:
        print(line)


if __name__ == "__main__":
    main()
