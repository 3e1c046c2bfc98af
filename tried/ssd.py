"""State space duality and the recurrences of one decay a head on a GPU: right in bf16, the same bits twice, then timed.

    cd REPOSITORY && python ssd.py [--sweep] [--compare-only | --time-only]          on a GPU
    TRITON_INTERPRET=1 python ssd.py                  the comparing half on a CPU: small sizes, float32 and float16
"""
import sys
import time

sys.path.insert(0, ".")
import torch
from torch.nn import functional as F

from torchlinearmoe.kernels.linear import linear_recurrence
from torchlinearmoe.kernels.ssd import dual, ssd
from torchlinearmoe.segments import Segments

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
began, failed = time.time(), []


def ssd_inputs(T, N, H, G, K, V, initial, harsh):
    A = -torch.rand(H).double() * (16 if harsh else 1) - 0.1
    dt = F.softplus(torch.randn(T, H).double() - 3)
    if harsh:  # some resets, some steps of zero
        dt = torch.where(torch.rand(T, H) < 0.02, 8.0, torch.where(torch.rand(T, H) < 0.02, 0.0, dt))
    x = torch.randn(H, T, V + 8).double().transpose(0, 1)[..., :V]  # strides that are not contiguous
    inputs = {"x": x, "dt": dt, "A": A, "B": torch.randn(T, G, K).double() / K**0.25, "C": torch.randn(T, G, K).double() / K**0.25}
    if initial:
        inputs["initial_state"] = torch.randn(N, H, K, V).double()
    return inputs


def linear_inputs(T, N, H, G, K, V, initial, harsh):
    g = F.logsigmoid(torch.randn(T, H).double() + 3)
    if harsh:
        g = torch.where(torch.rand(T, H) < 0.02, -25.0, g * 8)
    inputs = {"q": torch.randn(T, H, K).double(), "k": F.normalize(torch.randn(T, H, K).double(), dim=-1)}
    inputs |= {"v": torch.randn(T, H, V).double(), "log_decay": g}
    if initial:
        inputs["initial_state"] = torch.randn(N, H, K, V).double()
    return inputs


def run(function, inputs, lengths, states, backend, dtype):
    wide = ("dt", "A", "log_decay", "initial_state")
    leaves = {}
    for name, x in inputs.items():
        kind = torch.float32 if name in wide and dtype != torch.float64 else dtype
        leaves[name] = x.to(DEVICE, kind).requires_grad_()
    y, final = function(**leaves, segments=Segments.of_lengths(lengths, DEVICE), want_final=states, backend=backend)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(y.shape, generator=generator, dtype=torch.float64).bfloat16().to(DEVICE)
    loss = (y.double() * weight.double()).sum()
    if final is not None:
        loss = loss + (final.double() * torch.randn(final.shape, generator=generator).double().to(DEVICE)).sum()
    loss.backward()
    found = {"y": y} | ({} if final is None else {"final": final}) | {f"d_{n}": x.grad for n, x in leaves.items()}
    return {n: x.detach() for n, x in found.items()}


def compare(name, function, draw, lengths, H, G, K, V, states, dtype, harsh=False):
    torch.manual_seed(3)
    wide = ("dt", "A", "log_decay", "initial_state")
    inputs = draw(sum(lengths), len(lengths), H, G, K, V, states, harsh)
    inputs = {n: x.to(torch.float32 if n in wide else dtype).double() for n, x in inputs.items()}
    run_ours = lambda: run(function, inputs, lengths, states, "triton", dtype)  # noqa: E731
    if not GPU:  # the chooser wants a CUDA device
        import importlib

        from torchlinearmoe.kernels.operator import operators

        operator = "ssd" if function is ssd else "linear"
        package = importlib.import_module(f"torchlinearmoe.kernels.{operator}")
        chooser, package.choose = package.choose, lambda *_: operators()[operator].find_backends()["triton"]
        found = run_ours()
        again, package.choose = found, chooser
    else:
        found, again = run_ours(), run_ours()
    expected = run(function, inputs, lengths, states, "torch", torch.float64)
    limits = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4}
    errors, bad = {}, ""
    for n, e in expected.items():
        error = float((found[n].double() - e).norm() / e.norm().clamp(min=1e-30))
        errors[n] = error
        # d_A is one sum over all tokens, whose terms cancel; 16-bit d_log_decay is a difference of sums
        limit = limits[dtype] * (10 if n == "d_A" else 2 if n == "d_log_decay" else 1)
        if not error < limit or not torch.equal(found[n], again[n]):
            bad += f" {n}{'' if error < limit else ' WRONG'}{'' if torch.equal(found[n], again[n]) else ' NOT THE SAME TWICE'}"
    label = f"{name} {str(dtype)[6:]} T {sum(lengths)} N {len(lengths)} H {H} G {G} K {K} V {V}{' states' * states}{' harsh' * harsh}"
    print(("BAD " + bad if bad else "ok ") + f" {label}: " + " ".join(f"{n} {e:.1e}" for n, e in errors.items()), flush=True)
    if bad:
        failed.append(label + bad)


