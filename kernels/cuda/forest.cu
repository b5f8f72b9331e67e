// The forward pass of several trees over many tokens, on tensor cores, for 16-bit numbers.
//
// All levels but the last four, at most 256 nodes of all trees together, are a small dense layer: more than half of the visits. Below
// are subtrees of 15 nodes, at most 256 of all trees.
//
// 1. upper: tiles of tokens. Logits of all upper nodes; each token walks down in them, in every tree; the coefficients of the
//    visited nodes, zeros elsewhere, times the rows of weight_out are the first part of the outputs. In every tree a token
//    draws a ticket at its subtree: its place in the list of the tokens there.
// 2. lower: tiles of tokens of one subtree. Logits of its nodes, the rest of the walk, and a list of the visits, 4 bytes each.
// 3. sums: a multiprocessor keeps 16 columns of *all* lower rows of weight_out in shared memory, and adds those that a token visited
//    to the first part.
//
// The second kernel reads x once for every tree. So tokens are sorted within chunks, and a chunk's tiles follow each other: its x stays in
// the second-level cache.
#include <algorithm>
#include <numeric>

#include "cuda/mma.cuh"

namespace hf_fff_cuda {
namespace {

constexpr int kLower = 4, kLowerNodes = 15;  // levels and nodes of a subtree
constexpr int kUpper = 256;                  // upper nodes, with one more for each tree; and subtrees
constexpr int kShared = 222 * 1024;          // bytes, of the 227 KB that a block may have
constexpr int kChunk = 16384;                // tokens that are sorted together, at most
constexpr int kSlice = 16;                   // columns that a multiprocessor sums up: two words of 16 bytes

template <class T> struct Forest {
  Shape shape;
  Activation activation;
  int upper, chunk;  // levels above the last four; tokens that are sorted together, a multiple of 128
  const T *x, *weight_in, *bias, *weight_out;
  T* y;
  int32_t* path;
  float* logits;
  int32_t* counts;  // of the tokens in each subtree, [chunks, subtrees]
  uint16_t* order;  // and which, from the chunk's first: [chunks, subtrees, chunk]
  uint4* list;      // of the lower visits; see list_place
  T* first;         // part of the outputs, [hidden / kSlice, tokens, kSlice]: so what a multiprocessor reads of it lies together

  __device__ T* first_at(int64_t column, int64_t token) const {
    return first + (column / kSlice * shape.tokens + token) * kSlice + column % kSlice;
  }
  __host__ __device__ int subtrees() const { return int(shape.trees) << upper; }
  __host__ __device__ int quads() const { return int(shape.trees + 3) / 4; }
};

// ---- upper ---------------------------------------------------------------------------------------------------------------

// GROUPS, and what follows from it, is true of the code for a GPU alone: the host, for which it is never set, may look at BYTES.
template <int TOKENS> struct Upper {
  static constexpr bool GROUPS = kWarpgroups && TOKENS == 128;
  static constexpr int WARPS = GROUPS ? 8 : TOKENS == 128 ? 2 : 1, SIDE = 8 / WARPS;  // warps along the tokens, and along nodes and columns
  static constexpr int M = TOKENS / WARPS / 16, EACH = kUpper / SIDE;    // a warp's
  static constexpr int STRIDE = kUpper + 8;                              // of logits
  // In the memory of the products' stages: coefficients, in chunks of 64 nodes; behind them first logits, then stages of weight_out.
  static constexpr int PRODUCTS = kStages * (TOKENS + kUpper) * 128, AT = TOKENS * kUpper * 2;
  static constexpr int STAGE = 64 * kUpper * 2, STAGES = 4;
  static constexpr int BYTES = std::max({PRODUCTS, AT + TOKENS * STRIDE * 4, AT + STAGES * STAGE}) + 1024;  // from a multiple of 1024 on
  static_assert(BYTES <= kShared);
};

// Four lanes have each two neighbouring columns of four pieces of eight: then each has all of one piece.
__device__ inline void gather_piece(uint32_t (&w)[4]) {
  const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t got = __shfl_xor_sync(kAll, odd ? w[i] : w[i + 1], 1);
    w[i] = odd ? got : w[i], w[i + 1] = odd ? w[i + 1] : got;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t got = __shfl_xor_sync(kAll, upper ? w[i] : w[i + 2], 2);
    w[i] = upper ? got : w[i], w[i + 2] = upper ? w[i + 2] : got;
  }
}

template <class T, int TOKENS> __global__ void __launch_bounds__(256) upper_kernel(Forest<T> a) {
  using U = Upper<TOKENS>;
  constexpr int THREADS = 256, N = U::EACH / 8;
  extern __shared__ __align__(1024) char dynamic[];
  const uint32_t shared = (uint32_t(__cvta_generic_to_shared(dynamic)) + 1023) / 1024 * 1024;
  char* memory = dynamic + (shared - uint32_t(__cvta_generic_to_shared(dynamic)));
  __shared__ int tokens[TOKENS], rows[kUpper], drawn[kUpper];
  __shared__ float bias[kUpper];
  let_next_begin();
  const int trees = int(a.shape.trees), hidden = int(a.shape.hidden), nodes = 1 << a.upper;  // a tree's, and one more
  const int warp = threadIdx.x / 32 / U::SIDE, side = threadIdx.x / 32 % U::SIDE, lane = threadIdx.x % 32;
  const int first = int(blockIdx.x) * TOKENS, count = min(TOKENS, int(a.shape.tokens) - first);
  for (int i = threadIdx.x; i < TOKENS; i += THREADS) tokens[i] = i < count ? first + i : -1;
  {
    const int tree = int(threadIdx.x) >> a.upper, node = int(threadIdx.x) & (nodes - 1);
    const bool real = tree < trees && node < nodes - 1;
    const int row = real ? int(tree * a.shape.tree_nodes()) + node : -1;
    rows[threadIdx.x] = row;
    bias[threadIdx.x] = real ? to_acc(a.bias[row]) : 0;
    drawn[threadIdx.x] = 0;
  }
  __syncthreads();
  float sums[U::M][N][4];
  if constexpr (U::GROUPS) group_products(sums[0], shared, a.x, a.weight_in, hidden, tokens, rows);
  else products<T, U::WARPS, U::M, U::EACH, U::SIDE>(sums, shared, a.x, a.weight_in, hidden, tokens, rows);
  float* logits = reinterpret_cast<float*>(memory + U::AT);
#pragma unroll
  for (int m = 0; m < U::M; ++m)
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int i = 0; i < 4; i += 2)
        *reinterpret_cast<float2*>(logits + ((warp * U::M + m) * 16 + lane / 4 + i * 4) * U::STRIDE + side * U::EACH + n * 8 + lane % 4 * 2) =
            make_float2(sums[m][n][i], sums[m][n][i + 1]);
  for (int i = threadIdx.x; i < U::AT / 16; i += THREADS) reinterpret_cast<uint4*>(memory)[i] = make_uint4(0, 0, 0, 0);
  __syncthreads();

