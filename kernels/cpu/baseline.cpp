#include "kernels.h"

namespace hf_fff::baseline {
#define FFF_TARGET
#define FFF_BYTES 16
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
}  // namespace hf_fff::baseline
