// The CPU kernels as implementations of the operators that hf_fff/ops/_schema.py declares. A thin binding over cpu/fff.h:
// it checks arguments, allocates results and lends torch's thread pool. LibTorch stable ABI: one build serves torch 2.11
// and later, with any Python.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <string>
#include <tuple>
#include <vector>

#include "cpu/fff.h"
#include "torch-ext/arguments.h"
#include "torch-ext/namespace.h"

namespace {

using hf_fff_torch::text;
using hf_fff_torch::Text;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const hf_fff::ParallelFor torch_threads{[](int64_t count, int64_t grain, hf_fff::ParallelFor::Body body, void* context) {
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { body(context, begin, end); });
}};

hf_fff::Activation activation_of(const std::string& name) { return hf_fff_torch::activation_of<hf_fff::Activation>(name); }

// The shape of the problem, once the arguments are known to fit each other.
hf_fff::Shape shape_of(const Tensor& x, const Tensor& weight_in, const Tensor& bias_in, const Tensor& weight_out,
                       int64_t n_trees) {
  STD_TORCH_CHECK(!hf_fff::isa_error(), hf_fff::isa_error());
  const auto on_cpu = [](const Tensor& t) { return t.is_cpu(); };
  const auto [tokens, hidden, trees, depth] = hf_fff_torch::sizes_of(x, weight_in, bias_in, weight_out, n_trees, 30, on_cpu);
  return {tokens, hidden, trees, depth};
}

Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

template <class T> const T* in(const Tensor& t) { return static_cast<const T*>(t.const_data_ptr()); }
template <class T> T* out(const Tensor& t) { return static_cast<T*>(t.mutable_data_ptr()); }

// Calls f with a value of the C++ type that stores `dtype`.
template <class F> void with_type(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::BFloat16: return f(hf_fff::bfloat16{});
    case ScalarType::Half: return f(hf_fff::float16{});
    default: STD_TORCH_CHECK(false, "fff: the dtype must be float32, float64, bfloat16 or float16");
  }
}

void run_forward(const Tensor& x, const Tensor& weight_in, const Tensor& bias_in, const Tensor& weight_out,
                 const hf_fff::Shape& shape, const std::string& activation, const Tensor& y, const Tensor* path,
                 const Tensor* logits) {
  const auto act = activation_of(activation);
  const Tensor xd = dense(x), wi = dense(weight_in), bi = dense(bias_in), wo = dense(weight_out);
  with_type(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    hf_fff::forward<T>({shape, act, in<T>(xd), in<T>(wi), in<T>(bi), in<T>(wo), out<T>(y),
                        path ? out<int32_t>(*path) : nullptr,
                        logits ? out<hf_fff::accumulator_t<T>>(*logits) : nullptr},
                       torch_threads);
  });
}

std::vector<int64_t> leading(const Tensor& x, int64_t trees, int64_t levels) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) sizes.push_back(x.size(i));
  sizes.push_back(trees);
  sizes.push_back(levels);
  return sizes;
}

Tensor empty_like_dense(const Tensor& t) { return torch::stable::new_empty(t, t.sizes()); }

