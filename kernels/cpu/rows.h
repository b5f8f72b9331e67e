// Sums of products of rows: what both passes are made of. Included once per instruction set, after simd.h.
// No include guard: that is the point.

// <a, b> over n elements. Four running sums hide the latency of the additions.
template <class T> FFF_INLINE accumulator_t<T> dot(const T* a, const T* b, int64_t n) {
  using A = accumulator_t<T>;
  constexpr int w = Lanes<A>::width;
  Vec<A> s0 = zero<A>(), s1 = s0, s2 = s0, s3 = s0;
  int64_t i = 0;
  for (; i + 4 * w <= n; i += 4 * w) {
    s0 = fused(load(a + i), load(b + i), s0);
    s1 = fused(load(a + i + w), load(b + i + w), s1);
    s2 = fused(load(a + i + 2 * w), load(b + i + 2 * w), s2);
    s3 = fused(load(a + i + 3 * w), load(b + i + 3 * w), s3);
  }
  for (; i + w <= n; i += w) s0 = fused(load(a + i), load(b + i), s0);
  A total = sum<A>((s0 + s1) + (s2 + s3));
  for (; i < n; ++i) total = fused(to_accumulator(a[i]), to_accumulator(b[i]), total);
  return total;
}

#ifdef FFF_BF16
// bfloat16 has an instruction of its own: 32 products at a time, summed in pairs in float.
FFF_INLINE __m512bh load_pairs(const bfloat16* p) { return (__m512bh)_mm512_loadu_si512(p); }

FFF_INLINE float dot(const bfloat16* a, const bfloat16* b, int64_t n) {
  __m512 s0 = _mm512_setzero_ps(), s1 = s0, s2 = s0, s3 = s0;
  int64_t i = 0;
  for (; i + 128 <= n; i += 128) {
    s0 = _mm512_dpbf16_ps(s0, load_pairs(a + i), load_pairs(b + i));
    s1 = _mm512_dpbf16_ps(s1, load_pairs(a + i + 32), load_pairs(b + i + 32));
    s2 = _mm512_dpbf16_ps(s2, load_pairs(a + i + 64), load_pairs(b + i + 64));
    s3 = _mm512_dpbf16_ps(s3, load_pairs(a + i + 96), load_pairs(b + i + 96));
  }
  for (; i + 32 <= n; i += 32) s0 = _mm512_dpbf16_ps(s0, load_pairs(a + i), load_pairs(b + i));
  float total = _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(s0, s1), _mm512_add_ps(s2, s3)));
  for (; i < n; ++i) total = fused(to_float(a[i]), to_float(b[i]), total);
  return total;
}
#endif

// out[k] = <a, rows[k]>. Elements of `a` are loaded once for all rows.
template <int rows, class T> FFF_INLINE void dots(const T* a, const T* const* row, int64_t n, accumulator_t<T>* out) {
  using A = accumulator_t<T>;
  constexpr int w = Lanes<A>::width;
  Vec<A> s[rows][4];
#pragma GCC unroll 16
  for (int k = 0; k < 4 * rows; ++k) s[k / 4][k % 4] = zero<A>();
  int64_t i = 0;
  for (; i + 4 * w <= n; i += 4 * w)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const Vec<A> v = in_register(load(a + i + j * w));
#pragma GCC unroll 4
      for (int k = 0; k < rows; ++k) s[k][j] = fused(v, load(row[k] + i + j * w), s[k][j]);
    }
  for (; i + w <= n; i += w)
    for (int k = 0; k < rows; ++k) s[k][0] = fused(load(a + i), load(row[k] + i), s[k][0]);
  for (int k = 0; k < rows; ++k) {
    A total = sum<A>((s[k][0] + s[k][1]) + (s[k][2] + s[k][3]));
    for (int64_t j = i; j < n; ++j) total = fused(to_accumulator(a[j]), to_accumulator(row[k][j]), total);
    out[k] = total;
  }
}

constexpr int rows_at_once = FFF_BYTES == 64 ? 4 : 2;  // for `dots`, what fits the registers

// sums[offset : offset + vectors * width] (+)= sum over k of coefficient[k] * rows[k], in the order of k, in registers.
template <int vectors, class T>
FFF_INLINE void combine_block(const accumulator_t<T>* coefficient, const T* const* rows, int64_t count, int64_t offset,
                              bool add, accumulator_t<T>* sums) {
  using A = accumulator_t<T>;
  constexpr int w = Lanes<A>::width;
  Vec<A> s[vectors];
  for (int v = 0; v < vectors; ++v) s[v] = add ? load(sums + offset + v * w) : zero<A>();
  for (int64_t k = 0; k < count; ++k) {
    const Vec<A> c = broadcast<A>(coefficient[k]);
    const T* row = rows[k] + offset;
#pragma GCC unroll 32
    for (int v = 0; v < vectors; ++v) s[v] = fused(c, load(row + v * w), s[v]);
  }
  for (int v = 0; v < vectors; ++v) store<A>(sums + offset + v * w, s[v]);
}

