// What the bindings to torch share about arguments.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

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

}  // namespace hf_fff_torch

template <> struct torch::stable::detail::ToImpl<hf_fff_torch::Text> {
  static hf_fff_torch::Text call(StableIValue from, uint64_t, bool) {
    const auto handle = torch::stable::detail::to<StringHandle>(from);
    size_t length = 0;
    const char* data = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    hf_fff_torch::Text text{std::string(data, length)};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return text;
  }
};
