// What the kernels share: types, a warp's share of a row, activations, where a node is.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/fff.h"

namespace hf_fff_cuda {

using bfloat16 = __nv_bfloat16;
using float16 = __half;

constexpr int kWarp = 32;
constexpr unsigned kAll = 0xffffffffu;
constexpr int64_t kFewestMasked = 16;  // tokens from which dense matrix products with a mask are chosen where they are faster: the fewest that were measured
constexpr int64_t kFew = 256;          // tokens below which a GPU is half empty, and what a pass takes hardly depends on them

template <class T> struct accumulator { using type = float; };
template <> struct accumulator<double> { using type = double; };
template <class T> using accumulator_t = typename accumulator<T>::type;

__device__ inline float to_acc(float v) { return v; }
__device__ inline double to_acc(double v) { return v; }
__device__ inline float to_acc(bfloat16 v) { return __bfloat162float(v); }
__device__ inline float to_acc(float16 v) { return __half2float(v); }
template <class T> __device__ inline T from_acc(accumulator_t<T> v);
template <> __device__ inline float from_acc<float>(float v) { return v; }
template <> __device__ inline double from_acc<double>(double v) { return v; }
template <> __device__ inline bfloat16 from_acc<bfloat16>(float v) { return __float2bfloat16_rn(v); }
template <> __device__ inline float16 from_acc<float16>(float v) { return __float2half_rn(v); }

template <int BYTES> struct Word;
template <> struct Word<2> { using type = unsigned short; };
template <> struct Word<4> { using type = unsigned; };
template <> struct Word<8> { using type = uint2; };
template <> struct Word<16> { using type = uint4; };

__device__ inline void pair_of(uint32_t word, float& low, float& high, bfloat16) {
  low = __uint_as_float(word << 16);
  high = __uint_as_float(word & 0xffff0000u);
}
__device__ inline void pair_of(uint32_t word, float& low, float& high, float16) {
  union { uint32_t word; __half2 pair; } u = {word};
  const float2 both = __half22float2(u.pair);
  low = both.x, high = both.y;
}

// N neighbours, read and written as one word of 2 to 16 bytes. They stay a word until they are used: 16-bit numbers, each in a
// register of its own, would take twice the registers.
template <class T, int N> struct Pack {
  using A = accumulator_t<T>;
  typename Word<sizeof(T) * N>::type word;

  __device__ void get(A (&v)[N]) const {
    if constexpr (sizeof(T) == 2 && N > 1) {
      union { typename Word<sizeof(T) * N>::type word; uint32_t half[N / 2]; } u = {word};
#pragma unroll
      for (int i = 0; i < N / 2; ++i) pair_of(u.half[i], v[2 * i], v[2 * i + 1], T());
    } else {
      union { typename Word<sizeof(T) * N>::type word; T v[N]; } u = {word};
#pragma unroll
      for (int i = 0; i < N; ++i) v[i] = to_acc(u.v[i]);
    }
  }
  __device__ static Pack of(const A (&v)[N]) {
    union { typename Word<sizeof(T) * N>::type word; T v[N]; } u = {};
#pragma unroll
    for (int i = 0; i < N; ++i) u.v[i] = from_acc<T>(v[i]);
    return {u.word};
  }
};

template <class T, int N> __device__ inline Pack<T, N> load(const T* p) {  // of what no kernel writes meanwhile
  return {__ldg(reinterpret_cast<const typename Word<sizeof(T) * N>::type*>(p))};
}
template <class T, int N> __device__ inline Pack<T, N> load_once(const T* p) {  // and will not be read again soon
  return {__ldcs(reinterpret_cast<const typename Word<sizeof(T) * N>::type*>(p))};
}
template <class T, int N> __device__ inline void store_once(T* p, const Pack<T, N>& pack) {
  __stcs(reinterpret_cast<typename Word<sizeof(T) * N>::type*>(p), pack.word);
}

template <class T> constexpr int vector_of = 16 / int(sizeof(T));

// A warp's share of one row: lane l holds columns [(i * 32 + l) * VEC, ... + VEC) for each i < CHUNKS.
template <class T, int VEC, int CHUNKS> struct Share {
  Pack<T, VEC> pack[CHUNKS];

  template <bool ONCE = false> __device__ void read(const T* row, int hidden, int lane) {
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
      const int column = (i * kWarp + lane) * VEC;
      pack[i].word = {};
      if (column < hidden) pack[i] = ONCE ? load_once<T, VEC>(row + column) : load<T, VEC>(row + column);
    }
  }
  __device__ accumulator_t<T> dot(const Share& other) const {  // this lane's part
    accumulator_t<T> even = 0, odd = 0;
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
      accumulator_t<T> a[VEC], b[VEC];
      pack[i].get(a), other.pack[i].get(b);
#pragma unroll
      for (int j = 0; j < VEC; ++j) {
        auto& sum = (i + j) % 2 ? odd : even;
        sum = fma(a[j], b[j], sum);
      }
    }
    return even + odd;
  }
  __device__ void add_to(accumulator_t<T> (&sum)[CHUNKS][VEC], accumulator_t<T> coefficient) const {
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
      accumulator_t<T> v[VEC];
      pack[i].get(v);
#pragma unroll
      for (int j = 0; j < VEC; ++j) sum[i][j] = fma(coefficient, v[j], sum[i][j]);
    }
  }
};

