// The CUDA kernels as implementations of the operators that hf_fff/ops/_schema.py declares. A thin binding over cuda/fff.h: it
// checks arguments, allocates results and scratch memory on the current stream, and leaves to the dense operators, which are
// matrix products of torch, what those do better. LibTorch stable ABI: one build serves torch 2.11 and later, with any Python.
#ifndef USE_CUDA
#define USE_CUDA
#endif
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cuda/fff.h"
#include "torch-ext/arguments.h"
#include "torch-ext/namespace.h"

namespace {

using hf_fff_cuda::Activation;
using hf_fff_cuda::Problem;
using hf_fff_cuda::Shape;
using hf_fff_cuda::Type;
using hf_fff_cuda::Way;
using hf_fff_torch::text;
using hf_fff_torch::Text;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::detail::from;
using torch::stable::detail::to;

Activation activation_of(const std::string& name) { return hf_fff_torch::activation_of<Activation>(name); }

Type type_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return Type::float32;
    case ScalarType::Double: return Type::float64;
    case ScalarType::BFloat16: return Type::bfloat16;
    case ScalarType::Half: return Type::float16;
    default: STD_TORCH_CHECK(false, "fff: the dtype must be float32, float64, bfloat16 or float16");
  }
}

struct Device {
  int capability, processors;
};
// Facts about a device, asked for once.
Device device_facts(int index) {
  constexpr int kMost = 64;
  static std::atomic<int64_t> known[kMost];
  int64_t facts = index < kMost ? known[index].load(std::memory_order_relaxed) : 0;
  if (!facts) {
    int major = 0, minor = 0, processors = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index);
    cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, index);
    facts = int64_t(major * 10 + minor) << 32 | processors;
    if (index < kMost) known[index].store(facts, std::memory_order_relaxed);
  }
  return {int(facts >> 32), int(facts & 0xffffffff)};
}

// The problem, once the arguments are known to fit each other.
Problem problem_of(const Tensor& x, const Tensor& weight_in, const Tensor& bias_in, const Tensor& weight_out, int64_t n_trees,
                   std::optional<ScalarType> dtype = std::nullopt) {
  const auto beside_x = [&](const Tensor& t) { return t.is_cuda() && t.get_device_index() == x.get_device_index(); };
  const auto [tokens, hidden, trees, depth] = hf_fff_torch::sizes_of(x, weight_in, bias_in, weight_out, n_trees, 29, beside_x, dtype);
  STD_TORCH_CHECK(tokens < int64_t{1} << 30 && (trees << depth) < int64_t{1} << 32, "fff: x ", text(x), " or weight_in ",
                  text(weight_in), " is too large for a GPU");
  const Device device = device_facts(x.get_device_index());
  return {{tokens, hidden, trees, depth}, type_of(x.scalar_type()), false, device.capability, device.processors};
}

Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

bool aligned(std::initializer_list<const Tensor*> tensors) {
  for (const Tensor* t : tensors)
    if (reinterpret_cast<uintptr_t>(t->const_data_ptr()) % 16) return false;
  return true;
}

cudaStream_t stream_of(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

using Sizes = std::vector<int64_t>;

Sizes sizes_of(const Tensor& t) {
  Sizes sizes;
  for (int64_t i = 0; i < t.dim(); ++i) sizes.push_back(t.size(i));
  return sizes;
}
Sizes strides_of(const Sizes& sizes) {  // of a contiguous tensor
  Sizes strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(1, sizes[i]);
  return strides;
}

// A new tensor beside another one. Not by the dispatcher, which takes several times as long.
Tensor fresh(const Tensor& like, const Sizes& sizes, ScalarType dtype) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides_of(sizes).data(), to<int32_t>(from(dtype)),
                                                         aoti_torch_device_type_cuda(), like.get_device_index(), &handle));
  return Tensor(handle);
}
// A tensor over memory that somebody else holds as long as it lives.
Tensor over(const void* memory, const Tensor& beside, const Sizes& sizes, ScalarType dtype) {
  return torch::stable::from_blob(const_cast<void*>(memory), sizes, strides_of(sizes), beside.device(), dtype);
}

