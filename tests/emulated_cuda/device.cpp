// The device: blocks run at the same time, each on a thread of the CPU, and every thread of a block is a fiber. Barriers and
// warp operations wait for exactly the threads that CUDA would wait for. EMULATED_CUDA_BLOCKS (4) are resident at a time,
// started in an order that EMULATED_CUDA_SEED (1) shuffles; EMULATED_CUDA_ORDER=forward or =reverse fixes the order of the
// threads within them, which is else the seed's too. This file is never instrumented: a sanitiser sees what kernels do, and
// through tsan.h what orders it.
#include "device.h"

#include "tsan.h"

#include <link.h>
#include <sched.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace emulated {

constinit thread_local Here here;

namespace {

constexpr size_t kStack = 128 << 10, kShared = 227 << 10;
constexpr unsigned kMaxThreads = 1024;
constexpr int kUndefined = 0xa5;    // what shared memory is full of when a block starts
constexpr int kPatience = 1000;     // rounds in which all threads of a block only slept, before it counts as stuck
constexpr uint64_t kEnded = ~uint64_t{0};

// Puts the callee-saved registers on this stack, leaves its pointer in *save and goes on where `load` was left.
#if !defined(__x86_64__)
#error "the emulator switches stacks with x86-64 instructions"
#endif
constexpr int kSavedRegisters = 6;
__attribute__((naked, noinline)) void switch_stack(void** save, void* load) {
  asm("push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
      "mov %rsp, (%rdi)\n mov %rsi, %rsp\n"
      "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret");
}

struct Barrier {
  unsigned arrived = 0;
  uint64_t generation = 0;
  int votes[2] = {};   // of either parity of the generation
  char order[2] = {};  // addresses by which ThreadSanitizer knows what the barrier orders
};
struct WarpSlot {  // one for each mask that a warp has used
  unsigned mask;
  Barrier barrier;
  LaneValue value[2][kWarp];
};
struct Copy {
  void* to;
  const void* from;
  unsigned bytes;
  bool zeros;
};
struct Fiber : Thread {
  std::vector<std::vector<Copy>> groups;  // copies that are still to come; the last group is not committed
  void* stack_pointer = nullptr;
  void* tsan = nullptr;
  bool done = false, slept = false;
  const Barrier* waits_for = nullptr;
  uint64_t generation = 0;
};
// Reserved, and taken from the system only where it is touched.
char* reserve(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  return static_cast<char*>(p);
}
struct Block {  // the place of a resident block: one block after another uses it
  std::vector<Fiber> fibers;
  std::vector<std::deque<WarpSlot>> warps;
  Barrier barrier;
  unsigned live = 0;
  bool late_copies = false;
  Fiber* self = nullptr;
  const std::function<void()>* kernel = nullptr;
  void *scheduler = nullptr, *scheduler_tsan = nullptr;
  char started, ended;  // two addresses for tsan.h: what came before the block, and what comes after it
  char* stacks = reserve(kMaxThreads * kStack);
  alignas(128) unsigned char dynamic_shared[kShared];
};
constinit thread_local Block* resident = nullptr;

// Tells a deadlock between blocks from waiting: each of them has polled in vain since the last time that any got on.
class Watch {
 public:
  explicit Watch(size_t workers) : stuck_(workers) {}
  uint64_t now() const { return progress_; }
  void got_on() { ++progress_; }
  void ended(size_t worker) { stuck_[worker] = kEnded, got_on(); }
  bool deadlock(size_t worker, uint64_t since) {
    stuck_[worker] = since;
    const uint64_t progress = progress_;
    return std::all_of(stuck_.begin(), stuck_.end(), [&](uint64_t s) { return s == progress || s == kEnded; });
  }

