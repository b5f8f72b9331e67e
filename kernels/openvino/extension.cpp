// FFF and PackedFFF as operations of OpenVINO: a thin binding over cpu/fff.h that checks arguments, leaves out the tokens that
// a mask hides and lends the engine's thread pool (TBB). Weights are inputs, so that a saved model holds them.
//
// FFF: x [..., hidden], weight_in [nodes, hidden], bias_in [nodes], weight_out [nodes, hidden]. The type of the weights is what
// is computed in; x may have another one (float32, bfloat16 or float16), in which y is given.
// PackedFFF: x [..., hidden] and the buffer that `pack` fills, u8 [bytes].
// Both optionally take a mask with one number a token: 0 hides it, and its output is 0. Output: as x.
#include <openvino/core/op_extension.hpp>
#include <openvino/core/version.hpp>
#include <openvino/frontend/extension.hpp>
#include <openvino/op/constant.hpp>
#include <openvino/op/op.hpp>

#include <tbb/parallel_for.h>
#include <tbb/partitioner.h>
#include <tbb/task_arena.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

#include "cpu/fff.h"

#define FFF_TEXT_(x) #x
#define FFF_TEXT(x) FFF_TEXT_(x)
#define FFF_EXPORT extern "C" __attribute__((visibility("default")))

#if defined(__x86_64__) && defined(__gnu_linux__)
#define FFF_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FFF_CLONES
#endif

