// Device memory: host memory that is counted, in bytes, against a limit.
//
// Every device storage holds a lease on a host storage. Taking a lease counts its bytes and fails with Gaudi's own
// wording when the limit would be passed, so that code that looks for that text (accelerate) works unchanged.
#pragma once

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/Storage.h>
#include <c10/core/impl/alloc_cpu.h>

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <unordered_set>

namespace hpu_simulator {

inline const c10::Device kDevice(c10::DeviceType::HPU, 0);

// Names follow torch.hpu.memory_stats().
struct MemoryStats {
  uint64_t limit = uint64_t(96) << 30;
  uint64_t in_use = 0;
  uint64_t max_in_use = 0;
  uint64_t num_allocs = 0;
  uint64_t num_frees = 0;
  uint64_t active_allocs = 0;
  uint64_t max_alloc_size = 0;
  uint64_t total_allocs = 0;
  uint64_t total_frees = 0;
};

class DeviceMemory {
 public:
  void take(uint64_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    TORCH_CHECK(
        stats_.in_use + bytes <= stats_.limit,
        "FATAL ERROR :: MODULE:PT_DEVMEM Allocation failed for size::", bytes, " (", bytes >> 20, ")MB; in use ",
        stats_.in_use, " of ", stats_.limit,
        " bytes of the simulated HPU. Use a smaller batch or model, or give the simulator more with --memory.");
    stats_.in_use += bytes;
    stats_.max_in_use = std::max(stats_.max_in_use, stats_.in_use);
    stats_.max_alloc_size = std::max(stats_.max_alloc_size, bytes);
    stats_.num_allocs += 1;
    stats_.total_allocs += 1;
    stats_.active_allocs += 1;
  }

  void give_back(uint64_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    stats_.in_use -= bytes;
    stats_.num_frees += 1;
    stats_.total_frees += 1;
    stats_.active_allocs -= 1;
  }

  void set_limit(uint64_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    stats_.limit = bytes;
  }

  void reset_peak() {
    std::lock_guard<std::mutex> lock(mutex_);
    stats_.max_in_use = stats_.in_use;
  }

  void reset_counts() {
    std::lock_guard<std::mutex> lock(mutex_);
    stats_.num_allocs = 0;
    stats_.num_frees = 0;
  }

  MemoryStats stats() {
    std::lock_guard<std::mutex> lock(mutex_);
    return stats_;
  }

 private:
  std::mutex mutex_;
  MemoryStats stats_;
};

// Leaked on purpose: tensors may outlive static destruction.
inline DeviceMemory& device_memory() {
  static auto* memory = new DeviceMemory();
  return *memory;
}

struct Lease {
  c10::Storage host;
  uint64_t bytes;
};

inline void end_lease(void* context) {
  auto* lease = static_cast<Lease*>(context);
  device_memory().give_back(lease->bytes);
  delete lease;
}

// A device pointer that keeps `host` alive and is counted until it is dropped.
inline c10::DataPtr lease(c10::Storage host) {
  const uint64_t bytes = host.nbytes();
  device_memory().take(bytes);
  void* data = host.mutable_data();
  return c10::DataPtr(data, new Lease{std::move(host), bytes}, &end_lease, kDevice);
}

inline c10::Storage host_storage(size_t bytes) {
  return c10::Storage(c10::Storage::use_byte_size_t(), bytes, c10::GetCPUAllocator(), /*resizable=*/true);
}

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    return lease(host_storage(bytes));
  }
  void copy_data(void* to, const void* from, std::size_t count) const override {
    default_copy_data(to, from, count);
  }
};

inline DeviceAllocator& device_allocator() {
  static auto* allocator = new DeviceAllocator();
  return *allocator;
}

inline c10::Storage device_storage(c10::Storage host) {
  const size_t bytes = host.nbytes();
  return c10::Storage(
      c10::Storage::use_byte_size_t(), bytes, lease(std::move(host)), &device_allocator(), /*resizable=*/true);
}

// Pinned memory is plain host memory that remembers its addresses, so that is_pinned() tells the truth.
class PinnedAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    void* data = c10::alloc_cpu(bytes);
    std::lock_guard<std::mutex> lock(mutex_);
    live_.insert(data);
    return c10::DataPtr(data, data, &release, c10::Device(c10::DeviceType::CPU));
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return &release;
  }
  void copy_data(void* to, const void* from, std::size_t count) const override {
    default_copy_data(to, from, count);
  }
  bool holds(const void* data) {
    std::lock_guard<std::mutex> lock(mutex_);
    return live_.count(const_cast<void*>(data)) > 0;
  }

 private:
  static void release(void* data);
  std::mutex mutex_;
  std::unordered_set<void*> live_;
};

inline PinnedAllocator& pinned_allocator() {
  static auto* allocator = new PinnedAllocator();
  return *allocator;
}

inline void PinnedAllocator::release(void* data) {
  auto& self = pinned_allocator();
  {
    std::lock_guard<std::mutex> lock(self.mutex_);
    self.live_.erase(data);
  }
  c10::free_cpu(data);
}

} // namespace hpu_simulator
