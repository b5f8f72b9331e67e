// The forward pass: a warp per walk, and sums of rows along known paths.
#include <algorithm>

#include "cuda/common.cuh"

namespace hf_fff_cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kGroup = 8;  // tokens whose sums a warp keeps side by side

// ---- gather: a token in the registers of a warp --------------------------------------------------------------------------

template <class T> struct Layer {
  Shape shape;
  Activation activation;
  const T *x, *weight_in, *bias_in, *weight_out;
  T* y;
  int32_t* path;
  accumulator_t<T>* logits;
};

__device__ inline void prefetch(const void* start, int64_t bytes, int lane) {  // into the second-level cache
  const char* p = static_cast<const char*>(start);
  for (int64_t i = int64_t(lane) * 128; i < bytes; i += kWarp * 128) asm volatile("prefetch.global.L2 [%0];" ::"l"(p + i));
}

// A team of warps shares the trees of a token and adds up its sums in shared memory. `ahead`: too few tokens to fill the
// machine, so the rows that may come in two levels are fetched before it is known which one does.
template <class T, int CHUNKS>
__global__ void __launch_bounds__(kThreads, CHUNKS * vector_of<T> <= 24 ? 2 : 1) gather_kernel(Layer<T> a, int team, bool ahead) {
  using A = accumulator_t<T>;
  constexpr int VEC = vector_of<T>;
  extern __shared__ __align__(16) char shared[];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, member = warp % team;
  const int64_t token = int64_t(blockIdx.x) * (kWarps / team) + warp / team;
  const int hidden = int(a.shape.hidden), levels = int(a.shape.levels()), trees = int(a.shape.trees);
  const int64_t tree_nodes = a.shape.tree_nodes();
  const bool here = token < a.shape.tokens;
  A y[CHUNKS][VEC] = {};
  if (here) {
    Share<T, VEC, CHUNKS> x;
    x.template read<true>(a.x + token * hidden, hidden, lane);
    for (int tree = member; tree < trees; tree += team) {
      const int64_t root = tree * tree_nodes;
      const T *in = a.weight_in + root * hidden, *out = a.weight_out + root * hidden;
      int64_t node = 0;
      A coefficient = 0;
      Share<T, VEC, CHUNKS> row, output;
      if (ahead && levels > 1) prefetch(in + hidden, 2 * hidden * sizeof(T), lane);
#pragma unroll 1
      for (int level = 0; level < levels; ++level) {
        row.read(in + node * hidden, hidden, lane);
        const A bias = to_acc(a.bias_in[root + node]);
        if (ahead && level + 2 < levels) prefetch(in + (4 * node + 3) * hidden, 4 * hidden * sizeof(T), lane);
        if (level) output.add_to(y, coefficient);  // of the level above, while this row is on its way
        output.read(out + node * hidden, hidden, lane);
        const A z = warp_sum(x.dot(row)) + bias;
        coefficient = act(a.activation, z);
        if (a.path && lane == 0) {
          const int64_t visit = (token * trees + tree) * levels + level;
          a.path[visit] = int(node);
          a.logits[visit] = z;
        }
        node = 2 * node + 1 + (z > 0);
      }
      output.add_to(y, coefficient);
    }
  }
  if (team == 1) {
    if (!here) return;
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
      const int column = (i * kWarp + lane) * VEC;
      if (column < hidden) store_once(a.y + token * hidden + column, Pack<T, VEC>::of(y[i]));
    }
    return;
  }
  A* sums = reinterpret_cast<A*>(shared);  // [warps][hidden]
#pragma unroll
  for (int i = 0; i < CHUNKS; ++i) {
    const int column = (i * kWarp + lane) * VEC;
    if (column < hidden)
#pragma unroll
      for (int j = 0; j < VEC; ++j) sums[warp * hidden + column + j] = y[i][j];
  }
  __syncthreads();
  if (!here) return;
  const A* first = sums + (warp - member) * hidden;
  for (int c = member * kWarp + lane; c < hidden; c += team * kWarp) {
    A sum = 0;
    for (int m = 0; m < team; ++m) sum += first[m * hidden + c];
    a.y[token * hidden + c] = from_acc<T>(sum);
  }
}

