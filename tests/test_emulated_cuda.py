"""The emulator that runs CUDA kernels on the CPU: it must find what it is there to find."""

import os
import platform
import re
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
from emulated_cuda.build import CSRC, build, build_program, translate

KERNELS = """
#include <cuda_runtime.h>
static_assert(sizeof(fmin(1.f, 2.f)) == 4 && sizeof(fmax(1.f, 2.f)) == 4 && sizeof(fma(1.f, 2.f, fabs(3.f))) == 4);
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
  const int voters = __syncthreads_count(lane == 31);
  if (i == 0) sums[blockIdx.x] = of_warp[0] + of_warp[1] + of_warp[2] + of_warp[3] + 1000 * voters;
}
template <int V>
__global__ void early_read(int* out, bool barrier) {
  __shared__ int word;
  if (threadIdx.x == 0) word = V;
  if (barrier) __syncthreads();
  if (threadIdx.x == 127) out[blockIdx.x] = word;
}
__global__ void half_way() {
  if (threadIdx.x < 64) __shfl_sync(~0u, 1, 0);
  if (threadIdx.x % 2 == 0) __any_sync(~0u, 1);
}
// Two numbers of each lane, one after the other through one place in shared memory, to the lane opposite.
__global__ void copies(const float4* from, float* to, bool waits, bool barrier) {
  __shared__ float4 place[32];
  for (int i = 0; i < 2; ++i) {
    emulated::copy_async(place + threadIdx.x, from + 32 * i + threadIdx.x, 16, false);
    emulated::commit_copies();
    if (waits) emulated::wait_for_copies(0);
    __syncwarp();
    to[32 * i + threadIdx.x] = place[31 - threadIdx.x].x;
    if (barrier) __syncwarp();
  }
}
// Each block waits for the one before, whose number it goes on from.
struct Chain {
  unsigned ticket;
  volatile unsigned long long word[64];
  volatile int flag[64];
  int number[64];
};
__global__ void chain(Chain* c, bool ticket, bool one_word) {
  if (threadIdx.x > 0) return;
  const unsigned drawn = ticket ? atomicAdd(&c->ticket, 1u) : blockIdx.x;
  unsigned before = 0;
  if (drawn > 0 && one_word) {
    unsigned long long word;
    while ((word = c->word[drawn - 1]) >> 32 == 0) __nanosleep(20);
    before = word;
  } else if (drawn > 0) {
    while (c->flag[drawn - 1] == 0) __nanosleep(20);
    before = c->number[drawn - 1];
  }
  if (one_word) {
    c->word[drawn] = 1ull << 32 | (before + 1);
  } else {
    c->number[drawn] = before + 1;
    c->flag[drawn] = 1;
  }
  if (drawn == gridDim.x - 1) c->number[drawn] = before + 1;
}
int main(int, char** arguments) {
  const char what = arguments[1][0], fault = arguments[2][0];
  int values[256], sums[2], seen[8] = {};
  for (int i = 0; i < 256; ++i) values[i] = i;
  if (what == 'd') half_way<<<1, 64>>>();
  if (what == 's') {
    block_sum<<<2, dim3(128), 128 * sizeof(int)>>>(values, sums);
    printf("%d %d", sums[0], sums[1]);
  }
  if (what == 'e') {
    early_read<7><<<8, 128>>>(seen, fault != 'b');
    for (int word : seen) printf("%d ", word);
  }
  if (what == 'a') {
    float4 from[64];
    float to[64];
    for (int i = 0; i < 64; ++i) from[i] = {float(i)};
    copies<<<1, 32>>>(from, to, fault != 'w', fault != 'b');
    for (int i = 0; i < 64; ++i) printf("%d ", to[i] == i / 32 * 32 + 31 - i % 32);
  }
  if (what == 'c') {
    static Chain c;
    chain<<<64, 32>>>(&c, fault != 't', fault != 'w');
    printf("%d", c.number[63]);
  }
}
"""
UNDEFINED = int.from_bytes(b"\xa5" * 4, "little", signed=True)

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or platform.machine() != "x86_64",
    reason="the emulator needs g++ and an x86-64 processor",
)


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("kernels") / "program"
    build_program(translate(KERNELS), path)
    return path


