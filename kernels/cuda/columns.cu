// The forward pass of several trees over many tokens, for 16-bit numbers.
//
// A token of 8x8 reads 72 rows of weight_out, and each of them from the second-level cache: that is what binds. Here a
// multiprocessor keeps a few columns of *all* rows of weight_out in shared memory, and makes those columns of the outputs of many
// tokens. What a token needs is the list of its visits, a row and a coefficient each, which every multiprocessor reads.
//
// 1. paths: the upper levels of each tree on tensor cores (tiles.cu), the rest by fetching rows (forward.cu).
// 2. list: the visits, 4 bytes each: the coefficient is rounded to the type.
// 3. columns: the outputs.
#include <algorithm>

#include "cuda/common.cuh"

namespace hf_fff_cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kShared = 220 * 1024;  // of the 227 KB that a block may have
constexpr int kTogether = 16;        // bytes of the list that are read at once

template <class T> struct Visit;  // the row in the lower half, the coefficient in the upper one
template <> struct Visit<bfloat16> {
  uint32_t both;
  __device__ static Visit make(int row, float c) { return {uint32_t(__bfloat16_as_ushort(__float2bfloat16_rn(c))) << 16 | uint32_t(row)}; }
  __device__ int row() const { return both & 0xffff; }
  __device__ float coefficient() const { return __uint_as_float(both & 0xffff0000u); }
};
template <> struct Visit<float16> {
  uint32_t both;
  __device__ static Visit make(int row, float c) { return {uint32_t(__half_as_ushort(__float2half_rn(c))) << 16 | uint32_t(row)}; }
  __device__ int row() const { return both & 0xffff; }
  __device__ float coefficient() const { return __half2float(__ushort_as_half(static_cast<unsigned short>(both >> 16))); }
};
template <class T> constexpr int kEach = kTogether / int(sizeof(Visit<T>));  // visits that are read at once

template <class T>
__global__ void list_kernel(Shape s, Activation activation, const int32_t* path, const float* logits, Visit<T>* list, int64_t padded) {
  const int64_t i = blockIdx.x * int64_t(256) + threadIdx.x, visits = s.walk();
  if (i >= s.tokens * padded) return;
  const int64_t token = i / padded, visit = i % padded;
  Visit<T> v = Visit<T>::make(0, 0);
  if (visit < visits) {
    const int64_t at = token * visits + visit;
    v = Visit<T>::make(int(visit / s.levels() * s.tree_nodes() + path[at]), act(activation, logits[at]));
  }
  list[i] = v;
}

// Block: `units` words of 16 bytes of every row, for a part of the tokens. A lane: one word of one token.
template <class T> __global__ void __launch_bounds__(kThreads, 1) columns_kernel(Shape s, const T* weight, const Visit<T>* list, int64_t padded,
                                                                              int units, int slices, int parts, T* y) {
  constexpr int VEC = vector_of<T>, EACH = kEach<T>;
  extern __shared__ uint4 rows[];  // [nodes][units]
  const int slice = blockIdx.x % slices, part = blockIdx.x / slices;
  const int nodes = int(s.nodes()), first = slice * units, here = min(units, int(s.hidden / VEC) - first);
  for (int i = threadIdx.x; i < nodes * here; i += kThreads) {
    const int row = i / here, unit = i % here;
    rows[row * units + unit] = __ldg(reinterpret_cast<const uint4*>(weight + int64_t(row) * s.hidden) + first + unit);
  }
  __syncthreads();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, together = kWarp / units;
  const int unit = lane % units, within = lane / units;
  if (within >= together || unit >= here) return;
  const int64_t begin = s.tokens * part / parts, end = s.tokens * (part + 1) / parts;
  for (int64_t token = begin + warp * together + within; token < end; token += kThreads / kWarp * together) {
    float sum[VEC] = {};
    const uint4* visits = reinterpret_cast<const uint4*>(list + token * padded);
#pragma unroll 2
    for (int v = 0; v < int(padded) / EACH; ++v) {
      union { uint4 word; Visit<T> visit[EACH]; } u = {__ldg(visits + v)};
#pragma unroll
      for (int e = 0; e < EACH; ++e) {
        const Pack<T, VEC> row{rows[u.visit[e].row() * units + unit]};
        const float c = u.visit[e].coefficient();
        float w[VEC];
        row.get(w);
#pragma unroll
        for (int j = 0; j < VEC; ++j) sum[j] = fmaf(c, w[j], sum[j]);
      }
    }
    *reinterpret_cast<uint4*>(y + token * s.hidden + (first + unit) * VEC) = Pack<T, VEC>::of(sum).word;
  }
}

int units_of(const Shape& s) { return int(std::min<int64_t>(8, kShared / 16 / s.nodes())); }

template <class T> int64_t padded_visits(const Shape& s) { return divide_up(s.walk(), kEach<T>) * kEach<T>; }

struct Parts {
  int32_t* path;
  float* logits;
  void* list;
  int64_t used;
};
Parts parts_of(const Problem& p, bool train, void* workspace) {
  const Shape& s = p.shape;
  Carve carve{static_cast<char*>(workspace)};
  Parts r{};
  if (!train) r.path = carve.take<int32_t>(s.tokens * s.walk()), r.logits = carve.take<float>(s.tokens * s.walk());
  r.list = carve.take<Visit<bfloat16>>(s.tokens * padded_visits<bfloat16>(s));
  r.used = carve.used;
  return r;
}

template <class T> const char* run(const Forward& f, cudaStream_t stream) {
  const Problem& p = f.problem;
  const Shape& s = p.shape;
  const T *x = static_cast<const T*>(f.x), *in = static_cast<const T*>(f.weight_in), *bias = static_cast<const T*>(f.bias_in);
  const Parts parts = parts_of(p, f.path, f.workspace);
  int32_t* path = f.path ? f.path : parts.path;
  float* logits = f.path ? static_cast<float*>(f.logits) : parts.logits;
  const int begin = top_levels(p);
  if (begin) top_paths<T>(p, x, in, bias, path, logits, stream);
  if (begin < s.levels()) walk_down<T>(p, x, in, bias, path, logits, begin, stream);
  const int64_t padded = padded_visits<T>(s);
  Visit<T>* list = static_cast<Visit<T>*>(parts.list);
  list_kernel<T><<<unsigned(divide_up(s.tokens * padded, 256)), 256, 0, stream>>>(s, f.activation, path, logits, list, padded);
  const int units = units_of(s), slices = int(divide_up(s.hidden / vector_of<T>, units)), share = std::max(1, p.processors / slices);
  const int shared = int(s.nodes()) * units * 16;
  allow_shared(columns_kernel<T>, kShared);
  columns_kernel<T><<<unsigned(slices * share), kThreads, shared, stream>>>(s, static_cast<const T*>(f.weight_out), list, padded, units,
                                                                            slices, share, static_cast<T*>(f.y));
  return launched();
}

}  // namespace

bool columns_serve(const Problem& p) {
  const Shape& s = p.shape;
  return (p.type == Type::bfloat16 || p.type == Type::float16) && shared_kb(p.capability) * 1024 >= kShared && p.aligned &&
         s.hidden % 8 == 0 && units_of(s) >= 1;  // which also means that a row's number has 16 bits
}

int64_t columns_workspace(const Problem& p, bool train) { return parts_of(p, train, nullptr).used; }

const char* columns_forward(const Forward& f, cudaStream_t stream) {
  return f.problem.type == Type::bfloat16 ? run<bfloat16>(f, stream) : run<float16>(f, stream);
}

}  // namespace hf_fff_cuda
