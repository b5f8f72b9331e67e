// The backward pass on tensor cores, for 16-bit numbers and trees of up to 12 levels.
//
// As in the forward pass (tiles.cu) a tree is a top part and subtrees of up to 6 levels, 63 nodes, and products with all rows of a subtree
// and of its ancestors cost less than fetching the rows of each token's path:
//
// 1. order: tokens are sorted by subtree, tree by tree, stably: every sum is made in the same order in every run.
// 2. slopes: tiles of tokens of one subtree. Gains <grad_y, row of weight_out>, at the visited nodes times the activation's slope, are
//    dL/dlogit; of a single tree these, times the rows of weight_in, are grad_x.
// 3. weights: a block takes some columns and a chunk of a subtree's tokens. The nodes' gradients are the product of the visits'
//    coefficients, zeros elsewhere, with x or grad_y. Where a subtree is one chunk they are written at once, else as a part.
// 4. join: adds up the parts, those of all subtrees for the top part, and writes zeros where nobody was.
//
// Coefficients are rounded to the 16-bit type. Unvisited nodes of a token's subtree are multiplied by zero.
#include <algorithm>

#include "cuda/mma.cuh"

namespace hf_fff_cuda {
namespace {

constexpr int kSubLevels = 6, kSubNodes = 63, kTopLevels = 6;
constexpr int kRows = 72;   // of a subtree with its ancestors: 63 + 6, in eights
constexpr int kInner = 80;  // the same in sixteens
constexpr int kPartRows = kSubNodes + kTopLevels;
constexpr int kMostBins = 256;

// The subtrees of all trees, and who is there.
struct Subtrees {
  Shape shape;
  int top;                   // levels above them
  int32_t* order;            // [trees, tokens]: by subtree, otherwise as they came
  uint8_t* leaves;           // the same: the leaf, within the subtree
  int32_t *counts, *starts;  // [trees << top]: how many tokens, and where they begin in their tree's order
  __host__ __device__ int bins() const { return int(shape.trees) << top; }
  __host__ __device__ int sub() const { return int(shape.levels()) - top; }  // levels of a subtree
};

// ---- order ---------------------------------------------------------------------------------------------------------------

constexpr int kSortThreads = 1024, kSegments = 128, kTreeBins = 1 << kTopLevels;

struct Sorting {
  Subtrees to;
  const int32_t* path;
  int32_t* segment_counts;  // [trees << top, segments]
  int segments;
  int64_t per_segment;  // tokens of a block