Tensor fff(Tensor x, Tensor weight_in, Tensor bias_in, Tensor weight_out, int64_t n_trees, Text activation) {
  const auto shape = shape_of(x, weight_in, bias_in, weight_out, n_trees);
  Tensor y = empty_like_dense(x);
  run_forward(x, weight_in, bias_in, weight_out, shape, activation.value, y, nullptr, nullptr);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> fff_train(Tensor x, Tensor weight_in, Tensor bias_in, Tensor weight_out, int64_t n_trees,
                                             Text activation, double, double) {
  const auto shape = shape_of(x, weight_in, bias_in, weight_out, n_trees);
  Tensor y = empty_like_dense(x);
  const auto sizes = leading(x, shape.trees, shape.levels());
  Tensor path = torch::stable::new_empty(x, sizes, ScalarType::Int);
  Tensor logits = torch::stable::new_empty(
      x, sizes, x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float);
  run_forward(x, weight_in, bias_in, weight_out, shape, activation.value, y, &path, &logits);
  return {y, path, logits};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> fff_backward(Tensor grad_y, Tensor x, Tensor weight_in, Tensor bias_in,
                                                        Tensor weight_out, Tensor path, Tensor logits, int64_t n_trees,
                                                        Text activation, double routing_gradient,
                                                        double routing_temperature, bool need_x, bool need_weights) {
  const auto shape = shape_of(x, weight_in, bias_in, weight_out, n_trees);
  const auto act = activation_of(activation.value);
  STD_TORCH_CHECK(grad_y.numel() == x.numel() && grad_y.scalar_type() == x.scalar_type(), "fff_backward: grad_y is ",
                  text(grad_y), "; it must have x's shape ", text(x), " and dtype");
  STD_TORCH_CHECK(path.numel() == shape.tokens * shape.walk() && logits.numel() == path.numel(), "fff_backward: path is ",
                  text(path), " and logits ", text(logits), "; both must be [..., ", shape.trees, ", ", shape.levels(), "]");
  STD_TORCH_CHECK(routing_temperature > 0, "fff_backward: routing_temperature must be above 0");
  STD_TORCH_CHECK(path.scalar_type() == ScalarType::Int, "fff_backward: path must be int32");
  STD_TORCH_CHECK(
      logits.scalar_type() == (x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float),
      "fff_backward: logits must be float32 (float64 where x is)");
  const auto result = [](const Tensor& like, bool wanted) {
    return wanted ? empty_like_dense(like) : torch::stable::new_empty(like, std::vector<int64_t>{0});
  };
  Tensor grad_x = result(x, need_x), grad_in = result(weight_in, need_weights),
         grad_bias = result(bias_in, need_weights), grad_out = result(weight_out, need_weights);
  const Tensor gd = dense(grad_y), xd = dense(x), wi = dense(weight_in), bi = dense(bias_in), wo = dense(weight_out),
               pd = dense(path), ld = dense(logits);
  STD_TORCH_CHECK(hf_fff::is_valid_path(shape, in<int32_t>(pd)), "fff_backward: path is not one that fff_train returned");
  with_type(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    hf_fff::backward<T>({shape, act, in<T>(gd), in<T>(xd), in<T>(wi), in<T>(bi), in<T>(wo), in<int32_t>(pd),
                         in<hf_fff::accumulator_t<T>>(ld), routing_gradient, routing_temperature,
                         need_x ? out<T>(grad_x) : nullptr, need_weights ? out<T>(grad_in) : nullptr,
                         need_weights ? out<T>(grad_bias) : nullptr, need_weights ? out<T>(grad_out) : nullptr},
                        torch_threads);
  });
  return {grad_x, grad_in, grad_bias, grad_out};
}

Tensor pack(Tensor weight_in, Tensor bias_in, Tensor weight_out, int64_t n_trees, Text kind_of_rows) {
  const std::string& rows = kind_of_rows.value;
  const auto shape = shape_of(weight_in, weight_in, bias_in, weight_out, n_trees);
  STD_TORCH_CHECK(rows == "int8" || rows == "bf16", "pack: rows='", rows, "' is not known (allowed: int8, bf16)");
  const auto kind = rows == "int8" ? hf_fff::Rows::int8 : hf_fff::Rows::bf16;
  const auto floats = [](const Tensor& t) { return dense(torch::stable::to(t, ScalarType::Float)); };
  const Tensor wi = floats(weight_in), bi = floats(bias_in), wo = floats(weight_out);
  Tensor packed = torch::stable::new_empty(weight_in, std::vector<int64_t>{hf_fff::packed_bytes(kind, shape)}, ScalarType::Byte);
  STD_TORCH_CHECK(hf_fff::pack(kind, shape, in<float>(wi), in<float>(bi), in<float>(wo), out<uint8_t>(packed)),
                  "pack: a weight is not finite: it cannot be packed");
  return packed;
}

Tensor fff_packed(Tensor x, Tensor packed, Text activation) {
  STD_TORCH_CHECK(!hf_fff::isa_error(), hf_fff::isa_error());
  STD_TORCH_CHECK(packed.dim() == 1 && packed.scalar_type() == ScalarType::Byte && packed.is_cpu(),
                  "fff_packed: packed is ", text(packed), "; hf_fff::pack makes a uint8 [bytes] on the CPU");
  const Tensor pd = dense(packed);
  hf_fff::Rows rows;
  hf_fff::Shape shape;
  const char* error = hf_fff::read_packed(in<uint8_t>(pd), pd.numel(), false, &rows, &shape);
  STD_TORCH_CHECK(!error, "fff_packed: the packed layer cannot be used: ", error);
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == shape.hidden, "fff_packed: x is ", text(x), "; it must be [..., ",
                  shape.hidden, "], as the packed layer is");
  hf_fff_torch::check_visits(x.numel() / shape.hidden, shape.trees, shape.depth);
  const Tensor xd = dense(x);
  const auto act = activation_of(activation.value);
  Tensor y = empty_like_dense(x);
  const auto run = [&](auto type) {
    using T = decltype(type);
    hf_fff::forward_packed<T>({x.numel() / shape.hidden, act, in<T>(xd), in<uint8_t>(pd), out<T>(y)}, torch_threads);
  };
  switch (x.scalar_type()) {
    case ScalarType::Float: run(float{}); break;
    case ScalarType::BFloat16: run(hf_fff::bfloat16{}); break;
    case ScalarType::Half: run(hf_fff::float16{}); break;
    default: STD_TORCH_CHECK(false, "fff_packed: x must be float32, bfloat16 or float16");
  }
  return y;
}

HF_FFF_IMPLEMENTS(CPU, m) {
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("fff_packed", TORCH_BOX(&fff_packed));
  m.impl("fff", TORCH_BOX(&fff));
  m.impl("fff_train", TORCH_BOX(&fff_train));
  m.impl("fff_backward", TORCH_BOX(&fff_backward));
}

}  // namespace

extern "C" __attribute__((visibility("default"))) const char* hf_fff_cpu_isa() { return hf_fff::isa(); }
