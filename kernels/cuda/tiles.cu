// The forward pass of one deep tree on tensor cores, for 16-bit numbers.
//
// A tree of up to 12 levels is a top part and subtrees of up to 6 levels, 63 nodes. Either part is small enough that all its
// nodes times all its tokens, as a matrix product, cost less than fetching the rows of each token's path:
//
// 1. top: logits of the top part for tiles of tokens; each token walks down in them and draws a ticket at its subtree.
// 2. place: tokens are sorted by subtree (order.cu).
// 3. subtree: tiles of tokens of one subtree. Logits of its nodes and of their ancestors, which the whole tile shares; each token
//    walks down; the coefficients of the visited nodes, zeros elsewhere, times the rows of weight_out are the outputs.
//
// Every x is read twice, every y written once, and nothing else is as large. Coefficients are rounded to the 16-bit type.
#include <algorithm>

#include "cuda/common.cuh"

namespace hf_fff_cuda {
namespace {

constexpr int kColumns = 64;          // of a stage: rows of 128 bytes, eight pieces of 16
constexpr int kStages = 4;
constexpr int kSubLevels = 6, kSubNodes = 63, kTopLevels = 6;
constexpr int kRows = 72;             // of a subtree with its ancestors: 63 + 6, in eights
constexpr int kInner = 80;            // the same in sixteens
constexpr int kBins = 1 << kTopLevels;

__device__ inline void copy_16(uint32_t to, const void* from, bool real) {  // zeros where it is not
#if __CUDA_ARCH__ >= 800
  const int bytes = real ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
#endif
}
__device__ inline void copies_end_group() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int N> __device__ inline void copies_wait() {  // until at most N groups are under way
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

__device__ inline void matrices_4(uint32_t (&r)[4], uint32_t at) {
#if __CUDA_ARCH__ >= 800
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
#endif
}
__device__ inline void matrices_2(uint32_t& a, uint32_t& b, uint32_t at) {
#if __CUDA_ARCH__ >= 800
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];" : "=r"(a), "=r"(b) : "r"(at) : "memory");
#endif
}
__device__ inline void matrices_4_transposed(uint32_t (&r)[4], uint32_t at) {
#if __CUDA_ARCH__ >= 800
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
#endif
}

// c[16 x 8] += a[16 x 16] b[16 x 8]
__device__ inline void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bfloat16) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}
__device__ inline void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float16) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// Where piece `piece` of a row of 128 bytes lies: shuffled, so that eight rows' equal pieces are in different banks.
__device__ inline uint32_t piece_at(uint32_t base, int row, int piece) { return base + row * 128 + ((piece ^ (row & 7)) << 4); }

// Columns [chunk * 64, + 64) of `count` rows into a stage. rows[i] < 0: zeros.
template <int COUNT, int THREADS>
__device__ inline void fetch(uint32_t stage, const char* base, int64_t row_bytes, const int* rows, int chunk) {
  const int piece = threadIdx.x % 8;
  const char* column = base + int64_t(chunk) * 128 + piece * 16;
#pragma unroll
  for (int i = 0; i < COUNT; i += THREADS / 8) {
    const int row = i + threadIdx.x / 8;
    if (COUNT % (THREADS / 8) == 0 || row < COUNT) {
      const int from = rows[row];
      copy_16(piece_at(stage, row, piece), column + int64_t(max(from, 0)) * row_bytes, from >= 0);
    }
  }
}