  __device__ int leaf(int64_t token, int64_t tree) const {
    const Shape& s = to.shape;
    return leaf_of(path[(token * s.trees + tree) * s.levels() + s.depth], int(s.depth));
  }
};

__global__ void __launch_bounds__(kSortThreads) count_kernel(Sorting a) {
  __shared__ int32_t counts[kTreeBins];
  const int bins = 1 << a.to.top, tree = blockIdx.y, below = a.to.sub() - 1;
  if (int(threadIdx.x) < bins) counts[threadIdx.x] = 0;
  __syncthreads();
  const int64_t begin = blockIdx.x * a.per_segment, end = min(a.to.shape.tokens, begin + a.per_segment);
  for (int64_t t = begin + threadIdx.x; t < end; t += kSortThreads) atomicAdd(counts + (a.leaf(t, tree) >> below), 1);
  __syncthreads();
  if (int(threadIdx.x) < bins)
    a.segment_counts[(int64_t(tree) * bins + threadIdx.x) * a.segments + blockIdx.x] = counts[threadIdx.x];
}

__global__ void __launch_bounds__(kSortThreads) place_kernel(Sorting a) {
  constexpr int WARPS = kSortThreads / kWarp, EACH = kSortThreads / kTreeBins;  // threads a bin
  __shared__ int32_t base[kTreeBins], totals[kTreeBins], warps[WARPS][kTreeBins];
  const int bins = 1 << a.to.top, tree = blockIdx.y, below = a.to.sub() - 1, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t tokens = a.to.shape.tokens;
  {
    const int bin = threadIdx.x / EACH, part = threadIdx.x % EACH;
    int before = 0, total = 0;
    if (bin < bins)
      for (int s = part; s < a.segments; s += EACH) {
        const int count = a.segment_counts[(int64_t(tree) * bins + bin) * a.segments + s];
        total += count;
        if (s < int(blockIdx.x)) before += count;
      }
#pragma unroll
    for (int d = EACH / 2; d; d /= 2) before += __shfl_xor_sync(kAll, before, d), total += __shfl_xor_sync(kAll, total, d);
    if (part == 0) base[bin] = before, totals[bin] = total;
  }
  __syncthreads();
  if (warp == 0) {  // a lane: two bins
    const int t0 = totals[2 * lane], t1 = totals[2 * lane + 1];  // zero beyond the last
    int upto = t0 + t1;
    for (int d = 1; d < kWarp; d *= 2) {
      const int other = __shfl_up_sync(kAll, upto, d);
      if (lane >= d) upto += other;
    }
    const int first = upto - t0 - t1;
    base[2 * lane] += first, base[2 * lane + 1] += first + t0;
    if (blockIdx.x == 0) {
      const int at = tree * bins + 2 * lane;
      if (2 * lane < bins) a.to.counts[at] = t0, a.to.starts[at] = first;
      if (2 * lane + 1 < bins) a.to.counts[at + 1] = t1, a.to.starts[at + 1] = first + t0;
    }
  }
  const int64_t begin = blockIdx.x * a.per_segment, end = min(tokens, begin + a.per_segment);
  for (int64_t first = begin; first < end; first += kSortThreads) {
    const int64_t t = first + threadIdx.x;
    const bool here = t < end;
    const int leaf = here ? a.leaf(t, tree) : 0, bin = here ? leaf >> below : -1;
    for (int i = threadIdx.x; i < WARPS * kTreeBins; i += kSortThreads) warps[i / kTreeBins][i % kTreeBins] = 0;
    __syncthreads();
    const unsigned same = __match_any_sync(kAll, bin);
    const int rank = __popc(same & ((1u << lane) - 1));
    if (here && rank == 0) warps[warp][bin] = __popc(same);
    __syncthreads();
    if (int(threadIdx.x) < bins) {
      int at = base[threadIdx.x];
#pragma unroll
      for (int w = 0; w < WARPS; ++w) {
        const int count = warps[w][threadIdx.x];
        warps[w][threadIdx.x] = at;
        at += count;
      }
      base[threadIdx.x] = at;
    }
    __syncthreads();
    if (here) {
      const int64_t to = tree * tokens + warps[warp][bin] + rank;
      a.to.order[to] = int32_t(t);
      a.to.leaves[to] = uint8_t(leaf & ((1 << below) - 1));
    }
    __syncthreads();
  }
}

// ---- pieces of the subtrees' tokens --------------------------------------------------------------------------------------

struct Piece {
  int bin, within, count;  // of all trees' subtrees; its first token there; how many, 0 where there is no such piece
};

__device__ inline int pieces_of(int count, int size) { return (count + size - 1) / size; }

// The subtrees' tokens are cut into pieces of `size`, one subtree after the other. For a whole warp.
__device__ inline Piece piece_of(const int32_t* counts, int bins, int size, int number) {
  const int lane = threadIdx.x % kWarp, each = (bins + kWarp - 1) / kWarp, begin = min(bins, lane * each), end = min(bins, begin + each);
  int own = 0;
  for (int i = begin; i < end; ++i) own += pieces_of(counts[i], size);
  int upto = own;
#pragma unroll
  for (int d = 1; d < kWarp; d *= 2) {
    const int other = __shfl_up_sync(kAll, upto, d);
    if (lane >= d) upto += other;
  }
  Piece p{0, 0, 0};
  const bool here = number >= upto - own && number < upto;
  if (here) {
    int at = number - (upto - own), i = begin;
    while (at >= pieces_of(counts[i], size)) at -= pieces_of(counts[i++], size);
    p = {i, at * size, min(size, counts[i] - at * size)};
  }
  const unsigned who = __ballot_sync(kAll, here);
  const int from = who ? __ffs(who) - 1 : 0;
  p.bin = __shfl_sync(kAll, p.bin, from), p.within = __shfl_sync(kAll, p.within, from), p.count = __shfl_sync(kAll, p.count, from);
  return p;
}

// How many pieces are before those of a subtree. For a whole warp.
__device__ inline int pieces_before(const int32_t* counts, int bin, int size) {
  int sum = 0;
  for (int i = threadIdx.x % kWarp; i < bin; i += kWarp) sum += pieces_of(counts[i], size);
#pragma unroll
  for (int d = kWarp / 2; d; d /= 2) sum += __shfl_xor_sync(kAll, sum, d);
  return sum;
}

// The node of row r < kSubNodes below a root, within its tree; -1: the subtree has fewer levels.
__device__ inline int node_below(int root, int r, int sub) {
  const int level = 31 - __clz(r + 1);
  return level < sub ? ((root + 1) << level) - 1 + r + 1 - (1 << level) : -1;
}
// The row of the node that a leaf of the subtree has above it, at a level of the tree.
__device__ inline int row_above(int leaf, int level, int top, int sub) {
  const int down = level - top;
  return down < 0 ? kSubNodes + level : (1 << down) - 1 + (leaf >> (sub - 1 - down));
}

// ---- slopes --------------------------------------------------------------------------------------------------------------

template <class T> struct Slopes {
  Subtrees at;
  Activation activation;
  const T *grad_y, *weight_in, *weight_out;
  const float *logits, *extra;  // extra or null
  float* slopes;                // [tokens, trees, levels], or null
  T *into_logits, *values;      // [trees, levels, tokens], in order: dL/dlogit and activation of each visit; or null
  void* grad_x;                 // of a single tree, or null
};

template <int M> constexpr int kSlopesShared = M == 1 ? 69888 : 109056;  // bytes, of which the kernel makes sure

template <class T, class G, int M> __global__ void __launch_bounds__(128) tile_slopes_kernel(Slopes<T> a) {
  constexpr int WARPS = 4, TOKENS = WARPS * M * 16, STRIDE = kRows + 1, COEFFICIENTS = kCoefficientsRow<kInner>;
  // Second phase, in the memory of the first one's stages: gains, coefficients, a warp's outputs, stages of weight_in.
  constexpr int AT_COEFFICIENTS = (TOKENS * STRIDE * 4 + 127) / 128 * 128;
  constexpr int AT_OUTPUT = AT_COEFFICIENTS + TOKENS * COEFFICIENTS * 2, AT_STAGES = AT_OUTPUT + TOKENS * kOutputRow * 2;
  constexpr int STAGE = kInner * 128, STAGES = 3;
  static_assert(AT_OUTPUT % 16 == 0 && AT_STAGES % 128 == 0 && AT_STAGES + STAGES * STAGE <= kSlopesShared<M>);
  static_assert(kStages * (TOKENS + kRows) * 128 <= kSlopesShared<M>);
  extern __shared__ __align__(128) char memory[];
  __shared__ int tokens[TOKENS], rows[kInner];
  __shared__ uint8_t leaves[TOKENS];
  __shared__ Piece piece;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  if (warp == 0) {
    const Piece found = piece_of(a.at.counts, a.at.bins(), TOKENS, int(blockIdx.x));
    if (lane == 0) piece = found;
  }
  __syncthreads();
  const int bin = piece.bin, count = piece.count;
  if (count == 0) return;
  const Shape& s = a.at.shape;
  const int top = a.at.top, sub = a.at.sub(), levels = int(s.levels()), trees = int(s.trees), hidden = int(s.hidden);
  const int tree = bin >> top, root = (1 << top) - 1 + (bin & ((1 << top) - 1)), first_row = tree * int(s.tree_nodes());
  const int64_t first = a.at.starts[bin] + piece.within;  // in the tree's order
  for (int i = threadIdx.x; i < TOKENS; i += 128) {
    tokens[i] = i < count ? a.at.order[tree * s.tokens + first + i] : -1;
    leaves[i] = i < count ? a.at.leaves[tree * s.tokens + first + i] : 0;
  }
  for (int i = threadIdx.x; i < kInner; i += 128) {
    int node = -1;
    if (i < kSubNodes) node = node_below(root, i, sub);
    else if (i - kSubNodes < top) node = ((root + 1) >> (top - (i - kSubNodes))) - 1;
    rows[i] = node < 0 ? -1 : first_row + node;
  }
  __syncthreads();
  const uint32_t shared = uint32_t(__cvta_generic_to_shared(memory));
  {
    float sums[M][kRows / 8][4];
    products<T, WARPS, M, kRows>(sums, shared, a.grad_y, a.weight_out, hidden, tokens, rows);
    spill<M, kRows, STRIDE>(sums, reinterpret_cast<float*>(memory));
  }
  const int chunks = a.grad_x ? hidden / kColumns : 0;
  const auto begin = [&](int chunk) {
    if (chunk < chunks)
      fetch<kInner, 128>(shared + AT_STAGES + chunk % STAGES * STAGE, reinterpret_cast<const char*>(a.weight_in),
                         int64_t(hidden) * sizeof(T), rows, chunk);
    copies_end_group();
  };
  for (int c = 0; c < STAGES - 1; ++c) begin(c);
  uint4* zeros = reinterpret_cast<uint4*>(memory + AT_COEFFICIENTS);
  for (int i = threadIdx.x; i < TOKENS * COEFFICIENTS * 2 / 16; i += 128) zeros[i] = make_uint4(0, 0, 0, 0);
  __syncthreads();
  for (int i = threadIdx.x; i < TOKENS * levels; i += 128) {
    const int t = i % TOKENS, level = i / TOKENS;
    if (t >= count) continue;
    const int row = row_above(leaves[t], level, top, sub);
    const int64_t visit = (int64_t(tokens[t]) * trees + tree) * levels + level;
    const float z = a.logits[visit], gain = reinterpret_cast<const float*>(memory)[t * STRIDE + row];
    const float slope = gain * act_slope(a.activation, z) + (a.extra ? a.extra[visit] : 0);
    const T rounded = from_acc<T>(slope);
    if (a.slopes) a.slopes[visit] = slope;
    if (a.into_logits) {
      const int64_t to = (int64_t(tree) * levels + level) * s.tokens + first + t;
      a.into_logits[to] = rounded;
      a.values[to] = from_acc<T>(act(a.activation, z));
    }
    reinterpret_cast<T*>(memory + AT_COEFFICIENTS)[t * COEFFICIENTS + row] = rounded;
  }
  if (!a.grad_x) return;
  __syncthreads();
  outputs<T, M, kInner, STAGES>(shared + AT_COEFFICIENTS, shared + AT_STAGES, memory + AT_OUTPUT + warp * M * 16 * kOutputRow * 2, tokens,
                                static_cast<G*>(a.grad_x), hidden, begin);
}

// ---- weights -------------------------------------------------------------------------------------------------------------

constexpr int kTile = 64;   // tokens of a stage
constexpr int kWide = 128;  // columns of a block
constexpr int kWeightStages = 3, kWeightStage = kTile * kWide * 2, kCoefficientsStride = kInner + 8;
constexpr int kCoefficients = kTile * kCoefficientsStride * 2;  // bytes
constexpr int kWeightsShared = kWeightStages * kWeightStage + 2 * kCoefficients;

template <class T> struct Weights {
  Subtrees at;
  int per_chunk;                             // tokens, a multiple of kTile
  const T *x, *grad_y, *into_logits, *values;
  float* parts;                              // [chunks, kPartRows, 2, hidden]: of weight_in, weight_out
  float* bias_parts;                         // [chunks, kPartRows]
  void *into_in, *into_bias, *into_out;
};

template <class T, class G> __global__ void __launch_bounds__(128, 3) weights_kernel(Weights<T> a) {
  constexpr int MT = kInner / 16, NT = 4, LEVELS = (kSubLevels + kTopLevels) / 2;
  extern __shared__ __align__(128) char memory[];  // stages of rows, then twice the coefficients
  __shared__ Piece piece;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  if (warp == 0) {
    const Piece found = piece_of(a.at.counts, a.at.bins(), a.per_chunk, int(blockIdx.x));
    if (lane == 0) piece = found;
  }
  __syncthreads();
  const int bin = piece.bin, count = piece.count;
  if (count == 0) return;
  const Shape& s = a.at.shape;
  const int top = a.at.top, sub = a.at.sub(), levels = int(s.levels()), hidden = int(s.hidden), tree = bin >> top;
  const bool out = blockIdx.z;
  const int column0 = int(blockIdx.y) * kWide, tiles = (count + kTile - 1) / kTile;
  const int64_t first = a.at.starts[bin] + piece.within;
  const int32_t* order = a.at.order + tree * s.tokens + first;
  const uint8_t* leaves = a.at.leaves + tree * s.tokens + first;
  const unsigned short* given = reinterpret_cast<const unsigned short*>(out ? a.values : a.into_logits) + int64_t(tree) * levels * s.tokens + first;
  const uint32_t shared = uint32_t(__cvta_generic_to_shared(memory));
  char* coefficients = memory + kWeightStages * kWeightStage;

  // Rows of x or grad_y: a thread copies one piece of 16 bytes of every eighth row.
  const int piece16 = threadIdx.x % 16, row0 = threadIdx.x / 16;
  const bool column_here = column0 + piece16 * 8 < hidden;
  const T* column = (out ? a.grad_y : a.x) + (column_here ? column0 + piece16 * 8 : 0);
  int ids[kTile / 8];
  const auto read_ids = [&](int tile) {
#pragma unroll
    for (int j = 0; j < kTile / 8; ++j) {
      const int at = tile * kTile + j * 8 + row0;
      ids[j] = at < count ? order[at] : -1;
    }
  };
  const auto begin = [&](int tile) {
    if (tile < tiles) {
      const uint32_t stage = shared + tile % kWeightStages * kWeightStage + piece16 / 8 * (kTile * 128);
#pragma unroll
      for (int j = 0; j < kTile / 8; ++j)
        copy_16(piece_at(stage, j * 8 + row0, piece16 % 8), column + int64_t(max(ids[j], 0)) * hidden, ids[j] >= 0 && column_here);
    }
    copies_end_group();
  };
  // Coefficients: a thread has every second level of one token. What it wrote into a buffer before it clears itself.
  const int own = threadIdx.x % kTile, level0 = threadIdx.x / kTile;
  unsigned short value[LEVELS];
  int leaf = 0, leaf_before[2] = {0, 0};
  const auto read_coefficients = [&](int tile) {
    const int at = tile * kTile + own;
    const bool here = at < count;
    leaf = here ? leaves[at] : 0;
#pragma unroll
    for (int j = 0; j < LEVELS; ++j) {
      const int level = level0 + 2 * j;
      value[j] = here && level < levels ? given[level * s.tokens + at] : 0;
    }
  };
  const auto write_coefficients = [&](int buffer) {
    unsigned short* row = reinterpret_cast<unsigned short*>(coefficients + buffer * kCoefficients) + own * kCoefficientsStride;
#pragma unroll
    for (int j = 0; j < LEVELS; ++j) {
      const int level = level0 + 2 * j;
      if (level >= levels) continue;
      const int before = row_above(buffer ? leaf_before[1] : leaf_before[0], level, top, sub), now = row_above(leaf, level, top, sub);
      if (before != now) row[before] = 0;
      row[now] = value[j];
    }
    (buffer ? leaf_before[1] : leaf_before[0]) = leaf;
  };

  read_ids(0), begin(0), read_ids(1), begin(1), read_ids(2);
  read_coefficients(0);
  uint4* zeros = reinterpret_cast<uint4*>(coefficients);
  for (int i = threadIdx.x; i < 2 * kCoefficients / 16; i += 128) zeros[i] = make_uint4(0, 0, 0, 0);
  __syncthreads();
  write_coefficients(0);
  read_coefficients(1);
  float sums[MT][NT][4] = {}, bias[MT][4] = {};
  const bool bias_here = blockIdx.y == 0 && !out && warp == 0;
  const float one_and_one[2] = {1, 1};
  const uint32_t ones = Pack<T, 2>::of(one_and_one).word;
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    copies_wait<kWeightStages - 2>();
    __syncthreads();  // rows and coefficients of this tile are there, and nobody reads what is written next
    begin(tile + kWeightStages - 1);
    read_ids(tile + kWeightStages);
    write_coefficients((tile + 1) % 2);
    read_coefficients(tile + 2);
    const uint32_t stage = shared + tile % kWeightStages * kWeightStage + warp / 2 * (kTile * 128);
    const uint32_t here = shared + kWeightStages * kWeightStage + tile % 2 * kCoefficients;
#pragma unroll
    for (int k = 0; k < kTile / 16; ++k) {
      uint32_t b[NT / 2][4];
#pragma unroll
      for (int n = 0; n < NT / 2; ++n)
        matrices_4_transposed(b[n], piece_at(stage, k * 16 + lane % 16, warp % 2 * NT + n * 2 + lane / 16));
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        uint32_t c[4];
        matrices_4_transposed(c, here + (k * 16 + lane / 16 * 8 + lane % 8) * kCoefficientsStride * 2 + (m * 2 + lane / 8 % 2) * 16);
#pragma unroll
        for (int n = 0; n < NT; ++n) multiply(sums[m][n], c, b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1], T());
        if (bias_here) multiply(bias[m], c, ones, ones, T());
      }
    }
  }
  copies_wait<0>();
  const int root = (1 << top) - 1 + (bin & ((1 << top) - 1));
  const int64_t first_row = int64_t(tree) * s.tree_nodes();
  const bool alone = a.at.counts[bin] <= a.per_chunk;
  G* into = static_cast<G*>(out ? a.into_out : a.into_in);
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const int r = m * 16 + lane / 4 + i * 4;
      const int node = r < kSubNodes ? node_below(root, r, sub) : -1;
      if (node < 0 && (r < kSubNodes || r - kSubNodes >= top)) continue;
      const bool whole = node >= 0 && alone;
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        const int at = column0 + warp * 32 + n * 8 + lane % 4 * 2;
        if (at >= hidden) continue;
        if (whole) store_pair(into + (first_row + node) * hidden + at, sums[m][n][i], sums[m][n][i + 1]);
        else store_pair(a.parts + ((int64_t(blockIdx.x) * kPartRows + r) * 2 + out) * hidden + at, sums[m][n][i], sums[m][n][i + 1]);
      }
      if (bias_here && lane % 4 == 0) {
        if (whole) static_cast<G*>(a.into_bias)[first_row + node] = from_acc<G>(bias[m][i]);
        else a.bias_parts[int64_t(blockIdx.x) * kPartRows + r] = bias[m][i];
      }
    }
}

