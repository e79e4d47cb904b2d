// Every operator of the device, run by the CPU's kernel on the same memory.
//
// One boxed function serves the whole HPU dispatch key. It gives each device tensor a *shadow*: a CPU tensor on the
// same pointer. The CPU kernel runs on the shadows; its results are brought back by identity: a shadow returned is the
// tensor it stands for, a tensor on a shadow's storage is a view, anything else is new device memory. What the kernel
// did to a shadow's shape or storage (resize_, set_, out=) is copied to the tensor it stands for.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/enum_tag.h>
#include <ATen/core/stack.h>
#include <torch/library.h>

#include <memory>
#include <optional>
#include <shared_mutex>
#include <unordered_set>

#include "device.h"
#include "recorder.h"

namespace hpu_simulator {

using c10::IValue;
using torch::jit::Stack;

inline void DeviceGuard::synchronizeDevice(const c10::DeviceIndex) const {
  recorder().flush("synchronize");
}

// What the fallback has to know of an operator, looked up once per operator.
struct OpFacts {
  std::string name;
  std::vector<bool> writes;
  int generator = -1;
  bool records = true;
  bool pointwise = false;
  bool seeded = false;
  bool mixes_devices = false;
  bool indexes = false;
  const char* host_read = nullptr;
};

inline bool is_one_of(const std::string& name, std::initializer_list<const char*> names) {
  return std::any_of(names.begin(), names.end(), [&](const char* each) { return name == each; });
}

inline bool returns_view(const c10::FunctionSchema& schema) {
  return std::any_of(schema.returns().begin(), schema.returns().end(), [](const c10::Argument& out) {
    return out.alias_info() != nullptr && !out.alias_info()->isWrite();
  });
}

// Changes what a tensor is, not what it holds: no work for the device.
inline bool only_metadata(const std::string& name) {
  return is_one_of(
      name,
      {"aten::resize_", "aten::set_", "aten::as_strided_", "aten::transpose_", "aten::t_", "aten::squeeze_",
       "aten::unsqueeze_", "aten::swapaxes_", "aten::swapdims_", "aten::_resize_output_", "aten::is_set_to"});
}

// Operators that take host tensors next to device tensors, as indices or as lengths.
inline bool allows_host_operands(const std::string& name) {
  return is_one_of(
      name,
      {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index",
       "aten::_unsafe_index_put", "aten::_pack_padded_sequence", "aten::_ctc_loss", "aten::_ctc_loss_backward",
       "aten::_copy_from", "aten::_copy_from_and_resize", "aten::set_"});
}

inline const char* host_read_reason(const c10::OperatorHandle& op, const std::string& name) {
  if (name == "aten::_local_scalar_dense") {
    return "item";
  }
  if (name == "aten::equal" || op.hasTag(at::Tag::data_dependent_output)) {
    return "item";
  }
  return op.hasTag(at::Tag::dynamic_output_shape) ? "dynamic_shape" : nullptr;
}

inline OpFacts learn(const c10::OperatorHandle& op) {
  const auto& schema = op.schema();
  OpFacts facts;
  facts.name = schema.name();
  for (size_t i = 0; i < schema.arguments().size(); ++i) {
    const auto& argument = schema.arguments()[i];
    facts.writes.push_back(argument.alias_info() != nullptr && argument.alias_info()->isWrite());
    if (argument.name() == "generator") {
      facts.generator = static_cast<int>(i);
    }
  }
  facts.records = !returns_view(schema) && !only_metadata(facts.name);
  facts.pointwise = op.hasTag(at::Tag::pointwise);
  facts.seeded = op.hasTag(at::Tag::nondeterministic_seeded);
  facts.mixes_devices = allows_host_operands(facts.name);
  facts.indexes = is_one_of(facts.name, {"aten::index", "aten::_unsafe_index"});
  facts.host_read = host_read_reason(op, facts.name);
  if (!schema.overload_name().empty()) {
    facts.name += "." + schema.overload_name();
  }
  return facts;
}

inline const OpFacts& facts_of(const c10::OperatorHandle& op) {
  static auto* known = new std::unordered_map<const void*, std::unique_ptr<OpFacts>>();
  static auto* mutex = new std::shared_mutex();
  const void* key = &op.schema();
  {
    std::shared_lock<std::shared_mutex> lock(*mutex);
    const auto found = known->find(key);
    if (found != known->end()) {
      return *found->second;
    }
  }
  std::unique_lock<std::shared_mutex> lock(*mutex);
  auto& slot = (*known)[key];
  if (!slot) {
    slot = std::make_unique<OpFacts>(learn(op));
  }
  return *slot;
}

// One call's mapping between device tensors and their shadows.
class Shadows {
 public:
  IValue lower(const IValue& value) {
    if (value.isTensor()) {
      return IValue(lower(value.toTensor()));
    }
    if (value.isTensorList()) {
      return lower_list<c10::List<at::Tensor>>(value.toTensorList());
    }
    if (value.isOptionalTensorList()) {
      return lower_list<c10::List<std::optional<at::Tensor>>>(value.toOptionalTensorList());
    }
    if (value.isDevice() && value.toDevice().is_hpu()) {
      return IValue(c10::Device(c10::DeviceType::CPU));
    }
    if (value.isGenerator()) {
      return IValue(host_generator(value.toGenerator()));
    }
    if (value.isStorage() && value.toStorage().device().is_hpu()) {
      return IValue(shadow_storage(value.toStorage()));
    }
    return value;
  }