  for (int i = threadIdx.x; i < count * trees; i += THREADS) {
    const int t = i / trees, tree = i % trees;
    float* z_of = logits + t * U::STRIDE + (tree << a.upper);
    const int64_t visits = (int64_t(first + t) * trees + tree) * a.shape.levels();
    int node = 0;
    for (int level = 0; level < a.upper; ++level) {
      const int column = (tree << a.upper) + node;
      const float z = z_of[node] + bias[column];
      *reinterpret_cast<T*>(memory + piece_at(column / 64 * TOKENS * 128, t, column / 8 % 8) + column % 8 * 2) =
          from_acc<T>(act(a.activation, z));
      if (a.path) {
        a.path[visits + level] = node;
        a.logits[visits + level] = z;
      }
      node = 2 * node + 1 + (z > 0);
    }
    const int bin = node - (nodes - 1);  // its number among the tile's tokens there is kept where no node's logit is
    reinterpret_cast<int*>(z_of)[nodes - 1] = bin << 16 | atomicAdd(drawn + (tree << a.upper) + bin, 1);
  }
  __syncthreads();
  const int chunk = first / a.chunk, subtrees = a.subtrees();
  wait_for_previous();  // which sets the counts to zero
  if (const int some = drawn[threadIdx.x]) drawn[threadIdx.x] = atomicAdd(a.counts + int64_t(chunk) * subtrees + threadIdx.x, some);
  __syncthreads();
  for (int i = threadIdx.x; i < count * trees; i += THREADS) {
    const int t = i / trees, tree = i % trees;
    const int kept = reinterpret_cast<const int*>(logits + t * U::STRIDE + (tree << a.upper))[nodes - 1];
    const int subtree = (tree << a.upper) + (kept >> 16);
    a.order[(int64_t(chunk) * subtrees + subtree) * a.chunk + drawn[subtree] + (kept & 0xffff)] = uint16_t(first + t - chunk * a.chunk);
  }
  __syncthreads();

