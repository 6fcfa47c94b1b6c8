// ThreadSanitizer's view of the device: every CUDA thread is a fiber of its own, and nothing orders memory between them but
// what does in CUDA. Without EMULATED_CUDA_TSAN all of it is nothing.
#pragma once

namespace emulated::tsan {

#ifdef EMULATED_CUDA_TSAN
extern "C" {
void* __tsan_create_fiber(unsigned);
void* __tsan_get_current_fiber();
void __tsan_switch_to_fiber(void*, unsigned);
void __tsan_acquire(void*);
void __tsan_release(void*);
// A volatile access is a relaxed atomic one in CUDA: no race, and no order for other memory.
#define EMULATED_VOLATILE(size)                   \
  void __tsan_volatile_read##size(void*) {}       \
  void __tsan_volatile_write##size(void*) {}      \
  void __tsan_unaligned_volatile_read##size(void*) {} \
  void __tsan_unaligned_volatile_write##size(void*) {}
EMULATED_VOLATILE(1)
EMULATED_VOLATILE(2)
EMULATED_VOLATILE(4)
EMULATED_VOLATILE(8)
EMULATED_VOLATILE(16)
#undef EMULATED_VOLATILE
}
inline void* new_fiber() { return __tsan_create_fiber(0); }
inline void* current_fiber() { return __tsan_get_current_fiber(); }
inline void switch_to(void* fiber) { __tsan_switch_to_fiber(fiber, 1); }  // 1: the switch itself orders nothing
inline void acquire(void* address) { __tsan_acquire(address); }
inline void release(void* address) { __tsan_release(address); }
#else
inline void* new_fiber() { return nullptr; }
inline void* current_fiber() { return nullptr; }
inline void switch_to(void*) {}
inline void acquire(void*) {}
inline void release(void*) {}
#endif

}  // namespace emulated::tsan