constexpr int kJoinThreads = 128, kJoinRows = 8, kJoinColumns = kJoinThreads * 4;

// Blocks: eight rows of a subtree that is no single chunk; and a node of the top part, of which every subtree below has parts.
template <class T, class G> __global__ void __launch_bounds__(kJoinThreads) join_parts_kernel(Weights<T> a) {
  const Shape& s = a.at.shape;
  const int top = a.at.top, bins = a.at.bins(), tree_bins = 1 << top, hidden = int(s.hidden), lane = threadIdx.x % kWarp;
  const int eighths = (kSubNodes + kJoinRows - 1) / kJoinRows;
  int tree, begin, end, row0, rows = 1;
  int64_t node = 0;
  const int index = int(blockIdx.x) - bins * eighths;
  const bool below = index < 0;
  if (below) {
    const int bin = blockIdx.x / eighths, number = pieces_of(a.at.counts[bin], a.per_chunk);
    if (number == 1) return;
    tree = bin / tree_bins;
    begin = number ? pieces_before(a.at.counts, bin, a.per_chunk) : 0, end = begin + number;
    row0 = int(blockIdx.x) % eighths * kJoinRows, rows = min(kJoinRows, kSubNodes - row0);
    node = tree_bins - 1 + bin % tree_bins;  // the root
  } else {
    tree = index / (tree_bins - 1);
    node = index % (tree_bins - 1);
    const int level = 31 - __clz(int(node) + 1), place = int(node) + 1 - (1 << level);
    const int bin = tree * tree_bins + (place << (top - level));
    begin = pieces_before(a.at.counts, bin, a.per_chunk);
    end = pieces_before(a.at.counts, bin + (1 << (top - level)), a.per_chunk);
    row0 = kSubNodes + level;
  }
  const int64_t first_row = tree * s.tree_nodes();
  const int element = int(blockIdx.y) * kJoinColumns + threadIdx.x * 4;  // of a row of weight_in and one of weight_out
  for (int r = 0; r < rows; ++r) {
    const int64_t to = below ? node_below(int(node), row0 + r, a.at.sub()) : node;
    if (to < 0) break;
    if (element < 2 * hidden) {
      float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 8
      for (int c = begin; c < end; ++c) {
        const float4 part = __ldcs(reinterpret_cast<const float4*>(a.parts + (int64_t(c) * kPartRows + row0 + r) * 2 * hidden + element));
        sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
      }
      G* into = static_cast<G*>(element < hidden ? a.into_in : a.into_out) + (first_row + to) * hidden + element % hidden;
      store_pair(into, sum.x, sum.y), store_pair(into + 2, sum.z, sum.w);
    }
    if (blockIdx.y == 0 && threadIdx.x < kWarp) {
      float sum = 0;
      for (int c = begin + lane; c < end; c += kWarp) sum += a.bias_parts[int64_t(c) * kPartRows + row0 + r];
      sum = warp_sum(sum);
      if (lane == 0) static_cast<G*>(a.into_bias)[first_row + to] = from_acc<G>(sum);
    }
  }
}

