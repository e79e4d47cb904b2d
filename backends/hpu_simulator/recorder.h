// The lazy-graph recorder and the recipe cache.
//
// A segment is what runs between two flushes. Its key is the sequence of operators with their non-float scalars and
// with dtype, shape, stride and storage of their tensors, storages numbered by first appearance in the segment, plus
// the set of written storages that are still alive at the flush (the live outputs). A key seen before is a hit (a
// launch), a new one a miss (a compilation, then a launch). In eager mode every operator is a segment of its own, and
// a compiled region is one segment.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>
#include <c10/core/StorageImpl.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <map>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

namespace hpu_simulator {

using WeakStorage = c10::weak_intrusive_ptr<c10::StorageImpl>;

inline uint64_t mix(uint64_t hash, uint64_t value) {
  hash ^= value + 0x9e3779b97f4a7c15ull + (hash << 6) + (hash >> 2);
  hash *= 0xff51afd7ed558ccdull;
  return hash ^ (hash >> 32);
}

inline uint64_t mix(uint64_t hash, const std::string& text) {
  return mix(hash, std::hash<std::string>{}(text));
}

// A whole-number scalar that travels as a host tensor is a constant of the graph.
inline uint64_t read_integer(const at::Tensor& tensor) {
  uint64_t value = 0;
  std::memcpy(&value, tensor.const_data_ptr(), tensor.element_size());
  return value;
}

struct Recipe {
  uint64_t key;
  uint64_t ops;
  uint64_t live_outputs;
  uint64_t launches;
  std::string first_flush;
  std::vector<const std::string*> names; // owned by the operators' facts, which are never freed
};

struct Counters {
  uint64_t misses = 0;
  uint64_t hits = 0;
  uint64_t launches = 0;
  uint64_t ops = 0;
  uint64_t recipes = 0;
  uint64_t host_reads = 0;
  std::map<std::string, uint64_t> flushes;
};

// One operator call, as the recorder sees it: tensors of the device, before and after.
struct Call {
  const std::string& name; // must outlive the recorder
  const std::vector<bool>& writes;
  c10::ArrayRef<c10::IValue> inputs;
  c10::ArrayRef<c10::IValue> outputs;
};

class Recorder {
 public:
  void configure(bool lazy, uint64_t max_ops) {
    std::lock_guard<std::mutex> lock(mutex_);
    lazy_ = lazy;
    max_ops_ = max_ops;
  }

  // Memory from empty() counts as produced by the segment even though no operator wrote it yet.
  void note_empty(const c10::Storage& storage) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (collecting()) {
      fresh_.emplace(storage.unsafeGetStorageImpl(), storage.getWeakStorageImpl());
    }
  }

  // What comes from the host is an input, not a product, of the segment.
  void note_upload(const c10::Storage& storage) {
    std::lock_guard<std::mutex> lock(mutex_);
    fresh_.erase(storage.unsafeGetStorageImpl());
  }

  void record(const Call& call) {
    std::lock_guard<std::mutex> lock(mutex_);
    counters_.ops += 1;
    add(call);
    if (!collecting()) {
      close("eager");
    } else if (ops_ >= max_ops_) {
      close("max_ops");
    }
  }

