// Fast feedforward networks on an NVIDIA GPU: the public face of the arithmetic. Raw device pointers and a stream; no framework.
//
// The definition is that of cpu/fff.h: for one token x and each tree, starting at node 0 (children of n: 2n+1 and 2n+2),
//
//     z  = <x, weight_in[n]> + bias_in[n];   y += act(z) * weight_out[n];   n = 2n + 1 + (z > 0)
//
// depth + 1 times; a tie and a NaN go left. Sums are kept in float32 (float64 where the numbers are float64).
//
// Nothing here allocates or waits for the device. What a call needs beside its results is one buffer of `*_workspace` bytes,
// so all of it can be captured into a CUDA graph. Sums are made in a fixed order: two runs are equal bit for bit.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

namespace hf_fff_cuda {

enum class Type : int { float32, float64, bfloat16, float16 };
enum class Activation : int { gelu, gelu_new, relu, silu, identity };

struct Shape {
  int64_t tokens, hidden, trees, depth;
  __host__ __device__ int64_t levels() const { return depth + 1; }
  __host__ __device__ int64_t tree_nodes() const { return (int64_t{2} << depth) - 1; }
  __host__ __device__ int64_t nodes() const { return trees * tree_nodes(); }
  __host__ __device__ int64_t walk() const { return trees * levels(); }  // neurons that one token uses
};

// How a forward pass is computed.
enum class Way : int {
  automatic,
  plain,   // any shape: walks, then sums of rows
  gather,  // a token's numbers stay in a warp's registers; rows come from the caches
  sorted,  // deep single trees: halfway down and at the leaves, tokens are sorted by where they are
  tiles,   // deep single trees of 16-bit numbers: the same, with tensor cores
  columns, // several trees: the nodes' outputs lie in shared memory, some columns of all of them in each multiprocessor
  forest,  // several trees of 16-bit numbers on tensor cores, tokens sorted by subtree
  dense,   // all nodes, then a mask: matrix products of the framework, not done here
};

struct Problem {
  Shape shape;
  Type type;
  bool aligned;     // every tensor starts at a multiple of 16 bytes
  int capability;   // 90 for compute capability 9.0
  int processors;   // multiprocessors
};

struct Forward {
  Problem problem;
  Activation activation;
  const void *x, *weight_in, *bias_in, *weight_out;  // [tokens, hidden], [nodes, hidden], [nodes], [nodes, hidden]
  void* y;                                            // [tokens, hidden]
  int32_t* path;                                      // [tokens, trees, levels], node within its tree; or null
  void* logits;                                       // the same shape, float32 or float64; both or none
  void* workspace;
};

struct Backward {
  Problem problem;
  Activation activation;
  const void *grad_y, *x, *weight_in, *bias_in, *weight_out;
  const int32_t* path;  // its leaves are what counts; one out of range is taken for the nearest
  const void* logits;
  const void* extra;    // added to dL/dlogit, [tokens, trees, levels], as the logits; or null
  void* grad_x;         // or null: not wanted
  void *grad_weight_in, *grad_bias_in, *grad_weight_out;  // all three or none
  void* workspace;
  bool wide_x = false, wide_weights = false;  // these gradients are float32, the numbers have 16 bits: where `backward_wide` allows it
};

// The straight-through routing gradient of every visit, from the logits and the gains of *all* nodes, rows of `width`, which are
// matrix products: x times weight_in, without bias, and grad_y times weight_out. Its `extra` is what Backward adds.
struct Routing {
  Shape shape;
  Activation activation;
  const void *every, *gain;  // [tokens, width]
  int64_t width;             // nodes, or more of them
  const void* bias_in;
  const int32_t* path;
  const void* logits;
  double strength, temperature;  // alpha and tau
  void* extra;                   // [tokens, trees, levels]
};

// The way that a forward pass takes, or whether `wanted` can be taken: then that, otherwise `plain`.
Way forward_way(const Problem&, Way wanted = Way::automatic);
// The way that a backward pass takes: `plain`, `tiles` or `dense`.
Way backward_way(const Problem&, bool routing, Way wanted = Way::automatic);
// What that way can write as float32 for 16-bit numbers.
struct Wide {
  bool x, weights;
};
Wide backward_wide(const Problem&, Way);

int64_t forward_workspace(const Problem&, Way, bool train);
int64_t backward_workspace(const Problem&, Way, bool x, bool weights);

// Null, or what went wrong.
const char* forward(const Forward&, Way, cudaStream_t);
// The forward pass between two matrix products: walks down in the logits of all nodes (without bias), and leaves in their place the
// coefficients of the visited nodes, zeros elsewhere.
struct Mask {
  Shape shape;
  Activation activation;
  void* every;  // [tokens, width]
  int64_t width;
  const void* bias_in;
  int32_t* path;  // [tokens, trees, levels], or null
  void* logits;
};

const char* mask(const Mask&, Type, cudaStream_t);
const char* routing(const Routing&, Type, cudaStream_t);
const char* backward(const Backward&, Way, cudaStream_t);

// y[t] = x[t] + bias, rows of `hidden` numbers.
const char* add_bias(const void* x, const void* bias, void* y, int64_t tokens, int64_t hidden, Type, cudaStream_t);

// float32 to 16-bit numbers, several arrays at once, with zeros behind.
struct Cast {
  const void* from;
  void* to;
  int64_t count, zeros;
};
constexpr int kMostCasts = 4;
const char* cast(const Cast* casts, int count, Type to, cudaStream_t);

}  // namespace hf_fff_cuda
