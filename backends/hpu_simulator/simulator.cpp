// The simulated HPU: registrations with PyTorch, and the functions that its Python side calls.
//
// Stock PyTorch has the HPU device type, its dispatch keys, its hooks and its serialization tag, and nothing behind
// them. Loading this extension puts host memory behind all of them.
#include <torch/csrc/utils/pybind.h>

#include "autocast.h"
#include "fallback.h"

namespace at {
using HPUHooks = hpu_simulator::Hooks;
REGISTER_HPU_HOOKS(HPUHooks)
} // namespace at

namespace hpu_simulator {

C10_REGISTER_GUARD_IMPL(HPU, DeviceGuard)

const bool allocator_registered = [] {
  c10::SetAllocator(c10::DeviceType::HPU, &device_allocator());
  return true;
}();

bool is_native(const std::string& name) {
  return is_one_of(
      name,
      {"aten::empty.memory_format", "aten::empty_strided", "aten::_copy_from", "aten::_copy_from_and_resize",
       "aten::_fused_sdp_choice", "aten::convolution_overrideable", "aten::convolution_backward_overrideable"});
}

// Without a kernel of its own an operator with a structured CPU kernel would be taken apart into empty() and an out=
// call before the fallback sees it; so each gets the fallback by name.
void register_fallback_by_name(torch::Library& library) {
  for (const auto& op : c10::Dispatcher::singleton().getAllOpNamesForDispatchKey(c10::DispatchKey::CPU)) {
    const auto full = op.overload_name.empty() ? op.name : op.name + "." + op.overload_name;
    if (op.name.rfind("aten::", 0) == 0 && !is_native(full)) {
      library.impl(full.c_str(), torch::CppFunction::makeFromBoxedFunction<&fallback>());
    }
  }
}

TORCH_LIBRARY_IMPL(_, HPU, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

TORCH_LIBRARY_IMPL(_, AutocastHPU, m) {
  m.fallback(torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(aten, HPU, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_fused_sdp_choice", torch::CppFunction::makeFromBoxedFunction<&choose_math_attention>());
  m.impl("convolution_overrideable", torch::CppFunction::makeFromBoxedFunction<&convolution>());
  m.impl("convolution_backward_overrideable", torch::CppFunction::makeFromBoxedFunction<&convolution_backward>());
  register_fallback_by_name(m);
}

// A copy resolves these two bits itself; PyTorch's own way to resolve them is a copy, which would never end.
TORCH_LIBRARY_IMPL(aten, Conjugate, m) {
  m.impl("_copy_from", torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(aten, Negative, m) {
  m.impl("_copy_from", torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(aten, AutocastHPU, m) {
  register_autocast(m);
}

std::map<std::string, uint64_t> memory_stats() {
  const auto s = device_memory().stats();
  return {
      {"Limit", s.limit}, {"InUse", s.in_use}, {"MaxInUse", s.max_in_use}, {"NumAllocs", s.num_allocs},
      {"NumFrees", s.num_frees}, {"ActiveAllocs", s.active_allocs}, {"MaxAllocSize", s.max_alloc_size},
      {"TotalSystemAllocs", s.total_allocs}, {"TotalSystemFrees", s.total_frees},
      {"TotalActiveAllocs", s.active_allocs}};
}

py::dict counters() {
  const auto c = recorder().counters();
  py::dict result;
  result["recipes"] = c.recipes;
  result["misses"] = c.misses;
  result["hits"] = c.hits;
  result["launches"] = c.launches;
  result["ops"] = c.ops;
  result["host_reads"] = c.host_reads;
  result["flushes"] = py::cast(c.flushes);
  return result;
}

py::list recipes() {
  py::list result;
  for (const auto& recipe : recorder().recipes()) {
    py::dict each;
    each["key"] = recipe.key;
    each["ops"] = recipe.ops;
    each["live_outputs"] = recipe.live_outputs;
    each["launches"] = recipe.launches;
    each["first_flush"] = recipe.first_flush;
    py::list names;
    for (const auto* name : recipe.names) {
      names.append(*name);
    }
    each["names"] = names;
    result.append(each);
  }
  return result;
}

} // namespace hpu_simulator

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace hpu_simulator;
  m.def("configure", [](bool lazy, uint64_t max_ops) { recorder().configure(lazy, max_ops); });
  m.def("flush", [](const std::string& reason) { recorder().flush(reason.c_str()); });
  m.def("begin_region", [] { recorder().begin_region(); });
  m.def("end_region", [] { recorder().end_region(); });
  m.def("counters", &counters);
  m.def("recipes", &recipes);
  m.def("reset_counters", [](bool drop_recipes) { recorder().reset(drop_recipes); });
  m.def("memory_stats", &memory_stats);
  m.def("set_memory_limit", [](uint64_t bytes) { device_memory().set_limit(bytes); });
  m.def("reset_peak_memory", [] { device_memory().reset_peak(); });
  m.def("reset_allocation_counts", [] { device_memory().reset_counts(); });
  m.def("default_generator", [] { return default_generator(); });
  m.def("be_the_only_accelerator", &be_the_only_accelerator);
}
