// Loops for benchmarks: what the operation itself costs, without a call from Python around it. The dense layer is timed
// the same way, through torch's own operators. Not part of the library that users load; `hf-fff bench layer` builds it.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <chrono>
#include <optional>

#include "cpu/fff.h"

namespace {

using torch::stable::Tensor;
using torch::stable::detail::from;
using torch::stable::detail::to;

const hf_fff::ParallelFor torch_threads{[](int64_t count, int64_t grain, hf_fff::ParallelFor::Body body, void* context) {
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { body(context, begin, end); });
}};

template <class F> double seconds_per_call(int64_t repeats, const F& f) {
  const auto start = std::chrono::steady_clock::now();
  for (int64_t i = 0; i < repeats; ++i) f(i);
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() / repeats;
}

// x: [inputs, tokens, hidden], used in turn, so that the paths differ from call to call.
double fff_loop(Tensor x, Tensor weight_in, Tensor bias_in, Tensor weight_out, int64_t n_trees, int64_t depth, int64_t repeats) {
  const int64_t inputs = x.size(0), tokens = x.size(1), hidden = x.size(2);
  Tensor y = torch::stable::new_empty(x, std::vector<int64_t>{tokens, hidden});
  const auto data = [](const Tensor& t) { return static_cast<float*>(t.data_ptr()); };
  hf_fff::Forward<float> f{{tokens, hidden, n_trees, depth}, hf_fff::Activation::gelu, nullptr,
                           data(weight_in), data(bias_in), data(weight_out), data(y), nullptr, nullptr};
  return seconds_per_call(repeats, [&](int64_t i) {
    f.x = data(x) + i % inputs * tokens * hidden;
    hf_fff::forward<float>(f, torch_threads);
  });
}

double fff_packed_loop(Tensor x, Tensor packed, int64_t repeats) {
  const int64_t inputs = x.size(0), tokens = x.size(1), hidden = x.size(2);
  Tensor y = torch::stable::new_empty(x, std::vector<int64_t>{tokens, hidden});
  const auto* from = static_cast<const float*>(x.const_data_ptr());
  return seconds_per_call(repeats, [&](int64_t i) {
    hf_fff::forward_packed<float>({tokens, hf_fff::Activation::gelu, from + i % inputs * tokens * hidden,
                                   static_cast<const uint8_t*>(packed.const_data_ptr()), static_cast<float*>(y.mutable_data_ptr())},
                                  torch_threads);
  });
}

Tensor linear(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  std::array<StableIValue, 3> stack{from(x), from(weight), from(std::optional<Tensor>(bias))};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return to<Tensor>(stack[0]);
}

Tensor gelu(const Tensor& x) {
  std::array<StableIValue, 2> stack{from(x), from(std::string("none"))};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::gelu", "", stack.data(), TORCH_ABI_VERSION));
  return to<Tensor>(stack[0]);
}

double dense_loop(Tensor x, Tensor weight_in, Tensor bias_in, Tensor weight_out, Tensor bias_out, int64_t repeats) {
  const int64_t inputs = x.size(0);
  return seconds_per_call(repeats, [&](int64_t i) {
    linear(gelu(linear(torch::stable::select(x, 0, i % inputs), weight_in, bias_in)), weight_out, bias_out);
  });
}

STABLE_TORCH_LIBRARY(hf_fff_bench, m) {
  m.def("fff_loop(Tensor x, Tensor weight_in, Tensor bias_in, Tensor weight_out, int n_trees, int depth, int repeats) -> float");
  m.def("fff_packed_loop(Tensor x, Tensor packed, int repeats) -> float");
  m.def("dense_loop(Tensor x, Tensor weight_in, Tensor bias_in, Tensor weight_out, Tensor bias_out, int repeats) -> float");
}

STABLE_TORCH_LIBRARY_IMPL(hf_fff_bench, CPU, m) {
  m.impl("fff_loop", TORCH_BOX(&fff_loop));
  m.impl("fff_packed_loop", TORCH_BOX(&fff_packed_loop));
  m.impl("dense_loop", TORCH_BOX(&dense_loop));
}

}  // namespace
