// Sorting tokens by where they are in the trees.
#include <cub/device/device_radix_sort.cuh>

#include "cuda/common.cuh"

namespace hf_fff_cuda {
namespace {

constexpr int kThreads = 256;

int bits_of(const Shape& s) {  // of a (tree, leaf)
  int bits = int(s.depth);
  while ((int64_t{1} << (bits - s.depth)) < s.trees) ++bits;
  return bits ? bits : 1;
}

__global__ void keys_kernel(Shape s, const int32_t* path, uint32_t* keys, int32_t* tokens) {
  const int64_t i = blockIdx.x * int64_t(kThreads) + threadIdx.x;
  if (i >= s.trees * s.tokens) return;
  const int64_t tree = i / s.tokens, token = i % s.tokens;
  const int32_t leaf = leaf_of(path[(token * s.trees + tree) * s.levels() + s.depth], int(s.depth));
  keys[i] = uint32_t(tree << s.depth) | uint32_t(leaf);
  tokens[i] = int32_t(token);
}

// One block of 1024 threads: offsets[i] = counts[0] + ... + counts[i - 1].
__global__ void offsets_kernel(int bins, const int32_t* counts, int32_t* offsets) {
  __shared__ int32_t warps[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, each = (bins + 1023) / 1024;
  const int begin = min(bins, int(threadIdx.x) * each), end = min(bins, begin + each);
  int32_t sum = 0;
  for (int i = begin; i < end; ++i) sum += counts[i];
  int32_t upto = sum;
  for (int d = 1; d < 32; d *= 2) {
    const int32_t other = __shfl_up_sync(kAll, upto, d);
    if (lane >= d) upto += other;
  }
  if (lane == 31) warps[warp] = upto;
  __syncthreads();
  if (warp == 0) {
    int32_t v = warps[lane];
    for (int d = 1; d < 32; d *= 2) {
      const int32_t other = __shfl_up_sync(kAll, v, d);
      if (lane >= d) v += other;
    }
    warps[lane] = v;
  }
  __syncthreads();
  int32_t before = upto - sum + (warp ? warps[warp - 1] : 0);
  for (int i = begin; i < end; ++i) {
    offsets[i] = before;
    before += counts[i];
  }
}

__global__ void place_kernel(int64_t tokens, const int32_t* offsets, const int32_t* bin, const int32_t* ticket, int32_t* order) {
  const int64_t t = blockIdx.x * int64_t(kThreads) + threadIdx.x;
  if (t < tokens) order[offsets[bin[t]] + ticket[t]] = int32_t(t);
}

// The same for few bins: each block adds up the counts itself. A thread is a bin, then places kEach tokens.
constexpr int kEach = 4;
__global__ void place_few_kernel(int64_t tokens, int bins, const int32_t* counts, const int32_t* bin, const int32_t* ticket,
                                 int32_t* order) {
  __shared__ int32_t offsets[kThreads], warps[kThreads / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int32_t count = int(threadIdx.x) < bins ? counts[threadIdx.x] : 0;
  int32_t upto = count;
  for (int d = 1; d < 32; d *= 2) {
    const int32_t other = __shfl_up_sync(kAll, upto, d);
    if (lane >= d) upto += other;
  }
  if (lane == 31) warps[warp] = upto;
  __syncthreads();
  for (int w = 0; w < warp; ++w) upto += warps[w];
  offsets[threadIdx.x] = upto - count;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int64_t t = (blockIdx.x * int64_t(kEach) + i) * kThreads + threadIdx.x;
    if (t < tokens) order[offsets[bin[t]] + ticket[t]] = int32_t(t);
  }
}

__global__ void zero_kernel(int32_t* counts, int64_t count) {
  let_next_begin();
  const int64_t i = blockIdx.x * int64_t(kThreads) + threadIdx.x;
  if (i < count) counts[i] = 0;
}

struct Buffers {
  uint32_t* keys;
  int32_t* tokens;
  char* temporary;
  size_t temporary_bytes;
  int64_t used;
};

Buffers buffers_of(const Shape& s, void* workspace) {
  const int64_t count = s.trees * s.tokens;
  size_t bytes = 0;
  cub::DeviceRadixSort::SortPairs(nullptr, bytes, static_cast<uint32_t*>(nullptr), static_cast<uint32_t*>(nullptr),
                                  static_cast<int32_t*>(nullptr), static_cast<int32_t*>(nullptr), count, 0, bits_of(s));
  Carve carve{static_cast<char*>(workspace)};
  Buffers b{};
  b.keys = carve.take<uint32_t>(count);
  b.tokens = carve.take<int32_t>(count);
  b.temporary = carve.take<char>(int64_t(bytes));
  b.temporary_bytes = bytes;
  b.used = carve.used;
  return b;
}

}  // namespace

int64_t sort_by_leaf_workspace(const Shape& s) { return buffers_of(s, nullptr).used; }

const char* sort_by_leaf(const Shape& s, const int32_t* path, uint32_t* keys_out, int32_t* tokens_out, void* workspace,
                         cudaStream_t stream) {
  const Buffers b = buffers_of(s, workspace);
  const int64_t count = s.trees * s.tokens;
  keys_kernel<<<unsigned(divide_up(count, kThreads)), kThreads, 0, stream>>>(s, path, b.keys, b.tokens);
  size_t bytes = b.temporary_bytes;
  const cudaError_t error = cub::DeviceRadixSort::SortPairs(b.temporary, bytes, b.keys, keys_out, b.tokens, tokens_out, count,
                                                            0, bits_of(s), stream);
  return error == cudaSuccess ? launched() : cudaGetErrorString(error);
}

void zero_counts(int32_t* counts, int64_t count, cudaStream_t stream) {
  zero_kernel<<<unsigned(divide_up(count, kThreads)), kThreads, 0, stream>>>(counts, count);
}

void place_by_ticket(int64_t tokens, int bins, const int32_t* counts, const int32_t* bin, const int32_t* ticket,
                     int32_t* offsets, int32_t* order, cudaStream_t stream) {
  if (bins <= kThreads) {
    const unsigned blocks = unsigned(divide_up(tokens, kThreads * kEach));
    place_few_kernel<<<blocks, kThreads, 0, stream>>>(tokens, bins, counts, bin, ticket, order);
    return;
  }
  offsets_kernel<<<1, 1024, 0, stream>>>(bins, counts, offsets);
  place_kernel<<<unsigned(divide_up(tokens, kThreads)), kThreads, 0, stream>>>(tokens, offsets, bin, ticket, order);
}

}  // namespace hf_fff_cuda