// sums[n][..]: logits of the warp's 16 tokens for NODES rows of weights, without bias. Stages: x then weights.
template <class T, int WARPS, int NODES>
__device__ inline void products(float (&sums)[NODES / 8][4], uint32_t shared, const T* x, const T* weight, int hidden,
                                const int* tokens, const int* rows) {
  constexpr int TOKENS = WARPS * 16, THREADS = WARPS * 32, STAGE = (TOKENS + NODES) * 128;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, chunks = hidden / kColumns;
  const char *xs = reinterpret_cast<const char*>(x), *ws = reinterpret_cast<const char*>(weight);
  const int64_t bytes = int64_t(hidden) * sizeof(T);
#pragma unroll
  for (int n = 0; n < NODES / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[n][i] = 0;
  const auto begin = [&](int chunk) {
    if (chunk < chunks) {
      const uint32_t stage = shared + chunk % kStages * STAGE;
      fetch<TOKENS, THREADS>(stage, xs, bytes, tokens, chunk);
      fetch<NODES, THREADS>(stage + TOKENS * 128, ws, bytes, rows, chunk);
    }
    copies_end_group();
  };
  for (int c = 0; c < kStages - 1; ++c) begin(c);
  for (int chunk = 0; chunk < chunks; ++chunk) {
    copies_wait<kStages - 2>();
    __syncthreads();  // this chunk is there, and nobody reads the stage that is filled next
    begin(chunk + kStages - 1);
    const uint32_t stage = shared + chunk % kStages * STAGE, weights = stage + TOKENS * 128;
#pragma unroll
    for (int k = 0; k < kColumns / 16; ++k) {
      uint32_t a[4];
      matrices_4(a, piece_at(stage, warp * 16 + lane % 16, k * 2 + lane / 16));
#pragma unroll
      for (int n = 0; n + 1 < NODES / 8; n += 2) {
        uint32_t b[4];
        matrices_4(b, piece_at(weights, n * 8 + lane % 8 + lane / 16 * 8, k * 2 + lane / 8 % 2));
        multiply(sums[n], a, b[0], b[1], T());
        multiply(sums[n + 1], a, b[2], b[3], T());
      }
      if constexpr (NODES / 8 % 2) {
        constexpr int n = NODES / 8 - 1;
        uint32_t b0, b1;
        matrices_2(b0, b1, piece_at(weights, n * 8 + lane % 8, k * 2 + lane / 8 % 2));
        multiply(sums[n], a, b0, b1, T());
      }
    }
  }
  copies_wait<0>();
  __syncthreads();
}

// The warp's sums to logits[token][node], rows of STRIDE floats.
template <int NODES, int STRIDE> __device__ inline void spill(const float (&sums)[NODES / 8][4], float* logits) {
  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int n = 0; n < NODES / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) logits[(row + i / 2 * 8) * STRIDE + n * 8 + column + i % 2] = sums[n][i];
}

template <class T> struct Top {
  int tokens, hidden, levels;  // of the top part
  const T *x, *weight, *bias;
  int32_t *counts, *bin, *ticket;  // or null: where each token went, and its number among those that went there
  Shape shape;                     // without them: the path and the logits are wanted, of all trees
  int32_t* path;
  float* logits;
};

template <class T, int WARPS> __global__ void __launch_bounds__(WARPS * 32) top_kernel(Top<T> a) {
  constexpr int TOKENS = WARPS * 16, STRIDE = kBins + 1;
  extern __shared__ __align__(128) char memory[];
  __shared__ int tokens[TOKENS], rows[kBins], drawn[kBins];
  __shared__ float bias[kBins];
  const int tree = blockIdx.x % a.shape.trees, first = int(blockIdx.x / a.shape.trees) * TOKENS, nodes = (1 << a.levels) - 1;
  const int64_t root = tree * a.shape.tree_nodes();
  for (int i = threadIdx.x; i < TOKENS; i += WARPS * 32) tokens[i] = first + i < a.tokens ? first + i : -1;
  for (int i = threadIdx.x; i < kBins; i += WARPS * 32) {
    rows[i] = i < nodes ? i : -1;
    bias[i] = i < nodes ? to_acc(a.bias[root + i]) : 0;
    drawn[i] = 0;
  }
  __syncthreads();
  float sums[kBins / 8][4];
  products<T, WARPS, kBins>(sums, uint32_t(__cvta_generic_to_shared(memory)), a.x, a.weight + root * a.hidden, a.hidden, tokens, rows);
  float* logits = reinterpret_cast<float*>(memory);
  spill<kBins, STRIDE>(sums, logits);
  __syncthreads();
  const int t = threadIdx.x;
  int bin = 0, number = 0;
  const bool walks = t < TOKENS && first + t < a.tokens;
  if (!a.counts) {
    if (!walks) return;
    const int64_t visits = (int64_t(first + t) * a.shape.trees + tree) * a.shape.levels();
    int node = 0;
    for (int level = 0; level < a.levels; ++level) {
      const float z = logits[t * STRIDE + node] + bias[node];
      a.path[visits + level] = node;
      a.logits[visits + level] = z;
      node = 2 * node + 1 + (z > 0);
    }
    return;
  }
  if (walks) {
    int node = 0;
    for (int level = 0; level < a.levels; ++level) node = 2 * node + 1 + (logits[t * STRIDE + node] + bias[node] > 0);
    bin = node - nodes;
    number = atomicAdd(drawn + bin, 1);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kBins; i += WARPS * 32)
    if (const int count = drawn[i]) drawn[i] = atomicAdd(a.counts + i, count);  // its first ticket
  __syncthreads();
  if (walks) {
    a.bin[first + t] = bin;
    a.ticket[first + t] = drawn[bin] + number;
  }
}

