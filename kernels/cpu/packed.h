// The forward pass over packed rows. Included by packed.cpp once per instruction set, after simd.h. No include guard: that is the
// point.
//
// Integers are the same on every instruction set, and so are the floating point operations around them, as none of them is
// fused with another: results are the same bit for bit.

// Keeps the compiler from fusing a product with the sum that it goes into.
template <class V> FFF_INLINE V rounded(V v) {
#if defined(__x86_64__) && FFF_BYTES == 64
  asm("" : "+v"(v));
#elif defined(__x86_64__)
  asm("" : "+x"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#else
  asm("" : "+m"(v));
#endif
  return v;
}
template <class V, class W> FFF_INLINE V product(V a, W b) { return rounded<V>(a * b); }

typedef int32_t IntVec __attribute__((vector_size(FFF_BYTES)));
typedef uint32_t UintVec __attribute__((vector_size(FFF_BYTES)));
constexpr int lanes = FFF_BYTES / 4;
template <class To, class From> FFF_INLINE To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
FFF_INLINE Vec<float> to_floats(IntVec v) { return __builtin_convertvector(v, Vec<float>); }
FFF_INLINE Vec<float> magnitude(Vec<float> v) { return bits_of<Vec<float>>(bits_of<UintVec>(v) & 0x7fffffffu); }

// ---- activations, as in activation.h, one rounding an operation --------------------------------------------------------------
FFF_INLINE Vec<float> within(Vec<float> x, float limit) {  // a NaN stays one
  x = x < -limit ? broadcast<float>(-limit) : x;
  return x > limit ? broadcast<float>(limit) : x;
}

FFF_INLINE Vec<float> erf_vector(Vec<float> x) {
  x = within(x, 4.f);
  const Vec<float> s = product(x, x);
  Vec<float> p = broadcast(-2.72614225801306e-10f);
  for (float c : {2.77068142495902e-08f, -2.10102402082508e-06f, -5.69250639462346e-05f, -7.34990630326855e-04f,
                  -2.95459980854025e-03f, -1.60960333262415e-02f})
    p = product(p, s) + c;
  Vec<float> q = broadcast(-1.45660718464996e-05f);
  for (float c : {-2.13374055278905e-04f, -1.68282697438203e-03f, -7.37332916720468e-03f, -1.42647390514189e-02f})
    q = product(q, s) + c;
  return product(x, p) / q;
}

FFF_INLINE Vec<float> exp_vector(Vec<float> x) {
  x = within(x, 87.f);
  const Vec<float> shifted = product(x, 1.44269504f) + 12582912.f, n = shifted - 12582912.f;
  Vec<float> r = x - product(n, 0.693145752f);
  r = r - product(n, 1.42860677e-6f);
  Vec<float> p = broadcast(1.98756915e-4f);
  for (float c : {1.39819995e-3f, 8.33345192e-3f, 4.16657962e-2f, 1.66666655e-1f, 5.00000012e-1f}) p = product(p, r) + c;
  p = product(p, product(r, r)) + r;
  return product(p + 1.f, bits_of<Vec<float>>((bits_of<UintVec>(shifted) << 23) + 0x3f800000u));
}

FFF_INLINE Vec<float> activated(Activation activation, Vec<float> z) {
  switch (activation) {
    case Activation::gelu:
      return product(product(z, 0.5f), erf_vector(product(z, 0.70710678118654752440f)) + 1.f);
    case Activation::gelu_new: {
      const Vec<float> u = product(product(z, 1.59576912160573071176f), product(product(z, z), 0.044715f) + 1.f);
      return product(z, 1.f / (1.f + exp_vector(-u)));
    }
    case Activation::relu: return z <= 0.f ? zero<float>() : z;
    case Activation::silu: return product(z, 1.f / (1.f + exp_vector(-z)));
    case Activation::identity: break;
  }
  return z;
}

// ---- products of bytes --------------------------------------------------------------------------------------------------------
struct Bytes { UintVec v; };
FFF_INLINE Bytes load_bytes(const uint8_t* p) {  // by way of a vector: GCC copies a struct of 32 bytes in halves, through memory
  UintVec v;
  std::memcpy(&v, p, sizeof v);
  return {v};
}
FFF_INLINE Bytes repeat(uint32_t word) { return {word - UintVec{}}; }

// Sums of products of 4 bytes, -127 to 127. Rows of weight_out are stored with 128 added, and so are tokens where `shift` is 128: for
// an instruction that multiplies unsigned bytes by signed ones, whose sums are `excess` times the signed ones' sum too large.
struct Int8 {
  using Lane = int32_t;
  static constexpr Rows rows = Rows::int8;
#if defined(FFF_VNNI)
  using Factors = Bytes;
  static constexpr int32_t shift = 128, excess = 128;
  static FFF_INLINE IntVec add(IntVec sum, Bytes token, Bytes row) {
    return (IntVec)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)token.v, (__m512i)row.v);
  }
  static FFF_INLINE Factors factors(uint32_t word) { return repeat(word); }
  static FFF_INLINE IntVec add_group(IntVec sum, Bytes group, Factors f) { return add(sum, group, f); }