// The same for two tokens, whose first `shared` rows are the same and are loaded once. The second one's coefficients and
// rows follow the first one's.
template <int vectors, class T>
FFF_INLINE void combine_pair(const accumulator_t<T>* coefficient, const T* const* rows, int64_t count, int64_t shared,
                             int64_t offset, bool add, accumulator_t<T>* sums_a, accumulator_t<T>* sums_b) {
  using A = accumulator_t<T>;
  constexpr int w = Lanes<A>::width;
  Vec<A> a[vectors], b[vectors];
  for (int v = 0; v < vectors; ++v) a[v] = add ? load(sums_a + offset + v * w) : zero<A>();
  for (int v = 0; v < vectors; ++v) b[v] = add ? load(sums_b + offset + v * w) : zero<A>();
  for (int64_t k = 0; k < shared; ++k) {
    const Vec<A> ca = broadcast<A>(coefficient[k]), cb = broadcast<A>(coefficient[count + k]);
    const T* row = rows[k] + offset;
#pragma GCC unroll 32
    for (int v = 0; v < vectors; ++v) {
      const Vec<A> r = in_register(load(row + v * w));
      a[v] = fused(ca, r, a[v]);
      b[v] = fused(cb, r, b[v]);
    }
  }
  for (int64_t k = shared; k < count; ++k) {
    const Vec<A> ca = broadcast<A>(coefficient[k]), cb = broadcast<A>(coefficient[count + k]);
    const T *row_a = rows[k] + offset, *row_b = rows[count + k] + offset;
#pragma GCC unroll 32
    for (int v = 0; v < vectors; ++v) {
      a[v] = fused(ca, load(row_a + v * w), a[v]);
      b[v] = fused(cb, load(row_b + v * w), b[v]);
    }
  }
  for (int v = 0; v < vectors; ++v) store<A>(sums_a + offset + v * w, a[v]);
  for (int v = 0; v < vectors; ++v) store<A>(sums_b + offset + v * w, b[v]);
}

constexpr int wide = FFF_BYTES == 64 ? 24 : 12;  // vectors that fit the registers, beside what else is wanted there

// sums (+)= sum over k of coefficient[k] * rows[k], over the elements [from, hidden).
template <class T>
FFF_TARGET void combine(const accumulator_t<T>* coefficient, const T* const* rows, int64_t count, int64_t from,
                        int64_t hidden, bool add, accumulator_t<T>* sums) {
  using A = accumulator_t<T>;
  constexpr int w = Lanes<A>::width;
  int64_t i = from;
  for (; i + wide * w <= hidden; i += wide * w) combine_block<wide>(coefficient, rows, count, i, add, sums);
  for (; i + 4 * w <= hidden; i += 4 * w) combine_block<4>(coefficient, rows, count, i, add, sums);
  for (; i + w <= hidden; i += w) combine_block<1>(coefficient, rows, count, i, add, sums);
  for (; i < hidden; ++i) {
    A s = add ? sums[i] : A(0);
    for (int64_t k = 0; k < count; ++k) s = fused(coefficient[k], to_accumulator(rows[k][i]), s);
    sums[i] = s;
  }
}

// sum[i] (+)= sum over k of coefficient[i][k] * rows[i][k], for some tokens, best sorted so that those that share their first
// rows follow each other. Two at a time, and a part of the columns for all of them, so that what they share is in the
// first-level cache, or in registers.
constexpr int64_t run_tokens = 16, most_levels = 32;

template <class T>
FFF_TARGET void combine_run(const accumulator_t<T>* coefficient, const T* const* rows, int64_t tokens, int64_t levels,
                            int64_t hidden, bool add, accumulator_t<T>* const* sum) {
  constexpr int64_t part = wide / 2 * Lanes<accumulator_t<T>>::width;
  int64_t shared[run_tokens] = {}, column = 0;  // rows that a token shares with the one before it
  for (int64_t i = 1; i < tokens; ++i)
    while (shared[i] < levels && rows[i * levels + shared[i]] == rows[(i - 1) * levels + shared[i]]) ++shared[i];
  for (; column + part <= hidden; column += part)
    for (int64_t i = 0; i < tokens; i += 2) {
      const auto* c = coefficient + i * levels;
      const T* const* r = rows + i * levels;
      if (i + 1 < tokens) combine_pair<wide / 2>(c, r, levels, shared[i + 1], column, add, sum[i], sum[i + 1]);
      else combine_block<wide / 2>(c, r, levels, column, add, sum[i]);
    }
  for (int64_t i = 0; column < hidden && i < tokens; ++i)
    combine(coefficient + i * levels, rows + i * levels, levels, column, hidden, add, sum[i]);
}

// Where sums are kept until they are complete: in the result itself where that has their type.
template <class T> struct Sums {
  using A = accumulator_t<T>;
  std::vector<A> own;
  int64_t hidden;
  Sums(int64_t tokens, int64_t hidden_size) : own(std::is_same_v<T, A> ? 0 : tokens * hidden_size), hidden(hidden_size) {}
  A* row(int64_t i, T* result) {
    if constexpr (std::is_same_v<T, A>) return result;
    else return own.data() + i * hidden;
  }
  void finish(int64_t i, T* result) {
    if constexpr (!std::is_same_v<T, A>) store_converted(result, own.data() + i * hidden, hidden);
  }
};