namespace {

constexpr std::array activations{"gelu", "gelu_new", "relu", "silu", "identity"};  // in the order of hf_fff::Activation

// The threads of the arena in which the engine runs this inference; no pool of our own.
const hf_fff::ParallelFor engine_threads{[](int64_t count, int64_t grain, hf_fff::ParallelFor::Body body, void* context) {
  const int64_t most = tbb::this_task_arena::max_concurrency();
  const int64_t parts = std::min(most, (count + grain - 1) / std::max<int64_t>(1, grain));
  if (parts <= 1) return body(context, 0, count);
  tbb::parallel_for(
      int64_t{0}, parts, [&](int64_t i) { body(context, count * i / parts, count * (i + 1) / parts); },
      tbb::static_partitioner{});
}};

template <class F> void parallel(int64_t count, int64_t grain, const F& f) {
  engine_threads.run(
      count, grain,
      [](void* context, int64_t begin, int64_t end) { (*static_cast<const F*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

FFF_CLONES void convert(const float* from, hf_fff::bfloat16* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, from + i, 4);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to the nearest, ties to even
    to[i].bits = uint16_t((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded);
  }
}

FFF_CLONES void convert(const hf_fff::bfloat16* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = uint32_t{from[i].bits} << 16;
    std::memcpy(to + i, &bits, 4);
  }
}

// Rare: OpenVINO's own half type knows how.
void convert(const float* from, hf_fff::float16* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i].bits = ov::float16(from[i]).to_bits();
}
void convert(const hf_fff::float16* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = float(ov::float16::from_bits(from[i].bits));
}
template <class A, class B> void convert(const A* from, B* to, int64_t n) {
  if constexpr (std::is_same_v<A, B>) {
    std::copy_n(from, n, to);
  } else {  // one 16-bit type to the other
    thread_local std::vector<float> wide;
    wide.resize(n);
    convert(from, wide.data(), n);
    convert(wide.data(), to, n);
  }
}

// Memory that a thread keeps from call to call: fresh pages for every layer would cost more than the copies into them.
template <class T> T* scratch(int which, int64_t count) {
  thread_local std::vector<T> kept[2];
  if (int64_t(kept[which].size()) < count) kept[which].resize(count);
  return kept[which].data();
}

template <class M> void collect(const ov::Tensor& mask, std::vector<int32_t>& visible) {
  const M* m = static_cast<const M*>(std::as_const(mask).data());
  for (size_t i = 0; i < mask.get_size(); ++i)
    if (m[i] != M{0}) visible.push_back(int32_t(i));
}

// The tokens that the mask shows.
std::vector<int32_t> visible_tokens(const ov::Tensor& mask) {
  std::vector<int32_t> visible;
  visible.reserve(mask.get_size());
  const auto type = mask.get_element_type();
  if (type == ov::element::i64) collect<int64_t>(mask, visible);
  else if (type == ov::element::i32) collect<int32_t>(mask, visible);
  else if (type == ov::element::f32) collect<float>(mask, visible);
  else if (type.size() == 1) collect<uint8_t>(mask, visible);  // boolean, u8, i8
  else OPENVINO_THROW("FFF: a mask of type ", type, "; i64, i32, f32, u8 and boolean are known");
  return visible;
}

bool is_storage(const ov::element::Type& type) {
  return type == ov::element::f32 || type == ov::element::bf16 || type == ov::element::f16;
}

template <class F> void with_type(const ov::element::Type& type, const F& f) {
  if (type == ov::element::f32) return f(float{});
  if (type == ov::element::bf16) return f(hf_fff::bfloat16{});
  if (type == ov::element::f16) return f(hf_fff::float16{});
  OPENVINO_THROW("FFF: ", type, " is not float32, bfloat16 or float16");
}

hf_fff::Activation activation_of(const std::string& name) {
  return hf_fff::Activation(std::find(activations.begin(), activations.end(), name) - activations.begin());
}

// Calls forward(tokens, from, to) on the tokens of x that a mask (or null) shows; y is 0 for the others. T is what it computes
// in, X what x and y are.
template <class T, class X, class F>
void on_visible(const ov::Tensor& input, const ov::Tensor* mask, ov::Tensor& output, const F& forward) {
  const X* x = static_cast<const X*>(input.data());
  output.set_shape(input.get_shape());
  X* y = static_cast<X*>(output.data());
  const int64_t hidden = int64_t(input.get_shape().back()), tokens = hidden ? int64_t(input.get_size()) / hidden : 0;
  OPENVINO_ASSERT(!mask || int64_t(mask->get_size()) == tokens, "FFF: the mask has ", mask ? mask->get_size() : 0,
                  " numbers, and x ", tokens, " tokens");
  const std::vector<int32_t> visible = mask ? visible_tokens(*mask) : std::vector<int32_t>{};
  const bool all = !mask || int64_t(visible.size()) == tokens;
  if constexpr (std::is_same_v<T, X>)
    if (all) return forward(tokens, x, y);
  const int64_t count = all ? tokens : int64_t(visible.size()), grain = std::max<int64_t>(1, 16384 / hidden);
  T *from = scratch<T>(0, count * hidden), *to = scratch<T>(1, count * hidden);
  const auto token = [&](int64_t i) { return all ? i : int64_t(visible[i]); };
  parallel(count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) convert(x + token(i) * hidden, from + i * hidden, hidden);
  });
  if (count) forward(count, from, to);
  // Each thread writes the outputs of its visible tokens, and zeros up to the next of them.
  if (!count) std::fill_n(y, tokens * hidden, X{});
  parallel(count, grain, [&](int64_t begin, int64_t end) {
    int64_t done = begin ? token(begin) : 0;
    for (int64_t i = begin; i < end; ++i) {
      std::fill(y + done * hidden, y + token(i) * hidden, X{});
      convert(to + i * hidden, y + token(i) * hidden, hidden);
      done = token(i) + 1;
    }
    std::fill(y + done * hidden, y + (end == count ? tokens : token(end)) * hidden, X{});
  });
}

}  // namespace

namespace hf_fff::openvino {

class FFF : public ov::op::Op {
 public:
  // The version changes when a saved model would mean something else: an engine that does not know it then says so.
  OPENVINO_OP("FFF", "hf_fff.1");

  FFF() = default;
  FFF(const ov::OutputVector& inputs, int64_t trees, std::string activation)
      : Op(inputs), trees_(trees), activation_(std::move(activation)) {
    constructor_validate_and_infer_types();
  }

  std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
    return std::make_shared<FFF>(inputs, trees_, activation_);
  }

  bool visit_attributes(ov::AttributeVisitor& visitor) override {
    visitor.on_attribute("n_trees", trees_);
    visitor.on_attribute("activation", activation_);
    return true;
  }