#elif defined(__x86_64__) && FFF_BYTES == 32
  // One's magnitude by the other with the sign of both, so that pairs of products fit 16 bits.
  struct Factors { __m256i value, magnitude; };
  static constexpr int32_t shift = 0, excess = 0;
  static FFF_INLINE IntVec add(IntVec sum, __m256i magnitude, __m256i other) {
    return sum + (IntVec)_mm256_madd_epi16(_mm256_maddubs_epi16(magnitude, other), _mm256_set1_epi16(1));
  }
  static FFF_INLINE IntVec add(IntVec sum, Bytes token, Bytes row) {
    return add(sum, _mm256_abs_epi8((__m256i)token.v), _mm256_sign_epi8((__m256i)row.v, (__m256i)token.v));
  }
  static FFF_INLINE Factors factors(uint32_t word) {
    const __m256i value = (__m256i)repeat(word).v;
    return {value, _mm256_abs_epi8(value)};
  }
  static FFF_INLINE IntVec add_group(IntVec sum, Bytes group, Factors f) {
    return add(sum, f.magnitude, _mm256_sign_epi8((__m256i)(group.v ^ 0x80808080u), f.value));
  }
#else
  using Factors = Bytes;
  static constexpr int32_t shift = 0, excess = 0;
  static FFF_INLINE IntVec add(IntVec sum, Bytes token, Bytes row) {
    for (int shift = 24; shift >= 0; shift -= 8)  // a byte to the top of its lane and down again, with its sign
      sum += (bits_of<IntVec>(token.v << shift) >> 24) * (bits_of<IntVec>(row.v << shift) >> 24);
    return sum;
  }
  static FFF_INLINE Factors factors(uint32_t word) { return repeat(word); }
  static FFF_INLINE IntVec add_group(IntVec sum, Bytes group, Factors f) { return add(sum, Bytes{group.v ^ 0x80808080u}, f); }
#endif
};

// Sums of products of 2 bf16 numbers.
struct Bf16 {
  using Lane = float;
  using Factors = Bytes;
  static constexpr Rows rows = Rows::bf16;
  static constexpr int32_t excess = 0;
  static FFF_INLINE Factors factors(uint32_t word) { return repeat(word); }
  static FFF_INLINE Vec<float> add_group(Vec<float> sum, Bytes group, Factors f) { return add(sum, group, f); }
#ifdef FFF_BF16
  static FFF_INLINE Vec<float> add(Vec<float> sum, Bytes a, Bytes b) {
    return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a.v, (__m512bh)b.v);
  }
#else
  static FFF_INLINE Vec<float> add(Vec<float> sum, Bytes a, Bytes b) {
    sum = fused(bits_of<Vec<float>>(a.v & 0xffff0000u), bits_of<Vec<float>>(b.v & 0xffff0000u), sum);
    return fused(bits_of<Vec<float>>(a.v << 16), bits_of<Vec<float>>(b.v << 16), sum);
  }
#endif
};

