#!/usr/bin/env bash
# The CPU kernels under a sanitiser, through the operators' tests:
#   [PYTHON=python3] [OUT=folder] scripts/sanitize_cpu.sh asan|tsan [pytest's arguments; default: the operators' tests]
# asan: AddressSanitizer and UndefinedBehaviorSanitizer. tsan: ThreadSanitizer, with a parallel_for of plain threads in the
# place of OpenMP's, which it cannot see through. Needs g++ on Linux. Exit status 1: a report, or a failed test.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
kind=${1:-}
shift
case $kind in
  asan) flags=(-fsanitize=address,undefined -fno-sanitize=vptr) runtimes=(libasan.so libubsan.so) ;;
  tsan) flags=(-fsanitize=thread) runtimes=(libtsan.so) ;;
  *) sed -n '2,5s/^# \{0,1\}//p' "$0" && exit 2 ;;
esac
(($#)) || set -- tests/test_{nms,soft_nms,roi_align,multilevel_roi_align,decode_boxes,decode_proposals,match_boxes}.py \
  tests/test_{preprocess_op,deform_conv2d,deform_roi_pool,conv_winograd,conv_backward,operators}.py -k "not compiles and not exports and not opcheck"
python=${PYTHON:-python3}
out=${OUT:-$(mktemp -d)}
mkdir -p "$out"
torch=$("$python" -c 'import torch; print(torch.__path__[0])')

cat >"$out/plain_threads.cpp" <<'END'
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <exception>
#include <thread>
#include <vector>

extern "C" AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t grain, ParallelFunc body, void* context) {
  const int64_t parts = std::clamp<int64_t>((end - begin) / std::max<int64_t>(grain, 1), 1, 4), size = end - begin;
  std::vector<std::exception_ptr> thrown(parts);
  std::vector<std::thread> threads;
  for (int64_t p = 0; p < parts; ++p)
    threads.emplace_back([&, p] {
      try {
        if (size > 0) body(begin + size * p / parts, begin + size * (p + 1) / parts, context);
      } catch (...) {
        thrown[p] = std::current_exception();
      }
    });
  for (std::thread& t : threads) t.join();
  for (const std::exception_ptr& e : thrown)
    if (e) std::rethrow_exception(e);
  return AOTI_TORCH_SUCCESS;
}
END
cat >"$out/sanitized_kernels.py" <<END
import fastrcnn.ops, torch
torch.ops.load_library("$out/kernels.so")  # for a kernel registered twice the later one answers
END

sources=(csrc/cpu/*.cpp)
[[ $kind == asan ]] || sources+=("$out/plain_threads.cpp")
compile() {
  g++ "${@:2}" -std=c++20 -O1 -g1 -fopenmp-simd -ffp-contract=off -fno-math-errno -fno-trapping-math -fPIC -w -Icsrc \
    -DTORCH_TARGET_VERSION=0x020b000000000000 -isystem "$torch/include" -isystem "$torch/include/torch/csrc/api/include" \
    -c "$1" -o "$out/$(basename "$1" .cpp).o"
}
export -f compile
export out torch
printf '%s\n' "${sources[@]}" | xargs -P "${MAX_JOBS:-2}" -I{} bash -c "compile {} ${flags[*]}" &&
  g++ -shared "${flags[@]}" -Wl,-Bsymbolic "$out"/*.o -L"$torch/lib" -ltorch_cpu -lc10 -Wl,-rpath,"$torch/lib" \
    -o "$out/kernels.so" || exit 1

preload=""
for runtime in "${runtimes[@]}"; do preload+=$(g++ -print-file-name="$runtime"):; done
export ASAN_OPTIONS="detect_leaks=0:log_path=$out/report:halt_on_error=0" UBSAN_OPTIONS="log_path=$out/report:print_stacktrace=1"
export TSAN_OPTIONS="ignore_noninstrumented_modules=1 report_thread_leaks=0 exitcode=0 log_path=$out/report"
PYTHONPATH="$out${PYTHONPATH:+:$PYTHONPATH}" setarch -R env LD_PRELOAD="$preload" \
  "$python" -m pytest -p sanitized_kernels -p no:cacheprovider "$@"
status=$?
cat "$out"/report* 2>/dev/null | grep -E 'SUMMARY|runtime error' | sort | uniq -c | sort -rn && status=1
echo "reports: $out"
exit "$status"
