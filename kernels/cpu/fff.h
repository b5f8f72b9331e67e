// Fast feedforward networks on a CPU: the public face of the arithmetic. Plain C++17, no framework.
//
// A layer is `trees` balanced binary trees of depth `depth`, each with N = 2^(depth+1) - 1 nodes in heap order (the
// children of node n are 2n+1 and 2n+2). A node is a neuron: weight_in[n] (hidden), bias_in[n], weight_out[n] (hidden).
// Weights are tree-major: row `tree * N + n`. For one token x and each tree, starting at node 0 (arXiv 2311.10770, section 2):
//
//     z  = <x, weight_in[n]> + bias_in[n];   y += act(z) * weight_out[n];   n = 2n + 1 + (z > 0)
//
// depth + 1 times. "Strictly greater" is part of the definition: a tie and a NaN go left.
//
// One entry point per operation and storage type; each picks the best instruction set of the machine at run time. Work
// is split over tokens through a parallel-for that the caller supplies, so that the host's own thread pool is used. A
// token's arithmetic depends neither on the number of threads nor on the tokens beside it: results are equal bit for bit.
#pragma once
#include <cstdint>

namespace hf_fff {

enum class Activation : int { gelu, gelu_new, relu, silu, identity };

struct Shape {
  int64_t tokens, hidden, trees, depth;
  int64_t levels() const { return depth + 1; }
  int64_t tree_nodes() const { return (int64_t{2} << depth) - 1; }
  int64_t nodes() const { return trees * tree_nodes(); }
  int64_t walk() const { return trees * levels(); }  // neurons that one token uses
};

// Storage types that are no C++ types. Arithmetic on them is done in float.
struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };

// What sums are kept in: float for every storage type but double.
template <class T> struct accumulator { using type = float; };
template <> struct accumulator<double> { using type = double; };
template <class T> using accumulator_t = typename accumulator<T>::type;

// Calls body(context, begin, end) over pieces of [0, count), each of at least `grain` where that is possible.
struct ParallelFor {
  using Body = void (*)(void* context, int64_t begin, int64_t end);
  void (*run)(int64_t count, int64_t grain, Body body, void* context);
};

template <class T> struct Forward {
  Shape shape;
  Activation activation;
  const T *x, *weight_in, *bias_in, *weight_out;  // [tokens, hidden], [nodes, hidden], [nodes], [nodes, hidden]
  T* y;                                            // [tokens, hidden]
  int32_t* path;                                   // [tokens, trees, levels], node within its tree; or null
  accumulator_t<T>* logits;                        // [tokens, trees, levels]; or null
};

template <class T> struct Backward {
  Shape shape;
  Activation activation;
  const T *grad_y, *x, *weight_in, *bias_in, *weight_out;
  const int32_t* path;
  const accumulator_t<T>* logits;
  double routing_gradient, routing_temperature;  // alpha (0: off) and tau of the straight-through routing gradient
  T* grad_x;                                     // or null: not wanted
  T *grad_weight_in, *grad_bias_in, *grad_weight_out;  // all three or none
};

// Does every walk start at node 0 and go from parent to child? `backward` relies on it.
bool is_valid_path(const Shape&, const int32_t* path);

template <class T> void forward(const Forward<T>&, const ParallelFor&);
template <class T> void backward(const Backward<T>&, const ParallelFor&);

// ---- packed: frozen trees with rows of fewer bytes, for inference --------------------------------------------------------
// One flat buffer: a header, then everything of the layer in the order in which it is read (layout.h). It is a copy, so it
// belongs where weights do not change any more.
enum class Rows : int32_t { int8, bf16 };

// The bytes that `pack` fills for a shape (tokens do not matter).
int64_t packed_bytes(Rows, const Shape&);

// False, with nothing of use in `packed`, where a weight is not finite. `packed` holds packed_bytes().
bool pack(Rows, const Shape&, const float* weight_in, const float* bias_in, const float* weight_out, uint8_t* packed);

// Reads the header: null and the shape (tokens = 0), or what is wrong with the buffer. `whole` also looks for damage in all
// that follows the header, at the cost of reading it.
const char* read_packed(const uint8_t* packed, int64_t bytes, bool whole, Rows* rows, Shape* shape);

template <class T> struct PackedForward {  // T: float, bfloat16, float16
  int64_t tokens;
  Activation activation;
  const T* x;             // [tokens, hidden]
  const uint8_t* packed;  // that read_packed accepts; best aligned to 64 bytes
  T* y;                   // [tokens, hidden]
};
template <class T> void forward_packed(const PackedForward<T>&, const ParallelFor&);

// The instruction set in use: "avx512", "avx2", "baseline". HF_FFF_ISA forces one; a name that the machine lacks is an
// error, whose text `isa_error` returns (null: none).
const char* isa();
const char* isa_error();

}  // namespace hf_fff