#if defined(__x86_64__) && FFF_BYTES == 64
template <class V> FFF_INLINE V low_words(V a, V b) { return (V)_mm512_unpacklo_epi32((__m512i)a, (__m512i)b); }
template <class V> FFF_INLINE V high_words(V a, V b) { return (V)_mm512_unpackhi_epi32((__m512i)a, (__m512i)b); }
#elif defined(__x86_64__) && FFF_BYTES == 32
template <class V> FFF_INLINE V low_words(V a, V b) { return (V)_mm256_unpacklo_epi32((__m256i)a, (__m256i)b); }
template <class V> FFF_INLINE V high_words(V a, V b) { return (V)_mm256_unpackhi_epi32((__m256i)a, (__m256i)b); }
#endif

template <class A> struct FourOf { typedef A type __attribute__((vector_size(16))); };
template <class A> using Four = typename FourOf<A>::type;
template <class A> FFF_INLINE Four<A> load_four(const A* p) { Four<A> v; std::memcpy(&v, p, sizeof v); return v; }

// What is known of four nodes.
FFF_INLINE void nodes_of(const Node* nodes, const int32_t* at, Four<float>* scale_in, Four<float>* bias, Four<float>* scale_out,
                         Four<int32_t>* row_sum) {
#if defined(__x86_64__)
  const auto of = [&](int i) { return _mm_loadu_ps(&nodes[at[i]].scale_in); };
  __m128 a = of(0), b = of(1), c = of(2), d = of(3);
  _MM_TRANSPOSE4_PS(a, b, c, d);
  *scale_in = (Four<float>)a, *bias = (Four<float>)b, *scale_out = (Four<float>)c, *row_sum = (Four<int32_t>)d;
#else
  for (int i = 0; i < 4; ++i) {
    const Node& node = nodes[at[i]];
    (*scale_in)[i] = node.scale_in, (*bias)[i] = node.bias, (*scale_out)[i] = node.scale_out, (*row_sum)[i] = node.row_sum;
  }
#endif
}

// The sums over the lanes of four vectors, always in the same order.
template <class A> FFF_INLINE Four<A> sum_four(const Vec<A>* v) {
#if defined(__x86_64__) && FFF_BYTES == 64
  const Vec<A> ab = low_words(v[0], v[1]) + high_words(v[0], v[1]), cd = low_words(v[2], v[3]) + high_words(v[2], v[3]);
  const Vec<A> abcd = (Vec<A>)_mm512_unpacklo_epi64((__m512i)ab, (__m512i)cd) +
                      (Vec<A>)_mm512_unpackhi_epi64((__m512i)ab, (__m512i)cd);
  typedef A Half __attribute__((vector_size(32)));
  const Half half = (Half)_mm512_castsi512_si256((__m512i)abcd) + (Half)_mm512_extracti64x4_epi64((__m512i)abcd, 1);
  return (Four<A>)_mm256_castsi256_si128((__m256i)half) + (Four<A>)_mm256_extracti128_si256((__m256i)half, 1);
#elif defined(__x86_64__) && FFF_BYTES == 32
  const Vec<A> ab = low_words(v[0], v[1]) + high_words(v[0], v[1]), cd = low_words(v[2], v[3]) + high_words(v[2], v[3]);
  const Vec<A> abcd = (Vec<A>)_mm256_unpacklo_epi64((__m256i)ab, (__m256i)cd) +
                      (Vec<A>)_mm256_unpackhi_epi64((__m256i)ab, (__m256i)cd);
  return (Four<A>)_mm256_castsi256_si128((__m256i)abcd) + (Four<A>)_mm256_extracti128_si256((__m256i)abcd, 1);
#else
  Four<A> out;
  for (int i = 0; i < 4; ++i) {
    A lane[FFF_BYTES / sizeof(A)];
    std::memcpy(lane, v + i, sizeof lane);
    for (int step = lanes / 2; step > 0; step /= 2)
      for (int k = 0; k < step; ++k) lane[k] += lane[k + step];
    out[i] = lane[0];
  }
  return out;
#endif
}

