"""The emulator that runs CUDA kernels on the CPU: it must find what it is there to find."""

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from emulated_cuda.build import compile_source, link, translate

KERNELS = """
#include <cuda_runtime.h>
// The sum over a block, from the last lane of each warp.
__global__ void block_sum(const int* values, int* sums) {
  __shared__ int of_warp[4];
  extern __shared__ int copies[];
  const int i = threadIdx.x, lane = i % 32;
  copies[i] = values[blockIdx.x * blockDim.x + i];
  int sum = copies[i];
  for (int step = 1; step < 32; step *= 2) {
    const int below = __shfl_up_sync(~0u, sum, step);
    sum += lane >= step ? below : 0;
  }
  if (lane == 31) of_warp[i / 32] = sum;
#if BARRIER
  __syncthreads();
#endif
  const int voters = __syncthreads_count(lane == 31);
  if (i == 0) sums[blockIdx.x] = of_warp[0] + of_warp[1] + of_warp[2] + of_warp[3] + 1000 * voters;
}
template <int V>
__global__ void early_read(int* out) {
  __shared__ int word[2];
  if (threadIdx.x < 2) word[threadIdx.x] = 0;
  __syncthreads();
  if (threadIdx.x == 0) word[0] = V;
#if BARRIER
  __syncthreads();
#endif
  if (threadIdx.x == 127) out[0] = word[0];
}
__global__ void half_way() {
  if (threadIdx.x < 64) __shfl_sync(~0u, 1, 0);
  if (threadIdx.x % 2 == 0) __any_sync(~0u, 1);
}
int main(int, char** arguments) {
  int values[256], sums[2], seen = 0;
  for (int i = 0; i < 256; ++i) values[i] = i;
  if (arguments[1][0] == 'd') half_way<<<1, 64>>>();
  block_sum<<<2, dim3(128), 128 * sizeof(int)>>>(values, sums);
  early_read<7><<<1, 128>>>(&seen);
  printf("%d %d %d", sums[0], sums[1], seen);
}
"""

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or platform.machine() != "x86_64",
    reason="the emulator needs g++ and an x86-64 processor",
)


@pytest.fixture(scope="module", params=[1, 0], ids=["with barriers", "without"])
def program(request, tmp_path_factory) -> tuple[bool, Path]:
    folder = tmp_path_factory.mktemp("kernels")
    source = folder / "kernels.cpp"
    source.write_text(f"#define BARRIER {request.param}\n" + translate(KERNELS))
    compile_source(source, folder / "kernels.o")
    link([folder / "kernels.o"], folder / "kernels", shared=False)
    return bool(request.param), folder / "kernels"


def run(program: Path, what: str, order: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "EMULATED_CUDA_ORDER": order}
    return subprocess.run([program, what], env=environment, capture_output=True, text=True)


def test_one_of_the_two_orders_shows_a_missing_barrier(program):
    right, path = program
    results = [run(path, "sums", order).stdout.split() for order in ("forward", "reverse")]
    expected = [str(sum(range(128)) + 4000), str(sum(range(128, 256)) + 4000)]
    assert [r[:2] for r in results] == [expected] * 2  # __syncthreads_count is a barrier as well
    assert sorted(r[2] for r in results) == (["7", "7"] if right else ["0", "7"])


def test_an_operation_that_not_all_lanes_reach_is_an_error_not_a_hang(program):
    result = run(program[1], "deadlock", "forward")
    assert result.returncode != 0
    assert "deadlock" in result.stderr
    assert re.search(r"block \(0, 0, 0\)", result.stderr)


def test_launches_with_template_arguments_and_dynamic_shared_memory_are_translated():
    text = translate("k<T, 4><<<dim3(f(a, b), 2), kThreads, n * 4, stream>>>(x, g(y, z)); extern __shared__ float s[];")
    assert "<<<" not in text
    assert "::emulated::launch(dim3(f(a, b), 2),  kThreads,  n * 4, [=] { k<T, 4>(emulated_args...); })" in text
    assert "(x, g(y, z));" in text
    assert "float* s = static_cast<float*>(::emulated::dynamic_shared());" in text
