// The backward pass: only rows of visited nodes take part, and every sum is made in a fixed order.
//
// 1. order: tokens are sorted by leaf, tree by tree (order.cu), so that neighbours share most of their paths.
// 2. slopes: dL/dlogit of every visit, <grad_y, row of weight_out> times the activation's slope.
// 3. grad_x: sums of the rows of weight_in, those slopes the coefficients (forward.cu).
// 4. sums: the tokens that visited a node follow each other, at every level. A block takes a chunk of them, keeps the running
//    sums of one path in registers, and writes a node's gradients when the path leaves it: each row of x and grad_y is read once
//    for all levels. What a chunk's border cuts is written as a part.
// 5. join: adds up the parts.
//
// What has 16 bits and trees of up to 12 levels goes through tensor cores instead (gradients.cu).
#include <algorithm>

#include "cuda/common.cuh"

namespace hf_fff_cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;

// ---- slopes --------------------------------------------------------------------------------------------------------------

template <class T> struct Slopes {
  Shape shape;
  Activation activation;
  const T *grad_y, *weight_out;
  const int32_t* path;
  const accumulator_t<T>*logits, *extra;
  const int32_t* order;
  accumulator_t<T>* slopes;
  int64_t per_block;
};

// A warp: TOKENS neighbours; a row that they share is read once. CHUNKS = 0: rows of any length, grad_y read anew for each.
template <class T, int VEC, int CHUNKS, int TOKENS>
__global__ void __launch_bounds__(kThreads, CHUNKS * VEC * TOKENS <= 48 ? 2 : 1) slopes_kernel(Slopes<T> a) {
  using A = accumulator_t<T>;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t hidden = a.shape.hidden, trees = a.shape.trees, nodes = a.shape.tree_nodes();
  const int levels = int(a.shape.levels()), depth = int(a.shape.depth);
  const int64_t last = min(a.shape.tokens, (blockIdx.x + int64_t(1)) * a.per_block);
  for (int64_t first = blockIdx.x * a.per_block + warp * TOKENS; first < last; first += kWarps * TOKENS) {
    int64_t token[TOKENS];
    constexpr bool AHEAD = CHUNKS > 0 && sizeof(T) == 2;  // the next row on its way, where there are registers for it
    Share<T, VEC, CHUNKS ? CHUNKS : 1> grad[TOKENS], row, next;
#pragma unroll
    for (int i = 0; i < TOKENS; ++i) {
      token[i] = a.order[min(first + i, last - 1)];  // the last one twice changes nothing
      if constexpr (CHUNKS > 0) grad[i].template read<true>(a.grad_y + token[i] * hidden, int(hidden), lane);
    }
    for (int64_t tree = 0; tree < trees; ++tree) {
      const T* out = a.weight_out + tree * nodes * hidden;
      int leaf[TOKENS];
      A gain[TOKENS];  // lane l: of level l
#pragma unroll
      for (int i = 0; i < TOKENS; ++i) leaf[i] = leaf_of(a.path[(token[i] * trees + tree) * levels + depth], depth);
      if constexpr (AHEAD) next.read(out, int(hidden), lane);
#pragma unroll 1
      for (int level = 0; level < levels; ++level) {
        int before = -1;
        if constexpr (AHEAD) {
          row = next;
          before = node_above(leaf[0], level, depth);
          if (level + 1 < levels) next.read(out + node_above(leaf[0], level + 1, depth) * hidden, int(hidden), lane);
        }
#pragma unroll
        for (int i = 0; i < TOKENS; ++i) {
          const int node = node_above(leaf[i], level, depth);
          A sum;
          if constexpr (CHUNKS > 0) {
            if (node != before) row.read(out + node * hidden, int(hidden), lane);
            sum = warp_sum(grad[i].dot(row));
          } else {
            sum = dot_rows<T, VEC>(a.grad_y + token[i] * hidden, out + node * hidden, hidden, lane);
          }
          if (lane == level) gain[i] = sum;
          before = node;
        }
      }
      if (lane < levels)
#pragma unroll
        for (int i = 0; i < TOKENS; ++i) {
          const int64_t at = (token[i] * trees + tree) * levels + lane;
          a.slopes[at] = gain[i] * act_slope(a.activation, a.logits[at]) + (a.extra ? a.extra[at] : A(0));
        }
    }
  }
}