 private:
  std::atomic<uint64_t> progress_{1};
  std::vector<std::atomic<uint64_t>> stuck_;
};

void perform(std::vector<Copy>& copies) {
  for (const Copy& c : copies) c.zeros ? memset(c.to, 0, c.bytes) : memcpy(c.to, c.from, c.bytes);
  copies.clear();
}

void back_to_scheduler() {
  Block& b = *resident;
  tsan::switch_to(b.scheduler_tsan);
  switch_stack(&b.self->stack_pointer, b.scheduler);
}

void open(Barrier& b) {
  b.arrived = 0;
  b.votes[++b.generation & 1] = 0;  // whoever read its last votes has arrived here since
}
void wait(Barrier& b, unsigned expected, bool orders_memory) {
  const uint64_t parity = b.generation & 1;
  if (orders_memory) tsan::release(&b.order[parity]);
  if (++b.arrived == expected) {
    open(b);
  } else {
    resident->self->waits_for = &b;
    resident->self->generation = b.generation;
    back_to_scheduler();
  }
  if (orders_memory) tsan::acquire(&b.order[parity]);
}

void fiber_main() {
  Block& b = *resident;
  tsan::acquire(&b.started);
  (*b.kernel)();
  tsan::release(&b.ended);
  b.self->done = true;
  --b.live;
  if (b.live > 0 && b.barrier.arrived == b.live) open(b.barrier);  // threads that have ended count as arrived
  back_to_scheduler();
}

// Static shared memory is the thread-local memory of the library or program that this file is linked into. Only the first
// block on a thread finds it so, the others what the one before has left.
void fill_static_shared() {
  const Here kept_here = here;
  Block* const kept_resident = resident;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void*) {
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          if (info->dlpi_phdr[i].p_type != PT_TLS || info->dlpi_tls_data == nullptr) continue;
          const auto begin = static_cast<char*>(info->dlpi_tls_data), address = reinterpret_cast<char*>(&here);
          const size_t size = info->dlpi_phdr[i].p_memsz;
          if (begin <= address && address < begin + size) memset(begin, kUndefined, size);
        }
        return 0;
      },
      nullptr);
  here = kept_here;
  resident = kept_resident;
}

void start(Block& b) {
  const unsigned threads = here.block.x * here.block.y * here.block.z;
  if (b.fibers.size() < threads) b.fibers.resize(threads);
  b.warps.assign((threads + kWarp - 1) / kWarp, {});
  b.barrier = {};
  b.live = threads;
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& f = b.fibers[i];
    void* const context = f.tsan ? f.tsan : tsan::new_fiber();
    f = {};
    f.linear = i;
    f.index = dim3(i % here.block.x, i / here.block.x % here.block.y, i / here.block.x / here.block.y);
    f.tsan = context;
    void** top = reinterpret_cast<void**>(b.stacks + (i + 1) * kStack - 16);
    *--top = nullptr;                                // where fiber_main would return to: it never does
    *--top = reinterpret_cast<void*>(&fiber_main);  // where switch_stack returns to
    f.stack_pointer = top - kSavedRegisters;
  }
}

// Rounds over the threads, each from the first to the last or the other way: what comes out wrong in one of the two lacks
// a barrier. One warp, or none, gets on only where no other one does: what must not overtake it has to wait for it.
void run(Block& b, unsigned seed, Watch& watch, size_t worker) {
  const char *const fixed = getenv("EMULATED_CUDA_ORDER"), *const copies = getenv("EMULATED_CUDA_COPIES");
  std::minstd_rand random(seed);
  b.late_copies = copies ? *copies == 'l' : random() >> 8 & 1;
  start(b);
  tsan::release(&b.started);
  const unsigned threads = b.live, laggard = random() % (b.warps.size() + 1);
  const bool may_lag = !fixed && b.warps.size() > 1;
  bool others_got_on = may_lag;
  for (int in_vain = 0; b.live > 0;) {
    const uint64_t now = watch.now();
    const bool reverse = fixed ? *fixed == 'r' : random() >> 8 & 1;
    bool got_on = false, slept = false, others = false;
    for (unsigned k = 0; k < threads; ++k) {
      Fiber& f = b.fibers[reverse ? threads - 1 - k : k];
      if (f.done || (f.waits_for && f.waits_for->generation == f.generation)) continue;
      if (others_got_on && f.linear / kWarp == laggard) continue;
      f.waits_for = nullptr, f.slept = false;
      here.self = b.self = &f;
      tsan::switch_to(f.tsan);
      switch_stack(&b.scheduler, f.stack_pointer);
      (f.slept ? slept : got_on) = true;
      others |= !f.slept && f.linear / kWarp != laggard;
    }
    if (got_on) {
      watch.got_on();
      in_vain = 0;
    } else if (others_got_on) {  // the laggard's turn
    } else if (!slept) {
      fail("deadlock: some threads wait at a barrier or warp operation that the others never reach");
    } else if (++in_vain > kPatience && watch.deadlock(worker, now)) {
      fail("deadlock: every resident block waits for one that cannot start before it ends");
    } else {
      sched_yield();
    }
    others_got_on = may_lag && others;
  }
  tsan::acquire(&b.ended);
}