// ---- all of it -----------------------------------------------------------------------------------------------------------

struct Parts {
  Subtrees at;
  int32_t* segment_counts;
  int segments;
  int64_t per_segment;
  void *slopes, *into_logits, *values;
  int per_chunk, chunks;
  float *parts, *bias_parts;
  int64_t used;
};

Parts parts_of(const Problem& p, bool x, bool weights, void* workspace) {
  const Shape& s = p.shape;
  Carve carve{static_cast<char*>(workspace)};
  Parts r{};
  r.at.shape = s;
  r.at.top = s.levels() > kSubLevels ? int(s.levels()) - kSubLevels : 0;
  const int64_t places = s.trees * s.tokens, bins = r.at.bins();
  r.at.order = carve.take<int32_t>(places);
  r.at.leaves = carve.take<uint8_t>(places);
  r.at.counts = carve.take<int32_t>(bins);
  r.at.starts = carve.take<int32_t>(bins);
  r.segments = int(std::clamp<int64_t>(divide_up(s.tokens, kSortThreads), 1, kSegments));
  r.per_segment = divide_up(divide_up(s.tokens, r.segments), kSortThreads) * kSortThreads;
  r.segment_counts = carve.take<int32_t>(bins * r.segments);
  if (x && s.trees > 1) r.slopes = carve.take<float>(places * s.levels());
  if (weights) {
    r.into_logits = carve.take<char>(2 * places * s.levels());
    r.values = carve.take<char>(2 * places * s.levels());
    // A chunk is a subtree that has a quarter more tokens than the mean of 64: few subtrees are cut where they are even, and where they
    // are not, there are still enough blocks.
    r.per_chunk = int(divide_up(std::max<int64_t>(1, places * 5 / 4 / 64), kTile) * kTile);
    r.chunks = int(places / r.per_chunk + bins);
    r.parts = carve.take<float>(int64_t(r.chunks) * kPartRows * 2 * s.hidden);
    r.bias_parts = carve.take<float>(int64_t(r.chunks) * kPartRows);
  }
  r.used = carve.used;
  return r;
}

