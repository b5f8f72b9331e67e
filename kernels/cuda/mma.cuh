// Matrix products of 16-bit numbers on tensor cores, with rows fetched into shared memory by asynchronous copies (8.0 and later).
#pragma once
#include <type_traits>

#include "cuda/common.cuh"

namespace hf_fff_cuda {
namespace {

constexpr int kColumns = 64;  // of a stage: rows of 128 bytes, eight pieces of 16
constexpr int kStages = 4;

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

// sums[m][n][..]: logits of the warp's M times 16 tokens for its NODES rows of weights, without bias: WARPS times as many tokens, and
// SIDE times as many nodes, are the block's. Stages: x then weights. A warp reads all its weights of a stage: the more tokens it
// has, the fewer bytes of shared memory a token costs, which is what binds.
template <class T, int WARPS, int M, int NODES, int SIDE = 1>
__device__ inline void products(float (&sums)[M][NODES / 8][4], uint32_t shared, const T* x, const T* weight, int hidden,
                                const int* tokens, const int* rows) {
  constexpr int TOKENS = WARPS * M * 16, ROWS = NODES * SIDE, THREADS = WARPS * SIDE * 32, STAGE = (TOKENS + ROWS) * 128;
  const int warp = threadIdx.x / 32 / SIDE, side = threadIdx.x / 32 % SIDE, lane = threadIdx.x % 32, chunks = hidden / kColumns;
  const char *xs = reinterpret_cast<const char*>(x), *ws = reinterpret_cast<const char*>(weight);
  const int64_t bytes = int64_t(hidden) * sizeof(T);
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int n = 0; n < NODES / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[m][n][i] = 0;
  const auto begin = [&](int chunk) {
    if (chunk < chunks) {
      const uint32_t stage = shared + chunk % kStages * STAGE;
      fetch<TOKENS, THREADS>(stage, xs, bytes, tokens, chunk);
      fetch<ROWS, THREADS>(stage + TOKENS * 128, ws, bytes, rows, chunk);
    }
    copies_end_group();
  };
  for (int c = 0; c < kStages - 1; ++c) begin(c);
  for (int chunk = 0; chunk < chunks; ++chunk) {
    copies_wait<kStages - 2>();
    __syncthreads();  // this chunk is there, and nobody reads the stage that is filled next
    begin(chunk + kStages - 1);
    const uint32_t stage = shared + chunk % kStages * STAGE, weights = stage + (TOKENS + side * NODES) * 128;
#pragma unroll
    for (int k = 0; k < kColumns / 16; ++k) {
      uint32_t a[M][4];
#pragma unroll
      for (int m = 0; m < M; ++m) matrices_4(a[m], piece_at(stage, (warp * M + m) * 16 + lane % 16, k * 2 + lane / 16));
#pragma unroll
      for (int n = 0; n + 1 < NODES / 8; n += 2) {
        uint32_t b[4];
        matrices_4(b, piece_at(weights, n * 8 + lane % 8 + lane / 16 * 8, k * 2 + lane / 8 % 2));
#pragma unroll
        for (int m = 0; m < M; ++m) {
          multiply(sums[m][n], a[m], b[0], b[1], T());
          multiply(sums[m][n + 1], a[m], b[2], b[3], T());
        }
      }
      if constexpr (NODES / 8 % 2) {
        constexpr int n = NODES / 8 - 1;
        uint32_t b0, b1;
        matrices_2(b0, b1, piece_at(weights, n * 8 + lane % 8, k * 2 + lane / 8 % 2));
#pragma unroll
        for (int m = 0; m < M; ++m) multiply(sums[m][n], a[m], b0, b1, T());
      }
    }
  }
  copies_wait<0>();
  __syncthreads();
}

// The warp's sums to logits[token][node], rows of STRIDE floats.
template <int M, int NODES, int STRIDE> __device__ inline void spill(const float (&sums)[M][NODES / 8][4], float* logits) {
  const int row = threadIdx.x / 32 * M * 16 + threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int n = 0; n < NODES / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) logits[(row + m * 16 + i / 2 * 8) * STRIDE + n * 8 + column + i % 2] = sums[m][n][i];
}

// ---- products of warpgroups ----------------------------------------------------------------------------------------------
// On GPUs of 9.0, of code compiled for them alone (sm_90a), four warps multiply 64 rows from shared memory by 256 columns there, while they do
// something else (-DHF_FFF_NO_WARPGROUPS leaves it out, to compare). The same layout of rows serves: `piece_at` is what the hardware calls a
// swizzle of 128 bytes, of memory at a multiple of 1024.

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) && !defined(HF_FFF_NO_WARPGROUPS)
constexpr bool kWarpgroups = true;
#define HF_FFF_4(d, n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define HF_FFF_16(d, n) HF_FFF_4(d, n), HF_FFF_4(d, n + 1), HF_FFF_4(d, n + 2), HF_FFF_4(d, n + 3)
#define HF_FFF_128(d) \
  HF_FFF_16(d, 0), HF_FFF_16(d, 4), HF_FFF_16(d, 8), HF_FFF_16(d, 12), HF_FFF_16(d, 16), HF_FFF_16(d, 20), HF_FFF_16(d, 24), HF_FFF_16(d, 28)