template <class T> void slopes(Slopes<T> a, bool vectors, int processors, cudaStream_t stream) {
  constexpr int VEC = vector_of<T>;
  const int64_t tokens = a.shape.tokens, chunks = divide_up(a.shape.hidden, kWarp * VEC);
  const int together = vectors && sizeof(T) < 8 && chunks <= (sizeof(T) == 4 ? 8 : 4) ? 2 : 1;
  a.per_block = divide_up(std::max<int64_t>(1, divide_up(tokens, processors * 4)), kWarps * together) * kWarps * together;
  const unsigned blocks = unsigned(divide_up(tokens, a.per_block));
  if (!vectors) slopes_kernel<T, 1, 0, 1><<<blocks, kThreads, 0, stream>>>(a);
  else if (together == 1) slopes_kernel<T, VEC, 0, 1><<<blocks, kThreads, 0, stream>>>(a);
  else if constexpr (sizeof(T) < 8) {
    if (chunks == 1) slopes_kernel<T, VEC, 1, 2><<<blocks, kThreads, 0, stream>>>(a);
    else if (chunks == 2) slopes_kernel<T, VEC, 2, 2><<<blocks, kThreads, 0, stream>>>(a);
    else if (chunks == 3) slopes_kernel<T, VEC, 3, 2><<<blocks, kThreads, 0, stream>>>(a);
    else if (chunks == 4) slopes_kernel<T, VEC, 4, 2><<<blocks, kThreads, 0, stream>>>(a);
    else if constexpr (sizeof(T) == 4) {
      if (chunks <= 6) slopes_kernel<T, VEC, 6, 2><<<blocks, kThreads, 0, stream>>>(a);
      else slopes_kernel<T, VEC, 8, 2><<<blocks, kThreads, 0, stream>>>(a);
    }
  }
}

// ---- sums over the tokens of a node --------------------------------------------------------------------------------------

template <class T> struct Sums {
  Shape shape;
  Activation activation;
  const T *x, *grad_y;
  const accumulator_t<T>*slopes, *logits;
  const uint32_t* keys;     // sorted, [trees, tokens]: tree and leaf
  const int32_t* tokens;    // the same
  int per_chunk, chunks;    // of one tree
  accumulator_t<T>* parts;  // [trees, chunks, 2, levels, 2, hidden]: of a chunk's first and last run; of weight_in, weight_out
  accumulator_t<T>* bias_parts;  // [trees, chunks, 2, levels]
  T *into_in, *into_bias, *into_out;

  __device__ int leaf(int64_t tree, int64_t i) const {
    return int(keys[tree * shape.tokens + i] & ((uint32_t(1) << shape.depth) - 1));
  }
  __device__ int64_t part(int64_t tree, int64_t chunk, int slot, int level) const {
    return ((tree * chunks + chunk) * 2 + slot) * shape.levels() + level;
  }
};

constexpr int kBatch = 64;  // tokens whose coefficients lie in shared memory
constexpr int kRing = 8;    // tokens whose numbers are on their way there; a thread fetches what itself will need

template <int BYTES> __device__ inline void copy_own(void* to, const void* from) {
#if __CUDA_ARCH__ >= 800
  if constexpr (BYTES >= 4) {
    const uint32_t at = uint32_t(__cvta_generic_to_shared(to));
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(at), "l"(from), "n"(BYTES) : "memory");
    return;
  }
#endif
  using W = typename Word<BYTES>::type;
  *static_cast<W*>(to) = __ldcs(static_cast<const W*>(from));
}
__device__ inline void copies_end() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
__device__ inline void copies_of_oldest() {  // all but the last kRing - 1 groups are there
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kRing - 1) : "memory");
#endif
}

constexpr int kSumsThreads = 192;  // two blocks fit into a multiprocessor's registers

