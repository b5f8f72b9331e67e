// The forward pass of one deep tree on tensor cores, for 16-bit numbers.
//
// A tree of up to 12 levels is a top part and subtrees of up to 6 levels, 63 nodes. Either part is small enough that all its
// nodes times all its tokens, as a matrix product, cost less than fetching the rows of each token's path:
//
// 1. top: logits of the top part for tiles of tokens; each token walks down in them and draws a ticket
//    at its subtree: its place in the list of the tokens there.
// 2. subtree: tiles of tokens of one subtree. Logits of its nodes and of their ancestors, which the whole tile shares; each token
//    walks down; the coefficients of the visited nodes, zeros elsewhere, times the rows of weight_out are the outputs.
//
// Every x is read twice, every y written once, and nothing else is as large. Coefficients are rounded to the 16-bit type.
#include <algorithm>

#include "cuda/mma.cuh"

namespace hf_fff_cuda {
namespace {

constexpr int kSubLevels = 6, kSubNodes = 63, kTopLevels = 6;
constexpr int kRows = 72;             // of a subtree with its ancestors: 63 + 6, in eights
constexpr int kInner = 80;            // the same in sixteens
constexpr int kBins = 1 << kTopLevels;
constexpr int kSubStage = kInner * 128, kSubStages = 3;  // of the second phase

// Shared memory of the second kernel. Second phase, in the memory of the first one's stages: logits, coefficients, outputs on their way, stages
// of weight_out.
template <int TOKENS> struct SubMemory {
  static constexpr int STRIDE = kRows + 1;  // of logits
  static constexpr int COEFFICIENTS = (TOKENS * STRIDE * 4 + 127) / 128 * 128, OUTPUT = COEFFICIENTS + TOKENS * kCoefficientsRow<kInner> * 2;
  static constexpr int STAGES = OUTPUT + TOKENS * kOutputRow * 2;
  static constexpr int BYTES = std::max(STAGES + kSubStages * kSubStage, kStages * (TOKENS + kRows) * 128);
  static_assert(OUTPUT % 16 == 0 && STAGES % 128 == 0);
};

template <class T> struct Top {
  int tokens, hidden, levels;  // of the top part
  const T *x, *weight, *bias;
  int32_t *counts, *order;         // or null: how many tokens went to each subtree, and which, [subtrees, tokens]
  Shape shape;                     // without them: the path and the logits are wanted, of all trees
  int32_t* path;
  float* logits;
};

// A tile: WARPS times M times 16 tokens.
template <class T, int WARPS, int M> __global__ void __launch_bounds__(WARPS * 32) top_kernel(Top<T> a) {
  constexpr int TOKENS = WARPS * M * 16, STRIDE = kBins + 1;
  extern __shared__ __align__(128) char memory[];
  __shared__ int tokens[TOKENS], rows[kBins], drawn[kBins];
  __shared__ float bias[kBins];
  let_next_begin();
  const int tree = blockIdx.x % a.shape.trees, first = int(blockIdx.x / a.shape.trees) * TOKENS, nodes = (1 << a.levels) - 1;
  const int64_t root = tree * a.shape.tree_nodes();
  for (int i = threadIdx.x; i < TOKENS; i += WARPS * 32) tokens[i] = first + i < a.tokens ? first + i : -1;
  for (int i = threadIdx.x; i < kBins; i += WARPS * 32) {
    rows[i] = i < nodes ? i : -1;
    bias[i] = i < nodes ? to_acc(a.bias[root + i]) : 0;
    drawn[i] = 0;
  }
  __syncthreads();
  float sums[M][kBins / 8][4];
  products<T, WARPS, M, kBins>(sums, uint32_t(__cvta_generic_to_shared(memory)), a.x, a.weight + root * a.hidden, a.hidden, tokens, rows);
  float* logits = reinterpret_cast<float*>(memory);
  spill<M, kBins, STRIDE>(sums, logits);
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
  wait_for_previous();  // which sets the counts to zero
  for (int i = threadIdx.x; i < kBins; i += WARPS * 32)
    if (const int count = drawn[i]) drawn[i] = atomicAdd(a.counts + i, count);  // its first ticket
  __syncthreads();
  if (walks) a.order[int64_t(bin) * a.tokens + drawn[bin] + number] = first + t;
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

template <class T, int M> __global__ void __launch_bounds__(128) subtree_kernel(Sub<T> a) {
  constexpr int WARPS = 4, TOKENS = WARPS * M * 16, THREADS = WARPS * 32;
  using Memory = SubMemory<TOKENS>;
  extern __shared__ __align__(128) char memory[];
  __shared__ int tokens[TOKENS], rows[kInner], place[3];  // place: subtree, first of its tokens, how many
  __shared__ float bias[kRows];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  wait_for_previous();
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
    int tiles = t0 + t1;
    for (int d = 1; d < 32; d *= 2) {
      const int other = __shfl_up_sync(kAll, tiles, d);
      if (lane >= d) tiles += other;
    }
    const int tile = int(blockIdx.x) - (tiles - t0 - t1);
    if (tile >= 0 && tile < t0 + t1) {
      const bool second = tile >= t0;
      const int within = (second ? tile - t0 : tile) * TOKENS;
      place[0] = 2 * lane + second;
      place[1] = within;
      place[2] = min(TOKENS, (second ? c1 : c0) - within);
    }
  }
  __syncthreads();
  const int start = place[1], count = place[2];
  if (count <= 0) return;
  const int root = (1 << a.top) - 1 + place[0], sub = a.levels - a.top;
  const int32_t* order = a.order ? a.order + int64_t(place[0]) * a.tokens : nullptr;
  for (int i = threadIdx.x; i < TOKENS; i += THREADS) tokens[i] = i < count ? (order ? order[start + i] : start + i) : -1;
  for (int i = threadIdx.x; i < kInner; i += THREADS) {
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
    float sums[M][kRows / 8][4];
    products<T, WARPS, M, kRows>(sums, shared, a.x, a.weight_in, a.hidden, tokens, rows);
    spill<M, kRows, Memory::STRIDE>(sums, reinterpret_cast<float*>(memory));
  }
  const int chunks = a.hidden / kColumns;
  const auto begin = [&](int chunk) {
    if (chunk < chunks)
      fetch<kInner, THREADS>(shared + Memory::STAGES + chunk % kSubStages * kSubStage, reinterpret_cast<const char*>(a.weight_out),
                         int64_t(a.hidden) * sizeof(T), rows, chunk);
    copies_end_group();
  };
  for (int c = 0; c < kSubStages - 1; ++c) begin(c);
  uint4* zeros = reinterpret_cast<uint4*>(memory + Memory::COEFFICIENTS);
  for (int i = threadIdx.x; i < TOKENS * kCoefficientsRow<kInner> * 2 / 16; i += THREADS) zeros[i] = make_uint4(0, 0, 0, 0);
  __syncthreads();
  if (int(threadIdx.x) < count) {
    const float* logits = reinterpret_cast<const float*>(memory) + threadIdx.x * Memory::STRIDE;
    T* coefficients = reinterpret_cast<T*>(memory + Memory::COEFFICIENTS) + threadIdx.x * kCoefficientsRow<kInner>;
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
  outputs<T, M, kInner, kSubStages>(shared + Memory::COEFFICIENTS, shared + Memory::STAGES,
                                    memory + Memory::OUTPUT + warp * M * 16 * kOutputRow * 2, tokens, a.y, a.hidden, begin);
}

// Up to so many tokens a multiprocessor tiles are small; larger ones share what is read of the weights. Measured on an H200.
constexpr int64_t kTopSmall = 88, kTopMiddle = 350, kSubSmall = 700;
bool large_serve(const Problem& p) { return shared_kb(p.capability) * 1024 >= SubMemory<128>::BYTES + 2048; }

template <class T, int WARPS, int M> void launch_top(const Top<T>& a, bool early, cudaStream_t stream) {
  constexpr int TOKENS = WARPS * M * 16;
  launch_early(top_kernel<T, WARPS, M>, unsigned(divide_up(a.tokens, TOKENS) * a.shape.trees), WARPS * 32, kStages * (TOKENS + kBins) * 128, early,
               stream, a);
}
template <class T> void top_part(const Top<T>& a, const Problem& p, cudaStream_t stream) {
  const bool early = a.counts && p.capability >= 90;  // behind `zero_counts`
  const int64_t tokens = a.tokens * a.shape.trees;
  if (tokens <= kTopSmall * p.processors || !large_serve(p)) launch_top<T, 4, 1>(a, early, stream);
  else if (tokens <= kTopMiddle * p.processors) launch_top<T, 8, 1>(a, early, stream);
  else launch_top<T, 4, 2>(a, early, stream);
}

template <class T, int M> void launch_subtrees(const Sub<T>& a, bool early, cudaStream_t stream) {
  constexpr int TOKENS = 4 * M * 16;
  const int64_t more = a.top ? 1 << a.top : 0;  // the last tile of each subtree is not full
  launch_early(subtree_kernel<T, M>, unsigned(divide_up(a.tokens, TOKENS) + more), 128, SubMemory<TOKENS>::BYTES, early, stream, a);
}
template <class T> void subtrees(const Sub<T>& a, const Problem& p, cudaStream_t stream) {
  if (a.tokens <= kSubSmall * p.processors || !large_serve(p)) launch_subtrees<T, 1>(a, p.capability >= 90, stream);
  else launch_subtrees<T, 2>(a, p.capability >= 90, stream);
}

struct Parts {
  int32_t *counts, *order;
  int64_t used;
};
Parts parts_of(const Shape& s, void* workspace) {
  Carve carve{static_cast<char*>(workspace)};
  Parts p{};
  if (s.levels() > kSubLevels) {
    p.counts = carve.take<int32_t>(kBins);
    p.order = carve.take<int32_t>(s.tokens << (s.levels() - kSubLevels));
  }
  p.used = carve.used;
  return p;
}

template <class T> const char* run(const Forward& f, cudaStream_t stream) {
  const Shape& s = f.problem.shape;
  const int tokens = int(s.tokens), hidden = int(s.hidden), levels = int(s.levels()), top = levels > kSubLevels ? levels - kSubLevels : 0;
  const T *x = static_cast<const T*>(f.x), *in = static_cast<const T*>(f.weight_in), *bias = static_cast<const T*>(f.bias_in);
  const Parts p = parts_of(s, f.workspace);
  if (top) {
    zero_counts(p.counts, kBins, stream);
    top_part<T>({tokens, hidden, top, x, in, bias, p.counts, p.order, s, nullptr, nullptr}, f.problem, stream);
  }
  const Sub<T> a{tokens, hidden, levels, top, f.activation, x, in, bias, static_cast<const T*>(f.weight_out), static_cast<T*>(f.y),
                 f.path, static_cast<float*>(f.logits), p.counts, p.order};
  subtrees(a, f.problem, stream);
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
  top_part<T>({int(p.shape.tokens), int(p.shape.hidden), top_levels(p), x, weight, bias, nullptr, nullptr, p.shape, path, logits}, p,
              stream);
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