template <class T, class G> void slopes(const Slopes<T>& a, const Problem& p, cudaStream_t stream) {
  const int64_t places = p.shape.trees * p.shape.tokens, bins = a.at.bins();
  // Tiles of 64 tokens where there are few of them, or little shared memory. The last one of each subtree is not full.
  if (places < int64_t{64} * 4 * p.processors || shared_kb(p.capability) * 1024 < kSlopesShared<2> + 2048) {
    allow_shared(tile_slopes_kernel<T, G, 1>, kSlopesShared<1>);
    tile_slopes_kernel<T, G, 1><<<unsigned(places / 64 + bins), 128, kSlopesShared<1>, stream>>>(a);
  } else {
    allow_shared(tile_slopes_kernel<T, G, 2>, kSlopesShared<2>);
    tile_slopes_kernel<T, G, 2><<<unsigned(places / 128 + bins), 128, kSlopesShared<2>, stream>>>(a);
  }
}

template <class T, class G> void weights(const Weights<T>& a, int chunks, cudaStream_t stream) {
  const Shape& s = a.at.shape;
  allow_shared(weights_kernel<T, G>, kWeightsShared);
  weights_kernel<T, G><<<dim3{unsigned(chunks), unsigned(divide_up(s.hidden, kWide)), 2}, 128, kWeightsShared, stream>>>(a);
  const int eighths = (kSubNodes + kJoinRows - 1) / kJoinRows;
  const unsigned joined = unsigned(a.at.bins() * eighths + s.trees * ((1 << a.at.top) - 1));
  join_parts_kernel<T, G><<<dim3{joined, unsigned(divide_up(2 * s.hidden, kJoinColumns))}, kJoinThreads, 0, stream>>>(a);
}

