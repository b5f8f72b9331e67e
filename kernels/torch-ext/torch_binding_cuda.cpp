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
Problem problem_of(const Tensor& x, const Tensor& weight_in, const Tensor& bias_in, const Tensor& weight_out, int64_t n_trees) {
  const auto beside_x = [&](const Tensor& t) { return t.is_cuda() && t.get_device_index() == x.get_device_index(); };
  const auto [tokens, hidden, trees, depth] = hf_fff_torch::sizes_of(x, weight_in, bias_in, weight_out, n_trees, 29, beside_x);
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

Tensor empty_like_dense(const Tensor& t) { return torch::stable::new_empty(t, t.sizes()); }
Tensor bytes(const Tensor& like, int64_t count) {
  return torch::stable::new_empty(like, std::vector<int64_t>{count}, ScalarType::Byte);
}
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

bool goes_back_dense(const Problem& problem, bool routing) {
  const Way wanted = wanted_way();
  return wanted == Way::dense || (wanted == Way::automatic && hf_fff_cuda::backward_is_dense(problem, routing));
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
Tensor matrix(const Tensor& like, int64_t rows, int64_t width) {
  return torch::stable::new_empty(like, std::vector<int64_t>{rows, width});
}

// Matrix products over all nodes, with a mask between them.
void run_dense(const Tensor& x, const Tensor& weight_in, const Tensor& bias_in, const Tensor& weight_out, const Problem& problem,
               Activation activation, const Tensor& y, const Tensor* path, const Tensor* logits) {
  const Shape& s = problem.shape;
  const Tensor xs = rows_of(dense(x), s.tokens, s.hidden), in = torch::stable::transpose(in_eights(detached(dense(weight_in))), 0, 1),
               out = in_eights(detached(dense(weight_out))), bias = dense(bias_in), ys = rows_of(y, s.tokens, s.hidden);
  const int64_t width = out.size(0), piece = std::max<int64_t>(1, kMostElements / width);
  for (int64_t begin = 0; begin < s.tokens; begin += piece) {
    const int64_t count = std::min(piece, s.tokens - begin);
    const Tensor every = matrix(xs, count, width);
    product(part_of(xs, begin, count), in, every);
    check(hf_fff_cuda::mask(
        {{count, s.hidden, s.trees, s.depth}, activation, every.mutable_data_ptr(), width, bias.const_data_ptr(),
         path ? static_cast<int32_t*>(path->mutable_data_ptr()) + begin * s.walk() : nullptr,
         path ? static_cast<char*>(logits->mutable_data_ptr()) + begin * s.walk() * (problem.type == Type::float64 ? 8 : 4) : nullptr},
        problem.type, stream_of(x)));
    product(every, out, part_of(ys, begin, count));
  }
}

void run_forward(const Tensor& x, const Tensor& weight_in, const Tensor& bias_in, const Tensor& weight_out, Problem problem,
                 Way way, Activation activation, const Tensor& y, const Tensor* path, const Tensor* logits) {
  const Tensor xd = dense(x), wi = dense(weight_in), bi = dense(bias_in), wo = dense(weight_out);
  problem.aligned = aligned({&xd, &wi, &wo, &y});
  way = hf_fff_cuda::forward_way(problem, way);  // anew: now it is known where the numbers lie
  const Tensor workspace = bytes(x, hf_fff_cuda::forward_workspace(problem, way, path != nullptr));
  check(hf_fff_cuda::forward({problem, activation, xd.const_data_ptr(), wi.const_data_ptr(), bi.const_data_ptr(),
                              wo.const_data_ptr(), y.mutable_data_ptr(),
                              path ? static_cast<int32_t*>(path->mutable_data_ptr()) : nullptr,
                              logits ? logits->mutable_data_ptr() : nullptr, workspace.mutable_data_ptr()},
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
  if (way == Way::dense) run_dense(x, weight_in, bias_in, weight_out, problem, act, y, nullptr, nullptr);
  else run_forward(x, weight_in, bias_in, weight_out, problem, way, act, y, nullptr, nullptr);
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
  Tensor path = torch::stable::new_empty(x, sizes, ScalarType::Int);
  Tensor logits = torch::stable::new_empty(x, sizes, logits_type(x));
  if (way == Way::dense) run_dense(x, weight_in, bias_in, weight_out, problem, act, y, &path, &logits);
  else run_forward(x, weight_in, bias_in, weight_out, problem, way, act, y, &path, &logits);
  return {y, path, logits};
}

// What the routing gradient adds to dL/dlogit, [tokens, trees, levels]; contiguous arguments.
Tensor routing_term(const Tensor& grad_y, const Tensor& x, const Tensor& weight_in, const Tensor& bias_in, const Tensor& weight_out,
                    const Tensor& path, const Tensor& logits, const Problem& problem, Activation activation, double strength,
                    double temperature) {
  const Shape& s = problem.shape;
  Tensor extra = torch::stable::new_empty(x, std::vector<int64_t>{s.tokens, s.walk()}, logits_type(x));
  const Tensor xs = rows_of(x, s.tokens, s.hidden), gs = rows_of(grad_y, s.tokens, s.hidden), ps = rows_of(path, s.tokens, s.walk()),
               ls = rows_of(logits, s.tokens, s.walk()), in = torch::stable::transpose(in_eights(detached(weight_in)), 0, 1),
               out = torch::stable::transpose(in_eights(detached(weight_out)), 0, 1);
  const int64_t width = in.size(1), piece = std::max<int64_t>(1, kMostElements / width);
  for (int64_t begin = 0; begin < s.tokens; begin += piece) {
    const int64_t count = std::min(piece, s.tokens - begin);
    const Tensor every = matrix(xs, count, width), gain = matrix(gs, count, width);
    product(part_of(xs, begin, count), in, every), product(part_of(gs, begin, count), out, gain);
    const Tensor p = part_of(ps, begin, count), l = part_of(ls, begin, count), e = part_of(extra, begin, count);
    check(hf_fff_cuda::routing({{count, s.hidden, s.trees, s.depth}, activation, every.const_data_ptr(), gain.const_data_ptr(), width,
                                bias_in.const_data_ptr(), static_cast<const int32_t*>(p.const_data_ptr()), l.const_data_ptr(),
                                strength, temperature, e.mutable_data_ptr()},
                               problem.type, stream_of(x)));
  }
  return extra;
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
  if (goes_back_dense(problem, routing_gradient != 0)) {
    std::array<StableIValue, 13> stack{from(grad_y),     from(x),      from(weight_in), from(bias_in),
                                       from(weight_out), from(path),   from(logits),    from(n_trees),
                                       from(activation.value),         from(routing_gradient),
                                       from(routing_temperature),      from(need_x),    from(need_weights)};
    TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher(HF_FFF_OPERATOR("fff_backward_dense"), "", stack.data(), TORCH_ABI_VERSION));
    return {to<Tensor>(stack[0]), to<Tensor>(stack[1]), to<Tensor>(stack[2]), to<Tensor>(stack[3])};
  }
  const auto result = [](const Tensor& like, bool wanted) {
    return wanted ? empty_like_dense(like) : torch::stable::new_empty(like, std::vector<int64_t>{0});
  };
  Tensor grad_x = result(x, need_x), grad_in = result(weight_in, need_weights),
         grad_bias = result(bias_in, need_weights), grad_out = result(weight_out, need_weights);
  const Tensor gd = dense(grad_y), xd = dense(x), wi = dense(weight_in), bi = dense(bias_in), wo = dense(weight_out), pd = dense(path),
               ld = dense(logits);
  problem.aligned = aligned({&gd, &xd, &wi, &wo});
  Tensor extra;
  if (routing_gradient != 0)
    extra = routing_term(gd, xd, wi, bi, wo, pd, ld, problem, act, routing_gradient, routing_temperature);
  const Tensor workspace = bytes(x, hf_fff_cuda::backward_workspace(problem, need_weights));
  check(hf_fff_cuda::backward({problem, act, gd.const_data_ptr(), xd.const_data_ptr(), wi.const_data_ptr(), bi.const_data_ptr(),
                               wo.const_data_ptr(), static_cast<const int32_t*>(pd.const_data_ptr()), ld.const_data_ptr(),
                               routing_gradient != 0 ? extra.const_data_ptr() : nullptr, need_x ? grad_x.mutable_data_ptr() : nullptr,
                               need_weights ? grad_in.mutable_data_ptr() : nullptr,
                               need_weights ? grad_bias.mutable_data_ptr() : nullptr,
                               need_weights ? grad_out.mutable_data_ptr() : nullptr, workspace.mutable_data_ptr()},
                              stream_of(x)));
  return {grad_x, grad_in, grad_bias, grad_out};
}

HF_FFF_IMPLEMENTS(CUDA, m) {
  m.impl("fff", TORCH_BOX(&fff));
  m.impl("fff_train", TORCH_BOX(&fff_train));
  m.impl("fff_backward", TORCH_BOX(&fff_backward));
}

}  // namespace

// What a call does: "plain", "gather", "sorted", "tiles", "columns", "forest" or "dense" for a forward pass, "conditional" or "dense" for a backward
// one. `type` is an index of float32, float64, bfloat16, float16.
extern "C" __attribute__((visibility("default"))) const char* hf_fff_cuda_way(int64_t tokens, int64_t hidden, int64_t trees,
                                                                              int64_t depth, int type, int capability,
                                                                              int processors, bool backward, bool routing) {
  const Problem problem{{tokens, hidden, trees, depth}, Type(type), true, capability, processors};
  if (backward) return hf_fff_cuda::backward_is_dense(problem, routing) ? "dense" : "conditional";
  return kWays[size_t(hf_fff_cuda::forward_way(problem))];
}
