#!/usr/bin/env bash
# The emulated kernels under ThreadSanitizer, which sees memory that no barrier orders, within a block and between blocks:
#   [PYTHON=python3] tests/emulated_cuda/sanitize.sh [pytest's arguments; default: one file a kernel, minutes for each]
# Exit status 1: a race, or a failed test. Reports go to OUT (default: a new folder in /tmp), a line for each to stdout.
set -uo pipefail
cd "$(dirname "$0")/../.." || exit 1
out=${OUT:-$(mktemp -d)}
mkdir -p "$out"
(($#)) || set -- tests/test_{nms,soft_nms,decode_boxes,decode_proposals,match_boxes,preprocess_op}.py \
  tests/test_{roi_align,multilevel_roi_align,deform_conv2d,deform_roi_pool,select_candidates}.py \
  tests/test_{conv_tile,conv_stem}.py \
  -k "not compiles and not exports and not opcheck and not gradcheck and not long_lists"

# Only the kernels are instrumented: what torch and Python do among themselves is not looked at.
export EMULATED_CUDA_SANITIZE=thread EMULATED_CUDA_BLOCKS=${EMULATED_CUDA_BLOCKS:-2} OMP_NUM_THREADS=1
options="ignore_noninstrumented_modules=1 report_thread_leaks=0 exitcode=0 log_path=$out/race"
setarch -R env LD_PRELOAD="$(g++ -print-file-name=libtsan.so)" TSAN_OPTIONS="$options" \
  "${PYTHON:-python3}" -m pytest --emulate-cuda -p no:cacheprovider -q "$@"
status=$?
cat "$out"/race.* 2>/dev/null | grep SUMMARY | sort | uniq -c | sort -rn && status=1
echo "reports: $out"
exit "$status"