template <class T> struct Sub {
  int tokens, hidden, levels, top;  // levels of the tree, and of its top part
  Activation activation;
  const T *x, *weight_in, *bias, *weight_out;
  T* y;
  int32_t* path;
  float* logits;
  const int32_t *counts, *order;  // of the subtrees; null where the tree has no top part
};

template <class T> __global__ void __launch_bounds__(128) subtree_kernel(Sub<T> a) {
  constexpr int WARPS = 4, TOKENS = 64, STRIDE = kRows + 1, COEFFICIENTS = kInner + 8, OUTPUT = kColumns + 8;
  // Second phase, in the memory of the first one's stages: logits, coefficients, a warp's outputs, stages of weight_out.
  constexpr int AT_COEFFICIENTS = (TOKENS * STRIDE * 4 + 127) / 128 * 128;
  constexpr int AT_OUTPUT = AT_COEFFICIENTS + TOKENS * COEFFICIENTS * 2, AT_STAGES = AT_OUTPUT + WARPS * 16 * OUTPUT * 2;
  constexpr int STAGE = kInner * 128, STAGES = 3;
  static_assert(AT_OUTPUT % 16 == 0 && AT_STAGES % 128 == 0 && AT_STAGES + STAGES * STAGE <= kStages * (TOKENS + kRows) * 128 + 1024);
  extern __shared__ __align__(128) char memory[];
  __shared__ int tokens[TOKENS], rows[kInner], place[3];
  __shared__ float bias[kRows];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  if (!a.order) {
    if (threadIdx.x == 0) {
      place[0] = 0;
      place[1] = blockIdx.x * TOKENS;
      place[2] = min(TOKENS, a.tokens - int(blockIdx.x) * TOKENS);
    }
  } else if (warp == 0) {  // which subtree has this tile? A lane: two subtrees
    if (lane == 0) place[2] = 0;
    __syncwarp();
    const int bins = 1 << a.top, c0 = 2 * lane < bins ? a.counts[2 * lane] : 0, c1 = 2 * lane + 1 < bins ? a.counts[2 * lane + 1] : 0;
    const int t0 = (c0 + TOKENS - 1) / TOKENS, t1 = (c1 + TOKENS - 1) / TOKENS;
    int tiles = t0 + t1, entries = c0 + c1;
    for (int d = 1; d < 32; d *= 2) {
      const int other = __shfl_up_sync(kAll, tiles, d), more = __shfl_up_sync(kAll, entries, d);
      if (lane >= d) tiles += other, entries += more;
    }
    const int tile = int(blockIdx.x) - (tiles - t0 - t1);
    if (tile >= 0 && tile < t0 + t1) {
      const bool second = tile >= t0;
      const int within = (second ? tile - t0 : tile) * TOKENS;
      place[0] = 2 * lane + second;
      place[1] = entries - c0 - c1 + (second ? c0 : 0) + within;
      place[2] = min(TOKENS, (second ? c1 : c0) - within);
    }
  }
  __syncthreads();
  const int start = place[1], count = place[2];
  if (count <= 0) return;
  const int root = (1 << a.top) - 1 + place[0], sub = a.levels - a.top;
  for (int i = threadIdx.x; i < TOKENS; i += 128) tokens[i] = i < count ? (a.order ? a.order[start + i] : start + i) : -1;
  for (int i = threadIdx.x; i < kInner; i += 128) {
    int node = -1;
    if (i < kSubNodes) {
      const int level = 31 - __clz(i + 1);
      if (level < sub) node = ((root + 1) << level) - 1 + i + 1 - (1 << level);
    } else if (i - kSubNodes < a.top) {
      node = ((root + 1) >> (a.top - (i - kSubNodes))) - 1;
    }
    rows[i] = node;
    if (i < kRows) bias[i] = node >= 0 ? to_acc(a.bias[node]) : 0;
  }
  __syncthreads();
  const uint32_t shared = uint32_t(__cvta_generic_to_shared(memory));
  {
    float sums[kRows / 8][4];
    products<T, WARPS, kRows>(sums, shared, a.x, a.weight_in, a.hidden, tokens, rows);
    spill<kRows, STRIDE>(sums, reinterpret_cast<float*>(memory));
  }
  const int chunks = a.hidden / kColumns;
  const auto begin = [&](int chunk) {
    if (chunk < chunks)
      fetch<kInner, 128>(shared + AT_STAGES + chunk % STAGES * STAGE, reinterpret_cast<const char*>(a.weight_out),
                         int64_t(a.hidden) * sizeof(T), rows, chunk);
    copies_end_group();
  };
  for (int c = 0; c < STAGES - 1; ++c) begin(c);
  uint4* zeros = reinterpret_cast<uint4*>(memory + AT_COEFFICIENTS);
  for (int i = threadIdx.x; i < TOKENS * COEFFICIENTS * 2 / 16; i += 128) zeros[i] = make_uint4(0, 0, 0, 0);
  __syncthreads();
  if (threadIdx.x < count) {
    const float* logits = reinterpret_cast<const float*>(memory) + threadIdx.x * STRIDE;
    T* coefficients = reinterpret_cast<T*>(memory + AT_COEFFICIENTS) + threadIdx.x * COEFFICIENTS;
    const int64_t visits = int64_t(tokens[threadIdx.x]) * a.levels;
    int at = 0;
    for (int level = 0; level < a.levels; ++level) {
      const int i = level < a.top ? kSubNodes + level : at;
      const float z = logits[i] + bias[i];
      coefficients[i] = from_acc<T>(act(a.activation, z));
      if (a.path) {
        a.path[visits + level] = rows[i];
        a.logits[visits + level] = z;
      }
      if (level >= a.top) at = 2 * at + 1 + (z > 0);
    }
  }
  __syncthreads();
  uint32_t coefficients[kInner / 16][4];
#pragma unroll
  for (int k = 0; k < kInner / 16; ++k)
    matrices_4(coefficients[k], shared + AT_COEFFICIENTS + (warp * 16 + lane % 16) * COEFFICIENTS * 2 + (k * 2 + lane / 16) * 16);
  char* output = memory + AT_OUTPUT + warp * 16 * OUTPUT * 2;
  for (int chunk = 0; chunk < chunks; ++chunk) {
    copies_wait<STAGES - 2>();
    __syncthreads();
    begin(chunk + STAGES - 1);
    const uint32_t stage = shared + AT_STAGES + chunk % STAGES * STAGE;
    float sums[kColumns / 8][4] = {};
#pragma unroll
    for (int k = 0; k < kInner / 16; ++k)
#pragma unroll
      for (int n = 0; n < kColumns / 8; n += 2) {
        uint32_t b[4];
        matrices_4_transposed(b, piece_at(stage, k * 16 + lane % 16, n + lane / 16));
        multiply(sums[n], coefficients[k], b[0], b[1], T());
        multiply(sums[n + 1], coefficients[k], b[2], b[3], T());
      }
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const float pair[2] = {sums[n][i], sums[n][i + 1]};
        *reinterpret_cast<uint32_t*>(output + (lane / 4 + i * 4) * OUTPUT * 2 + n * 16 + lane % 4 * 4) = Pack<T, 2>::of(pair).word;
      }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = i * 4 + lane / 8, token = tokens[warp * 16 + row];
      const uint4 word = *reinterpret_cast<const uint4*>(output + row * OUTPUT * 2 + lane % 8 * 16);
      if (token >= 0) __stcs(reinterpret_cast<uint4*>(a.y + int64_t(token) * a.hidden + chunk * kColumns) + lane % 8, word);
    }
    __syncwarp();
  }
}

