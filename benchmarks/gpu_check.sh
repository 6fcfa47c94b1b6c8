#!/usr/bin/env bash
# Builds the CUDA kernels, tests them, times them and looks for memory errors and races, on the machine's GPU:
#   [OUT=folder] [SECONDS_IN_ALL=570] [PYTHON=python3] benchmarks/gpu_check.sh
# A step that fails or takes too long is reported, and the next one goes on. OUT (default benchmarks/results) gets, as they
# come: <gpu>_<date>.log with all output, .steps.md with a row a step, and .json and .md anew after every benchmark. Exit
# status 1: a step failed.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
export PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
out=${OUT:-benchmarks/results}
end=$(($(date +%s) + ${SECONDS_IN_ALL:-570}))
rows=$(mktemp -d)
trap 'rm -rf "$rows"' EXIT
mkdir -p "$out"
out=$(cd "$out" && pwd)

facts=$(timeout 30 nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>&1) ||
  facts=$(timeout 60 "$python" -c 'import torch; print(torch.cuda.get_device_name())' 2>&1) ||
  { echo "no NVIDIA GPU answers: $facts" >&2 && exit 1; }
# "NVIDIA H100 80GB HBM3" -> h100, "NVIDIA GeForce RTX 4090" -> rtx_4090
gpu=$(head -n 1 <<<"$facts" | cut -d, -f1 | tr '[:upper:]' '[:lower:]' |
  sed -E 's/nvidia |geforce |tesla |quadro //g; s/^(rtx|gtx) /\1_/; s/[ -].*//')
name=$out/${gpu}_$(date +%F)
: >"$name.log"

say() { echo "$*" | tee -a "$name.log"; }
say "command: ${OUT:+OUT=$OUT }$0"
say "gpu, driver, memory: $facts"
say "commit: $(git rev-parse --short HEAD 2>/dev/null || echo unknown), $(git status --short 2>/dev/null | wc -l) files changed"
say "$(timeout 60 "$python" -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda, "cuDNN", torch.backends.cudnn.version())' 2>&1)"
printf '| step | status | seconds |\n|---|---|---|\n' >"$name.steps.md"

failed=0
# step TITLE SECONDS COMMAND...: at most SECONDS and at most what is left of the whole. The command writes to the log and
# not into a pipe: a process that it leaves behind must not keep this script waiting. An interrupted pytest still reports.
step() {
  local title=$1 limit=$2 start left status=0 result from
  shift 2
  start=$(date +%s)
  left=$((end - start))
  ((limit < left)) || limit=$left
  say "== $title (at most $limit s): $(head -n 1 <<<"${*:0:200}" | cut -c 1-200)"
  from=$(wc -l <"$name.log")
  if ((limit < 5)); then
    status=124
  else
    timeout --signal=INT --kill-after=5 "$limit" "$@" >>"$name.log" 2>&1 </dev/null || status=$?
  fi
  tail -n "+$((from + 1))" "$name.log" | tail -n 20
  case $status in
    0) result=ok ;;
    124 | 137) result="OUT OF TIME" ;;
    *) result="FAILED ($status)" ;;
  esac
  ((status == 0)) || failed=1
  echo "| $title | $result | $(($(date +%s) - start)) |" >>"$name.steps.md"
  return "$status"
}

step build 240 env FASTRCNN_BUILD=cuda "$python" -m pip install -q --no-build-isolation --no-deps -e .
step "every op has a kernel" 60 "$python" -c 'import fastrcnn.ops, fastrcnn._extension as e
without = [op for op, kinds in e.kernel_table().items() if kinds["cuda"] != "kernel"]
raise SystemExit(e.reasons()["cuda"] or (f"no CUDA kernel: {without}" if without else 0))'

workers=()
timeout 30 "$python" -c 'import xdist' 2>/dev/null && workers=(-n 4)
step tests 200 "$python" -m pytest tests -rf --tb=short -m gpu -p no:cacheprovider ${workers[@]+"${workers[@]}"}

for bench in benchmarks/*_bench.py; do
  op=$(basename "$bench" _bench.py)
  step "bench $op" 60 "$python" "$bench" --device cuda --json "$rows/$op.json" &&
    timeout 30 "$python" benchmarks/collect.py "$name" "$rows"/*.json >>"$name.log" 2>&1
done

# Eight tests of every kernel, spread over its test file, one of each first. Without torch's caching allocator what lies
# beyond a tensor lies beyond its allocation, where memcheck sees it.
sanitizer=$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
kernels=(tests/test_{nms,soft_nms,roi_align,multilevel_roi_align,decode_boxes,decode_proposals,match_boxes,preprocess_op,conv_tile}.py
  tests/test_{deform_conv2d,deform_roi_pool}.py)
mapfile -t small < <(timeout 60 "$python" -m pytest "${kernels[@]}" --co -p no:cacheprovider -m gpu \
  -k "not compiles and not exports and not opcheck and not gradcheck and not 2_to_the_31" 2>/dev/null |
  awk -F:: '/::/ {test[$1, n[$1]++] = $0} END {for (i = 0; i < 8; i++) for (f in n) if (i < n[f])
    print test[f, int(i * n[f] / (n[f] < 8 ? n[f] : 8))]}')
tools=(memcheck racecheck synccheck initcheck)
for i in "${!tools[@]}"; do
  tool=${tools[i]}
  step "$tool" $(((end - $(date +%s)) / (${#tools[@]} - i))) env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$tool" \
    --kernel-name kns=fastrcnn --error-exitcode 9 --print-limit 5 \
    "$python" -m pytest -vv --tb=line -p no:cacheprovider "${small[@]:-no_test_found}"
done

[[ -f $name.md ]] && say "$(grep '^| ' "$name.md" | cut -d'|' -f 2-8)"
say "$(cat "$name.steps.md")"
say "results: $name.json, .md, .steps.md, .log"
exit "$failed"
