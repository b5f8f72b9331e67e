#include "kernels.h"

#if defined(__x86_64__)
namespace hf_fff::avx512 {
#define FFF_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prefer-vector-width=512")))
#define FFF_BYTES 64
#include "simd.h"
#include "rows.h"
#include "activation.h"
#include "forward.h"
#include "backward.h"
FFF_KERNELS
FFF_KERNELS_OF(float)
FFF_KERNELS_OF(double)
FFF_KERNELS_OF(bfloat16)
FFF_KERNELS_OF(float16)
}  // namespace hf_fff::avx512
#endif