template <class T, int VEC, int LEVELS> __global__ void __launch_bounds__(kSumsThreads, sizeof(T) < 8 ? 2 : 1) sums_kernel(Sums<T> a) {
  using A = accumulator_t<T>;
  extern __shared__ __align__(16) char memory[];  // [kRing][x, grad_y][threads] of Pack<T, VEC>
  struct Pair { A slope, value; };
  __shared__ Pair pairs[kBatch][LEVELS];
  __shared__ int tokens[kBatch], leaves[kBatch];
  const int64_t hidden = a.shape.hidden, trees = a.shape.trees, tree = blockIdx.x / a.chunks, nodes = a.shape.tree_nodes();
  const int64_t chunk = blockIdx.x % a.chunks;
  const int levels = int(a.shape.levels()), depth = int(a.shape.depth), level0 = int(blockIdx.z) * LEVELS;
  const int64_t begin = chunk * a.per_chunk, end = min(a.shape.tokens, begin + a.per_chunk);
  const int64_t column = (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * VEC;
  const bool here = column < hidden, first = column == 0, bias_here = blockIdx.y == 0 && threadIdx.x < kWarp;
  const int before = begin ? a.leaf(tree, begin - 1) : -1, after = end < a.shape.tokens ? a.leaf(tree, end) : -1;
  int leaf = a.leaf(tree, begin);
  A in[LEVELS][VEC] = {}, out[LEVELS][VEC] = {}, bias[LEVELS] = {};

  const auto flush = [&](int from) {  // the path leaves its nodes at the levels from `from` on
#pragma unroll
    for (int l = 0; l < LEVELS; ++l) {
      const int level = level0 + l;
      if (level < from || level >= levels) continue;
      const int shift = depth - level, place = leaf >> shift;
      const bool left = before >= 0 && before >> shift == place, right = after >= 0 && after >> shift == place;
      if (!left && !right) {
        const int64_t row = tree * nodes + (1 << level) - 1 + place;
        if (here) {
          store_once(a.into_in + row * hidden + column, Pack<T, VEC>::of(in[l]));
          store_once(a.into_out + row * hidden + column, Pack<T, VEC>::of(out[l]));
        }
        if (first) a.into_bias[row] = from_acc<T>(bias[l]);
      } else {
        const int64_t part = a.part(tree, chunk, left ? 0 : 1, level);
        if (here)
#pragma unroll
          for (int j = 0; j < VEC; ++j) {
            a.parts[part * 2 * hidden + column + j] = in[l][j];
            a.parts[(part * 2 + 1) * hidden + column + j] = out[l][j];
          }
        if (first) a.bias_parts[part] = bias[l];
      }
#pragma unroll
      for (int j = 0; j < VEC; ++j) in[l][j] = out[l][j] = 0;
      bias[l] = 0;
    }
  };

  for (int64_t base = begin; base < end; base += kBatch) {
    const int count = int(min(int64_t(kBatch), end - base));
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
      tokens[i] = a.tokens[tree * a.shape.tokens + base + i];
      leaves[i] = a.leaf(tree, base + i);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < count * LEVELS; i += blockDim.x) {
      const int t = i / LEVELS, l = i % LEVELS;
      Pair pair{0, 0};
      if (level0 + l < levels) {
        const int64_t at = (int64_t(tokens[t]) * trees + tree) * levels + level0 + l;
        pair = {a.slopes[at], act(a.activation, a.logits[at])};
      }
      pairs[t][l] = pair;
    }
    __syncthreads();
    Pack<T, VEC>* ring = reinterpret_cast<Pack<T, VEC>*>(memory) + threadIdx.x;
    const auto begin_copy = [&](int t) {
      if (here && t < count) {
        const int64_t from = int64_t(tokens[t]) * hidden + column;
        copy_own<sizeof(T) * VEC>(ring + t % kRing * 2 * blockDim.x, a.x + from);
        copy_own<sizeof(T) * VEC>(ring + (t % kRing * 2 + 1) * blockDim.x, a.grad_y + from);
      }
      copies_end();
    };
    for (int t = 0; t < kRing - 1; ++t) begin_copy(t);
#pragma unroll 1
    for (int t = 0; t < count; ++t) {
      begin_copy(t + kRing - 1);
      copies_of_oldest();
      const int now = leaves[t];
      if (now != leaf) {
        flush(depth - (31 - __clz(now ^ leaf)));
        leaf = now;
      }
      A xs[VEC], gs[VEC];
      ring[t % kRing * 2 * blockDim.x].get(xs);
      ring[(t % kRing * 2 + 1) * blockDim.x].get(gs);
#pragma unroll
      for (int l = 0; l < LEVELS; ++l) {
        const Pair pair = pairs[t][l];
        if (bias_here) bias[l] += pair.slope;
#pragma unroll
        for (int j = 0; j < VEC; ++j) in[l][j] = fma(pair.slope, xs[j], in[l][j]), out[l][j] = fma(pair.value, gs[j], out[l][j]);
      }
    }
  }
  flush(0);
}