template <class A> __device__ inline A warp_sum(A v) {  // equal on all lanes, bit for bit
#pragma unroll
  for (int d = kWarp / 2; d; d /= 2) v += __shfl_xor_sync(kAll, v, d);
  return v;
}

// <a, b> of two rows of any length in memory, equal on all lanes.
template <class T, int VEC> __device__ inline accumulator_t<T> dot_rows(const T* a, const T* b, int64_t hidden, int lane) {
  accumulator_t<T> sum = 0;
  for (int64_t c = int64_t(lane) * VEC; c < hidden; c += kWarp * VEC) {
    accumulator_t<T> u[VEC], v[VEC];
    load<T, VEC>(a + c).get(u), load<T, VEC>(b + c).get(v);
#pragma unroll
    for (int j = 0; j < VEC; ++j) sum = fma(u[j], v[j], sum);
  }
  return warp_sum(sum);
}

__device__ inline float exp_of(float v) { return expf(v); }
__device__ inline double exp_of(double v) { return exp(v); }
__device__ inline float erf_of(float v) { return erff(v); }
__device__ inline double erf_of(double v) { return erf(v); }

template <class A> __device__ inline A sigmoid(A z) { return A(1) / (A(1) + exp_of(-z)); }

template <class A> __device__ inline A act(Activation which, A z) {
  switch (which) {
    case Activation::gelu: return A(0.5) * z * (A(1) + erf_of(z * A(0.70710678118654752440)));
    case Activation::gelu_new:  // (1 + tanh(u)) / 2 = sigmoid(2u)
      return z * sigmoid(A(1.5957691216057307117) * (z + A(0.044715) * z * z * z));
    case Activation::relu: return z <= 0 ? A(0) : z;  // a NaN stays one
    case Activation::silu: return z * sigmoid(z);
    default: return z;
  }
}

template <class A> __device__ inline A act_slope(Activation which, A z) {
  switch (which) {
    case Activation::gelu:
      return A(0.5) * (A(1) + erf_of(z * A(0.70710678118654752440))) + z * exp_of(A(-0.5) * z * z) * A(0.39894228040143267794);
    case Activation::gelu_new: {
      const A k = A(1.5957691216057307117), s = sigmoid(k * (z + A(0.044715) * z * z * z));
      const A end = s * (A(1) - s);
      return s + (end == 0 ? A(0) : z * end * k * (A(1) + A(3 * 0.044715) * z * z));
    }
    case Activation::relu: return z > 0 ? A(1) : A(0);
    case Activation::silu: {
      const A s = sigmoid(z);
      return s * (A(1) + z * (A(1) - s));
    }
    default: return A(1);
  }
}

