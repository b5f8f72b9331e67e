// What the bindings to torch share about arguments.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>
#include <optional>
#include <string>

namespace hf_fff_torch {

// A string argument. torch's own conversion to std::string leaks one a call (ToImpl<std::string> in 2.11 to 2.13), and what it
// leaks keeps the C library from joining the memory of freed results: a process grew by a result a call.
struct Text {
  std::string value;
};

inline std::string text(const torch::stable::Tensor& t) {  // its shape, for messages
  std::string s = "[";
  for (int64_t i = 0; i < t.dim(); ++i) s += (i ? ", " : "") + std::to_string(t.size(i));
  return s + "]";
}

struct Sizes {
  int64_t tokens, hidden, trees, depth;
};

inline void check_visits(int64_t tokens, int64_t trees, int64_t depth) {
  STD_TORCH_CHECK(tokens <= std::numeric_limits<int64_t>::max() / trees / (depth + 1), "fff: x has ", tokens, " tokens; times ", trees,
                  " trees of ", depth + 1, " levels these are more visits than an int64 counts");
}

// Of a call, once its arguments are known to fit each other. `beside_x` says whether a tensor is on x's device; `dtype` is the weights',
// without it x's.
template <class F>
Sizes sizes_of(const torch::stable::Tensor& x, const torch::stable::Tensor& weight_in, const torch::stable::Tensor& bias_in,
               const torch::stable::Tensor& weight_out, int64_t n_trees, int64_t deepest, const F& beside_x,
               std::optional<torch::headeronly::ScalarType> dtype = std::nullopt) {
  STD_TORCH_CHECK(x.dim() >= 1, "fff: x has no dimensions; it is [..., hidden]");
  STD_TORCH_CHECK(weight_in.dim() == 2, "fff: weight_in is ", text(weight_in), "; it must be [nodes, hidden]");
  const int64_t hidden = x.size(x.dim() - 1), nodes = weight_in.size(0);
  STD_TORCH_CHECK(hidden >= 1 && weight_in.size(1) == hidden, "fff: weight_in is ", text(weight_in), " and x ", text(x),
                  "; the last dimensions must agree");
  STD_TORCH_CHECK(bias_in.dim() == 1 && bias_in.size(0) == nodes, "fff: bias_in is ", text(bias_in), "; it must be [",
                  nodes, "]");
  STD_TORCH_CHECK(weight_out.dim() == 2 && weight_out.size(0) == nodes && weight_out.size(1) == hidden,
                  "fff: weight_out is ", text(weight_out), "; it must be ", text(weight_in));
  STD_TORCH_CHECK(n_trees >= 1 && nodes % n_trees == 0, "fff: n_trees=", n_trees, " does not divide the ", nodes, " nodes");
  int64_t depth = 0;
  while (depth < deepest && (int64_t{2} << depth) - 1 < nodes / n_trees) ++depth;
  STD_TORCH_CHECK((int64_t{2} << depth) - 1 == nodes / n_trees, "fff: a tree of ", nodes / n_trees,
                  " nodes is not balanced; 2^(depth+1)-1 nodes a tree are needed");
  for (const torch::stable::Tensor* t : {&weight_in, &bias_in, &weight_out}) {
    STD_TORCH_CHECK(t->scalar_type() == dtype.value_or(x.scalar_type()), "fff: x, weight_in, bias_in and weight_out must have one dtype");
    STD_TORCH_CHECK(beside_x(*t), "fff: x, weight_in, bias_in and weight_out must be on one device");
  }
  check_visits(x.numel() / hidden, n_trees, depth);
  return {x.numel() / hidden, hidden, n_trees, depth};
}

// A kernel's enumeration of activations, by its names.
template <class A> A activation_of(const std::string& name) {
  if (name == "gelu") return A::gelu;
  if (name == "gelu_new") return A::gelu_new;
  if (name == "relu") return A::relu;
  if (name == "silu") return A::silu;
  STD_TORCH_CHECK(name == "identity", "fff: activation '", name,
                  "' is not known (allowed: gelu, gelu_new, relu, silu, identity)");
  return A::identity;
}

}  // namespace hf_fff_torch

template <> struct torch::stable::detail::ToImpl<hf_fff_torch::Text> {
  static hf_fff_torch::Text call(StableIValue from, uint64_t, bool) {
    const auto handle = torch::stable::detail::to<StringHandle>(from);
    size_t length = 0;
    const char* data = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    hf_fff_torch::Text text{std::string(data, length)};
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return text;
  }
};
