// Vector primitives for one instruction set. Included once per set (see avx512.cpp), inside a namespace of that set, with
//   FFF_TARGET   the attribute that lets a function use the set's instructions
//   FFF_BYTES    bytes of a vector
// Vectors are the compilers' own (GCC, Clang): the same code serves x86-64, Arm and whatever comes.
// No include guard: that is the point.

#define FFF_INLINE FFF_TARGET inline __attribute__((always_inline))

template <class A> struct Lanes {
  static constexpr int width = FFF_BYTES / sizeof(A);
  typedef A vector __attribute__((vector_size(FFF_BYTES)));
};
template <class A> using Vec = typename Lanes<A>::vector;

template <class A> FFF_INLINE Vec<A> zero() { return Vec<A>{}; }

template <class A> FFF_INLINE Vec<A> broadcast(A a) { return a - Vec<A>{}; }

// Keeps what was loaded in a register: GCC would rather load it again for each of its uses.
template <class V> FFF_INLINE V in_register(V v) {
#if defined(__x86_64__) && FFF_BYTES == 64
  asm("" : "+v"(v));
#elif defined(__x86_64__)
  asm("" : "+x"(v));
#endif
  return v;
}

// ---- loads: storage -> accumulator --------------------------------------------------------------------------------
FFF_INLINE Vec<float> load(const float* p) { Vec<float> v; std::memcpy(&v, p, sizeof v); return v; }
FFF_INLINE Vec<double> load(const double* p) { Vec<double> v; std::memcpy(&v, p, sizeof v); return v; }

FFF_INLINE Vec<float> load(const bfloat16* p) {
#if defined(__x86_64__) && FFF_BYTES == 64  // GCC 12 makes six instructions of the vectors' conversion
  return (Vec<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16);
#elif defined(__x86_64__) && FFF_BYTES == 32
  return (Vec<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16);
#else
  constexpr int width = Lanes<float>::width;
  typedef uint16_t half_vector __attribute__((vector_size(FFF_BYTES / 2)));
  typedef uint32_t full_vector __attribute__((vector_size(FFF_BYTES)));
  static_assert(sizeof(half_vector) == width * 2, "a half vector holds as many elements");
  half_vector h;
  std::memcpy(&h, p, sizeof h);
  full_vector wide = __builtin_convertvector(h, full_vector) << 16;
  Vec<float> v;
  std::memcpy(&v, &wide, sizeof v);
  return v;
#endif
}

FFF_INLINE Vec<float> load(const float16* p) {
#if defined(__x86_64__) && FFF_BYTES == 64
  return (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__x86_64__) && FFF_BYTES == 32
  return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Vec<float> v;
  for (int i = 0; i < Lanes<float>::width; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}

template <class A> FFF_INLINE void store(A* p, Vec<A> v) { std::memcpy(p, &v, sizeof v); }

// a * b + c, rounded once where the instruction set can, for vectors and numbers. Sources are compiled without contraction (-ffp-contract=off),
// which would fuse here and not there, by a compiler's version and by what stands around: a token's result must not depend on whether it
// comes alone.
#if defined(__x86_64__) && FFF_BYTES == 64
FFF_INLINE Vec<float> fused(Vec<float> a, Vec<float> b, Vec<float> c) { return (Vec<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
FFF_INLINE Vec<double> fused(Vec<double> a, Vec<double> b, Vec<double> c) {
  return (Vec<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
}
#elif defined(__x86_64__) && FFF_BYTES == 32
FFF_INLINE Vec<float> fused(Vec<float> a, Vec<float> b, Vec<float> c) { return (Vec<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
FFF_INLINE Vec<double> fused(Vec<double> a, Vec<double> b, Vec<double> c) {
  return (Vec<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
}
#elif defined(__aarch64__)
FFF_INLINE Vec<float> fused(Vec<float> a, Vec<float> b, Vec<float> c) { return (Vec<float>)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
FFF_INLINE Vec<double> fused(Vec<double> a, Vec<double> b, Vec<double> c) {
  return (Vec<double>)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
}
#else
template <class V> FFF_INLINE V fused(V a, V b, V c) { return a * b + c; }
#endif
#if FFF_BYTES > 16 || defined(__aarch64__)
FFF_INLINE float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
FFF_INLINE double fused(double a, double b, double c) { return __builtin_fma(a, b, c); }
#endif

// ---- sum over the lanes, always in the same order -------------------------------------------------------------------
template <class A> FFF_INLINE A sum(Vec<A> v) {
#if defined(__x86_64__) && FFF_BYTES == 64
  if constexpr (std::is_same_v<A, float>) return _mm512_reduce_add_ps((__m512)v);
  else return _mm512_reduce_add_pd((__m512d)v);
#else
  A lanes[Lanes<A>::width];
  std::memcpy(lanes, &v, sizeof v);
  for (int step = Lanes<A>::width / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) lanes[i] += lanes[i + step];
  return lanes[0];
#endif
}

FFF_INLINE void prefetch_row(const void* row, int64_t bytes) {
  const char* p = static_cast<const char*>(row);
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i);
}