constexpr int kJoinThreads = 512, kJoinColumns = 64, kJoinGroups = kJoinThreads / kJoinColumns, kJoinVec = 2;
constexpr int kMostLevels = 30;

// A block: some columns of the runs, one a level, that begin in a chunk and go on beyond it.
template <class T> __global__ void __launch_bounds__(kJoinThreads) join_kernel(Sums<T> a) {
  using A = accumulator_t<T>;
  __shared__ A sums[kJoinGroups][kJoinColumns * kJoinVec];
  __shared__ int last_chunk[kMostLevels], places[kMostLevels];  // the last one that begins with the run; -1: no run
  const int64_t chunk = blockIdx.x % (a.chunks - 1), tree = blockIdx.x / (a.chunks - 1), hidden = a.shape.hidden;
  const int levels = int(a.shape.levels());
  const auto first_of = [&](int64_t c) { return a.leaf(tree, c * a.per_chunk); };
  if (int(threadIdx.x) < levels) {
    const int shift = int(a.shape.depth) - int(threadIdx.x), place = a.leaf(tree, (chunk + 1) * a.per_chunk - 1) >> shift;
    int64_t last = -1;
    if (first_of(chunk + 1) >> shift == place && !(chunk && a.leaf(tree, chunk * a.per_chunk - 1) >> shift == place)) {
      last = chunk + 1;
      int64_t beyond = a.chunks;
      for (int64_t step = 1; last + step < beyond; step *= 2) {
        if (first_of(last + step) >> shift == place) last += step;
        else beyond = last + step;
      }
      while (last + 1 < beyond) {
        const int64_t middle = (last + beyond) / 2;
        if (first_of(middle) >> shift == place) last = middle;
        else beyond = middle;
      }
    }
    last_chunk[threadIdx.x] = int(last), places[threadIdx.x] = place;
  }
  __syncthreads();
  const int column = threadIdx.x % kJoinColumns, group = threadIdx.x / kJoinColumns;
  const int64_t at = (int64_t(blockIdx.y) * kJoinColumns + column) * kJoinVec;  // of a row of weight_in and one of weight_out
  for (int level = 0; level < levels; ++level) {
    const int64_t last = last_chunk[level];
    if (last < 0) continue;
    const int64_t row = tree * a.shape.tree_nodes() + (1 << level) - 1 + places[level];
    A sum[kJoinVec] = {};
    const auto add = [&](int64_t c, int slot) {
      const A* part = a.parts + a.part(tree, c, slot, level) * 2 * hidden + at;
#pragma unroll
      for (int j = 0; j < kJoinVec; ++j)
        if (at + j < 2 * hidden) sum[j] += part[j];
    };
    if (group == 0) add(chunk, 1);
#pragma unroll 8
    for (int64_t c = chunk + 1 + group; c <= last; c += kJoinGroups) add(c, 0);
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kJoinVec; ++j) sums[group][column * kJoinVec + j] = sum[j];
    __syncthreads();
    if (group == 0)
#pragma unroll
      for (int j = 0; j < kJoinVec; ++j) {
        for (int g = 1; g < kJoinGroups; ++g) sum[j] += sums[g][column * kJoinVec + j];
        if (at + j < hidden) a.into_in[row * hidden + at + j] = from_acc<T>(sum[j]);
        else if (at + j < 2 * hidden) a.into_out[row * hidden + at + j - hidden] = from_acc<T>(sum[j]);
      }
    if (blockIdx.y == 0 && group == kJoinGroups - 1 && column < kWarp) {
      A total = 0;
      for (int64_t c = chunk + 1 + column; c <= last; c += kWarp) total += a.bias_parts[a.part(tree, c, 0, level)];
      total = warp_sum(total);
      if (column == 0) a.into_bias[row] = from_acc<T>(total + a.bias_parts[a.part(tree, chunk, 1, level)]);
    }
  }
}

