#include "kernels.h"

#if defined(__x86_64__)
namespace hf_fff::avx512_bf16 {
#define FFF_TARGET \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c,prefer-vector-width=512")))
#define FFF_BYTES 64
#define FFF_BF16
#include "simd.h"
#include "rows.h"
#include "activation.h"
#include "forward.h"
#include "backward.h"
FFF_KERNELS
FFF_KERNELS_OF(bfloat16)
}  // namespace hf_fff::avx512_bf16
#endif