// ---- walks: levels [begin, end) of every token in every tree, paths and logits in memory ---------------------------------

template <class T> struct Walk {
  Shape shape;
  const T *x, *weight_in, *bias_in;
  int32_t* path;
  accumulator_t<T>* logits;
  int begin, end;
  const int32_t* order;  // of tokens, or null
  int32_t *counts, *bin, *ticket;  // or null: where each token went (one tree), and its number among those that went there
  int64_t per_block;               // walks, neighbours in the order: they share rows in the first-level cache
};

template <class T, int VEC, int CHUNKS, int THREADS = kThreads>  // CHUNKS = 0: rows of any length, x read anew for each
__global__ void __launch_bounds__(THREADS, THREADS == kThreads && CHUNKS && CHUNKS * VEC <= 24 ? 4 : 1) walk_kernel(Walk<T> a) {
  using A = accumulator_t<T>;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t hidden = a.shape.hidden, levels = a.shape.levels(), trees = a.shape.trees, walks = a.shape.tokens * trees;
  const int64_t last = min(walks, (blockIdx.x + int64_t(1)) * a.per_block);
  for (int64_t walk = blockIdx.x * a.per_block + warp; walk < last; walk += THREADS / kWarp) {
    const int64_t slot = walk / trees, tree = walk % trees, token = a.order ? a.order[slot] : slot;
    const int64_t root = tree * a.shape.tree_nodes(), visits = (token * trees + tree) * levels;
    const T* in = a.weight_in + root * hidden;
    const T* x = a.x + token * hidden;
    Share<T, VEC, CHUNKS ? CHUNKS : 1> mine, row;
    if constexpr (CHUNKS > 0) mine.template read<true>(x, int(hidden), lane);
    int64_t node = 0;
    if (a.begin) node = 2 * int64_t(a.path[visits + a.begin - 1]) + 1 + (a.logits[visits + a.begin - 1] > 0);
    for (int level = a.begin; level < a.end; ++level) {
      A z;
      const A bias = to_acc(a.bias_in[root + node]);
      if constexpr (CHUNKS > 0) {
        row.read(in + node * hidden, int(hidden), lane);
        z = warp_sum(mine.dot(row)) + bias;
      } else {
        z = dot_rows<T, VEC>(x, in + node * hidden, hidden, lane) + bias;
      }
      if (lane == 0) {
        a.path[visits + level] = int(node);
        a.logits[visits + level] = z;
      }
      if (level + 1 < levels) node = 2 * node + 1 + (z > 0);
    }
    if (a.counts && lane == 0) {
      const int depth = min(a.end, int(levels) - 1), place = int(node) - ((1 << depth) - 1);
      a.bin[token] = place;
      a.ticket[token] = atomicAdd(a.counts + place, 1);
    }
  }
}

template <class T> void walk(Walk<T> a, bool vectors, int processors, cudaStream_t stream) {
  const int64_t walks = a.shape.tokens * a.shape.trees, hidden = a.shape.hidden;
  // In order: about four blocks a multiprocessor, each with neighbours. Otherwise: small ones, for balance.
  a.per_block = a.order ? std::max<int64_t>(kWarps, divide_up(divide_up(walks, processors * 4), kWarps) * kWarps) : kWarps * 2;
  const unsigned blocks = unsigned(divide_up(walks, a.per_block));
  constexpr int VEC = vector_of<T>;
  if (!vectors) {
    walk_kernel<T, 1, 0><<<blocks, kThreads, 0, stream>>>(a);
    return;
  }
  if constexpr (sizeof(T) == 4) {
    const int64_t chunks = divide_up(hidden, kWarp * VEC);
    if (a.counts && (chunks == 5 || chunks == 6)) {  // sorted: one block a multiprocessor, whose neighbours are few subtrees
      a.per_block = std::max<int64_t>(kWarp, divide_up(divide_up(walks, processors), kWarp) * kWarp);
      walk_kernel<T, VEC, 6, 1024><<<unsigned(divide_up(walks, a.per_block)), 1024, 0, stream>>>(a);
      return;
    }
  }
  if constexpr (sizeof(T) < 8) switch (divide_up(hidden, kWarp * VEC)) {
    case 1: walk_kernel<T, VEC, 1><<<blocks, kThreads, 0, stream>>>(a); return;
    case 2: walk_kernel<T, VEC, 2><<<blocks, kThreads, 0, stream>>>(a); return;
    case 3: walk_kernel<T, VEC, 3><<<blocks, kThreads, 0, stream>>>(a); return;
    case 4: walk_kernel<T, VEC, 4><<<blocks, kThreads, 0, stream>>>(a); return;
    case 5: case 6: if constexpr (sizeof(T) == 4) { walk_kernel<T, VEC, 6><<<blocks, kThreads, 0, stream>>>(a); return; } break;
    case 7: case 8: if constexpr (sizeof(T) == 4) { walk_kernel<T, VEC, 8><<<blocks, kThreads, 0, stream>>>(a); return; } break;
    default: break;
  }
  walk_kernel<T, VEC, 0><<<blocks, kThreads, 0, stream>>>(a);
}