// Leaves are counted from 0; the node at `level` on the way to one, within its tree.
__device__ inline int node_above(int leaf, int level, int depth) { return (1 << level) - 1 + (leaf >> (depth - level)); }
__device__ inline int leaf_of(int node, int depth) {  // whatever is in memory: never outside the tree
  return max(0, min(node - ((1 << depth) - 1), (1 << depth) - 1));
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline const char* launched() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Parts of the workspace, one after the other; with a null start it counts the bytes.
struct Carve {
  char* at;
  int64_t used = 0;
  template <class P> P* take(int64_t count) {
    char* here = at ? at + used : nullptr;
    used += divide_up(count * int64_t(sizeof(P)), 256) * 256;
    return reinterpret_cast<P*>(here);
  }
};

template <class F> auto with_type(Type type, const F& f) {
  switch (type) {
    case Type::float32: return f(float{});
    case Type::float64: return f(double{});
    case Type::bfloat16: return f(bfloat16{});
    default: return f(float16{});
  }
}

// KB of shared memory that a block may have; of GPUs that are not known, what all since 8.6 have.
inline int shared_kb(int capability) {
  switch (capability) {
    case 75: return 64;
    case 80: case 87: return 163;
    case 90: case 100: case 101: case 103: case 110: return 227;
    default: return 99;
  }
}

// A kernel that says so early lets the next one's blocks come as soon as there is room; those wait for all that it writes.
__device__ inline void let_next_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ inline void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets a kernel have more shared memory than the usual 48 KB.
template <class K> void allow_shared(K kernel, int bytes) {
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

// ---- sums of rows along the paths (forward.cu), for both passes ----------------------------------------------------------
// out[t] = sum over the visits of coefficient * weight[row]. The coefficients are given, or act(logits).
template <class T> struct Combine {
  Shape shape;
  Activation activation;
  const T* weight;
  const int32_t* path;
  const accumulator_t<T>* values;  // logits where `is_logits`, else coefficients
  bool is_logits;
  const int32_t* order;  // of tokens, or null; neighbours with equal paths are quick
  T* out;
};
template <class T> void combine(const Combine<T>&, bool vectors, int processors, cudaStream_t);

// ---- sorting (order.cu) --------------------------------------------------------------------------------------------------
// Stable, by (tree, leaf): keys_out and tokens_out hold trees * tokens entries, tree after tree. Null or what went wrong.
int64_t sort_by_leaf_workspace(const Shape&);
const char* sort_by_leaf(const Shape&, const int32_t* path, uint32_t* keys_out, int32_t* tokens_out, void* workspace,
                         cudaStream_t);

// Any order within a bin: tokens whose ticket (number within the bin) was drawn before. `offsets` is scratch memory, of `bins`.
void place_by_ticket(int64_t tokens, int bins, const int32_t* counts, const int32_t* bin, const int32_t* ticket,
                     int32_t* offsets, int32_t* order, cudaStream_t);

// Counters that the next kernel, if it is launched early, needs only after `wait_for_previous`.
void zero_counts(int32_t* counts, int64_t count, cudaStream_t);

// ---- several trees (columns.cu) ------------------------------------------------------------------------------------------
bool columns_serve(const Problem&);
int64_t columns_workspace(const Problem&, bool train);
const char* columns_forward(const Forward&, cudaStream_t);

// ---- several trees with tensor cores (forest.cu) -------------------------------------------------------------------------
bool forest_serves(const Problem&);
int64_t forest_workspace(const Problem&);
const char* forest_forward(const Forward&, cudaStream_t);

// Levels [begin, levels) of all walks (forward.cu); the path and logits above are known.
template <class T> void walk_down(const Problem&, const T* x, const T* weight_in, const T* bias_in, int32_t* path,
                                  accumulator_t<T>* logits, int begin, cudaStream_t);

// ---- tensor cores (tiles.cu) ---------------------------------------------------------------------------------------------
int top_levels(const Problem&);  // that `top_paths` does; 0: it does not serve
template <class T> void top_paths(const Problem&, const T* x, const T* weight_in, const T* bias_in, int32_t* path, float* logits,
                                  cudaStream_t);
bool tiles_serve(const Problem&);
int64_t tiles_workspace(const Problem&);
const char* tiles_forward(const Forward&, cudaStream_t);

// ---- gradients on tensor cores (gradients.cu) ----------------------------------------------------------------------------
bool backward_tiles_serve(const Problem&);
int64_t backward_tiles_workspace(const Problem&, bool x, bool weights);
const char* backward_tiles(const Backward&, cudaStream_t);

}  // namespace hf_fff_cuda