  IValue lift(const IValue& value, bool contiguous) {
    if (value.isTensor()) {
      return IValue(lift(value.toTensor(), contiguous));
    }
    if (value.isTensorList()) {
      c10::List<at::Tensor> items;
      for (const at::Tensor& item : value.toTensorVector()) {
        items.push_back(lift(item, contiguous));
      }
      return IValue(std::move(items));
    }
    return value;
  }

  // Copies to the device tensors what the kernel changed on their shadows.
  void write_back() {
    for (auto& pair : storages_) {
      if (pair.second.shadow.data() != pair.second.pointer || pair.second.shadow.nbytes() != pair.second.bytes) {
        adopt(pair.second);
      }
    }
    for (auto& pair : tensors_) {
      follow(pair.first, pair.second);
    }
  }

  bool has_device_tensor() const {
    return !tensors_.empty();
  }

 private:
  struct StoragePair {
    c10::Storage device;
    c10::Storage shadow;
    const void* pointer;
    size_t bytes;
  };

  static at::Generator host_generator(const at::Generator& generator) {
    if (!generator.defined() || !generator.device().is_hpu()) {
      return generator;
    }
    return static_cast<DeviceGenerator*>(generator.unsafeGetGeneratorImpl())->host;
  }

  template <typename List>
  IValue lower_list(const List& list) {
    List lowered;
    lowered.reserve(list.size());
    for (size_t i = 0; i < list.size(); ++i) {
      lowered.push_back(lower_item(list.get(i)));
    }
    return IValue(std::move(lowered));
  }

  at::Tensor lower_item(const at::Tensor& item) {
    return lower(item);
  }
  std::optional<at::Tensor> lower_item(const std::optional<at::Tensor>& item) {
    return item.has_value() ? std::optional<at::Tensor>(lower(*item)) : item;
  }

  at::Tensor lower(const at::Tensor& tensor) {
    if (!tensor.defined() || !tensor.is_hpu()) {
      return tensor;
    }
    for (const auto& pair : tensors_) {
      if (pair.first.is_same(tensor)) {
        return pair.second;
      }
    }
    auto shadow = tensor_on(shadow_storage(tensor.storage()), c10::DispatchKey::CPU, tensor);
    if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) {
      shadow.unsafeGetTensorImpl()->set_wrapped_number(true);
    }
    tensors_.emplace_back(tensor, shadow);
    return shadow;
  }

