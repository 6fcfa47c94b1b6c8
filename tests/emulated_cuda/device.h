// What a kernel sees of the device that runs it: where it is, and how it waits for others. device.cpp has the rest.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace emulated {

constexpr int kWarp = 32;

struct Thread {
  dim3 index;
  unsigned linear = 0;
};
struct Here {  // of the block that this thread of the CPU runs
  dim3 grid, block, index;
  const Thread* self = nullptr;
  unsigned char* dynamic_shared = nullptr;
};
extern constinit thread_local Here here;

struct alignas(16) LaneValue {
  uint64_t words[2];
};

// Runs the kernel's grid to its end. Throws std::runtime_error for a grid or block that CUDA refuses.
void launch(dim3 grid, dim3 block, size_t dynamic_shared, const std::function<void()>& kernel);
// Waits for the block's threads that have not ended; how many of them voted.
int sync_block(bool vote);
// Waits for the lanes of the mask; what each of them gave, to be read before the lane's next but one call.
const LaneValue* sync_warp(unsigned mask, const LaneValue& value, bool orders_memory);
// A copy to shared memory, or zeros there, at once or not before the thread waits for it: EMULATED_CUDA_COPIES=early or
// =late, else the seed, decides for the block. A kernel that is right with both neither reads too early nor overwrites.
void copy_async(void* to, const void* from, unsigned bytes, bool zeros);
// The thread's copies since the last commit are a group.
void commit_copies();
// Until all of the thread's groups but the last `pending` are done.
void wait_for_copies(size_t pending);
// Rows of ldmatrix that wait for another's bank; emulated_cuda_conflicts() gives how many since it was last asked.
void count_conflicts(unsigned n);
// Lets others run. A loop that waits for another block must call it: that is how a deadlock is told from work.
void sleep();
// Ends the process with a message that names block and thread.
[[noreturn]] void fail(const char* what);

}  // namespace emulated