template <class T> void sums(const Sums<T>& a, bool vectors, cudaStream_t stream) {
  constexpr int VEC = sizeof(T) == 8 ? 2 : 4;
  const int vec = vectors ? VEC : 1, levels = int(a.shape.levels());
  const int size = vectors ? (levels <= 4 ? 4 : levels <= 8 || levels > 12 ? 8 : 12) : 8, groups = int(divide_up(levels, size));
  const int64_t columns = divide_up(a.shape.hidden, vec), blocks = divide_up(columns, kSumsThreads);
  const int threads = int(divide_up(divide_up(columns, blocks), kWarp) * kWarp);
  const dim3 grid(unsigned(a.chunks * a.shape.trees), unsigned(divide_up(columns, threads)), unsigned(groups));
  const int shared = kRing * 2 * threads * vec * int(sizeof(T));
  const auto launch = [&](auto kernel) {
    allow_shared(kernel, shared);
    kernel<<<grid, threads, shared, stream>>>(a);
  };
  if (!vectors) launch(sums_kernel<T, 1, 8>);
  else if (size == 4) launch(sums_kernel<T, VEC, 4>);
  else if (size == 8) launch(sums_kernel<T, VEC, 8>);
  else launch(sums_kernel<T, VEC, 12>);
  if (a.chunks > 1) {
    const dim3 borders(unsigned((a.chunks - 1) * a.shape.trees), unsigned(divide_up(2 * a.shape.hidden, kJoinColumns * kJoinVec)));
    join_kernel<T><<<borders, kJoinThreads, 0, stream>>>(a);
  }
}

// ---- the straight-through routing gradient -------------------------------------------------------------------------------

// A thread: a visit of an inner node. What each child is worth: <grad_y, output of the path that descends greedily from it>.
template <class T> __global__ void __launch_bounds__(kThreads) routing_kernel(Routing r) {
  using A = accumulator_t<T>;
  const int64_t levels = r.shape.levels(), nodes = r.shape.tree_nodes();
  const int64_t i = blockIdx.x * int64_t(kThreads) + threadIdx.x;
  if (i >= r.shape.tokens * r.shape.walk()) return;
  const int64_t token = i / r.shape.walk(), tree = i / levels % r.shape.trees;
  const int level = int(i % levels), depth = int(r.shape.depth);
  A* extra = static_cast<A*>(r.extra);
  if (level == depth) {
    extra[i] = 0;
    return;
  }
  const T *every = static_cast<const T*>(r.every) + token * r.width + tree * nodes,
          *gain = static_cast<const T*>(r.gain) + token * r.width + tree * nodes,
          *bias = static_cast<const T*>(r.bias_in) + tree * nodes;
  const int64_t node = node_above(leaf_of(r.path[i - level + depth], depth), level, depth);
  A worth[2] = {0, 0};
#pragma unroll
  for (int child = 0; child < 2; ++child)
    for (int64_t n = 2 * node + 1 + child; n < nodes;) {
      const A z = to_acc(every[n]) + to_acc(bias[n]);
      worth[child] = fma(act(r.activation, z), to_acc(gain[n]), worth[child]);
      n = 2 * n + 1 + (z > 0);
    }
  const A s = sigmoid(static_cast<const A*>(r.logits)[i] / A(r.temperature));
  extra[i] = A(r.strength) * (worth[1] - worth[0]) * s * (A(1) - s) / A(r.temperature);
}

struct Parts {
  uint32_t* keys;
  int32_t* tokens;
  void *slopes, *sort, *parts, *bias_parts;
  int per_chunk, chunks;
  int64_t used;
};

Parts parts_of(const Problem& p, bool weights, void* workspace) {
  const Shape& s = p.shape;
  const int64_t number = p.type == Type::float64 ? 8 : 4;
  Carve carve{static_cast<char*>(workspace)};
  Parts r{};
  r.keys = carve.take<uint32_t>(s.trees * s.tokens);
  r.tokens = carve.take<int32_t>(s.trees * s.tokens);
  r.slopes = carve.take<char>(number * s.tokens * s.walk());
  r.sort = carve.take<char>(sort_by_leaf_workspace(s));
  if (weights) {
    const int64_t wanted = std::max<int64_t>(1, 4 * p.processors / s.trees);
    r.per_chunk = int(std::max<int64_t>(kBatch, divide_up(divide_up(s.tokens, wanted), kBatch) * kBatch));
    r.chunks = int(divide_up(s.tokens, r.per_chunk));
    const int64_t runs = s.trees * r.chunks * 2 * s.levels();
    r.parts = carve.take<char>(number * runs * 2 * s.hidden);
    r.bias_parts = carve.take<char>(number * runs);
  }
  r.used = carve.used;
  return r;
}