  static at::Tensor tensor_on(c10::Storage storage, c10::DispatchKey key, const at::Tensor& like) {
    c10::DispatchKeySet keys(key);
    if (like._is_zerotensor()) {
      keys = keys.add(c10::DispatchKey::ZeroTensor);
    }
    auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), keys, like.dtype());
    made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
    if (like.is_conj()) {
      made._set_conj(true);
    }
    if (like.is_neg()) {
      made._set_neg(true);
    }
    return made;
  }

  c10::Storage shadow_storage(const c10::Storage& storage) {
    auto* impl = storage.unsafeGetStorageImpl();
    for (const auto& pair : storages_) {
      if (pair.first == impl) {
        return pair.second.shadow;
      }
    }
    void* data = storage.mutable_data();
    c10::Storage shadow(
        c10::Storage::use_byte_size_t(),
        storage.nbytes(),
        c10::DataPtr(data, c10::Device(c10::DeviceType::CPU)),
        c10::GetCPUAllocator(),
        storage.resizable());
    storages_.emplace_back(impl, StoragePair{storage, shadow, data, storage.nbytes()});
    return shadow;
  }

  // The device storage standing behind a host storage; null when it is new or the caller's own host memory.
  const c10::Storage* device_side(const c10::Storage& host) const {
    for (const auto& pair : storages_) {
      if (pair.second.shadow.is_alias_of(host)) {
        return &pair.second.device;
      }
    }
    return nullptr;
  }

  at::Tensor lift(const at::Tensor& host, bool contiguous) {
    if (!host.defined() || !host.is_cpu() || !host.has_storage()) {
      return host;
    }
    for (const auto& pair : tensors_) {
      if (pair.second.is_same(host)) {
        return pair.first;
      }
    }
    const c10::Storage* known = device_side(host.storage());
    if (known != nullptr) {
      return tensor_on(*known, c10::DispatchKey::HPU, host);
    }
    const auto dense = contiguous ? host.contiguous() : host;
    auto storage = device_storage(dense.storage());
    storages_.emplace_back(
        storage.unsafeGetStorageImpl(),
        StoragePair{storage, dense.storage(), dense.storage().data(), dense.storage().nbytes()});
    return tensor_on(storage, c10::DispatchKey::HPU, dense);
  }

  static void adopt(StoragePair& pair) {
    const size_t bytes = pair.shadow.nbytes();
    pair.device.set_data_ptr(lease(pair.shadow));
    pair.device.set_nbytes(bytes);
    pair.pointer = pair.shadow.data();
    pair.bytes = bytes;
  }

  void follow(const at::Tensor& tensor, const at::Tensor& shadow) {
    auto* impl = tensor.unsafeGetTensorImpl();
    if (shadow.has_storage()) {
      const c10::Storage* storage = device_side(shadow.storage());
      if (storage == nullptr) {
        impl->set_storage_keep_dtype(device_storage(shadow.storage()));
      } else if (!storage->is_alias_of(tensor.storage())) {
        impl->set_storage_keep_dtype(*storage);
      }
    }
    if (tensor.sizes() != shadow.sizes() || tensor.strides() != shadow.strides() ||
        tensor.storage_offset() != shadow.storage_offset()) {
      impl->set_sizes_and_strides(shadow.sizes(), shadow.strides(), shadow.storage_offset());
    }
  }

  std::vector<std::pair<at::Tensor, at::Tensor>> tensors_;
  std::vector<std::pair<c10::StorageImpl*, StoragePair>> storages_;
};

// The CPU's default generator borrowed for an operator that draws from it without naming it.
class BorrowedHostGenerator {
 public:
  explicit BorrowedHostGenerator(bool needed) {
    if (needed) {
      host_ = at::detail::getDefaultCPUGenerator();
      saved_ = host_.get_state();
      host_.set_state(at::Tensor(default_generator().unsafeGetGeneratorImpl()->get_state()));
    }
  }
  ~BorrowedHostGenerator() {
    if (host_.defined()) {
      default_generator().unsafeGetGeneratorImpl()->set_state(*host_.get_state().unsafeGetTensorImpl());
      host_.set_state(saved_);
    }
  }