// ---- 1. tokens ------------------------------------------------------------------------------------------------------------------
constexpr float smallest = 0x1p-100f;  // a row whose numbers are all below it is a row of zeros

FFF_INLINE uint32_t largest(UintVec v) {
#if defined(__x86_64__) && FFF_BYTES == 32
  __m128i most = _mm_max_epu32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
  most = _mm_max_epu32(most, _mm_shuffle_epi32(most, 0x4e));
  return uint32_t(_mm_cvtsi128_si32(_mm_max_epu32(most, _mm_shuffle_epi32(most, 0xb1))));
#else
  uint32_t most = 0;
  for (int i = 0; i < lanes; ++i) most = std::max(most, v[i]);
  return most;
#endif
}

// What the largest magnitude of a row, as bits, makes of it: integers are values times `up`, values integers times `down`.
// Not finite: integers are zero, and what comes of them a NaN.
struct Scale { float up, down; };
inline Scale scale_of(uint32_t most) {
  const float m = bits_to_float(most);
  if (most >= 0x7f800000u) return {0.f, bits_to_float(0x7fc00000u)};
  return m < smallest ? Scale{0.f, 0.f} : Scale{127.f / m, m / 127.f};
}

FFF_INLINE IntVec to_integers(Vec<float> v, float up) {  // to nearest, ties to even; a NaN becomes something
  const Vec<float> shifted = product(v, up) + 12582912.f;
  return bits_of<IntVec>(shifted) - 0x4b400000;
}

FFF_INLINE void store_bytes(uint8_t* to, IntVec v) {
#if defined(__x86_64__) && FFF_BYTES == 64
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8((__m512i)v));
#elif defined(__x86_64__) && FFF_BYTES == 32  // what is stored fits the saturating instructions
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(words, words));
#else
  typedef uint8_t Narrow __attribute__((vector_size(lanes)));
  const Narrow narrow = __builtin_convertvector(bits_of<UintVec>(v), Narrow);
  std::memcpy(to, &narrow, sizeof narrow);
#endif
}