  // Outputs, 256 columns at a time; each time the nodes in chunks of 64.
  const int chunks = (subtrees + 63) / 64, blocks = (hidden + kUpper - 1) / kUpper;
  const auto begin = [&](int step) {
    if (step < blocks * chunks) {
      const uint32_t stage = shared + U::AT + step % U::STAGES * U::STAGE;
      const int inner = step % chunks * 64, piece = threadIdx.x % 32, column = step / chunks * kUpper + piece * 8;
#pragma unroll
      for (int i = 0; i < 64; i += THREADS / 32) {
        const int row = i + threadIdx.x / 32, from = rows[inner + row];
        const bool real = from >= 0 && column < hidden;
        copy_16(piece_at(stage + piece / 8 * 64 * 128, row, piece % 8), a.weight_out + (real ? int64_t(from) * hidden + column : 0), real);
      }
    }
    copies_end_group();
  };
  constexpr int AHEAD = U::STAGES - (U::GROUPS ? 2 : 1);  // warpgroups may still multiply what the step before this one needs
  for (int c = 0; c < AHEAD; ++c) begin(c);
  for (int block = 0; block < blocks; ++block) {
    const int column = block * kUpper + side * U::EACH;
    if constexpr (!U::GROUPS) {
#pragma unroll
      for (int m = 0; m < U::M; ++m)
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[m][n][i] = 0;
    }
    for (int inner = 0; inner < chunks; ++inner) {
      const int step = block * chunks + inner;
      copies_wait<AHEAD - 1>();
      if constexpr (U::GROUPS) groups_will_read();
      __syncthreads();
      begin(step + AHEAD);
      const uint32_t coefficients = shared + inner * TOKENS * 128, weights = shared + U::AT + step % U::STAGES * U::STAGE;
      if constexpr (U::GROUPS) {
        group_begin();
#pragma unroll
        for (int k = 0; k < 4; ++k)
          group_multiply<true>(sums[0], operand(coefficients + warp / 4 * 64 * 128 + k * 32), operand(weights + k * 16 * 128, 64 * 128), inner || k, T());
        group_end();
        groups_wait_but_last();
      } else if (column < hidden) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          uint32_t c[U::M][4];
#pragma unroll
          for (int m = 0; m < U::M; ++m) matrices_4(c[m], piece_at(coefficients, (warp * U::M + m) * 16 + lane % 16, k * 2 + lane / 16));
#pragma unroll
          for (int n = 0; n < N; n += 2) {
            uint32_t b[4];
            matrices_4_transposed(b, piece_at(weights + side * U::EACH / 64 * 64 * 128, k * 16 + lane % 16, side * N % 8 + n + lane / 16));
#pragma unroll
            for (int m = 0; m < U::M; ++m) {
              multiply(sums[m][n], c[m], b[0], b[1], T());
              multiply(sums[m][n + 1], c[m], b[2], b[3], T());
            }
          }
        }
      }
    }
    if constexpr (U::GROUPS) groups_wait(sums[0]);
#pragma unroll
    for (int m = 0; m < U::M; ++m)
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const int token = tokens[(warp * U::M + m) * 16 + lane / 4 + i * 4];
#pragma unroll
        for (int n = 0; n < N; n += 4) {
          uint32_t w[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const float pair[2] = {sums[m][n + j][i], sums[m][n + j][i + 1]};
            w[j] = Pack<T, 2>::of(pair).word;
          }
          gather_piece(w);
          if (token >= 0 && column + n * 8 < hidden)
            *reinterpret_cast<uint4*>(a.first_at(column + (n + lane % 4) * 8, token)) = make_uint4(w[0], w[1], w[2], w[3]);
        }
      }
  }
}

// ---- the list ------------------------------------------------------------------------------------------------------------