 private:
  at::Generator host_;
  at::Tensor saved_;
};

inline void check_device(const at::Tensor& tensor, bool written, const std::string& name) {
  if (tensor.defined() && tensor.is_cpu() && (tensor.dim() > 0 || written)) {
    TORCH_CHECK(
        false, "Expected all tensors to be on the same device, but found at least two devices, hpu:0 and cpu! (when "
        "checking the arguments of ", name, ")");
  }
}

inline void check_devices(const OpFacts& facts, c10::ArrayRef<IValue> inputs) {
  if (facts.mixes_devices) {
    TORCH_CHECK(
        !inputs[0].isTensor() || !inputs[0].toTensor().is_cpu() || facts.name.find("_copy_from") != std::string::npos,
        "indices should be either on cpu or on the same device as the indexed tensor (cpu)");
    return;
  }
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (inputs[i].isTensor()) {
      check_device(inputs[i].toTensor(), facts.writes[i], facts.name);
    } else if (inputs[i].isTensorList()) {
      for (const at::Tensor& tensor : inputs[i].toTensorVector()) {
        check_device(tensor, facts.writes[i], facts.name);
      }
    }
  }
}

inline std::vector<IValue> pop_arguments(const c10::OperatorHandle& op, Stack* stack) {
  const size_t count = op.schema().arguments().size();
  const auto arguments = torch::jit::last(*stack, count);
  std::vector<IValue> inputs(arguments.begin(), arguments.end());
  torch::jit::drop(*stack, count);
  return inputs;
}

inline void call_on_host(const c10::OperatorHandle& kernel, bool borrow_generator, Stack* stack) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCPU);
  BorrowedHostGenerator generator(borrow_generator);
  kernel.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
}

// Runs `kernel`, `op` itself or the operator that does its work on the CPU, on the shadows of op's arguments.
// `arrange` may change the lowered arguments where the two operators differ.
template <typename Arrange>
void run_on_shadows(const c10::OperatorHandle& op, const c10::OperatorHandle& kernel, Stack* stack, Arrange arrange) {
  const OpFacts& facts = facts_of(op);
  const auto inputs = pop_arguments(op, stack);
  Shadows shadows;
  Stack lowered;
  for (const IValue& input : inputs) {
    lowered.push_back(shadows.lower(input));
  }
  if (shadows.has_device_tensor()) {
    check_devices(facts, inputs);
  }
  if (facts.generator >= 0 && inputs[facts.generator].isNone()) {
    lowered[facts.generator] = shadows.lower(IValue(default_generator()));
  }
  arrange(lowered);
  call_on_host(kernel, facts.seeded && facts.generator < 0, &lowered);
  shadows.write_back();
  std::vector<IValue> outputs;
  for (const IValue& output : lowered) {
    outputs.push_back(shadows.lift(output, facts.pointwise));
  }
  if (facts.records && facts.name != "aten::_local_scalar_dense") {
    recorder().record(Call{facts.name, facts.writes, inputs, outputs});
  }
  for (IValue& output : outputs) {
    stack->push_back(std::move(output));
  }
}

// Indexing has a shape that depends on data only when an index is a mask.
inline bool indexes_by_mask(const std::vector<IValue>& inputs) {
  for (const IValue& each : inputs[1].toListRef()) {
    if (each.isTensor() && each.toTensor().defined() &&
        (each.toTensor().scalar_type() == at::kBool || each.toTensor().scalar_type() == at::kByte)) {
      return true;
    }
  }
  return false;
}

inline bool reads_on_host(const c10::OperatorHandle& op, const OpFacts& facts, const Stack& stack) {
  if (facts.host_read == nullptr || !facts.indexes) {
    return facts.host_read != nullptr;
  }
  const auto arguments = torch::jit::last(stack, op.schema().arguments().size());
  return indexes_by_mask(std::vector<IValue>(arguments.begin(), arguments.end()));
}