template <class T> const char* run(const Backward& b, cudaStream_t stream) {
  using A = accumulator_t<T>;
  const Shape& s = b.problem.shape;
  const T *g = static_cast<const T*>(b.grad_y), *x = static_cast<const T*>(b.x), *in = static_cast<const T*>(b.weight_in),
          *out = static_cast<const T*>(b.weight_out);
  const A* logits = static_cast<const A*>(b.logits);
  const bool vectors = b.problem.aligned && s.hidden % vector_of<T> == 0, weights = b.grad_weight_in;
  const Parts p = parts_of(b.problem, weights, b.workspace);
  if (weights) {
    cudaMemsetAsync(b.grad_weight_in, 0, s.nodes() * s.hidden * sizeof(T), stream);
    cudaMemsetAsync(b.grad_weight_out, 0, s.nodes() * s.hidden * sizeof(T), stream);
    cudaMemsetAsync(b.grad_bias_in, 0, s.nodes() * sizeof(T), stream);
  }
  if (s.tokens == 0) return launched();
  if (const char* error = sort_by_leaf(s, b.path, p.keys, p.tokens, p.sort, stream)) return error;
  A* slope = static_cast<A*>(p.slopes);
  slopes<T>({s, b.activation, g, out, b.path, logits, static_cast<const A*>(b.extra), p.tokens, slope, 0}, vectors,
            b.problem.processors, stream);
  if (b.grad_x) combine<T>({s, b.activation, in, b.path, slope, false, p.tokens, static_cast<T*>(b.grad_x)}, vectors,
                            b.problem.processors, stream);
  if (weights)
    sums<T>({s, b.activation, x, g, slope, logits, p.keys, p.tokens, p.per_chunk, p.chunks, static_cast<A*>(p.parts),
             static_cast<A*>(p.bias_parts), static_cast<T*>(b.grad_weight_in), static_cast<T*>(b.grad_bias_in),
             static_cast<T*>(b.grad_weight_out)},
            vectors, stream);
  return launched();
}

}  // namespace

namespace {

constexpr int64_t kMostMaskedLevels = 12;  // that Triton holds (triton_backend.py): deeper trees are left to PyTorch's operations there
constexpr int64_t kFewestVisits = 64;      // of a token, with few tokens: nobody measured narrower layers there

// What was measured on an H100, in microseconds for 131072 tokens of 768 numbers: the conditional pass costs so much for each visit,
// with the routing gradient so much more for each node; the masked one for each node, and at least kDenseStart. Few tokens leave a GPU
// half empty: however few there are, a visit takes kVisitStart (H200), and all of the masked pass kDenseCall.
// Fewer numbers a row make both cheaper, so that only their ratio counts. With few tokens (H200, 16 and 64) both take at least kFewCall,
// the conditional pass kFewVisit a visit beside, the masked one few_node for each node of 768 numbers, whose gradients it writes.
bool masked_is_faster(const Problem& p, bool routing) {
  if (p.type == Type::float64 || p.shape.tokens < kFewestMasked || p.shape.levels() > kMostMaskedLevels) return false;
  const bool single = p.type == Type::float32;
  const double visit = single ? 99 : 77, routing_node = single ? 8.1 : 0.8, dense_node = single ? 22 : 2.75, few_node = single ? 0.016 : 0.01;
  constexpr double kDenseStart = 600, kDenseCall = 50, kVisitStart = 1.3, kFewVisit = 1.5, kFewCall = 60, kMargin = 1.25;
  const double nodes = double(p.shape.nodes()), walk = double(p.shape.walk()), scale = double(p.shape.tokens) / 131072;
  double conditional = kVisitStart * walk + scale * (visit * walk + (routing ? routing_node * nodes : 0));
  double masked = kDenseCall + scale * (dense_node * nodes + kDenseStart);
  if (p.shape.tokens < kFew) {
    if (p.shape.walk() < kFewestVisits) return false;
    conditional = std::max(conditional, kFewVisit * walk + kFewCall);
    masked = std::max(masked, few_node * nodes * double(p.shape.hidden) / 768 + kFewCall);
  }
  return masked * kMargin < conditional;
}

constexpr int64_t kTilesFrom = 256;  // tokens

}  // namespace