constexpr int kSubShared = kStages * (64 + kRows) * 128 + 1024;
template <int WARPS> constexpr int kTopShared = kStages * (WARPS * 16 + kBins) * 128;

template <class T> void top_part(const Top<T>& a, int processors, cudaStream_t stream) {
  if (int64_t(a.tokens) * a.shape.trees < 64 * 4 * processors) {
    allow_shared(top_kernel<T, 4>, kTopShared<4>);
    top_kernel<T, 4><<<unsigned(divide_up(a.tokens, 64) * a.shape.trees), 128, kTopShared<4>, stream>>>(a);
  } else {
    allow_shared(top_kernel<T, 8>, kTopShared<8>);
    top_kernel<T, 8><<<unsigned(divide_up(a.tokens, 128) * a.shape.trees), 256, kTopShared<8>, stream>>>(a);
  }
}

struct Parts {
  int32_t *counts, *offsets, *bin, *ticket, *order;
  int64_t used;
};
Parts parts_of(const Shape& s, void* workspace) {
  Carve carve{static_cast<char*>(workspace)};
  Parts p{};
  if (s.levels() > kSubLevels) {
    p.counts = carve.take<int32_t>(kBins);
    p.offsets = carve.take<int32_t>(kBins);
    p.bin = carve.take<int32_t>(s.tokens);
    p.ticket = carve.take<int32_t>(s.tokens);
    p.order = carve.take<int32_t>(s.tokens);
  }
  p.used = carve.used;
  return p;
}