  void validate_and_infer_types() override {
    NODE_VALIDATION_CHECK(this, get_input_size() == 4 || get_input_size() == 5,
                          "FFF takes x, weight_in, bias_in, weight_out and a mask or none, not ", get_input_size(),
                          " inputs");
    NODE_VALIDATION_CHECK(this, std::count(activations.begin(), activations.end(), activation_) == 1,
                          "FFF: activation '", activation_, "' is not known");
    const auto type = get_input_element_type(1);
    for (size_t i = 1; i < 4; ++i)
      NODE_VALIDATION_CHECK(this, get_input_element_type(i) == type && is_storage(get_input_element_type(i)),
                            "FFF: the weights must be float32, bfloat16 or float16, all of one type, and input ", i,
                            " is ", get_input_element_type(i));
    NODE_VALIDATION_CHECK(this, get_input_element_type(0).is_dynamic() || is_storage(get_input_element_type(0)),
                          "FFF: x is ", get_input_element_type(0), ", not float32, bfloat16 or float16");
    const auto& weights = get_input_partial_shape(1);
    if (weights.is_static()) {
      NODE_VALIDATION_CHECK(this, weights.size() == 2 && trees_ >= 1 && depth_of(weights[0].get_length(), trees_) >= 0,
                            "FFF: weight_in is ", weights, ", which are not n_trees=", trees_,
                            " balanced trees of 2^(depth+1)-1 nodes each");
      NODE_VALIDATION_CHECK(this,
                            get_input_partial_shape(3).compatible(weights) &&
                                get_input_partial_shape(2).compatible(ov::PartialShape{weights[0]}),
                            "FFF: bias_in ", get_input_partial_shape(2), " or weight_out ", get_input_partial_shape(3),
                            " does not fit weight_in ", weights);
      const auto& x = get_input_partial_shape(0);
      NODE_VALIDATION_CHECK(this, x.rank().is_dynamic() || (x.size() >= 1 && x[x.size() - 1].compatible(weights[1])),
                            "FFF: x is ", x, " and weight_in ", weights, "; the last dimensions must agree");
    }
    set_output_type(0, get_input_element_type(0), get_input_partial_shape(0));
  }

  bool has_evaluate() const override { return true; }

  bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
    OPENVINO_ASSERT(!hf_fff::isa_error(), hf_fff::isa_error());
    const ov::Tensor &x = inputs[0], &weight_in = inputs[1];
    const int64_t hidden = int64_t(weight_in.get_shape().at(1)), nodes = int64_t(weight_in.get_shape()[0]);
    OPENVINO_ASSERT(int64_t(x.get_shape().back()) == hidden, "FFF: x is ", x.get_shape(), " and weight_in ",
                    weight_in.get_shape(), "; the last dimensions must agree");
    with_type(weight_in.get_element_type(), [&](auto weight) {
      using T = decltype(weight);
      const auto weights = [&](int i) { return static_cast<const T*>(inputs[i].data()); };
      const auto forward = [&](int64_t tokens, const T* from, T* to) {
        const hf_fff::Shape shape{tokens, hidden, trees_, depth_of(nodes, trees_)};
        hf_fff::forward<T>({shape, activation_of(activation_), from, weights(1), weights(2), weights(3), to, nullptr, nullptr},
                           engine_threads);
      };
      with_type(x.get_element_type(), [&](auto value) {
        on_visible<T, decltype(value)>(x, inputs.size() == 5 ? &inputs[4] : nullptr, outputs[0], forward);
      });
    });
    return true;
  }

 private:
  // -1: no balanced trees.
  static int64_t depth_of(int64_t nodes, int64_t trees) {
    for (int64_t depth = 0; depth < 30; ++depth)
      if (trees * ((int64_t{2} << depth) - 1) == nodes) return depth;
    return -1;
  }

  int64_t trees_ = 0;
  std::string activation_;
};

class PackedFFF : public ov::op::Op {
 public:
  OPENVINO_OP("PackedFFF", "hf_fff.1");

  PackedFFF() = default;
  PackedFFF(const ov::OutputVector& inputs, std::string activation) : Op(inputs), activation_(std::move(activation)) {
    constructor_validate_and_infer_types();
  }