// A visit: the coefficient as float32, but in its lowest bits the row. Which coefficient is nearest, they are part of it: it has more
// bits than a number of 16.
constexpr int kRowBits = 11;
__device__ inline uint32_t visit_of(float c, int row) {
  const uint32_t bits = __float_as_uint(c), sign = bits & 0x80000000u, magnitude = bits & 0x7fffffffu, one = 1u << kRowBits;
  if (magnitude < one) return uint32_t(row);
  if (magnitude >= 0x7f800000u) return 0x7fc00000u | uint32_t(row);
  return sign | ((magnitude - uint32_t(row) + one / 2) & ~(one - 1)) | uint32_t(row);
}

// Where the four lower visits of a token in a tree are. Tokens in sixteens; then their trees in fours, each token beginning with
// another one: those that a multiprocessor looks at together are in different banks of its shared memory.
__device__ inline int64_t list_place(int64_t token, int tree, int quads) {
  const int t = int(token % 16);
  return ((token / 16 * quads + tree / 4) * 4 + ((tree - t) & 3)) * 16 + t;
}

// ---- lower ---------------------------------------------------------------------------------------------------------------

template <int M> constexpr int kLowerShared = kStages * (M * 64 + 16) * 128;

template <class T, int M> __global__ void __launch_bounds__(128) lower_kernel(Forest<T> a, int tiles) {
  constexpr int TOKENS = 64 * M, STRIDE = 17;
  extern __shared__ __align__(128) char memory[];
  __shared__ int tokens[TOKENS], rows[16], place[3];  // place: subtree, first of its tokens, how many
  __shared__ float bias[16];
  const int chunk = int(blockIdx.x) / tiles, lane = threadIdx.x % 32, subtrees = a.subtrees();
  let_next_begin();
  wait_for_previous();
  if (threadIdx.x < 32) {  // which subtree has this tile? A lane: eight of them
    if (lane == 0) place[2] = 0;
    __syncwarp();
    const int32_t* counts = a.counts + int64_t(chunk) * subtrees;
    int c[8], sum = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      c[i] = lane * 8 + i < subtrees ? counts[lane * 8 + i] : 0;
      sum += (c[i] + TOKENS - 1) / TOKENS;
    }
    int upto = sum;
    for (int d = 1; d < 32; d *= 2) {
      const int other = __shfl_up_sync(kAll, upto, d);
      if (lane >= d) upto += other;
    }
    int tile = int(blockIdx.x) % tiles - (upto - sum);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int here = (c[i] + TOKENS - 1) / TOKENS;
      if (tile >= 0 && tile < here) {
        place[0] = lane * 8 + i;
        place[1] = tile * TOKENS;
        place[2] = min(TOKENS, c[i] - tile * TOKENS);
      }
      tile -= here;
    }
  }
  __syncthreads();
  const int count = place[2];
  if (count <= 0) return;
  const int tree = place[0] >> a.upper, above = (1 << a.upper) - 1, root = above + (place[0] & above);
  const int64_t tree_begin = tree * a.shape.tree_nodes();
  const uint16_t* order = a.order + (int64_t(chunk) * subtrees + place[0]) * a.chunk + place[1];
  for (int i = threadIdx.x; i < TOKENS; i += 128) tokens[i] = i < count ? chunk * a.chunk + order[i] : -1;
  if (threadIdx.x < 16) {
    const int i = threadIdx.x, level = 31 - __clz(i + 1);
    const int node = ((root + 1) << level) - 1 + i + 1 - (1 << level);
    rows[i] = i < kLowerNodes ? int(tree_begin) + node : -1;
    bias[i] = i < kLowerNodes ? to_acc(a.bias[tree_begin + node]) : 0;
  }
  __syncthreads();
  float sums[M][2][4];
  products<T, 4, M, 16>(sums, uint32_t(__cvta_generic_to_shared(memory)), a.x, a.weight_in, int(a.shape.hidden), tokens, rows);
  spill<M, 16, STRIDE>(sums, reinterpret_cast<float*>(memory));
  __syncthreads();
  if (threadIdx.x >= count) return;
  const float* logits = reinterpret_cast<const float*>(memory) + threadIdx.x * STRIDE;
  const int token = tokens[threadIdx.x], before = (tree / 4 * kLowerNodes << a.upper) - above;
  const int64_t visits = (int64_t(token) * a.shape.trees + tree) * a.shape.levels() + a.upper;
  uint32_t list[kLower];
  int at = 0, node = root;