FFF_INLINE void store_bf16(uint8_t* to, Vec<float> v) {  // to nearest, ties to even
  typedef uint16_t Narrow __attribute__((vector_size(FFF_BYTES / 2)));
  const UintVec bits = bits_of<UintVec>(v);
  const UintVec near = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const UintVec none = (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u - UintVec{} : near;
  const Narrow narrow = __builtin_convertvector(none, Narrow);
  std::memcpy(to, &narrow, sizeof narrow);
}

// The tokens' rows in the type of the weights, padded: bytes with K::shift added, or bf16.
template <class K, class T> FFF_TARGET void pack_tokens(const Packed& p, const T* x, int64_t begin, int64_t end) {
  const int64_t hidden = p.layout.hidden, padded = p.layout.padded, whole = hidden / lanes * lanes;
  for (int64_t t = begin; t < end; ++t) {
    const T* row = x + t * hidden;
    uint8_t* to = p.x + t * p.layout.row_bytes;
    const char* ahead = reinterpret_cast<const char*>(x + std::min(t + 3, end - 1) * hidden);
    for (int64_t i = 0; i < hidden * int64_t(sizeof(T)); i += 64) __builtin_prefetch(ahead + i, 0, 2);
    float last[lanes] = {};
    for (int64_t i = whole; i < hidden; ++i) last[i - whole] = to_accumulator(row[i]);
    const Vec<float> rest = load(last);
    if constexpr (K::rows == Rows::int8) {
      UintVec most = bits_of<UintVec>(magnitude(rest));
      for (int64_t i = 0; i < whole; i += lanes) {
        const UintVec m = bits_of<UintVec>(magnitude(load(row + i)));
        most = m > most ? m : most;
      }
      const Scale scale = scale_of(largest(most));
      p.x_scale[t] = scale.down;
      for (int64_t i = 0; i < whole; i += lanes) store_bytes(to + i, to_integers(load(row + i), scale.up) + K::shift);
      if (whole < padded) store_bytes(to + whole, to_integers(rest, scale.up) + K::shift);
      for (int64_t i = whole + lanes; i < padded; i += lanes) store_bytes(to + i, K::shift - IntVec{});
    } else {
      for (int64_t i = 0; i < whole; i += lanes) store_bf16(to + 2 * i, load(row + i));
      for (int64_t i = whole; i < padded; i += lanes) store_bf16(to + 2 * i, i == whole ? rest : zero<float>());
    }
  }
}

// ---- 2. down the trees ------------------------------------------------------------------------------------------------------------
// Walks of the tokens order[0, n) (null: first, first + 1, ...) in the trees [tree, tree_end), from `level` to `end`. Some go
// down side by side, four sums at a time; what they read next is fetched from level `fetched` on.
template <class K>
FFF_TARGET void walk_packed(const Packed& p, const int32_t* order, int64_t first, int64_t n, int64_t tree, int64_t tree_end,
                     int64_t level, int64_t end, int64_t fetched) {
  using Lane = typename K::Lane;
  constexpr int64_t side = 8;
  const Layout& l = p.layout;
  const int64_t trees = l.trees, row_bytes = l.row_bytes, walks = n * (tree_end - tree);
  const Node* nodes = p.nodes();
  const uint8_t* rows = p.data + l.in_at;
  int64_t token[side], number[side];
  alignas(16) int32_t at[side];  // nodes among those of all trees
  alignas(16) int32_t child[side];  // 2 at + child: the left child
  alignas(16) float x_scale[side] = {};
  const uint8_t* x[side];
  alignas(64) float z[(most_levels + 1) * side], scale[(most_levels + 1) * side];
  int64_t i = 0, k = tree;  // the next walk's token and tree
  for (int64_t walk = 0; walk < walks; walk += side) {
    const int64_t count = std::min(side, walks - walk);
    for (int64_t s = 0; s < side; ++s) {
      if (s < count) {
        token[s] = order ? order[i] : first + i, number[s] = k;
        at[s] = int32_t(k * l.tree_nodes) + (level ? p.node[token[s] * trees + k] : 0);
        child[s] = 1 - int32_t(k * l.tree_nodes);
        x[s] = p.x + token[s] * row_bytes;
        if constexpr (K::rows == Rows::int8) x_scale[s] = p.x_scale[token[s]];
        if (++i == n) i = 0, ++k;
      } else {
        token[s] = token[s - 1], number[s] = number[s - 1], at[s] = at[s - 1], child[s] = child[s - 1], x[s] = x[s - 1];
        x_scale[s] = x_scale[s - 1];
      }
    }
    for (int64_t d = level; d < end; ++d)
      for (int64_t s = 0; s < count; s += 4) {
        const int64_t some = std::min<int64_t>(4, count - s);
        const uint8_t* row[4];
        for (int j = 0; j < 4; ++j) row[j] = rows + at[s + j] * row_bytes;
        Vec<Lane> sum[4] = {};
        if (some == 4) {
          Vec<Lane> other[4] = {};
          int64_t b = 0;
          for (; b + 2 * FFF_BYTES <= row_bytes; b += 2 * FFF_BYTES)
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) {
              sum[j] = K::add(sum[j], load_bytes(x[s + j] + b), load_bytes(row[j] + b));
              other[j] = K::add(other[j], load_bytes(x[s + j] + b + FFF_BYTES), load_bytes(row[j] + b + FFF_BYTES));
            }
          for (; b < row_bytes; b += FFF_BYTES)
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) sum[j] = K::add(sum[j], load_bytes(x[s + j] + b), load_bytes(row[j] + b));
#pragma GCC unroll 4
          for (int j = 0; j < 4; ++j) sum[j] += other[j];
        } else {  // in the same order
          for (int j = 0; j < some; ++j) {
            Vec<Lane> even{}, odd{};
            int64_t b = 0;
            for (; b + 2 * FFF_BYTES <= row_bytes; b += 2 * FFF_BYTES) {
              even = K::add(even, load_bytes(x[s + j] + b), load_bytes(row[j] + b));
              odd = K::add(odd, load_bytes(x[s + j] + b + FFF_BYTES), load_bytes(row[j] + b + FFF_BYTES));
            }
            for (; b < row_bytes; b += FFF_BYTES) even = K::add(even, load_bytes(x[s + j] + b), load_bytes(row[j] + b));
            sum[j] = even + odd;
          }
          for (int64_t j = some; j < 4; ++j) sum[j] = sum[some - 1];  // of a walk that is the one before it
        }
        const Four<Lane> total = sum_four<Lane>(sum);
        Four<float> scale_in, bias, scale_out;
        Four<int32_t> row_sum;
        nodes_of(nodes, at + s, &scale_in, &bias, &scale_out, &row_sum);
        Four<float> logit;
        if constexpr (K::rows == Rows::int8)
          logit = product(__builtin_convertvector(total - K::excess * row_sum, Four<float>),
                          product(load_four(x_scale + s), scale_in)) + bias;
        else logit = total + bias;
        std::memcpy(z + (d - level) * side + s, &logit, 16);
        std::memcpy(scale + (d - level) * side + s, &scale_out, 16);
        if (d + 1 == l.levels) continue;
        const Four<int32_t> here = load_four(at + s), next = here + here + load_four(child + s) - (logit > 0.f);
        std::memcpy(at + s, &next, 16);
        if (d + 1 >= fetched)
          for (int j = 0; j < some; ++j) {
            prefetch_row(rows + at[s + j] * row_bytes, row_bytes);
            __builtin_prefetch(nodes + at[s + j]);
          }
      }
    for (int64_t v = 0; v < (end - level) * side; v += lanes) {
      const Vec<float> a = activated(p.activation, load(z + v));
      store<float>(z + v, K::rows == Rows::int8 ? product(a, load(scale + v)) : a);
    }
    for (int64_t s = 0; s < count; ++s) {
      float* value = p.value + token[s] * l.values();
      float *top = value + l.top_value(number[s]), *body = value + l.body_value(number[s]) - l.top_levels;
      for (int64_t d = level; d < end; ++d) (d < l.top_levels ? top : body)[d] = z[(d - level) * side + s];
      p.node[token[s] * trees + number[s]] = at[s] - 1 + child[s];
    }
  }
}