// ---- sums of rows --------------------------------------------------------------------------------------------------------

// A warp: kGroup tokens, and every `parts`-th of the pieces of 32 * VEC columns. A row that all of them visit is read once.
template <class T, int VEC>
__global__ void __launch_bounds__(kThreads, sizeof(T) < 8 ? 2 : 1) combine_kernel(Combine<T> a, int64_t groups, int parts, int64_t per_block) {
  using A = accumulator_t<T>;
  constexpr int AHEAD = 4;  // rows on their way
  __shared__ A coefficients[kWarps][kWarp][kGroup];
  __shared__ int rows[kWarps][kWarp][kGroup];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t hidden = a.shape.hidden, visits = a.shape.walk(), levels = a.shape.levels(), nodes = a.shape.tree_nodes();
  const int64_t last = min(groups * parts, (blockIdx.x + int64_t(1)) * per_block);
  const bool one_batch = visits <= kWarp;  // then the coefficients serve all columns
  for (int64_t item = blockIdx.x * per_block + warp; item < last; item += kWarps) {
    const int64_t first = item / parts * kGroup;
    const int count = int(min(int64_t(kGroup), a.shape.tokens - first));
    int64_t mine = 0;  // lane i knows token i
    if (lane < count) mine = a.order ? a.order[first + lane] : first + lane;
    unsigned shared_rows = 0;
    for (int64_t piece = item % parts; piece * kWarp * VEC < hidden; piece += parts) {
      const int64_t column = (piece * kWarp + lane) * VEC;
      const bool here = column < hidden;
      A sum[kGroup][VEC] = {};
      for (int64_t begin = 0; begin < visits; begin += kWarp) {
        const int batch = int(min(int64_t(kWarp), visits - begin));
        if (!one_batch || piece == item % parts) {
          __syncwarp();
          bool same = true;
          int before = 0;
#pragma unroll
          for (int i = 0; i < kGroup; ++i) {
            const int64_t token = __shfl_sync(kAll, mine, i);
            A c = 0;
            int node = before;
            if (i < count && lane < batch) {
              const int64_t at = token * visits + begin + lane;
              node = max(0, min(a.path[at], int(nodes) - 1));
              c = a.is_logits ? act(a.activation, a.values[at]) : a.values[at];
            }
            if (i) same &= node == before;
            before = node;
            coefficients[warp][lane][i] = c;
            rows[warp][lane][i] = node;
          }
          shared_rows = __ballot_sync(kAll, same);
          __syncwarp();
        }
        if (!here) continue;
        for (int v = 0; v < batch; v += AHEAD) {
          const unsigned wanted = (1u << min(AHEAD, batch - v)) - 1;
          if ((shared_rows >> v & wanted) == wanted) {
            Pack<T, VEC> row[AHEAD];
#pragma unroll
            for (int u = 0; u < AHEAD; ++u)
              if (v + u < batch)
                row[u] = load<T, VEC>(a.weight + ((begin + v + u) / levels * nodes + rows[warp][v + u][0]) * hidden + column);
#pragma unroll
            for (int u = 0; u < AHEAD; ++u) {
              if (v + u >= batch) break;
              A w[VEC];
              row[u].get(w);
#pragma unroll
              for (int i = 0; i < kGroup; ++i) {
                const A c = coefficients[warp][v + u][i];
#pragma unroll
                for (int j = 0; j < VEC; ++j) sum[i][j] = fma(c, w[j], sum[i][j]);
              }
            }
            continue;
          }
          for (int u = v; u < min(batch, v + AHEAD); ++u) {
            const T* tree = a.weight + (begin + u) / levels * nodes * hidden + column;
            Pack<T, VEC> row[kGroup];
#pragma unroll
            for (int i = 0; i < kGroup; ++i) row[i] = load<T, VEC>(tree + rows[warp][u][i] * hidden);
#pragma unroll
            for (int i = 0; i < kGroup; ++i) {
              const A c = coefficients[warp][u][i];
              A w[VEC];
              row[i].get(w);
#pragma unroll
              for (int j = 0; j < VEC; ++j) sum[i][j] = fma(c, w[j], sum[i][j]);
            }
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        const int64_t token = __shfl_sync(kAll, mine, i);
        if (i < count && here) store_once(a.out + token * hidden + column, Pack<T, VEC>::of(sum[i]));
      }
    }
    __syncwarp();
  }
}

// ---- dense: between two matrix products ----------------------------------------------------------------------------------

// A block: a token. A thread: one of its trees at a time; then all write the row.
template <class T> __global__ void __launch_bounds__(kThreads) mask_kernel(Mask m) {
  using A = accumulator_t<T>;
  extern __shared__ __align__(16) char shared[];
  T* row = reinterpret_cast<T*>(shared);  // [width]
  const int64_t token = blockIdx.x, nodes = m.shape.tree_nodes(), trees = m.shape.trees, levels = m.shape.levels();
  T* every = static_cast<T*>(m.every) + token * m.width;
  const T* bias = static_cast<const T*>(m.bias_in);
  for (int64_t i = threadIdx.x; i < m.width; i += blockDim.x) row[i] = from_acc<T>(0);
  __syncthreads();
  for (int64_t tree = threadIdx.x; tree < trees; tree += blockDim.x) {
    int64_t node = 0;
    for (int64_t level = 0; level < levels; ++level) {
      const int64_t at = tree * nodes + node, visit = (token * trees + tree) * levels + level;
      const A z = to_acc(every[at]) + to_acc(bias[at]);
      row[at] = from_acc<T>(act(m.activation, z));
      if (m.path) m.path[visit] = int(node), static_cast<A*>(m.logits)[visit] = z;
      node = 2 * node + 1 + (z > 0);
    }
  }
  __syncthreads();
  for (int64_t i = threadIdx.x; i < m.width; i += blockDim.x) every[i] = row[i];
}

template <class T> const char* run_forward(const Forward& f, Way way, cudaStream_t stream) {
  using A = accumulator_t<T>;
  const Shape& s = f.problem.shape;
  const T *x = static_cast<const T*>(f.x), *in = static_cast<const T*>(f.weight_in), *bias = static_cast<const T*>(f.bias_in),
          *out = static_cast<const T*>(f.weight_out);
  T* y = static_cast<T*>(f.y);
  if (way == Way::gather) {
    if constexpr (sizeof(T) < 8) {
      const Layer<T> layer{s, f.activation, x, in, bias, out, y, f.path, static_cast<A*>(f.logits)};
      const int64_t room = int64_t(f.problem.processors) * kWarps;  // one block on each
      int team = 1;
      while (team < kWarps && team < s.trees && s.tokens * team * 2 <= room * 2) team *= 2;
      const bool ahead = s.tokens * std::min<int64_t>(s.trees, team) <= room;
      const unsigned blocks = unsigned(divide_up(s.tokens, kWarps / team));
      const int shared = team > 1 ? int(kWarps * s.hidden * sizeof(A)) : 0;
      constexpr int VEC = vector_of<T>;
      switch (divide_up(s.hidden, kWarp * VEC)) {
        case 1: gather_kernel<T, 1><<<blocks, kThreads, shared, stream>>>(layer, team, ahead); break;
        case 2: gather_kernel<T, 2><<<blocks, kThreads, shared, stream>>>(layer, team, ahead); break;
        case 3: gather_kernel<T, 3><<<blocks, kThreads, shared, stream>>>(layer, team, ahead); break;
        case 4: gather_kernel<T, 4><<<blocks, kThreads, shared, stream>>>(layer, team, ahead); break;
        default:
          if constexpr (sizeof(T) == 4) {
            if (s.hidden <= 6 * kWarp * VEC) gather_kernel<T, 6><<<blocks, kThreads, shared, stream>>>(layer, team, ahead);
            else gather_kernel<T, 8><<<blocks, kThreads, shared, stream>>>(layer, team, ahead);
          }
      }
    }
    return launched();
  }
  Carve carve{static_cast<char*>(f.workspace)};
  int32_t* path = f.path ? f.path : carve.take<int32_t>(s.tokens * s.walk());
  A* logits = f.path ? static_cast<A*>(f.logits) : carve.take<A>(s.tokens * s.walk());
  const bool vectors = f.problem.aligned && s.hidden % vector_of<T> == 0;
  const int levels = int(s.levels()), processors = f.problem.processors;
  Walk<T> w{s, x, in, bias, path, logits, 0, levels, nullptr, nullptr, nullptr, nullptr, 0};
  const int32_t* order = nullptr;
  if (way == Way::sorted) {
    const int half = levels / 2, bins = 1 << half, leaves = 1 << s.depth;
    int32_t* counts = carve.take<int32_t>(bins + leaves);
    int32_t* offsets = carve.take<int32_t>(leaves);
    w.bin = carve.take<int32_t>(s.tokens);
    w.ticket = carve.take<int32_t>(s.tokens);
    int32_t* places = carve.take<int32_t>(s.tokens);
    cudaMemsetAsync(counts, 0, sizeof(int32_t) * (bins + leaves), stream);
    w.counts = counts, w.end = half;
    walk(w, vectors, processors, stream);
    place_by_ticket(s.tokens, bins, counts, w.bin, w.ticket, offsets, places, stream);
    w.order = order = places, w.counts = counts + bins, w.begin = half, w.end = levels;
    walk(w, vectors, processors, stream);
    place_by_ticket(s.tokens, leaves, counts + bins, w.bin, w.ticket, offsets, places, stream);
  } else {
    walk(w, vectors, processors, stream);
  }
  combine<T>({s, f.activation, out, path, logits, true, order, y}, vectors, processors, stream);
  return launched();
}

}  // namespace

template <class T> void walk_down(const Problem& p, const T* x, const T* weight_in, const T* bias_in, int32_t* path,
                                  accumulator_t<T>* logits, int begin, cudaStream_t stream) {
  const bool vectors = p.aligned && p.shape.hidden % vector_of<T> == 0;
  walk<T>({p.shape, x, weight_in, bias_in, path, logits, begin, int(p.shape.levels()), nullptr, nullptr, nullptr, nullptr, 0}, vectors,
          p.processors, stream);
}
template void walk_down(const Problem&, const bfloat16*, const bfloat16*, const bfloat16*, int32_t*, float*, int, cudaStream_t);
template void walk_down(const Problem&, const float16*, const float16*, const float16*, int32_t*, float*, int, cudaStream_t);

template <class T> void combine(const Combine<T>& c, bool vectors, int processors, cudaStream_t stream) {
  const int64_t groups = divide_up(c.shape.tokens, kGroup);
  const int64_t pieces = divide_up(c.shape.hidden, kWarp * (vectors ? vector_of<T> : 1));
  const int parts = groups >= 32 * processors ? 1 : int(pieces);  // few tokens: more warps
  const int64_t per_block = std::max<int64_t>(kWarps, divide_up(divide_up(groups * parts, 8 * processors), kWarps) * kWarps);
  const unsigned blocks = unsigned(divide_up(groups * parts, per_block));
  if (vectors) combine_kernel<T, vector_of<T>><<<blocks, kThreads, 0, stream>>>(c, groups, parts, per_block);
  else combine_kernel<T, 1><<<blocks, kThreads, 0, stream>>>(c, groups, parts, per_block);
}
template void combine<float>(const Combine<float>&, bool, int, cudaStream_t);
template void combine<double>(const Combine<double>&, bool, int, cudaStream_t);
template void combine<bfloat16>(const Combine<bfloat16>&, bool, int, cudaStream_t);
template void combine<float16>(const Combine<float16>&, bool, int, cudaStream_t);

namespace {

bool serves(const Problem& p, Way way) {
  const Shape& s = p.shape;
  const int64_t vec = p.type == Type::float32 ? 4 : 8;
  switch (way) {
    case Way::gather: return p.type != Type::float64 && p.aligned && s.hidden % vec == 0 && s.hidden <= 1024;
    case Way::sorted: return s.trees == 1 && s.depth >= 3 && s.depth <= 20;
    case Way::tiles: return tiles_serve(p);
    case Way::columns: return columns_serve(p);
    case Way::forest: return forest_serves(p);
    case Way::dense: return s.nodes() * (p.type == Type::float64 ? 8 : p.type == Type::float32 ? 4 : 2) <= 40 * 1024;
    default: return true;
  }
}

}  // namespace

// What was measured on an H200 (float32: on an H100), in microseconds for 131072 tokens of 768 numbers: of gathering and of columns
// for each visit, of a forest for each tree, of dense matrix products for each node; where they start; and what a call costs beside.
// With few tokens (H200, 16 and 64) gathering takes at least kFewVisit a visit and kFewCall beside, dense products `few` and the time in
// which all weights are read, kRead bytes a microsecond.
struct Costs {
  double gather, columns, forest, dense, few;
};
constexpr Costs kHalf{62, 37, 70, 0.56, 20}, kSingle{71, 0, 0, 8.8, 35};
constexpr double kForestStart = 680, kDenseStart = 500, kGatherCall = 15, kColumnsCall = 25, kForestCall = 40, kDenseCall = 20;
constexpr double kFewVisit = 0.12, kFewCall = 8, kRead = 4.15e6;
constexpr double kMargin = 1.25;  // by which dense must be better: it rounds 16-bit logits, and turns elsewhere near ties

Way forward_way(const Problem& p, Way wanted) {
  if (wanted != Way::automatic) return serves(p, wanted) ? wanted : Way::plain;
  const Shape& s = p.shape;
  if (serves(p, Way::tiles) && s.tokens > 4096) return Way::tiles;
  if (p.type == Type::float32 && serves(p, Way::sorted) && s.depth >= 8 && s.tokens >= 32768) return Way::sorted;
  if (p.type == Type::float64) return Way::plain;
  Way best = serves(p, Way::gather) ? Way::gather : Way::plain;
  if (s.trees == 1 && best == Way::gather) return best;
  if (s.tokens < (best == Way::gather ? kFewestMasked : kFew)) return best;  // nobody measured others there
  const Costs& cost = p.type == Type::float32 ? kSingle : kHalf;
  const double share = double(s.tokens) / 131072, scale = share * double(s.hidden) / 768;
  const double walk = double(s.walk()), nodes = double(s.nodes());
  double least = std::max(share, scale) * cost.gather * walk + kGatherCall;  // a visit of fewer numbers takes as long
  if (s.tokens < kFew) least = std::max(least, kFewVisit * walk + kFewCall);
  if (best == Way::plain) least *= 2;  // nobody measured it
  if (s.tokens >= 8192 && serves(p, Way::columns)) {
    const double columns = scale * cost.columns * walk + kColumnsCall;
    if (columns < least) least = columns, best = Way::columns;
  }
  if (s.tokens >= 2048 && serves(p, Way::forest)) {
    const double forest = scale * (kForestStart + cost.forest * double(s.trees)) + kForestCall;
    if (forest < least) least = forest, best = Way::forest;
  }
  double dense = scale * (kDenseStart + cost.dense * nodes) + kDenseCall;
  if (s.tokens < kFew) dense = std::max(dense, cost.few + 2 * nodes * double(s.hidden) * (p.type == Type::float32 ? 4 : 2) / kRead);
  return serves(p, Way::dense) && dense * kMargin < least ? Way::dense : best;
}

// A thread: VEC numbers.
template <class T, int VEC>
__global__ void __launch_bounds__(kThreads) add_bias_kernel(const T* x, const T* bias, T* y, int64_t pieces, int columns) {
  const int64_t i = blockIdx.x * int64_t(kThreads) + threadIdx.x;
  if (i >= pieces) return;
  accumulator_t<T> v[VEC], b[VEC];
  load_once<T, VEC>(x + i * VEC).get(v), load<T, VEC>(bias + i % columns * VEC).get(b);
#pragma unroll
  for (int j = 0; j < VEC; ++j) v[j] += b[j];
  *reinterpret_cast<typename Word<sizeof(T) * VEC>::type*>(y + i * VEC) = Pack<T, VEC>::of(v).word;
}

const char* add_bias(const void* x, const void* bias, void* y, int64_t tokens, int64_t hidden, Type type, cudaStream_t stream) {
  if (tokens * hidden == 0) return nullptr;
  with_type(type, [&](auto t) {
    using T = decltype(t);
    constexpr int VEC = vector_of<T>;
    const T *from = static_cast<const T*>(x), *row = static_cast<const T*>(bias);
    const bool vectors = hidden % VEC == 0 && (reinterpret_cast<uintptr_t>(x) | reinterpret_cast<uintptr_t>(bias) | reinterpret_cast<uintptr_t>(y)) % 16 == 0;
    const int64_t pieces = tokens * hidden / (vectors ? VEC : 1);
    const unsigned blocks = unsigned(divide_up(pieces, kThreads));
    if (vectors) add_bias_kernel<T, VEC><<<blocks, kThreads, 0, stream>>>(from, row, static_cast<T*>(y), pieces, int(hidden / VEC));
    else add_bias_kernel<T, 1><<<blocks, kThreads, 0, stream>>>(from, row, static_cast<T*>(y), pieces, int(hidden));
  });
  return launched();
}

const char* mask(const Mask& m, Type type, cudaStream_t stream) {
  if (m.shape.tokens == 0) return nullptr;
  with_type(type, [&](auto t) {
    using T = decltype(t);
    const int bytes = int(m.width * sizeof(T)), threads = 128;
    allow_shared(mask_kernel<T>, bytes);
    mask_kernel<T><<<unsigned(m.shape.tokens), threads, bytes, stream>>>(m);
  });
  return launched();
}

int64_t forward_workspace(const Problem& p, Way way, bool train) {
  const Shape& s = p.shape;
  if (way == Way::tiles) return tiles_workspace(p);
  if (way == Way::columns) return columns_workspace(p, train);
  if (way == Way::forest) return forest_workspace(p);
  if (way == Way::gather || way == Way::dense) return 0;
  Carve carve{nullptr};
  if (!train) {
    carve.take<int32_t>(s.tokens * s.walk());
    if (p.type == Type::float64) carve.take<double>(s.tokens * s.walk());
    else carve.take<float>(s.tokens * s.walk());
  }
  if (way == Way::sorted) {
    carve.take<int32_t>((int64_t{1} << (s.levels() / 2)) + (int64_t{1} << s.depth));
    carve.take<int32_t>(int64_t{1} << s.depth);
    for (int i = 0; i < 3; ++i) carve.take<int32_t>(s.tokens);
  }
  return carve.used;
}

const char* forward(const Forward& f, Way way, cudaStream_t stream) {
  if (f.problem.shape.tokens == 0) return nullptr;
  if (way == Way::tiles) return tiles_forward(f, stream);
  if (way == Way::columns) return columns_forward(f, stream);
  if (way == Way::forest) return forest_forward(f, stream);
  return with_type(f.problem.type, [&](auto type) { return run_forward<decltype(type)>(f, way, stream); });
}

}  // namespace hf_fff_cuda