// The transpose of such a matrix, of `rows` rows.
Tensor columns_over(const void* memory, const Tensor& beside, int64_t rows, int64_t width, ScalarType dtype) {
  return torch::stable::from_blob(const_cast<void*>(memory), Sizes{width, rows}, Sizes{1, width}, beside.device(), dtype);
}

Tensor empty_like_dense(const Tensor& t) { return fresh(t, sizes_of(t), t.scalar_type()); }
Tensor bytes(const Tensor& like, int64_t count) { return fresh(like, {count}, ScalarType::Byte); }
ScalarType logits_type(const Tensor& x) { return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

void check(const char* error) { STD_TORCH_CHECK(!error, "fff: CUDA says: ", error); }

std::vector<int64_t> leading(const Tensor& x, int64_t trees, int64_t levels) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) sizes.push_back(x.size(i));
  sizes.push_back(trees);
  sizes.push_back(levels);
  return sizes;
}

constexpr std::array<const char*, 8> kWays{"automatic", "plain", "gather", "sorted", "tiles", "columns", "forest", "dense"};

// HF_FFF_CUDA_WAY names one of them, for tests and measurements; a shape that it does not serve is done the plain way.
Way wanted_way() {
  const char* name = std::getenv("HF_FFF_CUDA_WAY");
  if (!name || !*name) return Way::automatic;
  for (size_t i = 0; i < kWays.size(); ++i)
    if (!std::strcmp(name, kWays[i])) return Way(i);
  STD_TORCH_CHECK(false, "fff: HF_FFF_CUDA_WAY='", name, "' is not known (allowed: automatic, plain, gather, sorted, tiles, columns, forest, dense)");
}

constexpr int64_t kMostElements = int64_t{1} << 28;  // of all nodes' logits that are there at once