// ---- 3. terms ---------------------------------------------------------------------------------------------------------------------
// Which groups of output rows a token adds up, and with which factors, in the type of the rows.
template <class K> FFF_TARGET void terms(const Packed& p, const int32_t* order, int64_t first, int64_t n) {
  const Layout& l = p.layout;
  const int64_t values = l.values(), count = l.terms();
  for (int64_t i = 0; i < n; ++i) {
    const int64_t t = order ? order[i] : first + i;
    const float* value = p.value + t * values;
    const int32_t* leaf = p.node + t * l.trees;
    Term* term = p.term + t * count;
    uint8_t bytes[4 * lanes];
    const auto words = [&](int64_t at, int64_t of) FFF_TARGET {  // the factors of the groups from `at` on
      for (int64_t g = 0; g < of; ++g) std::memcpy(&term[at + g].factors, bytes + 4 * g, 4);
    };
    Sum& sum = p.sum[t];
    if constexpr (K::rows == Rows::int8) {
      UintVec most{};
      int64_t v = 0;
      for (; v + lanes <= values; v += lanes) {
        const UintVec m = bits_of<UintVec>(magnitude(load(value + v)));
        most = m > most ? m : most;
      }
      float rest[lanes] = {};
      std::copy(value + v, value + values, rest);
      const UintVec m = bits_of<UintVec>(magnitude(load(rest)));
      const Scale scale = scale_of(largest(m > most ? m : most));
      IntVec total{};
      for (v = 0; v < values; v += lanes) {
        const IntVec q = to_integers(v + lanes <= values ? load(value + v) : load(rest), scale.up);
        total += q;
        store_bytes(bytes, q);
        words(v / 4, std::min<int64_t>(lanes, values - v) / 4);
      }
      int32_t all = 0;
      for (int j = 0; j < lanes; ++j) all += total[j];
      sum = {-K::excess * all, scale.down};
    } else {
      for (int64_t v = 0; v < values; v += lanes) {
        float part[lanes] = {};
        const int64_t some = std::min<int64_t>(lanes, values - v);
        std::copy_n(value + v, some, part);
        store_bf16(bytes, load(part));
        words(v / 2, some / 2);
      }
      sum = {0, 1.f};
    }
    for (int64_t top = 0; top < l.tops; ++top) {
      int64_t group = l.top_group(top);
      for (int64_t k = top * l.top_trees; k < std::min(l.trees, (top + 1) * l.top_trees); ++k) group += l.top_choice(k, leaf[k]);
      term[top].group = uint32_t(group);
    }
    int64_t base = l.tops * l.top_choices;
    Term* next = term + l.tops;
    for (int64_t k = 0; k < l.trees; ++k)
      for (int64_t g = 0; g < l.body; ++g, ++next) {
        const int64_t last = l.last_level(g), width = int64_t{1} << last;
        next->group = uint32_t(base + ((leaf[k] + 1) >> (l.levels - 1 - last)) - width);
        base += width;
      }
  }
}

