#!/bin/bash
# Learning curves and recall on one GPU, in parts that each keep a limit and go on where an earlier call stopped.
#
#   bash tried/curves.sh learn:200 recall:200        (call 1, timeout_s 560)
#   bash tried/curves.sh peers:400                   (call 2: flash-linear-attention's own models, five at once)
#   bash tried/curves.sh embed:200                   (with call 2 or 3: all mixers again, embeddings at 0.02)
#   bash tried/curves.sh draw                        (no GPU: tables and pictures of what is there)
#
# PART:SECONDS: no model of the part begins after so many seconds, nor one that would not end; each part is cut off
# 40 s later. Run in the root of a checkout that has `python -m torchlinearmoe.curves`. Before the first call, here:
#
#   python -m torchlinearmoe.curves --only-text --output .curves; results lie in $CURVES (.curves), with text/ in it.
#
# What came of it lies in $OUT/curves.tar.gz (results/); unpack it into .curves before the next call.
# The pictures and tables are there too: $OUT/*.png, $OUT/*.md.
# TINY=1 tries all of it on the CPU in small sizes.
set -u
HOME_=${CURVES:-.curves}
TEXT=$HOME_/text RESULTS=$HOME_/results OUT=${OUT:-$HOME_/out}
mkdir -p "$RESULTS" "$OUT"
PY=${PYTHON:-python3}
PROCESSES=${PROCESSES:-5}
if ls .whl/torchdata*.whl >/dev/null 2>&1 && [ -z "${TINY:-}" ]; then
  $PY -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site \
    .whl/torchdata*.whl .whl/einops*.whl .whl/fla_core*.whl .whl/flash_linear_attention*.whl 2>&1 | tail -2
  export PYTHONPATH=/tmp/site:$PWD
fi
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1 FLA_CACHE_RESULTS=1 TRITON_CACHE_AUTOTUNING=1 TOKENIZERS_PARALLELISM=false
export PYTORCH_ALLOC_CONF=expandable_segments:True HF_HUB_OFFLINE=1
C=() R=(--setting published --steps "${STEPS:-4000}" --device auto) MIXERS=(gated_delta_net delta_net gla based mamba2)
WIDTHS=(64 128) LRS=(3.2e-3 1e-2) MODELS=(all)
R+=(--model.kernel_backend="${RECALL_BACKEND:-torch}") # compiles nothing; float32 kernels of Triton compile for minutes
if [ -n "${TINY:-}" ]; then
  C=(--model.hidden_size=64 --model.num_layers=2 --model.num_heads=2 --model.num_kv_heads=2 --model.head_dim=32
     --model.ffn_hidden_size=64 --training.sequence_length=64 --training.micro_batch_size=2
     --training.tokens_per_step=128 --training.steps=4 --metrics.validation_interval=2 --metrics.interval=2
     --metrics.validation_batches=2)
  R=(--setting small --steps 3 --device cpu "--data.recall=[{pairs=4,length=16,examples=64}]") WIDTHS=(32) LRS=(1e-3 1e-2)
  MODELS=(gla kda) MIXERS=(gla based)
fi
curves() { # folder, seconds, further arguments
  local folder=$1 seconds=$2; shift 2
  timeout -s INT -k 15 "$((${seconds%.*} + 40))" $PY -m torchlinearmoe.curves --text "$TEXT" --output "$RESULTS/$folder" \
    --seconds "$seconds" "$@" "${C[@]}"
}
recall() { # seconds, further arguments
  local seconds=$1; shift
  timeout -s INT -k 15 "$((seconds + 40))" $PY -m torchlinearmoe.recall "${R[@]}" --widths "${WIDTHS[@]}" --lrs "${LRS[@]}" \
    --output "$RESULTS/recall" --seconds "$seconds" "$@"
}
peers() { [ -n "${TINY:-}" ] && echo fla/gla || echo fla/all; }
draw() {
  curves learn 0 --models "${MODELS[@]}" $(ls -d "$RESULTS"/learn/fla-* >/dev/null 2>&1 && peers) || true
  [ -d "$RESULTS/embed" ] && curves embed 0 --models "${MODELS[@]}" --model.embed_init_std=0.02
  [ -d "$RESULTS/recall" ] && recall 0 --mixers "${MIXERS[@]}" | tee "$RESULTS/recall/recall.txt"
  for part in learn embed recall; do
    for file in "$RESULTS/$part"/curves.{png,md,json} "$RESULTS/$part"/recall.{png,txt,json}; do
      [ -f "$file" ] && cp "$file" "$OUT/$part-$(basename "$file")"
    done
  done
  # At most eight files come back.
  tar -czf "$OUT/curves.tar.gz" -C "$HOME_" --exclude=claim --exclude=cache results
  rm -f "$OUT"/*.json "$OUT"/embed-curves.png
}
for part in "$@"; do
  name=${part%%:*} seconds=${part##*:}
  echo "=== $part at $SECONDS s"
  case $name in
    learn) curves learn "$seconds" --models "${MODELS[@]}" --processes "$PROCESSES" --no-picture ;;
    embed) curves embed "$seconds" --models "${MODELS[@]}" --processes "$PROCESSES" --no-picture --model.embed_init_std=0.02 ;;
    peers) curves learn "$seconds" --models $(peers) --processes 5 --no-picture ;;
    recall)
      for mixer in "${MIXERS[@]}"; do
        recall "$seconds" --mixers "$mixer" --no-picture >"/tmp/recall-$mixer.log" 2>&1 &
      done
      wait
      tail -n 4 /tmp/recall-*.log ;;
    draw) ;;
    *) echo "unknown part $part" ;;
  esac
done
echo "=== drawing at $SECONDS s"
draw
ls -la "$OUT"
echo "=== done at $SECONDS s"