unsigned setting(const char* name, unsigned otherwise) {
  const char* const text = getenv(name);
  return text ? static_cast<unsigned>(std::max(1, atoi(text))) : otherwise;
}

}  // namespace

void launch(dim3 grid, dim3 block, size_t dynamic_shared, const std::function<void()>& kernel) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  const auto check = [](bool good, const char* what) {
    if (!good) throw std::runtime_error(std::string("emulated CUDA: bad ") + what);
  };
  check(grid.x > 0 && grid.x < 1u << 31 && grid.y > 0 && grid.z > 0 && grid.y < 65536 && grid.z < 65536, "grid");
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  check(threads > 0 && threads <= kMaxThreads && block.z <= 64, "block");
  check(dynamic_shared <= kShared, "size of shared memory");

  const unsigned seed = setting("EMULATED_CUDA_SEED", 1);
  std::vector<size_t> order(size_t{grid.x} * grid.y * grid.z);
  std::iota(order.begin(), order.end(), size_t{0});
  std::shuffle(order.begin(), order.end(), std::mt19937(seed));
  const size_t workers = std::min<size_t>(setting("EMULATED_CUDA_BLOCKS", 4), order.size());
  static std::deque<Block> places;
  while (places.size() < workers) places.emplace_back();

  Watch watch(workers);
  std::atomic<size_t> next{0};
  const auto work = [&](size_t worker) {
    Block& b = *(resident = &places[worker]);
    b.kernel = &kernel;
    b.scheduler_tsan = tsan::current_fiber();
    here = {grid, block, {}, nullptr, b.dynamic_shared};
    fill_static_shared();
    for (size_t i; (i = next++) < order.size();) {
      const size_t n = order[i];
      here.index = dim3(n % grid.x, n / grid.x % grid.y, n / grid.x / grid.y);
      memset(b.dynamic_shared, kUndefined, dynamic_shared);
      run(b, seed + n, watch, worker);
    }
    watch.ended(worker);
  };
  std::vector<std::thread> pool;
  for (size_t worker = 0; worker < workers; ++worker) pool.emplace_back(work, worker);
  for (std::thread& t : pool) t.join();
}

int sync_block(bool vote) {
  Barrier& b = resident->barrier;
  const uint64_t parity = b.generation & 1;
  b.votes[parity] += vote;
  wait(b, resident->live, true);
  return b.votes[parity];
}

const LaneValue* sync_warp(unsigned mask, const LaneValue& value, bool orders_memory) {
  const unsigned linear = here.self->linear, lane = linear % kWarp;
  if (!(mask >> lane & 1)) fail("a warp operation whose mask leaves out the calling lane");
  auto& slots = resident->warps[linear / kWarp];
  const auto found = std::find_if(slots.begin(), slots.end(), [&](const WarpSlot& s) { return s.mask == mask; });
  WarpSlot& slot = found == slots.end() ? slots.emplace_back(WarpSlot{mask, {}, {}}) : *found;
  const uint64_t parity = slot.barrier.generation & 1;
  slot.value[parity][lane] = value;
  wait(slot.barrier, std::popcount(mask), orders_memory);
  return slot.value[parity];
}

void copy_async(void* to, const void* from, unsigned bytes, bool zeros) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % bytes) fail("a misaligned copy");
  auto& groups = resident->self->groups;
  if (groups.empty()) groups.emplace_back();
  groups.back().push_back({to, from, bytes, zeros});
  if (!resident->late_copies) perform(groups.back());
}

void commit_copies() { resident->self->groups.emplace_back(); }

void wait_for_copies(size_t pending) {
  auto& groups = resident->self->groups;
  for (; groups.size() > pending + 1; groups.erase(groups.begin())) perform(groups.front());
}

std::atomic<uint64_t> conflicts{0};
void count_conflicts(unsigned n) {
  if (n > 0) conflicts += n;
}
extern "C" uint64_t emulated_cuda_conflicts() { return conflicts.exchange(0); }

void sleep() {
  resident->self->slept = true;
  back_to_scheduler();
}

void fail(const char* what) {
  fprintf(stderr, "emulated CUDA, block (%u, %u, %u), thread %u: %s\n", here.index.x, here.index.y, here.index.z,
          here.self ? here.self->linear : 0, what);
  abort();
}

}  // namespace emulated
