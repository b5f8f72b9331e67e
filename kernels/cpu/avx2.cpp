#include "kernels.h"

#if defined(__x86_64__)
namespace hf_fff::avx2 {
#define FFF_TARGET __attribute__((target("avx2,fma,f16c")))
#define FFF_BYTES 32
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
}  // namespace hf_fff::avx2
#endif
