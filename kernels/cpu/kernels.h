// What an instruction set offers, and the sets: each is compiled by itself (avx512.cpp and so on), so that they can be compiled
// at the same time.
#pragma once
#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "fff.h"
#include "order.h"
#include "scalar.h"
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace hf_fff {

constexpr int64_t few_tokens = 64;  // tokens that forward_few takes at a time

template <class T> struct Kernels {
  void (*forward_few)(const Forward<T>&, int64_t, int64_t);
  void (*descend)(const Descent<T>&, int32_t*, int32_t*, int64_t, int64_t, int64_t);
  void (*outputs)(const Descent<T>&, const int32_t*, int64_t, accumulator_t<T>*);
  void (*backward_tokens)(const Backward<T>&, int64_t, const int64_t*, int64_t, accumulator_t<T>*, accumulator_t<T>*,
                          accumulator_t<T>*, int64_t);
  void (*backward_columns)(const Backward<T>&, int64_t, const int64_t*, const accumulator_t<T>*, const accumulator_t<T>*,
                           int64_t, int64_t);
};

namespace avx512 { template <class T> const Kernels<T>& kernels(); }
namespace avx512_bf16 { template <class T> const Kernels<T>& kernels(); }  // for bfloat16 alone
namespace avx2 { template <class T> const Kernels<T>& kernels(); }
namespace baseline { template <class T> const Kernels<T>& kernels(); }  // what the compiler targets by itself: SSE2, Neon, ...

// Defines a set's kernels, inside its namespace and after its code, for the types that are named.
#define FFF_KERNELS                                                                                            \
  template <class T> const Kernels<T>& kernels() {                                                             \
    static constexpr Kernels<T> all{forward_few<T>, descend<T>, outputs<T>, backward_tokens<T>, backward_columns<T>}; \
    return all;                                                                                                \
  }
#define FFF_KERNELS_OF(T) template const Kernels<T>& kernels<T>();

}  // namespace hf_fff