// into = a b. Spelled so that neither autocast, which would change the type, nor autograd, if somebody calls the bare operator
// with it on, has a part in it.
void product(const Tensor& a, const Tensor& b, const Tensor& into) {
  std::array<StableIValue, 3> stack{from(a), from(b), from(into)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  to<Tensor>(stack[0]);
}
Tensor detached(const Tensor& t) {
  std::array<StableIValue, 1> stack{from(t)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::detach", "", stack.data(), TORCH_ABI_VERSION));
  return to<Tensor>(stack[0]);
}

// Rows in eights: matrix products of another number of them take several times as long. Those beyond are zero.
Tensor in_eights(const Tensor& weight) {
  const int64_t nodes = weight.size(0), more = (nodes + 7) / 8 * 8;
  if (more == nodes) return weight;
  Tensor padded = torch::stable::new_zeros(weight, std::vector<int64_t>{more, weight.size(1)});
  Tensor real = torch::stable::narrow(padded, 0, 0, nodes);
  torch::stable::copy_(real, weight);
  return padded;
}

Tensor rows_of(const Tensor& t, int64_t rows, int64_t width) {
  return torch::stable::view(detached(t), std::vector<int64_t>{rows, width});
}
Tensor part_of(const Tensor& t, int64_t begin, int64_t count) {
  Tensor all = t;
  return torch::stable::narrow(all, 0, begin, count);
}
Tensor matrix(const Tensor& like, int64_t rows, int64_t width) { return fresh(like, {rows, width}, like.scalar_type()); }

// Matrix products over all nodes, with a mask between them. xs, ys: [tokens, hidden]; in, out: [nodes or more, hidden].
void run_dense(const Tensor& xs, const Tensor& in, const void* bias, const Tensor& out, const Problem& problem, Activation activation,
               const Tensor& ys, int32_t* path, void* logits) {
  const Shape& s = problem.shape;
  const Tensor columns = torch::stable::transpose(in, 0, 1);
  const int64_t width = out.size(0), piece = std::max<int64_t>(1, kMostElements / width);
  for (int64_t begin = 0; begin < s.tokens; begin += piece) {
    const int64_t count = std::min(piece, s.tokens - begin);
    const Tensor every = matrix(xs, count, width);
    product(part_of(xs, begin, count), columns, every);
    check(hf_fff_cuda::mask({{count, s.hidden, s.trees, s.depth}, activation, every.mutable_data_ptr(), width, bias,
                             path ? path + begin * s.walk() : nullptr,
                             path ? static_cast<char*>(logits) + begin * s.walk() * (problem.type == Type::float64 ? 8 : 4) : nullptr},
                            problem.type, stream_of(xs)));
    product(every, out, part_of(ys, begin, count));
  }
}

int32_t* path_in(const Tensor* path) { return path ? static_cast<int32_t*>(path->mutable_data_ptr()) : nullptr; }
void* logits_in(const Tensor* logits) { return logits ? logits->mutable_data_ptr() : nullptr; }

void run_forward(const Tensor& x, const Tensor& weight_in, const Tensor& bias_in, const Tensor& weight_out, Problem problem,
                 Way way, Activation activation, const Tensor& y, const Tensor* path, const Tensor* logits) {
  const Tensor xd = dense(x), wi = dense(weight_in), bi = dense(bias_in), wo = dense(weight_out);
  const Shape& s = problem.shape;
  if (way == Way::dense) {
    run_dense(rows_of(xd, s.tokens, s.hidden), in_eights(detached(wi)), bi.const_data_ptr(), in_eights(detached(wo)), problem, activation,
              rows_of(y, s.tokens, s.hidden), path_in(path), logits_in(logits));
    return;
  }
  problem.aligned = aligned({&xd, &wi, &wo, &y});
  way = hf_fff_cuda::forward_way(problem, way);  // anew: now it is known where the numbers lie
  const Tensor workspace = bytes(x, hf_fff_cuda::forward_workspace(problem, way, path != nullptr));
  check(hf_fff_cuda::forward({problem, activation, xd.const_data_ptr(), wi.const_data_ptr(), bi.const_data_ptr(), wo.const_data_ptr(),
                              y.mutable_data_ptr(), path_in(path), logits_in(logits), workspace.mutable_data_ptr()},
                             way, stream_of(x)));
}

Way way_of(Problem problem) {
  problem.aligned = true;
  return hf_fff_cuda::forward_way(problem, wanted_way());
}

Tensor fff(Tensor x, Tensor weight_in, Tensor bias_in, Tensor weight_out, int64_t n_trees, Text activation) {
  const Problem problem = problem_of(x, weight_in, bias_in, weight_out, n_trees);
  const Activation act = activation_of(activation.value);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Way way = way_of(problem);
  Tensor y = empty_like_dense(x);
  run_forward(x, weight_in, bias_in, weight_out, problem, way, act, y, nullptr, nullptr);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> fff_train(Tensor x, Tensor weight_in, Tensor bias_in, Tensor weight_out, int64_t n_trees,
                                             Text activation, double, double) {
  const Problem problem = problem_of(x, weight_in, bias_in, weight_out, n_trees);
  const Activation act = activation_of(activation.value);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Way way = way_of(problem);
  Tensor y = empty_like_dense(x);
  const auto sizes = leading(x, problem.shape.trees, problem.shape.levels());
  Tensor path = fresh(x, sizes, ScalarType::Int), logits = fresh(x, sizes, logits_type(x));
  run_forward(x, weight_in, bias_in, weight_out, problem, way, act, y, &path, &logits);
  return {y, path, logits};
}

// What the routing gradient adds to dL/dlogit, [tokens, trees, levels]. g, x: [tokens, hidden]; in, out: [width, hidden], zeros behind the nodes.
// Its matrices are made over memory, not by the dispatcher: with few tokens only queueing takes time.
Tensor routing_term(const Tensor& beside, ScalarType dtype, const void* g, const void* x, const void* in, const void* bias, const void* out,
                    int64_t width, const int32_t* path, const void* logits, const Problem& problem, Activation activation, double strength,
                    double temperature) {
  const Shape& s = problem.shape;
  const int64_t size = problem.type == Type::float64 ? 8 : 4, number = problem.type == Type::float32 ? 4 : problem.type == Type::float64 ? 8 : 2;
  Tensor extra = fresh(beside, {s.tokens, s.walk()}, size == 8 ? ScalarType::Double : ScalarType::Float);
  const Tensor in_columns = columns_over(in, beside, width, s.hidden, dtype), out_columns = columns_over(out, beside, width, s.hidden, dtype);
  const int64_t piece = std::max<int64_t>(1, kMostElements / width);
  for (int64_t begin = 0; begin < s.tokens; begin += piece) {
    const int64_t count = std::min(piece, s.tokens - begin), at = begin * s.walk();
    const Tensor both = fresh(beside, {2 * count, width}, dtype);
    char *every = static_cast<char*>(both.mutable_data_ptr()), *gain = every + number * count * width;
    const auto rows = [&](const void* of) { return over(static_cast<const char*>(of) + number * begin * s.hidden, beside, {count, s.hidden}, dtype); };
    product(rows(x), in_columns, over(every, beside, {count, width}, dtype)), product(rows(g), out_columns, over(gain, beside, {count, width}, dtype));
    check(hf_fff_cuda::routing({{count, s.hidden, s.trees, s.depth}, activation, every, gain, width, bias, path + at,
                                static_cast<const char*>(logits) + at * size, strength, temperature,
                                static_cast<char*>(extra.mutable_data_ptr()) + at * size},
                               problem.type, stream_of(beside)));
  }
  return extra;
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Gradients backward_dense(const Tensor& grad_y, const Tensor& x, const Tensor& weight_in, const Tensor& bias_in, const Tensor& weight_out,
                         const Tensor& path, const Tensor& logits, int64_t n_trees, const std::string& activation, double routing_gradient,
                         double routing_temperature, bool need_x, bool need_weights) {
  std::array<StableIValue, 13> stack{from(grad_y),     from(x),          from(weight_in),           from(bias_in), from(weight_out), from(path), from(logits), from(n_trees),
                                     from(activation), from(routing_gradient), from(routing_temperature), from(need_x),  from(need_weights)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(HF_FFF_OPERATOR("fff_backward_dense"), "", stack.data(), TORCH_ABI_VERSION));
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1]), to<Tensor>(stack[2]), to<Tensor>(stack[3])};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> fff_backward(Tensor grad_y, Tensor x, Tensor weight_in, Tensor bias_in,
                                                        Tensor weight_out, Tensor path, Tensor logits, int64_t n_trees,
                                                        Text activation, double routing_gradient,
                                                        double routing_temperature, bool need_x, bool need_weights) {
  Problem problem = problem_of(x, weight_in, bias_in, weight_out, n_trees);
  const Shape& shape = problem.shape;
  const Activation act = activation_of(activation.value);
  STD_TORCH_CHECK(grad_y.numel() == x.numel() && grad_y.scalar_type() == x.scalar_type(), "fff_backward: grad_y is ",
                  text(grad_y), "; it must have x's shape ", text(x), " and dtype");
  STD_TORCH_CHECK(path.numel() == shape.tokens * shape.walk() && logits.numel() == path.numel(), "fff_backward: path is ",
                  text(path), " and logits ", text(logits), "; both must be [..., ", shape.trees, ", ", shape.levels(), "]");
  STD_TORCH_CHECK(routing_temperature > 0, "fff_backward: routing_temperature must be above 0");
  STD_TORCH_CHECK(path.scalar_type() == ScalarType::Int, "fff_backward: path must be int32");
  STD_TORCH_CHECK(logits.scalar_type() == logits_type(x), "fff_backward: logits must be float32 (float64 where x is)");
  for (const Tensor* t : {&grad_y, &path, &logits})
    STD_TORCH_CHECK(t->is_cuda() && t->get_device_index() == x.get_device_index(),
                    "fff_backward: grad_y, path and logits must be on x's device");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor gd = dense(grad_y), xd = dense(x), wi = dense(weight_in), bi = dense(bias_in), wo = dense(weight_out), pd = dense(path),
               ld = dense(logits);
  problem.aligned = aligned({&gd, &xd, &wi, &wo});
  const bool routing = routing_gradient != 0;
  const Way way = hf_fff_cuda::backward_way(problem, routing, wanted_way());
  if (way == Way::dense)
    return backward_dense(grad_y, x, weight_in, bias_in, weight_out, path, logits, n_trees, activation.value, routing_gradient,
                          routing_temperature, need_x, need_weights);
  const auto result = [&](const Tensor& like, bool wanted) { return fresh(x, wanted ? sizes_of(like) : Sizes{0}, x.scalar_type()); };
  Tensor grad_x = result(x, need_x), grad_in = result(weight_in, need_weights), grad_bias = result(bias_in, need_weights),
         grad_out = result(weight_out, need_weights);
  const int32_t* visits = static_cast<const int32_t*>(pd.const_data_ptr());
  Tensor extra;
  if (routing) {
    const Tensor in = in_eights(detached(wi)), out = in_eights(detached(wo));
    extra = routing_term(x, x.scalar_type(), gd.const_data_ptr(), xd.const_data_ptr(), in.const_data_ptr(), bi.const_data_ptr(), out.const_data_ptr(),
                         in.size(0), visits, ld.const_data_ptr(), problem, act, routing_gradient, routing_temperature);
  }
  const Tensor workspace = bytes(x, hf_fff_cuda::backward_workspace(problem, way, need_x, need_weights));
  check(hf_fff_cuda::backward({problem, act, gd.const_data_ptr(), xd.const_data_ptr(), wi.const_data_ptr(), bi.const_data_ptr(),
                               wo.const_data_ptr(), visits, ld.const_data_ptr(), routing ? extra.const_data_ptr() : nullptr,
                               need_x ? grad_x.mutable_data_ptr() : nullptr, need_weights ? grad_in.mutable_data_ptr() : nullptr,
                               need_weights ? grad_bias.mutable_data_ptr() : nullptr,
                               need_weights ? grad_out.mutable_data_ptr() : nullptr, workspace.mutable_data_ptr()},
                              way, stream_of(x)));
  return {grad_x, grad_in, grad_bias, grad_out};
}

// ---- training under autocast: float32 weights, and 16-bit numbers made of them ---------------------------------------------

// What a forward pass keeps for the backward pass, one after the other in one buffer. Rows of weights in eights, zeros behind.
struct Kept {
  char *x, *in, *out, *bias;
  int32_t* path;
  float* logits;
  int64_t width, used;
};
Kept kept_of(const Shape& s, bool with_x, const Tensor* buffer) {
  Kept k{};
  char* start = buffer ? static_cast<char*>(buffer->mutable_data_ptr()) : nullptr;
  const auto take = [&](int64_t count) {
    char* here = start ? start + k.used : nullptr;
    k.used += (count + 255) / 256 * 256;
    return here;
  };
  k.width = (s.nodes() + 7) / 8 * 8;
  k.in = take(2 * k.width * s.hidden), k.out = take(2 * k.width * s.hidden), k.bias = take(2 * k.width);
  k.path = reinterpret_cast<int32_t*>(take(4 * s.tokens * s.walk())), k.logits = reinterpret_cast<float*>(take(4 * s.tokens * s.walk()));
  if (with_x) k.x = take(2 * s.tokens * s.hidden);
  return k;
}

std::tuple<Tensor, Tensor> fff_train_mixed(Tensor x, Tensor weight_in, Tensor bias_in, Tensor weight_out, int64_t n_trees, Text activation,
                                           bool half) {
  Problem problem = problem_of(x, weight_in, bias_in, weight_out, n_trees, ScalarType::Float);
  const Activation act = activation_of(activation.value);
  const ScalarType dtype = half ? ScalarType::Half : ScalarType::BFloat16;
  const bool cast_x = x.scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(cast_x || x.scalar_type() == dtype, "fff_train_mixed: x must be float32, or of the type that is computed in");
  problem.type = half ? Type::float16 : Type::bfloat16;
  const Shape& s = problem.shape;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor xd = dense(x), wi = dense(weight_in), bi = dense(bias_in), wo = dense(weight_out);
  Tensor y = fresh(x, sizes_of(x), dtype), kept = bytes(x, kept_of(s, cast_x, nullptr).used);
  const Kept k = kept_of(s, cast_x, &kept);
  const int64_t numbers = s.nodes() * s.hidden, more = (k.width - s.nodes()) * s.hidden;
  const hf_fff_cuda::Cast casts[]{{wi.const_data_ptr(), k.in, numbers, more},
                                  {wo.const_data_ptr(), k.out, numbers, more},
                                  {bi.const_data_ptr(), k.bias, s.nodes(), k.width - s.nodes()},
                                  {xd.const_data_ptr(), k.x, s.tokens * s.hidden, 0}};
  check(hf_fff_cuda::cast(casts, cast_x ? 4 : 3, problem.type, stream_of(x)));
  const void* xs = cast_x ? k.x : xd.const_data_ptr();
  problem.aligned = reinterpret_cast<uintptr_t>(xs) % 16 == 0;
  const Way way = hf_fff_cuda::forward_way(problem, wanted_way());
  if (way == Way::dense) {
    run_dense(over(xs, x, {s.tokens, s.hidden}, dtype), over(k.in, x, {k.width, s.hidden}, dtype), k.bias,
              over(k.out, x, {k.width, s.hidden}, dtype), problem, act, rows_of(y, s.tokens, s.hidden), k.path, k.logits);
  } else {
    const Tensor workspace = bytes(x, hf_fff_cuda::forward_workspace(problem, way, true));
    check(hf_fff_cuda::forward({problem, act, xs, k.in, k.bias, k.out, y.mutable_data_ptr(), k.path, k.logits, workspace.mutable_data_ptr()},
                               way, stream_of(x)));
  }
  return {y, kept};
}

Gradients fff_backward_mixed(Tensor grad_y, std::optional<Tensor> x, Tensor kept, int64_t n_trees, int64_t depth, Text activation,
                             double routing_gradient, double routing_temperature, bool need_x, bool need_weights) {
  const Activation act = activation_of(activation.value);
  const ScalarType dtype = grad_y.scalar_type();
  STD_TORCH_CHECK(grad_y.dim() >= 1 && grad_y.is_cuda() && (dtype == ScalarType::Half || dtype == ScalarType::BFloat16) &&
                      (!x || (x->scalar_type() == dtype && x->numel() == grad_y.numel() && x->get_device_index() == grad_y.get_device_index())),
                  "fff_backward_mixed: grad_y and x do not fit each other");
  STD_TORCH_CHECK(n_trees >= 1 && depth >= 0 && depth < 30, "fff_backward_mixed: no such trees");
  STD_TORCH_CHECK(routing_temperature > 0, "fff_backward_mixed: routing_temperature must be above 0");
  const int64_t hidden = grad_y.size(grad_y.dim() - 1);
  const Shape s{hidden ? grad_y.numel() / hidden : 0, hidden, n_trees, depth};
  STD_TORCH_CHECK(kept.is_cuda() && kept.get_device_index() == grad_y.get_device_index() && kept.scalar_type() == ScalarType::Byte &&
                      kept.numel() == kept_of(s, !x, nullptr).used,
                  "fff_backward_mixed: what was kept is of another call");
  const torch::stable::accelerator::DeviceGuard guard(grad_y.get_device_index());
  const Kept k = kept_of(s, !x, &kept);
  const Tensor gd = dense(grad_y), xd = x ? dense(*x) : over(k.x, grad_y, {s.tokens, s.hidden}, dtype);
  const Device device = device_facts(grad_y.get_device_index());
  const Problem problem{s, type_of(dtype), aligned({&gd, &xd}), device.capability, device.processors};
  const bool routing = routing_gradient != 0;
  const Way way = hf_fff_cuda::backward_way(problem, routing, wanted_way());
  if (way == Way::dense) {
    const Sizes visits{s.tokens, s.trees, s.levels()}, weights{s.nodes(), s.hidden};
    return backward_dense(gd, torch::stable::view(xd, sizes_of(grad_y)), over(k.in, gd, weights, dtype), over(k.bias, gd, {s.nodes()}, dtype),
                          over(k.out, gd, weights, dtype), over(k.path, gd, visits, ScalarType::Int), over(k.logits, gd, visits, ScalarType::Float),
                          n_trees, activation.value, routing_gradient, routing_temperature, need_x, need_weights);
  }
  const hf_fff_cuda::Wide can = hf_fff_cuda::backward_wide(problem, way);
  const bool wide_x = can.x && !x, wide = can.weights;
  const auto result = [&](const Sizes& sizes, bool wanted, bool single) {
    return fresh(grad_y, wanted ? sizes : Sizes{0}, single ? ScalarType::Float : dtype);
  };
  Tensor grad_x = result(sizes_of(grad_y), need_x, wide_x), grad_in = result({s.nodes(), s.hidden}, need_weights, wide),
         grad_bias = result({s.nodes()}, need_weights, wide), grad_out = result({s.nodes(), s.hidden}, need_weights, wide);
  Tensor extra;
  if (routing)
    extra = routing_term(gd, dtype, gd.const_data_ptr(), xd.const_data_ptr(), k.in, k.bias, k.out, k.width, k.path, k.logits, problem, act,
                         routing_gradient, routing_temperature);
  const Tensor workspace = bytes(grad_y, hf_fff_cuda::backward_workspace(problem, way, need_x, need_weights));
  check(hf_fff_cuda::backward({problem, act, gd.const_data_ptr(), xd.const_data_ptr(), k.in, k.bias, k.out, k.path, k.logits,
                               routing ? extra.const_data_ptr() : nullptr, need_x ? grad_x.mutable_data_ptr() : nullptr,
                               need_weights ? grad_in.mutable_data_ptr() : nullptr, need_weights ? grad_bias.mutable_data_ptr() : nullptr,
                               need_weights ? grad_out.mutable_data_ptr() : nullptr, workspace.mutable_data_ptr(), wide_x, wide},
                              way, stream_of(grad_y)));
  return {grad_x, grad_in, grad_bias, grad_out};
}

Tensor add_bias(Tensor x, Tensor bias) {
  const int64_t hidden = x.dim() ? x.size(x.dim() - 1) : 0;
  STD_TORCH_CHECK(x.dim() >= 1 && bias.dim() == 1 && bias.size(0) == hidden && bias.scalar_type() == x.scalar_type() && bias.is_cuda() &&
                      bias.get_device_index() == x.get_device_index(),
                  "add_bias: bias is ", text(bias), "; it must have one number for each column of x ", text(x), ", its dtype and its device");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor xd = dense(x), bd = dense(bias), y = empty_like_dense(x);
  check(hf_fff_cuda::add_bias(xd.const_data_ptr(), bd.const_data_ptr(), y.mutable_data_ptr(), hidden ? x.numel() / hidden : 0, hidden,
                              type_of(x.scalar_type()), stream_of(x)));
  return y;
}

HF_FFF_IMPLEMENTS(CUDA, m) {
  m.impl("fff", TORCH_BOX(&fff));
  m.impl("fff_train", TORCH_BOX(&fff_train));
  m.impl("fff_backward", TORCH_BOX(&fff_backward));
  m.impl("fff_train_mixed", TORCH_BOX(&fff_train_mixed));
  m.impl("fff_backward_mixed", TORCH_BOX(&fff_backward_mixed));
  m.impl("add_bias", TORCH_BOX(&add_bias));
}

}  // namespace

// What a call does: "plain", "gather", "sorted", "tiles", "columns", "forest" or "dense" for a forward pass, "conditional", "tiles" or "dense" for
// a backward one. `type` is an index of float32, float64, bfloat16, float16.
extern "C" __attribute__((visibility("default"))) const char* hf_fff_cuda_way(int64_t tokens, int64_t hidden, int64_t trees,
                                                                              int64_t depth, int type, int capability,
                                                                              int processors, bool backward, bool routing) {
  const Problem problem{{tokens, hidden, trees, depth}, Type(type), true, capability, processors};
  if (backward) {
    const Way way = hf_fff_cuda::backward_way(problem, routing);
    return way == Way::plain ? "conditional" : kWays[size_t(way)];
  }
  return kWays[size_t(hf_fff_cuda::forward_way(problem))];
}