template <class T> const char* run(const Backward& b, cudaStream_t stream) {
  const Shape& s = b.problem.shape;
  const Parts p = parts_of(b.problem, b.grad_x, b.grad_weight_in, b.workspace);
  const T *g = static_cast<const T*>(b.grad_y), *x = static_cast<const T*>(b.x), *in = static_cast<const T*>(b.weight_in),
          *out = static_cast<const T*>(b.weight_out);
  const Sorting sorting{p.at, b.path, p.segment_counts, p.segments, p.per_segment};
  const dim3 sorters{unsigned(p.segments), unsigned(s.trees)};
  count_kernel<<<sorters, kSortThreads, 0, stream>>>(sorting);
  place_kernel<<<sorters, kSortThreads, 0, stream>>>(sorting);

  float* slope = static_cast<float*>(p.slopes);
  T *into_logits = static_cast<T*>(p.into_logits), *values = static_cast<T*>(p.values);
  const Slopes<T> a{p.at, b.activation, g, in, out, static_cast<const float*>(b.logits), static_cast<const float*>(b.extra), slope,
                    into_logits, values, s.trees == 1 ? b.grad_x : nullptr};
  if (b.wide_x) slopes<T, float>(a, b.problem, stream);
  else slopes<T, T>(a, b.problem, stream);
  if (b.grad_x && s.trees > 1)
    combine<T>({s, b.activation, in, b.path, slope, false, p.at.order, static_cast<T*>(b.grad_x)}, true, b.problem.processors, stream);
  if (!b.grad_weight_in) return launched();

  const Weights<T> w{p.at, p.per_chunk, x, g, into_logits, values, p.parts, p.bias_parts, b.grad_weight_in, b.grad_bias_in, b.grad_weight_out};
  if (b.wide_weights) weights<T, float>(w, p.chunks, stream);
  else weights<T, T>(w, p.chunks, stream);
  return launched();
}

}  // namespace

bool backward_tiles_serve(const Problem& p) {
  const Shape& s = p.shape;
  const int64_t top = s.levels() > kSubLevels ? s.levels() - kSubLevels : 0;
  return (p.type == Type::bfloat16 || p.type == Type::float16) && p.capability >= 80 && p.aligned && s.hidden % kColumns == 0 &&
         s.tokens > 0 && top <= kTopLevels && (s.trees << top) <= kMostBins;
}

int64_t backward_tiles_workspace(const Problem& p, bool x, bool weights) { return parts_of(p, x, weights, nullptr).used; }

const char* backward_tiles(const Backward& b, cudaStream_t stream) {
  return b.problem.type == Type::bfloat16 ? run<bfloat16>(b, stream) : run<float16>(b, stream);
}

}  // namespace hf_fff_cuda