inline void fallback(const c10::OperatorHandle& op, Stack* stack) {
  const OpFacts& facts = facts_of(op);
  const bool reads = reads_on_host(op, facts, *stack);
  run_on_shadows(op, op, stack, [](Stack&) {});
  if (reads) {
    recorder().host_read(facts.host_read);
  }
}

inline c10::OperatorHandle find_op(const char* name, const char* overload) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, overload);
}

inline at::Tensor host_view(const at::Tensor& tensor) {
  Shadows shadows;
  return shadows.lower(IValue(tensor)).toTensor();
}

// Host to device feeds the graph, device to host ends it, device to device is work for the device.
inline at::Tensor copy_from(const at::Tensor& source, const at::Tensor& target, bool) {
  if (target.is_cpu()) {
    recorder().host_read("copy_to_host");
  }
  {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    host_view(target).copy_(host_view(source));
  }
  if (source.is_cpu()) {
    recorder().note_upload(target.storage());
  } else if (target.is_hpu()) {
    static const std::string name = "aten::_copy_from";
    static const std::vector<bool> writes{false, true};
    const std::vector<IValue> inputs{IValue(source), IValue(target)};
    recorder().record(Call{name, writes, inputs, {}});
  }
  return target;
}

inline at::Tensor copy_from_and_resize(const at::Tensor& source, const at::Tensor& target) {
  if (target.sizes() != source.sizes()) {
    static const auto resize = find_op("aten::resize_", "").typed<const at::Tensor&(
        const at::Tensor&, c10::SymIntArrayRef, std::optional<at::MemoryFormat>)>();
    resize.call(target, source.sym_sizes(), std::nullopt);
  }
  return copy_from(source, target, false);
}

inline void refuse_another(std::optional<at::Device> device) {
  if (device) {
    DeviceGuard().setDevice(*device);
  }
}

inline at::Tensor noted(at::TensorBase made) {
  recorder().note_empty(made.storage());
  return at::Tensor(std::move(made));
}

inline at::Tensor empty(
    c10::SymIntArrayRef size,
    std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>,
    std::optional<at::Device> device,
    std::optional<bool>,
    std::optional<at::MemoryFormat> format) {
  refuse_another(device);
  return noted(at::detail::empty_generic(
      C10_AS_INTARRAYREF_SLOW(size), &device_allocator(), c10::DispatchKeySet(c10::DispatchKey::HPU),
      c10::dtype_or_default(dtype), format));
}

inline at::Tensor empty_strided(
    c10::SymIntArrayRef size,
    c10::SymIntArrayRef stride,
    std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>,
    std::optional<at::Device> device,
    std::optional<bool>) {
  refuse_another(device);
  return noted(at::detail::empty_strided_generic(
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &device_allocator(),
      c10::DispatchKeySet(c10::DispatchKey::HPU), c10::dtype_or_default(dtype)));
}

// Plain attention: the fused kernel of the hardware is a module of its own (hpex.kernels.FusedSDPA).
inline void choose_math_attention(const c10::OperatorHandle& op, Stack* stack) {
  torch::jit::drop(*stack, op.schema().arguments().size());
  stack->push_back(IValue(int64_t(0)));
}

// PyTorch sends the convolutions of devices it does not know to the two "overrideable" operators.
inline void convolution(const c10::OperatorHandle& op, Stack* stack) {
  static const auto kernel = find_op("aten::convolution", "");
  run_on_shadows(op, kernel, stack, [](Stack&) {});
}

inline void convolution_backward(const c10::OperatorHandle& op, Stack* stack) {
  static const auto kernel = find_op("aten::convolution_backward", "");
  run_on_shadows(op, kernel, stack, [](Stack& lowered) {
    const auto grad_output = lowered[0].toTensor();
    lowered.insert(lowered.begin() + 3, IValue(std::vector<int64_t>{grad_output.size(1)}));
  });
}

} // namespace hpu_simulator
