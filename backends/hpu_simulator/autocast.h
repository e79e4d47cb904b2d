// Autocast for the device, by Gaudi's documented default lists (docs.habana.ai, "Mixed Precision Training with PyTorch
// Autocast"). Priority: lower precision, then float32, then promote. One boxed kernel per policy.
#pragma once

#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <torch/library.h>

#include <set>
#include <string>

namespace hpu_simulator {

using Names = std::set<std::string>;

inline const Names& lower_precision_names() {
  static const Names names{
      "addmm", "addbmm", "batch_norm", "baddbmm", "bmm", "conv1d", "conv2d", "conv3d", "conv_transpose1d",
      "conv_transpose2d", "conv_transpose3d", "dot", "dropout", "feature_dropout", "group_norm", "instance_norm",
      "layer_norm", "leaky_relu", "linear", "matmul", "mean", "mm", "mul", "mv", "softmax", "log_softmax",
      "scaled_dot_product_attention"};
  return names;
}

// Of these only the first argument is cast: their weights stay as they are.
inline const Names& first_argument_names() {
  static const Names names{"layer_norm", "group_norm", "instance_norm", "batch_norm"};
  return names;
}

inline const Names& float32_names() {
  static const Names names{
      "acos", "addcdiv", "asin", "atan2", "bilinear", "binary_cross_entropy", "binary_cross_entropy_with_logits",
      "cdist", "cosh", "cosine_embedding_loss", "cosine_similarity", "cross_entropy_loss", "dist", "div", "divide",
      "embedding", "embedding_bag", "erfinv", "exp", "expm1", "hinge_embedding_loss", "huber_loss", "kl_div",
      "l1_loss", "log", "log10", "log1p", "log2", "logsumexp", "margin_ranking_loss", "mse_loss", "multi_margin_loss",
      "multilabel_margin_loss", "nll_loss", "pdist", "poisson_nll_loss", "pow", "reciprocal", "renorm", "rsqrt",
      "sinh", "smooth_l1_loss", "soft_margin_loss", "softplus", "tan", "topk", "triplet_margin_loss", "true_divide"};
  return names;
}

inline const Names& promote_names() {
  static const Names names{"add", "addcmul", "cat", "sub", "stack"};
  return names;
}

inline void cast_value(at::ScalarType type, c10::IValue& value) {
  if (value.isTensor() && value.toTensor().defined()) {
    value = at::autocast::cached_cast(type, value.toTensor(), c10::DeviceType::HPU);
  } else if (value.isTensorList()) {
    value = at::autocast::cached_cast(type, at::TensorList(value.toTensorVector()), c10::DeviceType::HPU);
  }
}

inline void call_below_autocast(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  c10::impl::ExcludeDispatchKeyGuard below(c10::DispatchKey::AutocastHPU);
  op.callBoxed(stack);
}

template <typename Cast>
void cast_arguments(const c10::OperatorHandle& op, torch::jit::Stack* stack, size_t limit, Cast cast) {
  const size_t count = op.schema().arguments().size();
  c10::impl::ExcludeDispatchKeyGuard below(c10::DispatchKey::AutocastHPU);
  for (size_t i = 0; i < std::min(count, limit); ++i) {
    cast(torch::jit::peek(*stack, i, count));
  }
}

inline void lower_precision(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto type = at::autocast::get_autocast_dtype(c10::DeviceType::HPU);
  cast_arguments(op, stack, SIZE_MAX, [&](c10::IValue& value) { cast_value(type, value); });
  call_below_autocast(op, stack);
}

inline void lower_first_argument(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto type = at::autocast::get_autocast_dtype(c10::DeviceType::HPU);
  cast_arguments(op, stack, 1, [&](c10::IValue& value) { cast_value(type, value); });
  call_below_autocast(op, stack);
}

inline void float32(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  cast_arguments(op, stack, SIZE_MAX, [&](c10::IValue& value) { cast_value(at::kFloat, value); });
  call_below_autocast(op, stack);
}

inline at::ScalarType widest(at::ScalarType type, const at::Tensor& tensor) {
  return tensor.defined() ? at::autocast::prioritize(type, tensor, c10::DeviceType::HPU) : type;
}

inline void promote(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  auto type = at::autocast::get_autocast_dtype(c10::DeviceType::HPU);
  cast_arguments(op, stack, SIZE_MAX, [&](c10::IValue& value) {
    if (value.isTensor()) {
      type = widest(type, value.toTensor());
    } else if (value.isTensorList()) {
      for (const at::Tensor& item : value.toTensorVector()) {
        type = widest(type, item);
      }
    }
  });
  cast_arguments(op, stack, SIZE_MAX, [&](c10::IValue& value) { cast_value(type, value); });
  call_below_autocast(op, stack);
}

using Boxed = void(const c10::OperatorHandle&, torch::jit::Stack*);

inline torch::CppFunction autocast_kernel(const std::string& name) {
  if (first_argument_names().count(name)) {
    return torch::CppFunction::makeFromBoxedFunction<&lower_first_argument>();
  }
  if (lower_precision_names().count(name)) {
    return torch::CppFunction::makeFromBoxedFunction<&lower_precision>();
  }
  if (float32_names().count(name)) {
    return torch::CppFunction::makeFromBoxedFunction<&float32>();
  }
  return torch::CppFunction::makeFromBoxedFunction<&promote>();
}

inline bool has_autocast_policy(const c10::OperatorName& op, const std::string& name) {
  const bool writes_to_out = op.overload_name.find("out") != std::string::npos;
  return !writes_to_out &&
      (lower_precision_names().count(name) || float32_names().count(name) || promote_names().count(name));
}

inline void register_autocast(torch::Library& library) {
  const std::string prefix = "aten::";
  for (const auto& op : c10::Dispatcher::singleton().getAllOpNames()) {
    if (op.name.rfind(prefix, 0) == 0 && has_autocast_policy(op, op.name.substr(prefix.size()))) {
      const auto full = op.overload_name.empty() ? op.name : op.name + "." + op.overload_name;
      library.impl(full.c_str(), autocast_kernel(op.name.substr(prefix.size())));
    }
  }
}

} // namespace hpu_simulator