#pragma unroll
  for (int level = 0; level < kLower; ++level) {
    const float z = logits[at] + bias[at];
    list[level] = visit_of(act(a.activation, z), before + node);
    if (a.path) {
      a.path[visits + level] = node;
      a.logits[visits + level] = z;
    }
    const int right = z > 0;
    at = 2 * at + 1 + right;
    node = 2 * node + 1 + right;
  }
  a.list[list_place(token, tree, a.quads())] = make_uint4(list[0], list[1], list[2], list[3]);
}

// ---- sums ----------------------------------------------------------------------------------------------------------------

constexpr int kSumThreads = 1024;
constexpr int kLine = 128;  // bytes of shared memory: the two words of a row of each of four trees
constexpr int kMostLines = kShared / kLine;
static_assert(kMostLines <= 1 << kRowBits);

// A lane: a word of a token. Lanes of a warp: two words of 16 tokens; of four neighbouring tokens, each is at another tree, so that
// eight lanes read from all banks.
template <class T> __global__ void __launch_bounds__(kSumThreads, 1) sums_kernel(Forest<T> a, int lines, int period) {
  constexpr int VEC = 8;
  extern __shared__ __align__(128) char memory[];
  const int trees = int(a.shape.trees), quads = a.quads(), below = kLowerNodes << a.upper, above = (1 << a.upper) - 1;
  const int64_t hidden = a.shape.hidden, tokens = a.shape.tokens, items = (tokens + 15) / 16, slices = hidden / kSlice;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, word = lane % 2, within = lane / 2;
  uint32_t bank[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) bank[i] = ((within + i) & 3) * 32 + word * 16;
  int64_t begin = slices * items * blockIdx.x / gridDim.x;
  const int64_t end = slices * items * (blockIdx.x + 1) / gridDim.x;
  while (begin < end) {  // a slice, or a part of one
    const int64_t number = begin / items, last = min((number + 1) * items, end);
    // Blocks that are at the same tokens have neighbouring columns.
    const int64_t column = (number % period * (slices / period) + number / period) * kSlice + word * VEC;
    __syncthreads();
#pragma unroll 4
    for (int i = threadIdx.x; i < lines * 8; i += kSumThreads) {
      const int line = i / 8, tree = line / below * 4 + i / 2 % 4, node = line % below + above;
      uint4 v = make_uint4(0, 0, 0, 0);
      if (tree < trees) v = __ldg(reinterpret_cast<const uint4*>(a.weight_out + (tree * a.shape.tree_nodes() + node) * hidden + column));
      reinterpret_cast<uint4*>(memory)[i] = v;
    }
    __syncthreads();
    wait_for_previous();
    for (int64_t item = begin - number * items + warp; item < last - number * items; item += kSumThreads / kWarp) {
      const int64_t token = item * 16 + within;
      if (token >= tokens) continue;
      const uint4* visits = a.list + item * quads * 64 + within;
      float sum[VEC];
      Pack<T, VEC>{*reinterpret_cast<const uint4*>(a.first_at(column, token))}.get(sum);
      for (int quad = 0; quad < quads; ++quad, visits += 64) {
        uint32_t list[4][4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint4 four = quad * 4 + ((within + i) & 3) < trees ? __ldg(visits + i * 16) : make_uint4(0, 0, 0, 0);
          list[i][0] = four.x, list[i][1] = four.y, list[i][2] = four.z, list[i][3] = four.w;
        }
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int v = 0; v < 4; ++v) {
            const uint32_t at = (list[i][v] & ((1u << kRowBits) - 1)) * kLine + bank[i];
            const float c = __uint_as_float(list[i][v]);
            float w[VEC];
            Pack<T, VEC>{*reinterpret_cast<const uint4*>(memory + at)}.get(w);
#pragma unroll
            for (int j = 0; j < VEC; ++j) sum[j] = fmaf(c, w[j], sum[j]);
          }
      }
      *reinterpret_cast<uint4*>(a.y + token * hidden + column) = Pack<T, VEC>::of(sum).word;
    }
    begin = last;
  }
}