template <class T> const char* run(const Forward& f, cudaStream_t stream) {
  const Shape& s = f.problem.shape;
  const int tokens = int(s.tokens), hidden = int(s.hidden), levels = int(s.levels()), top = levels > kSubLevels ? levels - kSubLevels : 0;
  const T *x = static_cast<const T*>(f.x), *in = static_cast<const T*>(f.weight_in), *bias = static_cast<const T*>(f.bias_in);
  const Parts p = parts_of(s, f.workspace);
  unsigned tiles = unsigned(divide_up(tokens, 64));
  if (top) {
    cudaMemsetAsync(p.counts, 0, kBins * sizeof(int32_t), stream);
    top_part<T>({tokens, hidden, top, x, in, bias, p.counts, p.bin, p.ticket, s, nullptr, nullptr}, f.problem.processors, stream);
    place_by_ticket(tokens, 1 << top, p.counts, p.bin, p.ticket, p.offsets, p.order, stream);
    tiles += 1u << top;  // the last of each subtree is not full
  }
  allow_shared(subtree_kernel<T>, kSubShared);
  subtree_kernel<T><<<tiles, 128, kSubShared, stream>>>({tokens, hidden, levels, top, f.activation, x, in, bias,
      static_cast<const T*>(f.weight_out), static_cast<T*>(f.y), f.path, static_cast<float*>(f.logits), p.counts, p.order});
  return launched();
}

}  // namespace

int top_levels(const Problem& p) {
  const bool serves = (p.type == Type::bfloat16 || p.type == Type::float16) && p.capability >= 80 && p.aligned &&
                      p.shape.hidden % kColumns == 0;
  return serves ? int(std::min<int64_t>(kTopLevels, p.shape.levels())) : 0;
}

template <class T> void top_paths(const Problem& p, const T* x, const T* weight, const T* bias, int32_t* path, float* logits,
                                  cudaStream_t stream) {
  top_part<T>({int(p.shape.tokens), int(p.shape.hidden), top_levels(p), x, weight, bias, nullptr, nullptr, nullptr, p.shape, path, logits},
              p.processors, stream);
}
template void top_paths(const Problem&, const bfloat16*, const bfloat16*, const bfloat16*, int32_t*, float*, cudaStream_t);
template void top_paths(const Problem&, const float16*, const float16*, const float16*, int32_t*, float*, cudaStream_t);

bool tiles_serve(const Problem& p) {
  return top_levels(p) && p.shape.trees == 1 && p.shape.levels() <= kTopLevels + kSubLevels;
}

int64_t tiles_workspace(const Problem& p) { return parts_of(p.shape, nullptr).used; }

const char* tiles_forward(const Forward& f, cudaStream_t stream) {
  return f.problem.type == Type::bfloat16 ? run<bfloat16>(f, stream) : run<float16>(f, stream);
}

}  // namespace hf_fff_cuda