Way backward_way(const Problem& p, bool routing, Way wanted) {
  const bool tiles = backward_tiles_serve(p);
  if (wanted == Way::dense) return Way::dense;
  if (wanted != Way::automatic) return wanted == Way::tiles && tiles ? Way::tiles : Way::plain;
  if (masked_is_faster(p, routing)) return Way::dense;
  return tiles && p.shape.tokens >= kTilesFrom ? Way::tiles : Way::plain;
}

Wide backward_wide(const Problem& p, Way way) {
  const bool tiles = way == Way::tiles;
  return {tiles && p.shape.trees == 1, tiles};
}

int64_t backward_workspace(const Problem& p, Way way, bool x, bool weights) {
  if (!p.shape.tokens) return 0;
  return way == Way::tiles ? backward_tiles_workspace(p, x, weights) : parts_of(p, weights, nullptr).used;
}

// A thread: eight numbers of one of the arrays.
struct Casts {
  Cast of[kMostCasts];
  int64_t first_block[kMostCasts + 1];
};
constexpr int kCastNumbers = 8;

template <class T> __global__ void __launch_bounds__(kThreads) cast_kernel(Casts casts) {
  int which = 0;
  while (which + 1 < kMostCasts && int64_t(blockIdx.x) >= casts.first_block[which + 1]) ++which;
  const Cast c = casts.of[which];
  const int64_t begin = ((int64_t(blockIdx.x) - casts.first_block[which]) * kThreads + threadIdx.x) * kCastNumbers, end = c.count + c.zeros;
  const float* from = static_cast<const float*>(c.from);
  T* to = static_cast<T*>(c.to);
  if (begin + kCastNumbers <= c.count && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
    float v[kCastNumbers];
#pragma unroll
    for (int i = 0; i < kCastNumbers / 4; ++i) {
      const float4 four = __ldcs(reinterpret_cast<const float4*>(from + begin) + i);
      v[4 * i] = four.x, v[4 * i + 1] = four.y, v[4 * i + 2] = four.z, v[4 * i + 3] = four.w;
    }
    *reinterpret_cast<uint4*>(to + begin) = Pack<T, kCastNumbers>::of(v).word;
    return;
  }
  for (int64_t i = begin; i < min(begin + kCastNumbers, end); ++i) to[i] = from_acc<T>(i < c.count ? from[i] : 0);
}

const char* cast(const Cast* of, int count, Type to, cudaStream_t stream) {
  Casts casts{};
  int64_t blocks = 0;
  for (int i = 0; i < kMostCasts; ++i) {
    casts.first_block[i] = blocks;
    if (i < count) casts.of[i] = of[i], blocks += divide_up(of[i].count + of[i].zeros, kThreads * kCastNumbers);
  }
  casts.first_block[kMostCasts] = blocks;
  if (!blocks) return nullptr;
  if (to == Type::bfloat16) cast_kernel<bfloat16><<<unsigned(blocks), kThreads, 0, stream>>>(casts);
  else cast_kernel<float16><<<unsigned(blocks), kThreads, 0, stream>>>(casts);
  return launched();
}

const char* routing(const Routing& r, Type type, cudaStream_t stream) {
  const int64_t visits = r.shape.tokens * r.shape.walk();
  if (visits == 0) return nullptr;
  with_type(type, [&](auto t) { routing_kernel<decltype(t)><<<unsigned(divide_up(visits, kThreads)), kThreads, 0, stream>>>(r); });
  return launched();
}

const char* backward(const Backward& b, Way way, cudaStream_t stream) {
  if (way == Way::tiles) return backward_tiles(b, stream);
  return with_type(b.problem.type, [&](auto type) { return run<decltype(type)>(b, stream); });
}

}  // namespace hf_fff_cuda