  std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
    return std::make_shared<PackedFFF>(inputs, activation_);
  }

  bool visit_attributes(ov::AttributeVisitor& visitor) override {
    visitor.on_attribute("activation", activation_);
    return true;
  }

  void validate_and_infer_types() override {
    NODE_VALIDATION_CHECK(this, get_input_size() == 2 || get_input_size() == 3,
                          "PackedFFF takes x, a packed layer and a mask or none, not ", get_input_size(), " inputs");
    NODE_VALIDATION_CHECK(this, std::count(activations.begin(), activations.end(), activation_) == 1,
                          "PackedFFF: activation '", activation_, "' is not known");
    NODE_VALIDATION_CHECK(this, get_input_element_type(0).is_dynamic() || is_storage(get_input_element_type(0)),
                          "PackedFFF: x is ", get_input_element_type(0), ", not float32, bfloat16 or float16");
    NODE_VALIDATION_CHECK(this, get_input_element_type(1) == ov::element::u8 && get_input_partial_shape(1).rank().compatible(1),
                          "PackedFFF: the packed layer is ", get_input_element_type(1), " ", get_input_partial_shape(1),
                          ", not u8 [bytes]");
    if (const auto constant = ov::as_type_ptr<ov::op::v0::Constant>(input_value(1).get_node_shared_ptr())) {
      const int64_t hidden = hidden_of(constant->get_data_ptr<uint8_t>(), int64_t(constant->get_byte_size()));
      const auto& x = get_input_partial_shape(0);
      NODE_VALIDATION_CHECK(this, x.rank().is_dynamic() || (x.size() >= 1 && x[x.size() - 1].compatible(hidden)),
                            "PackedFFF: x is ", x, ", and the packed layer is for a last dimension of ", hidden);
    }
    set_output_type(0, get_input_element_type(0), get_input_partial_shape(0));
  }

  bool has_evaluate() const override { return true; }

  bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
    OPENVINO_ASSERT(!hf_fff::isa_error(), hf_fff::isa_error());
    const ov::Tensor &x = inputs[0], &packed = inputs[1];
    const uint8_t* data = static_cast<const uint8_t*>(packed.data());
    const int64_t hidden = hidden_of(data, int64_t(packed.get_byte_size()));
    OPENVINO_ASSERT(int64_t(x.get_shape().back()) == hidden, "PackedFFF: x is ", x.get_shape(),
                    ", and the packed layer is for a last dimension of ", hidden);
    with_type(x.get_element_type(), [&](auto value) {
      using X = decltype(value);
      on_visible<X, X>(x, inputs.size() == 3 ? &inputs[2] : nullptr, outputs[0], [&](int64_t tokens, const X* from, X* to) {
        hf_fff::forward_packed<X>({tokens, activation_of(activation_), from, data, to}, engine_threads);
      });
    });
    return true;
  }

 private:
  static int64_t hidden_of(const uint8_t* packed, int64_t bytes) {
    hf_fff::Rows rows;
    hf_fff::Shape shape;
    const char* wrong = hf_fff::read_packed(packed, bytes, false, &rows, &shape);
    OPENVINO_ASSERT(!wrong, "PackedFFF: the packed layer cannot be used: ", wrong);
    return shape.hidden;
  }

  std::string activation_;
};

}  // namespace hf_fff::openvino

namespace {

using hf_fff::openvino::FFF;
using hf_fff::openvino::PackedFFF;

// x, weight_in, bias_in, weight_out, [trees, number of the activation], and a mask or none: what hf_fff/openvino/graph.py traces.
ov::OutputVector from_torch(const ov::frontend::NodeContext& context) {
  ov::OutputVector inputs;
  for (size_t i = 0; i < context.get_input_size(); ++i)
    if (i != 4) inputs.push_back(context.get_input(int(i)));
  const auto settings = ov::as_type_ptr<ov::op::v0::Constant>(context.get_input(4).get_node_shared_ptr());
  OPENVINO_ASSERT(settings && ov::shape_size(settings->get_shape()) == 2, "hf_fff::FFF: its settings are no constant");
  const auto values = settings->cast_vector<int64_t>();
  return std::make_shared<FFF>(inputs, values[0], activations.at(size_t(values[1])))->outputs();
}

}  // namespace

FFF_EXPORT const char* hf_fff_openvino_version() {
  return FFF_TEXT(OPENVINO_VERSION_MAJOR) "." FFF_TEXT(OPENVINO_VERSION_MINOR) "." FFF_TEXT(OPENVINO_VERSION_PATCH);
}
FFF_EXPORT const char* hf_fff_openvino_isa() { return hf_fff::isa(); }

OPENVINO_CREATE_EXTENSIONS(std::vector<ov::Extension::Ptr>({
    std::make_shared<ov::OpExtension<FFF>>(),
    std::make_shared<ov::OpExtension<PackedFFF>>(),
    std::make_shared<ov::frontend::ConversionExtension>("hf_fff::FFF", from_torch),
}))