@pytest.fixture(scope="module")
def sanitised(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sanitised") / "program"
    build_program(translate(KERNELS), path, sanitised=True)
    return path


def run(
    program: Path, what: str, fault: str = "none", seed: int = 1, order: str | None = None, copies: str | None = None
) -> subprocess.CompletedProcess:
    environment = {**os.environ, "EMULATED_CUDA_SEED": str(seed), "TSAN_OPTIONS": "exitcode=66"}
    environment |= {"EMULATED_CUDA_COPIES": copies} if copies else {}
    environment.pop("EMULATED_CUDA_ORDER", None)
    if order:
        environment["EMULATED_CUDA_ORDER"] = order
    command = [
        *(["setarch", "-R"] if shutil.which("setarch") else []),
        program,
        what,
        fault,
    ]  # as ThreadSanitizer wants it
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_shuffles_votes_and_dynamic_shared_memory(program):
    assert run(program, "sums").stdout.split() == [str(sum(range(128)) + 4000), str(sum(range(128, 256)) + 4000)]


def test_one_of_the_two_orders_shows_a_missing_barrier(program):
    right = ["7"] * 8
    for how in ({"order": "forward"}, {"order": "reverse"}, {"seed": 1}, {"seed": 2}):
        assert run(program, "early", **how).stdout.split() == right
    assert run(program, "early", "barrier", order="forward").stdout.split() == right
    assert str(UNDEFINED) in run(program, "early", "barrier", order="reverse").stdout.split()
    # Each block goes its own way; of the blocks on a CPU's thread the first alone finds the memory undefined.
    assert sum(run(program, "early", "barrier", seed).stdout.split() != right for seed in range(1, 7)) > 2


def test_copies_come_as_early_and_as_late_as_they_may(program):
    """A missing wait reads what has not come; without a barrier the next copy comes before the last was read."""
    right = ["1"] * 64
    for order, copies in product(("forward", "reverse"), ("early", "late")):
        assert run(program, "asynchronous", order=order, copies=copies).stdout.split() == right
        without_wait = run(program, "asynchronous", "wait", order=order, copies=copies).stdout.split()
        assert (without_wait != right) == (copies == "late")
    assert any(run(program, "asynchronous", "barrier", order=o, copies="early").stdout.split() != right for o in "fr")


def test_an_operation_that_not_all_lanes_reach_is_an_error_not_a_hang(program):
    result = run(program, "deadlock")
    assert result.returncode != 0
    assert "deadlock" in result.stderr
    assert re.search(r"block \(0, 0, 0\)", result.stderr)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_chain_of_blocks_needs_tickets(program, seed):
    assert run(program, "chain", seed=seed).stdout == "64"
    result = run(program, "chain", "ticket", seed)
    assert result.returncode != 0
    assert "every resident block waits" in result.stderr


@pytest.mark.parametrize("what, fault", [("chain", "word in two"), ("early", "barrier")])
def test_thread_sanitizer_sees_memory_that_nothing_orders(sanitised, what, fault):
    clean = run(sanitised, what)
    assert clean.returncode == 0, clean.stderr
    wrong = run(sanitised, what, fault)
    assert wrong.returncode == 66
    assert "data race" in wrong.stderr


def test_nms_without_its_ticket_is_an_error(tmp_path):
    replaced = []

    def without(text: str) -> str:
        faulty, count = re.subn(r"atomicAdd\(p\.ticket, 1u\)", "blockIdx.x", text)
        replaced.append(count)
        return faulty

    build(tmp_path / "nms.so", ["nms"], edit=without)
    assert sum(replaced) == 1
    call = f"""
import torch, fastrcnn.ops
torch.ops.load_library({str(tmp_path / "nms.so")!r})  # for a kernel registered twice the later one answers
fastrcnn.ops.nms(torch.rand(6000, 4).cumsum(1), torch.rand(6000), 0.5)
"""
    result = subprocess.run([sys.executable, "-c", call], cwd=CSRC.parent, capture_output=True, text=True, timeout=120)
    assert result.returncode != 0
    assert "every resident block waits" in result.stderr


def test_launches_with_template_arguments_and_dynamic_shared_memory_are_translated():
    text = translate("k<T, 4><<<dim3(f(a, b), 2), kThreads, n * 4, stream>>>(x, g(y, z)); extern __shared__ float s[];")
    assert "<<<" not in text
    assert "::emulated::launch(dim3(f(a, b), 2),  kThreads,  n * 4, [=] { k<T, 4>(emulated_args...); })" in text
    assert "(x, g(y, z));" in text
    assert "float* s = reinterpret_cast<float*>(::emulated::here.dynamic_shared);" in text
