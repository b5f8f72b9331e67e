// Instruction sets side by side in one file, the choice between them, and what is common to all: how the work is split.
#include "fff.h"

#include <algorithm>
#include <cstdlib>
#include <string>
#include <type_traits>
#include <vector>

#include "scalar.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace hf_fff {
namespace {

// All visits of a batch, sorted by node: visit order[i] for i in [start[n], start[n + 1]) is one of node n, in the order
// of the tokens. A visit is an index into [tokens, trees, levels].
struct Visits {
  std::vector<int64_t> start, order;
};

// What an instruction set offers.
template <class T> struct Kernels {
  void (*forward_range)(const Forward<T>&, int64_t, int64_t);
  void (*backward_tokens)(const Backward<T>&, accumulator_t<T>*, accumulator_t<T>*, int64_t, int64_t);
  void (*backward_nodes)(const Backward<T>&, const Visits&, const accumulator_t<T>*, const accumulator_t<T>*, int64_t,
                         int64_t, int64_t, int64_t);
  int64_t node_columns;  // columns that backward_nodes handles at a time
};

#define FFF_KERNELS                                                                                                   \
  template <class T> constexpr Kernels<T> kernels{forward_range<T>, backward_tokens<T>, backward_nodes<T>, node_columns};

#if defined(__x86_64__)
namespace avx512 {
#define FFF_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prefer-vector-width=512")))
#define FFF_BYTES 64
#include "simd.h"
#include "kernels.h"
FFF_KERNELS
#undef FFF_INLINE
#undef FFF_BYTES
#undef FFF_TARGET
}  // namespace avx512

namespace avx2 {
#define FFF_TARGET __attribute__((target("avx2,fma,f16c")))
#define FFF_BYTES 32
#include "simd.h"
#include "kernels.h"
FFF_KERNELS
#undef FFF_INLINE
#undef FFF_BYTES
#undef FFF_TARGET
}  // namespace avx2
#endif

namespace baseline {  // what the compiler targets by itself: SSE2, Neon, ...
#define FFF_TARGET
#define FFF_BYTES 16
#include "simd.h"
#include "kernels.h"
FFF_KERNELS
#undef FFF_INLINE
#undef FFF_BYTES
#undef FFF_TARGET
}  // namespace baseline

struct Choice {
  std::string name, error;
};

Choice choose() {
  std::vector<std::string> available;  // best first
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    available.push_back("avx512");
  if (avx2) available.push_back("avx2");
#endif
  available.push_back("baseline");
  const char* wanted = std::getenv("HF_FFF_ISA");
  if (!wanted || !*wanted) return {available.front(), ""};
  if (std::find(available.begin(), available.end(), wanted) != available.end()) return {wanted, ""};
  std::string names;
  for (const auto& name : available) names += (names.empty() ? "" : ", ") + name;
  return {available.front(), "HF_FFF_ISA='" + std::string(wanted) + "' is not available on this machine (available: " + names + ")"};
}

const Choice& choice() {
  static const Choice chosen = choose();
  return chosen;
}

template <class T> const Kernels<T>& pick() {
#if defined(__x86_64__)
  static const Kernels<T>& picked = choice().name == "avx512" ? avx512::kernels<T>
                                    : choice().name == "avx2" ? avx2::kernels<T>
                                                              : baseline::kernels<T>;
  return picked;
#else
  return baseline::kernels<T>;
#endif
}

template <class F> void parallel(const ParallelFor& host, int64_t count, int64_t grain, const F& f) {
  if (count <= 0) return;
  if (count <= grain) return f(0, count);
  host.run(
      count, grain,
      [](void* context, int64_t begin, int64_t end) { (*static_cast<const F*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

// Tokens that are worth a thread of their own: some microseconds of work, at 16 elements of a row in about a nanosecond.
int64_t token_grain(const Shape& s, int64_t rows_per_visit) {
  constexpr int64_t elements = 50'000;
  return std::max<int64_t>(1, elements / std::max<int64_t>(1, s.walk() * rows_per_visit * s.hidden));
}

Visits sort_by_node(const Shape& s, const int32_t* path, const ParallelFor& host) {
  const int64_t levels = s.levels(), walk = s.walk(), tree_nodes = s.tree_nodes();
  Visits v;
  v.start.assign(s.nodes() + 1, 0);
  v.order.resize(s.tokens * walk);
  parallel(host, s.trees, 1, [&](int64_t first, int64_t last) {  // a counting sort a tree
    std::vector<int64_t> next(tree_nodes);
    for (int64_t k = first; k < last; ++k) {
      std::fill(next.begin(), next.end(), 0);
      for (int64_t t = 0; t < s.tokens; ++t)
        for (int64_t l = 0; l < levels; ++l) ++next[path[t * walk + k * levels + l]];
      int64_t at = k * s.tokens * levels;
      for (int64_t n = 0; n < tree_nodes; ++n) {
        v.start[k * tree_nodes + n] = at;
        at += next[n];
        next[n] = v.start[k * tree_nodes + n];
      }
      for (int64_t t = 0; t < s.tokens; ++t)
        for (int64_t l = 0; l < levels; ++l) {
          const int64_t visit = t * walk + k * levels + l;
          v.order[next[path[visit]]++] = visit;
        }
    }
  });
  v.start[s.nodes()] = s.tokens * walk;
  return v;
}

}  // namespace

bool is_valid_path(const Shape& s, const int32_t* path) {
  const int64_t levels = s.levels();
  for (int64_t i = 0; i < s.tokens * s.walk(); ++i)
    if (i % levels == 0 ? path[i] != 0 : (path[i] - 1) >> 1 != path[i - 1]) return false;
  return true;
}

template <class T> void forward(const Forward<T>& f, const ParallelFor& host) {
  const Kernels<T>& k = pick<T>();
  parallel(host, f.shape.tokens, token_grain(f.shape, 2), [&](int64_t begin, int64_t end) { k.forward_range(f, begin, end); });
}

template <class T> void backward(const Backward<T>& b, const ParallelFor& host) {
  using A = accumulator_t<T>;
  const Kernels<T>& k = pick<T>();
  const Shape& s = b.shape;
  std::vector<A> grad_logits(s.tokens * s.walk()), values(s.tokens * s.walk());
  const int64_t rows_per_visit = b.routing_gradient != 0 ? 2 + s.depth : 2;
  parallel(host, s.tokens, token_grain(s, rows_per_visit), [&](int64_t begin, int64_t end) {
    k.backward_tokens(b, grad_logits.data(), values.data(), begin, end);
  });
  if (!b.grad_weight_in) return;

  const Visits visits = sort_by_node(s, b.path, host);
  // Pieces of about equal work: ranges of nodes with about as many visits, times blocks of columns.
  constexpr int64_t pieces = 16, cost_of_a_node = 2;
  std::vector<int64_t> bounds{0};
  const int64_t work = s.tokens * s.walk() + cost_of_a_node * s.nodes();
  for (int64_t n = 0; n < s.nodes(); ++n)
    if (visits.start[n + 1] + cost_of_a_node * (n + 1) >= int64_t(bounds.size()) * work / pieces && n + 1 < s.nodes())
      bounds.push_back(n + 1);
  bounds.push_back(s.nodes());
  const int64_t blocks = bounds.size() - 1, chunks = (s.hidden + k.node_columns - 1) / k.node_columns;
  const int64_t grain = work * s.hidden < 50'000 ? blocks * chunks : 1;
  parallel(host, blocks * chunks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t column = i / blocks * k.node_columns;
      k.backward_nodes(b, visits, grad_logits.data(), values.data(), bounds[i % blocks], bounds[i % blocks + 1], column,
                       std::min(column + k.node_columns, s.hidden));
    }
  });
}

const char* isa() { return choice().name.c_str(); }
const char* isa_error() { return choice().error.empty() ? nullptr : choice().error.c_str(); }

#define FFF_INSTANTIATE(T)                                       \
  template void forward<T>(const Forward<T>&, const ParallelFor&); \
  template void backward<T>(const Backward<T>&, const ParallelFor&);
FFF_INSTANTIATE(float)
FFF_INSTANTIATE(double)
FFF_INSTANTIATE(bfloat16)
FFF_INSTANTIATE(float16)

}  // namespace hf_fff
