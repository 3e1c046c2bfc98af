#!/bin/bash
# Softmax attention by every backend that runs here: held to the definition, timed forward and backward, one process.
# Run in the root of a checkout on a GPU machine; stops by itself after 85 s (first argument).
# torchdata and rich must be importable: in .site here, or in $SITE.
# FlashAttention-4 (4.0.0b12 with nvidia-cutlass-dsl 4.4.2, Python 3.12), optional, `flash4` runs then:
# unpack its wheels and those it needs into /tmp/fa4;
# export FA4=/tmp/fa4:/tmp/fa4/nvidia_cutlass_dsl/python_packages   (its kernels compile for some 20 s a width: ask 150 s)
export PYTHONPATH=$PWD:$PWD/.site:$SITE:$FA4:$PYTHONPATH PYTHONUNBUFFERED=1
timeout ${LIMIT:-200} python3 - "$@" <<'PY' 2>&1 | tee ${OUT:-/tmp}/attention.log
import sys, time, warnings
from functools import partial
from itertools import accumulate
import torch
warnings.simplefilter("ignore")
from torchlinearmoe.benchmark import parts_one
from torchlinearmoe.benchmark.timing import time_steps
from torchlinearmoe.documents import Documents
from torchlinearmoe.kernels import attention
from torchlinearmoe.kernels.attention import OPERATOR, budget, flex, packed_attention
from torchlinearmoe.kernels.choose import decide, this_machine

started, device, kind = time.perf_counter(), torch.device("cuda"), torch.bfloat16
print(torch.__version__, torch.cuda.get_device_name(), "cudnn", torch.backends.cudnn.version(), this_machine())
usual = flex._options
WAYS = {"varlen": ("varlen", usual), "cudnn": ("cudnn", usual), "flex": ("flex", usual),
        "flex TMA": ("flex", lambda q: usual(q) | {"USE_TMA": True}), "flash4": ("flash4", usual),
        "flash3": ("flash3", usual), "sdpa": ("sdpa", usual)}
torch.manual_seed(0)
UNEVEN = (4096, 1, 2500, 700, 3000, 64, 1900, 1200, 333, 2590)        # 16384 tokens
assert sum(UNEVEN) == 16384
CHEAP, ALL = ("varlen", "cudnn", "flash3"), tuple(WAYS)   # flex compiles for some 8 s a shape
CASES = {  # who runs; documents, row length, query heads, key heads, width of keys, of values, window
    "packed 16384 h8 d128": (ALL, (UNEVEN, 16384, 8, 8, 128, 128, 0)),
    "1x16384 h8 d128": (CHEAP + ("flash4", "flex", "sdpa"), ((16384,), 16384, 8, 8, 128, 128, 0)),
    "8x2048 h8 d128": (CHEAP + ("flash4", "flex", "sdpa"), ((2048,) * 8, 2048, 8, 8, 128, 128, 0)),
    "packed 16384 h16 MLA 192/128": (CHEAP + ("flash4", "flex"), (UNEVEN, 16384, 16, 16, 192, 128, 0)),
    "1x16384 h16 MLA 192/128": (CHEAP + ("flash4", "flex"), ((16384,), 16384, 16, 16, 192, 128, 0)),
    "1x16384 h16 d64": (CHEAP, ((16384,), 16384, 16, 16, 64, 64, 0)),
    "8x2048 h16 d64": (CHEAP, ((2048,) * 8, 2048, 16, 16, 64, 64, 0)),
    "packed 16384 h16/4 d64": (CHEAP + ("flex",), (UNEVEN, 16384, 16, 4, 64, 64, 0)),
    "packed 16384 h8 d128 window 512": (CHEAP + ("flex",), (UNEVEN, 16384, 8, 8, 128, 128, 512)),
}


def draw(lengths, row, heads, groups, width, value_width, window):
    documents = Documents.packed([0, *accumulate(lengths)], row, device)
    shapes = ((heads, width), (groups, width), (groups, value_width))
    qkv = tuple(torch.randn(sum(lengths), *shape, device=device).to(kind).requires_grad_() for shape in shapes)
    call = partial(packed_attention, documents=documents, scale=width**-0.5, window=window)
    return qkv, call, torch.randn(sum(lengths), heads, value_width, device=device).to(kind)


def both(qkv, call, gradient, backend):
    o = call(*qkv, backend=backend)
    return o, *torch.autograd.grad(o, qkv, gradient)


for title, (who, case) in CASES.items():
    lengths, row, heads, groups, width, value_width, window = case
    cost = budget(lengths, heads, groups, width, value_width, window)
    print(f"== {title}: {cost.flops / 1e9:.0f} GFLOP forward")
    small = draw((300, 1, 211), 512, heads, groups, width, value_width, min(window, 100))
    plain = draw((256, 256), 256, heads, groups, width, value_width, min(window, 100))
    expected = [both(*inputs, "reference") for inputs in (small, plain)]
    large = draw(*case)
    first_found = None
    for name in who:
        backend, options = WAYS[name]
        if time.perf_counter() - started > float(sys.argv[1] if len(sys.argv) > 1 else 85):
            sys.exit("out of time")
        call = attention.call(window, width, "cuda", kind)
        chosen, reason = decide(OPERATOR, backend, call, this_machine())
        if not chosen:
            if first_found is not None and "h8 d128" in title: print("  ", reason)
            continue
        flex._options = options
        try:
            errors = []
            for inputs, wanted in () if backend == "flex" else zip((small, plain), expected):
                found = both(*inputs, backend)
                errors += [float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(found, wanted)]
            again = both(*large, backend), both(*large, backend)
            equal = all(torch.equal(a, b) for a, b in zip(*again))
            first_found = first_found or again[0]  # of varlen, itself held to the definition
            errors += [float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(again[0], first_found)]
            del again
            torch.cuda.synchronize(); torch.cuda.reset_peak_memory_stats(); held = torch.cuda.memory_allocated()
            whole = time_steps(lambda: both(*large, backend), steps=9, device=device)["step_s"]
            peak = (torch.cuda.max_memory_allocated() - held) / 2**30
            with torch.no_grad():
                forward = time_steps(lambda: large[1](*large[0], backend=backend), steps=9, device=device)["step_s"]
        except Exception as error:
            print(f"   {name:9} {type(error).__name__}: {str(error).splitlines()[0][:150]}")
            continue
        print(f"   {name:9} forward {forward * 1e3:7.3f} ms {cost.flops / forward / 1e12:5.0f} TFLOP/s"
              f"   backward {(whole - forward) * 1e3:7.3f} ms {2.5 * cost.flops / (whole - forward) / 1e12:5.0f}"
              f"   both {whole * 1e3:7.3f} ms {3.5 * cost.flops / whole / 1e12:5.0f} (x3.5)   extra {peak:.2f} GiB"
              f"   off {max(errors):.1e} {'two runs equal' if equal else 'two runs differ'}")
        flex._options = usual
print("seconds", time.perf_counter() - started)
# The command's own figures of the same, in this process.
for shape in ((2048,) * 8, (16384,)):
    for name in ("varlen", "cudnn", "flex"):
        if time.perf_counter() - started < float(sys.argv[1] if len(sys.argv) > 1 else 85):
            options = {"part": "attention", "contestant": name, "recipe": "recipes/qwen2_hgrn2.toml", "overrides": [],
                       "lengths": list(shape), "compile": True, "repeats": 6}
            try: print("benchmark attention", len(shape), "x", shape[0], name, parts_one.measure(options))
            except Exception as error: print("benchmark attention", name, str(error).splitlines()[0])
PY