def case_table():
    ragged = (1, 63, 0, 64, 130, 7)
    if not GPU:
        for dtype in (torch.float32, torch.float16):
            compare("ssd", ssd, ssd_inputs, (70, 3), 4, 2, 24, 40, True, dtype)
            compare("ssd", ssd, ssd_inputs, (66,), 2, 1, 40, 72, False, dtype, harsh=True)
            compare("scalar", linear_recurrence, linear_inputs, (70, 3), 1, 1, 24, 40, True, dtype)
        return
    bf = torch.bfloat16
    for states in (False, True):
        compare("ssd", ssd, ssd_inputs, (*ragged, 1100, 70), 32, 1, 128, 64, states, bf)
        compare("ssd", ssd, ssd_inputs, (*ragged, 1100, 70), 8, 2, 128, 64, states, bf, harsh=True)
        compare("ssd", ssd, ssd_inputs, (*ragged, 1100, 70), 6, 2, 24, 40, states, bf)
        compare("scalar", linear_recurrence, linear_inputs, (*ragged, 1100, 70), 4, 4, 128, 128, states, bf)
        compare("scalar", linear_recurrence, linear_inputs, (*ragged, 1100, 70), 4, 4, 64, 96, states, bf, harsh=True)
    compare("ssd", ssd, ssd_inputs, (1, 1, 1, 1, 1), 4, 4, 16, 64, True, bf)
    compare("ssd", ssd, ssd_inputs, (700, 3), 4, 1, 64, 128, True, bf)
    compare("ssd", ssd, ssd_inputs, (700, 3), 4, 4, 256, 200, True, bf)
    compare("ssd", ssd, ssd_inputs, (40000, 24, 25512), 8, 1, 128, 64, True, bf)  # stretches of 32, parts, slabs below
    most, dual.MOST_BYTES = dual.MOST_BYTES, 2**26
    compare("ssd, slabs", ssd, ssd_inputs, (9000, 24, 3000), 8, 1, 128, 64, True, bf)
    dual.MOST_BYTES = most
    compare("ssd", ssd, ssd_inputs, (*ragged, 1100, 70), 4, 1, 128, 64, True, torch.float16)


def timed(label, function, inputs, options, top=0):
    """Sums of kernels of one forward and backward, ms."""
    from torch.profiler import ProfilerActivity, profile

    cotangent = None

    def step():
        nonlocal cotangent
        y, _ = function(**inputs, **options, backend="triton")
        if cotangent is None:
            cotangent = torch.randn_like(y)
        torch.autograd.grad(y, [x for x in inputs.values() if x.requires_grad], cotangent)

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as p:
        for _ in range(5):
            step()
        torch.cuda.synchronize()
    events = [e for e in p.key_averages() if e.self_device_time_total > 0]
    rows = sorted(((e.self_device_time_total / 5e3, e.count // 5, e.key) for e in events), reverse=True)
    total = sum(ms for ms, *_ in rows)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    lines = [f"{label:28s} {total:6.2f} ms   peak {peak:.2f} GiB"]
    lines += [f"    {ms:6.3f} ms x{count:<3d} {key[:80]}" for ms, count, key in rows[:top]]
    return lines


def times():
    T, H, K, device = 131072, 8, 128, torch.device("cuda")
    segments = {"segments": Segments.of_lengths((T,), device)}
    normal = lambda *shape: torch.randn(*shape, device=device).bfloat16().requires_grad_()  # noqa: E731
    x = {"x": normal(T, 32, 64), "dt": F.softplus(torch.randn(T, 32, device=device) - 3).requires_grad_()}
    x |= {"A": (-torch.rand(32, device=device) - 0.5).requires_grad_(), "B": normal(T, 1, K), "C": normal(T, 1, K)}
    lines = timed("ssd 32x64, state 128 (13.0)", ssd, x, segments, 12)
    if "--sweep" in sys.argv:
        warps, stages = dict(dual.WARPS), dict(dual.STAGES)
        for kernel, w, s in (
            ("walk", 4, 2), ("walk", 4, 4), ("walk", 8, 3), ("advance", 4, 2), ("advance", 8, 3),
            ("gradients", 8, 2), ("gradients", 16, 3),
        ):  # fmt: skip
            dual.WARPS[kernel], dual.STAGES[kernel] = w, s
            found = timed(f"  {kernel}: {w} warps, {s} stages", ssd, x, segments, 8)
            lines += [found[0], *(line for line in found[1:] if f" {kernel}" in line)]
            dual.WARPS.update(warps), dual.STAGES.update(stages)
    del x
    q = {"q": normal(T, H, K), "k": F.normalize(torch.randn(T, H, K, device=device), dim=-1).bfloat16().requires_grad_()}
    q |= {"v": normal(T, H, K)}
    lines += timed("identity 8x128 (2.02)", linear_recurrence, q, segments)
    constant = {"log_decay": -torch.rand(H, device=device) / 16}
    lines += timed("constant (2.42)", linear_recurrence, q, segments | constant)
    g = F.logsigmoid(torch.randn(T, H, device=device) + 3).requires_grad_()
    lines += timed("scalar (2.80, goal 2.2)", linear_recurrence, q | {"log_decay": g}, segments, 12)
    return lines


if "--time-only" not in sys.argv:
    case_table()
compared = time.time() - began
lines = times() if GPU and "--compare-only" not in sys.argv else []
print(f"\ncompared in {compared:.0f} s, all {time.time() - began:.0f} s")
print("\n".join(lines))
print("ALL RIGHT" if not failed else "WRONG:\n" + "\n".join(failed))
sys.exit(bool(failed))