// ---- host ----------------------------------------------------------------------------------------------------------------

int upper_of(const Shape& s) { return int(s.levels()) - kLower; }
int lines_of(const Shape& s) { return int(divide_up(s.trees, 4)) * (kLowerNodes << upper_of(s)); }

struct Parts {
  int chunk;
  int64_t chunks;
  int32_t* counts;
  uint16_t* order;
  uint4* list;
  void* first;
  int64_t used;
};
Parts parts_of(const Shape& s, void* workspace) {
  Carve carve{static_cast<char*>(workspace)};
  Parts p{};
  const int64_t subtrees = s.trees << upper_of(s);
  p.chunk = int(std::min<int64_t>(kChunk, std::max<int64_t>(1, divide_up(s.tokens, 128)) * 128));
  p.chunks = divide_up(s.tokens, p.chunk);
  p.counts = carve.take<int32_t>(p.chunks * subtrees);
  p.order = carve.take<uint16_t>(p.chunks * subtrees * p.chunk);
  p.list = carve.take<uint4>(divide_up(s.tokens, 16) * divide_up(s.trees, 4) * 64);
  p.first = carve.take<char>(2 * s.tokens * s.hidden);
  p.used = carve.used;
  return p;
}

template <class T, int TOKENS> void upper(const Forest<T>& a, cudaStream_t stream) {
  launch_early(upper_kernel<T, TOKENS>, unsigned(divide_up(a.shape.tokens, TOKENS)), 256, Upper<TOKENS>::BYTES, true, stream, a);
}

template <class T, int M> void lower(const Forest<T>& a, int64_t chunks, cudaStream_t stream) {
  const int tiles = int(divide_up(a.chunk * a.shape.trees, 64 * M)) + a.subtrees();  // the last one of each subtree is not full
  launch_early(lower_kernel<T, M>, unsigned(chunks * tiles), 128, kLowerShared<M>, true, stream, a, tiles);
}

template <class T> const char* run(const Forward& f, cudaStream_t stream) {
  const Shape& s = f.problem.shape;
  const int processors = f.problem.processors;
  const Parts parts = parts_of(s, f.workspace);
  const Forest<T> a{s, f.activation, upper_of(s), parts.chunk, static_cast<const T*>(f.x), static_cast<const T*>(f.weight_in),
                    static_cast<const T*>(f.bias_in), static_cast<const T*>(f.weight_out), static_cast<T*>(f.y), f.path,
                    static_cast<float*>(f.logits), parts.counts, parts.order, parts.list, static_cast<T*>(parts.first)};
  zero_counts(parts.counts, parts.chunks * a.subtrees(), stream);
  // Smaller tiles where there are too few for all multiprocessors, or too few tokens in a subtree.
  if (s.tokens > 64 * processors) upper<T, 128>(a, stream);
  else if (s.tokens > 32 * processors) upper<T, 64>(a, stream);
  else upper<T, 32>(a, stream);
  if (a.chunk >> a.upper >= 256) lower<T, 2>(a, parts.chunks, stream);
  else lower<T, 1>(a, parts.chunks, stream);
  // Blocks with a common divisor of slices and multiprocessors have slices side by side.
  const int64_t slices = s.hidden / kSlice;
  const int lines = lines_of(s), period = int(slices / std::gcd(slices, int64_t{processors}));
  launch_early(sums_kernel<T>, unsigned(processors), kSumThreads, lines * kLine, true, stream, a, lines, period);
  return launched();
}

}  // namespace

bool forest_serves(const Problem& p) {
  const Shape& s = p.shape;
  return (p.type == Type::bfloat16 || p.type == Type::float16) && shared_kb(p.capability) >= 227 && p.aligned && s.hidden % kColumns == 0 &&
         s.depth >= kLower && s.trees << s.levels() <= kUpper << kLower && lines_of(s) <= kMostLines;
}

int64_t forest_workspace(const Problem& p) { return parts_of(p.shape, nullptr).used; }

const char* forest_forward(const Forward& f, cudaStream_t stream) {
  return f.problem.type == Type::bfloat16 ? run<bfloat16>(f, stream) : run<float16>(f, stream);
}

}  // namespace hf_fff_cuda