// ---- 4. outputs -------------------------------------------------------------------------------------------------------------------
// The columns of the parts [part, part_end) of the tokens' outputs. Tokens take turns inside a part, or with one tree the other
// way round: see layout.h.
template <class K, class T>
FFF_TARGET void add_groups(const Packed& p, const int32_t* order, int64_t first, int64_t n, int64_t part, int64_t part_end, T* y) {
  using Lane = typename K::Lane;
  constexpr int vectors = piece_bytes / FFF_BYTES;
  const Layout& l = p.layout;
  const int64_t count = l.terms(), all_parts = part_end - part, hidden = l.hidden;
  const bool one_tree = l.trees == 1;
  for (int64_t step = 0; step < n * all_parts; ++step) {
    const int64_t i = one_tree ? step / all_parts : step % n, c = part + (one_tree ? step % all_parts : step / n);
    const int64_t t = order ? order[i] : first + i;
    const Term* term = p.term + t * count;
    const uint8_t* base = p.data + l.out_at + c * l.part_stride;
    const Sum sum = p.sum[t];
    Vec<Lane> even[vectors], odd[vectors] = {};  // where registers hold both: a sum's next product need not wait for the last
    for (int v = 0; v < vectors; ++v) even[v] = Lane(sum.start) - Vec<Lane>{};
    const auto add = [&](Vec<Lane>* to, int64_t g) FFF_TARGET __attribute__((always_inline)) {
      const uint8_t* group = base + term[g].group * l.group_stride;
      const typename K::Factors factors = K::factors(term[g].factors);
#pragma GCC unroll 16
      for (int v = 0; v < vectors; ++v) to[v] = K::add_group(to[v], load_bytes(group + v * FFF_BYTES), factors);
    };
    int64_t g = 0;
    if constexpr (vectors <= 4)
      for (; g + 2 <= count; g += 2) add(even, g), add(odd, g + 1);
    for (; g < count; ++g) add(even, g);
    T* out = y + t * hidden + c * piece_columns;
    const bool whole = (c + 1) * piece_columns <= hidden;
    float result[piece_columns];
    float* to = result;
    if constexpr (std::is_same_v<T, float>) to = whole ? out : result;
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) {
      const Vec<Lane> s = even[v] + odd[v];
      if constexpr (K::rows == Rows::int8) store<float>(to + v * lanes, product(to_floats(s), sum.scale));
      else store<float>(to + v * lanes, s);
    }
    if constexpr (std::is_same_v<T, bfloat16>) {
      if (whole) {
        for (int v = 0; v < vectors; ++v) store_bf16(reinterpret_cast<uint8_t*>(out + v * lanes), load(result + v * lanes));
        continue;
      }
    }
    if (to == result) store_converted(out, result, std::min(piece_columns, hidden - c * piece_columns));
  }
}

#define FFF_PACKED_KERNELS(K)                                                                                      \
  template <class T> constexpr PackedKernels<T> packed_kernels_##K{pack_tokens<K, T>, walk_packed<K>, terms<K>, \
                                                                  add_groups<K, T>};
