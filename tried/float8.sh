#!/bin/bash
# training.float8 = "rowwise" on a Hopper: products against torchao's emulation, the curve of 200 steps beside two seeds
# in bfloat16, and tokens a second of Llama 3 1B and 3B (dense) without and with. About 4 minutes; STEPS=1|2|3 one part.
# Run in the root of a checkout on a GPU machine. torchao 0.18.0 (pure Python is enough), torchdata and
# rich must be importable: in .site here, or in $SITE.
export PYTHONPATH=$PWD:$PWD/.site:$SITE:$PYTHONPATH PYTHONUNBUFFERED=1
OUT=${OUT:-/tmp}; WHAT=${STEPS:-123}
if [[ $WHAT == *1* ]]; then
  timeout 120 python3 -m pytest -q -p no:cacheprovider -o addopts= -n0 -m gpu tests/parallel/test_float8.py 2>&1 | tail -15 | tee $OUT/float8_products.log
fi
if [[ $WHAT == *2* ]]; then
  common="--model.layout=LLLN --model.hidden_size=512 --model.num_heads=4 --model.num_kv_heads=4 --moe.shared_hidden_size=512
    --training.steps=200 --training.sequence_length=512 --training.micro_batch_size=8 --training.tokens_per_step=4096
    --optimizer.lr=1e-3 --optimizer.min_lr=1e-4 --metrics.interval=1 --metrics.tensorboard=false --metrics.baselines=false
    --metrics.mixer_ablation=false --checkpoint.interval=0 --checkpoint.resume=never"
  run() { timeout 170 python3 -m torchlinearmoe.train recipes/quickstart.toml $common --training.output_dir=/tmp/curve_$1 "${@:2}" > /tmp/curve_$1.log 2>&1 || tail -3 /tmp/curve_$1.log; }
  rm -rf /tmp/curve_*
  run bf16_0 --training.seed=0 & run bf16_1 --training.seed=1 & run bf16_2 --training.seed=2 &
  run float8_0 --training.seed=0 --training.float8=rowwise & run float8_1 --training.seed=1 --training.float8=rowwise &
  wait
  python3 - <<'PY' 2>&1 | tee $OUT/float8_curve.log
import json
curves = {}
for name in ("bf16_0", "bf16_1", "bf16_2", "float8_0", "float8_1"):
    try: lines = [json.loads(x) for x in open(f"/tmp/curve_{name}/metrics.jsonl")]
    except OSError as error: print(name, error); continue
    curves[name] = [x["loss"] for x in lines if "loss" in x]
    print(name, "validation", [x["validation_loss"] for x in lines if "validation_loss" in x], "tokens/s",
          max(x["tokens_per_second"] for x in lines if "tokens_per_second" in x))
mean = lambda xs: sum(xs) / len(xs)
windows = lambda xs: [mean(xs[i:i + 20]) for i in range(0, len(xs), 20)]
for name, xs in curves.items(): print(name, " ".join(f"{x:.4f}" for x in windows(xs)))
for a, b in (("bf16_0", "bf16_1"), ("bf16_0", "bf16_2"), ("bf16_0", "float8_0"), ("bf16_1", "float8_1")):
    if a in curves and b in curves:
        d = [y - x for x, y in zip(windows(curves[a]), windows(curves[b]))]
        print(f"{b} - {a}: mean of the last half {mean(d[5:]):+.4f}, largest {max(map(abs, d)):.4f} (means of 20 steps)")
PY
fi
if [[ $WHAT == *3* ]]; then
  for size in 1B 3B; do for kind in none rowwise; do
    shapes="8x2048"; [[ $size == 1B ]] && shapes="8x2048 1x16384"
    timeout 170 python3 -m torchlinearmoe.benchmark train --recipe recipes/llama3_lightning.toml --contestants ours \
      --shapes $shapes --steps 12 --timeout 80 --model.size=$size --model.layout=N --training.float8=$kind 2>&1 | tail -8
  done; done | tee $OUT/float8_speed.log
fi