#define HF_FFF_WGMMA(types) \
  "{\n.reg .pred add;\nsetp.ne.b32 add, %130, 0;\nwgmma.mma_async.sync.aligned.m64n256k16.f32." types " {" \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31," \
  "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63," \
  "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95," \
  "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127" \
  "}, %128, %129, add, 1, 1, 0, %131;\n}\n"
#else
constexpr bool kWarpgroups = false;
#endif

// An operand: rows of 128 bytes at a multiple of 1024, eight rows after eight. `next`: bytes to the next 64 columns, if rows are what is summed over.
__device__ inline uint64_t operand(uint32_t at, uint32_t next = 0) {
  return uint64_t((at & 0x3ffff) >> 4) | uint64_t(next >> 4) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

// c[64 x 256] (+)= a[64 x 16] b[16 x 256]; of b the memory holds columns, or, TRANSPOSED, rows. A warp's c: 16 rows, as of `multiply`.
template <bool TRANSPOSED, class T> __device__ inline void group_multiply(float (&c)[32][4], uint64_t a, uint64_t b, bool add, T) {
#ifdef HF_FFF_WGMMA
  if constexpr (std::is_same_v<T, bfloat16>)
    asm volatile(HF_FFF_WGMMA("bf16.bf16") : HF_FFF_128(c) : "l"(a), "l"(b), "r"(int(add)), "n"(int(TRANSPOSED)));
  else
    asm volatile(HF_FFF_WGMMA("f16.f16") : HF_FFF_128(c) : "l"(a), "l"(b), "r"(int(add)), "n"(int(TRANSPOSED)));
#endif
}
__device__ inline void group_begin() {  // sums are in registers
#ifdef HF_FFF_WGMMA
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
__device__ inline void group_end() {
#ifdef HF_FFF_WGMMA
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
__device__ inline void groups_wait_but_last() {
#ifdef HF_FFF_WGMMA
  asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
#endif
}
__device__ inline void groups_wait(float (&c)[32][4]) {
#ifdef HF_FFF_WGMMA
  asm volatile("wgmma.wait_group.sync.aligned 0;" : HF_FFF_128(c)::"memory");
#endif
}
__device__ inline void groups_will_read() {  // what this thread wrote to shared memory, or copied there; then a barrier
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// `products` of 128 tokens and 256 nodes by two warpgroups, each 64 tokens.
template <class T>
__device__ inline void group_products(float (&sums)[32][4], uint32_t shared, const T* x, const T* weight, int hidden, const int* tokens, const int* rows) {
  constexpr int TOKENS = 128, NODES = 256, THREADS = 256, STAGE = (TOKENS + NODES) * 128;
  const int chunks = hidden / kColumns;
  const char *xs = reinterpret_cast<const char*>(x), *ws = reinterpret_cast<const char*>(weight);
  const int64_t bytes = int64_t(hidden) * sizeof(T);
  const auto begin = [&](int chunk) {
    if (chunk < chunks) {
      const uint32_t stage = shared + chunk % kStages * STAGE;
      fetch<TOKENS, THREADS>(stage, xs, bytes, tokens, chunk);
      fetch<NODES, THREADS>(stage + TOKENS * 128, ws, bytes, rows, chunk);
    }
    copies_end_group();
  };
  for (int c = 0; c < kStages - 2; ++c) begin(c);
  for (int chunk = 0; chunk < chunks; ++chunk) {
    copies_wait<kStages - 3>();
    groups_will_read();
    __syncthreads();  // this chunk is there, and nobody multiplies what is overwritten next: the chunk before the last one
    begin(chunk + kStages - 2);
    const uint32_t stage = shared + chunk % kStages * STAGE;
    group_begin();
#pragma unroll
    for (int k = 0; k < kColumns / 16; ++k)
      group_multiply<false>(sums, operand(stage + threadIdx.x / 128 * 64 * 128 + k * 32), operand(stage + TOKENS * 128 + k * 32), chunk || k, T());
    group_end();
    groups_wait_but_last();
  }
  groups_wait(sums);
  copies_wait<0>();
  __syncthreads();
}

template <class G> __device__ inline void store_pair(G* to, float a, float b) {
  if constexpr (sizeof(G) == 4) {
    *reinterpret_cast<float2*>(to) = make_float2(a, b);
  } else {
    const float pair[2] = {a, b};
    *reinterpret_cast<uint32_t*>(to) = Pack<G, 2>::of(pair).word;
  }
}

// Rows of `outputs`: of coefficients in shared memory, and of a warp's results on their way out.
template <int INNER> constexpr int kCoefficientsRow = INNER + 8;
constexpr int kOutputRow = kColumns + 8;

// out[token] = coefficients times weights, for the warp's M times 16 tokens (< 0: none). `begin(chunk)` starts copying columns
// [chunk * 64, + 64) of INNER rows of weights into stage chunk % STAGES; it was called for the first STAGES - 1. Results of 16 bits go
// through `memory`, [M * 16] rows of the warp's own, so that eight lanes write 128 bytes.
template <class T, int M, int INNER, int STAGES, class G, class Begin>
__device__ inline void outputs(uint32_t coefficients, uint32_t stages, char* memory, const int* tokens, G* out, int hidden, const Begin& begin) {
  const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * M * 16, chunks = hidden / kColumns;
  uint32_t c[M][INNER / 16][4];
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int k = 0; k < INNER / 16; ++k)
      matrices_4(c[m][k], coefficients + (first + m * 16 + lane % 16) * kCoefficientsRow<INNER> * 2 + (k * 2 + lane / 16) * 16);
  for (int chunk = 0; chunk < chunks; ++chunk) {
    copies_wait<STAGES - 2>();
    __syncthreads();
    begin(chunk + STAGES - 1);
    const uint32_t stage = stages + chunk % STAGES * INNER * 128;
    constexpr int PART = kColumns / 8 / 2;  // half of the columns at a time, for the registers
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sums[M][PART][4] = {};
#pragma unroll
      for (int k = 0; k < INNER / 16; ++k)
#pragma unroll
        for (int n = 0; n < PART; n += 2) {
          uint32_t b[4];
          matrices_4_transposed(b, piece_at(stage, k * 16 + lane % 16, half * PART + n + lane / 16));
#pragma unroll
          for (int m = 0; m < M; ++m) {
            multiply(sums[m][n], c[m][k], b[0], b[1], T());
            multiply(sums[m][n + 1], c[m][k], b[2], b[3], T());
          }
        }
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int n = 0; n < PART; ++n)
#pragma unroll
          for (int i = 0; i < 4; i += 2) {
            const int row = m * 16 + lane / 4 + i * 4, column = (half * PART + n) * 8 + lane % 4 * 2;
            if constexpr (sizeof(G) == 4) {  // four lanes write a whole sector
              const int token = tokens[first + row];
              if (token >= 0)
                __stcs(reinterpret_cast<float2*>(out + int64_t(token) * hidden + chunk * kColumns + column),
                       make_float2(sums[m][n][i], sums[m][n][i + 1]));
            } else {
              store_pair(reinterpret_cast<G*>(memory + row * kOutputRow * 2) + column, sums[m][n][i], sums[m][n][i + 1]);
            }
          }
    }
    if constexpr (sizeof(G) == 2) {
      __syncwarp();
#pragma unroll
      for (int i = 0; i < 4 * M; ++i) {
        const int row = i * 4 + lane / 8, token = tokens[first + row];
        const uint4 word = *reinterpret_cast<const uint4*>(memory + row * kOutputRow * 2 + lane % 8 * 16);
        if (token >= 0) __stcs(reinterpret_cast<uint4*>(out + int64_t(token) * hidden + chunk * kColumns) + lane % 8, word);
      }
      __syncwarp();
    }
  }
}

// Blocks that may, if `early` (9.0 and later), begin before the kernel before them has ended: see `wait_for_previous`.
template <class... P>
void launch_early(void (*kernel)(P...), unsigned blocks, int threads, int shared, bool early, cudaStream_t stream, P... of) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks), config.blockDim = dim3(threads), config.dynamicSmemBytes = size_t(shared), config.stream = stream;
  config.attrs = &attribute, config.numAttrs = early ? 1 : 0;
  allow_shared(kernel, shared);
  cudaLaunchKernelEx(&config, kernel, of...);
}

}  // namespace
}  // namespace hf_fff_cuda