  void flush(const char* reason) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (regions_ == 0) {
      close(reason);
    }
  }

  void host_read(const char* reason) {
    std::lock_guard<std::mutex> lock(mutex_);
    counters_.host_reads += 1;
    close(reason);
  }

  void begin_region() {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!lazy_ && regions_ == 0) {
      close("eager");
    }
    regions_ += 1;
  }

  void end_region() {
    std::lock_guard<std::mutex> lock(mutex_);
    regions_ -= 1;
    if (!lazy_ && regions_ == 0) {
      close("region");
    }
  }

  Counters counters() {
    std::lock_guard<std::mutex> lock(mutex_);
    auto copy = counters_;
    copy.recipes = recipes_.size();
    return copy;
  }

  std::vector<Recipe> recipes() {
    std::lock_guard<std::mutex> lock(mutex_);
    return recipes_;
  }

  void reset(bool drop_recipes) {
    std::lock_guard<std::mutex> lock(mutex_);
    counters_ = Counters();
    if (drop_recipes) {
      recipes_.clear();
      index_.clear();
    }
  }

 private:
  struct Seen {
    int id;
    bool written;
    WeakStorage storage;
  };

  bool collecting() const {
    return lazy_ || regions_ > 0;
  }

  void add(const Call& call) {
    ops_ += 1;
    names_.push_back(&call.name);
    hash_ = mix(hash_, call.name);
    for (size_t i = 0; i < call.inputs.size(); ++i) {
      add_value(call.inputs[i], /*produced=*/false, i < call.writes.size() && call.writes[i]);
    }
    for (const auto& output : call.outputs) {
      add_value(output, /*produced=*/true, /*written=*/true);
    }
  }

  void add_value(const c10::IValue& value, bool produced, bool written) {
    if (value.isTensor()) {
      add_tensor(value.toTensor(), produced, written);
    } else if (value.isTensorList() || value.isOptionalTensorList()) {
      for (const c10::IValue& item : value.toListRef()) {
        add_value(item, produced, written);
      }
    } else if (value.isInt()) {
      hash_ = mix(hash_, static_cast<uint64_t>(value.toInt()));
    } else if (value.isBool()) {
      hash_ = mix(hash_, value.toBool() ? 2 : 1);
    } else if (value.isString()) {
      hash_ = mix(hash_, value.toStringRef());
    } else if (value.isIntList()) {
      for (const int64_t item : value.toIntVector()) {
        hash_ = mix(hash_, static_cast<uint64_t>(item));
      }
    } else if (value.isBoolList()) {
      for (const bool item : value.toBoolList()) {
        hash_ = mix(hash_, item ? 2 : 1);
      }
    } else {
      hash_ = mix(hash_, value.isNone() ? 3 : 4); // floats, devices, generators: not part of a recipe
    }
  }

  void add_tensor(const at::Tensor& tensor, bool produced, bool written) {
    if (!tensor.defined()) {
      hash_ = mix(hash_, 5);
      return;
    }
    hash_ = mix(hash_, static_cast<uint64_t>(tensor.scalar_type()));
    for (const int64_t size : tensor.sizes()) {
      hash_ = mix(hash_, static_cast<uint64_t>(size));
    }
    if (tensor.is_hpu() && tensor.has_storage()) {
      add_layout(tensor);
      hash_ = mix(hash_, number(tensor.storage(), produced, written));
    } else if (tensor.is_cpu() && tensor.dim() == 0 && c10::isIntegralType(tensor.scalar_type(), /*bool=*/true)) {
      hash_ = mix(hash_, read_integer(tensor));
    }
  }

  void add_layout(const at::Tensor& tensor) {
    for (const int64_t stride : tensor.strides()) {
      hash_ = mix(hash_, static_cast<uint64_t>(stride));
    }
    hash_ = mix(hash_, static_cast<uint64_t>(tensor.storage_offset()));
  }

  uint64_t number(const c10::Storage& storage, bool produced, bool written) {
    auto* impl = storage.unsafeGetStorageImpl();
    auto found = seen_.find(impl);
    if (found == seen_.end()) {
      const bool made_here = produced || fresh_.count(impl) > 0;
      hash_ = mix(hash_, made_here ? 6 : 7);
      const int id = static_cast<int>(seen_.size());
      found = seen_.emplace(impl, Seen{id, false, storage.getWeakStorageImpl()}).first;
    }
    found->second.written |= written;
    return static_cast<uint64_t>(found->second.id) + 8;
  }

  std::vector<int> live_outputs() const {
    std::vector<int> ids;
    for (const auto& entry : seen_) {
      if (entry.second.written && entry.second.storage.use_count() > 0) {
        ids.push_back(entry.second.id);
      }
    }
    std::sort(ids.begin(), ids.end());
    return ids;
  }

  void close(const std::string& reason) {
    if (ops_ > 0) {
      launch(reason);
    }
    hash_ = 0;
    ops_ = 0;
    names_.clear();
    seen_.clear();
    fresh_.clear();
  }

  void launch(const std::string& reason) {
    const auto live = live_outputs();
    for (const int id : live) {
      hash_ = mix(hash_, static_cast<uint64_t>(id) + 8);
    }
    const auto found = index_.find(hash_);
    if (found == index_.end()) {
      counters_.misses += 1;
      index_.emplace(hash_, recipes_.size());
      recipes_.push_back(Recipe{hash_, ops_, live.size(), 1, reason, names_});
    } else {
      counters_.hits += 1;
      recipes_[found->second].launches += 1;
    }
    counters_.launches += 1;
    counters_.flushes[reason] += 1;
  }

  std::mutex mutex_;
  bool lazy_ = true;
  uint64_t max_ops_ = std::numeric_limits<uint64_t>::max();
  int regions_ = 0;
  uint64_t hash_ = 0;
  uint64_t ops_ = 0;
  std::vector<const std::string*> names_;
  std::unordered_map<c10::StorageImpl*, Seen> seen_;
  std::unordered_map<c10::StorageImpl*, WeakStorage> fresh_;
  std::unordered_map<uint64_t, size_t> index_;
  std::vector<Recipe> recipes_;
  Counters counters_;
};

inline Recorder& recorder() {
  static auto* instance = new Recorder();
  return *instance;
}

} // namespace hpu_simulator
