// The choice between instruction sets, and what is common to all: how the work is split.
#include "fff.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <string>
#include <type_traits>
#include <vector>

#include "kernels.h"
#include "split.h"
#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace hf_fff {
namespace {

constexpr int64_t most_tokens = 16384;  // tokens that forward_by_tree takes at a time
constexpr int64_t chunk_tokens = 1024;  // of which it finishes so many at a time: what one part of a tree needs stays near
constexpr int64_t column_part = 64;     // columns of the weights' gradients that a thread takes, at least

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
  const std::string what = "HF_FFF_ISA='" + std::string(wanted) + "' is not available on this machine";
  return {available.front(), what + " (available: " + names + ")"};
}

const Choice& choice() {
  static const Choice chosen = choose();
  return chosen;
}

template <class T> const Kernels<T>& pick() {
#if defined(__x86_64__)
  if constexpr (std::is_same_v<T, bfloat16>) {
    static const bool has_bf16 = __builtin_cpu_supports("avx512bf16");
    if (has_bf16 && choice().name == "avx512") return avx512_bf16::kernels<T>();
  }
  static const Kernels<T>& picked = choice().name == "avx512" ? avx512::kernels<T>()
                                    : choice().name == "avx2" ? avx2::kernels<T>()
                                                              : baseline::kernels<T>();
  return picked;
#else
  return baseline::kernels<T>();
#endif
}

int64_t second_level_cache() {
  static const int64_t bytes = [] {
#ifdef _SC_LEVEL2_CACHE_SIZE
    const int64_t told = sysconf(_SC_LEVEL2_CACHE_SIZE);  // 0 or less where the system does not know
#else
    const int64_t told = 0;
#endif
    return told > 0 ? std::clamp<int64_t>(told, 256 << 10, 4 << 20) : int64_t{1} << 20;
  }();
  return bytes;
}

// Tokens that are worth a thread of their own: some microseconds of work, at 16 elements of a row in about a nanosecond.
int64_t token_grain(const Shape& s, int64_t rows_per_visit) {
  constexpr int64_t elements = 50'000;
  return std::max<int64_t>(1, elements / std::max<int64_t>(1, s.walk() * rows_per_visit * s.hidden));
}

// Where the sums of a result are kept until they are complete: in the result itself where that has their type.
template <class T> accumulator_t<T>* sums_of(T* result, accumulator_t<T>* own) {
  if constexpr (std::is_same_v<T, accumulator_t<T>>) return result;
  else return own;
}

template <class T> std::unique_ptr<accumulator_t<T>[]> own_sums(int64_t count) {
  return std::make_unique_for_overwrite<accumulator_t<T>[]>(std::is_same_v<T, accumulator_t<T>> ? 0 : count);
}

template <class T> void finish_sums(T* result, const accumulator_t<T>* own, int64_t count) {
  if constexpr (!std::is_same_v<T, accumulator_t<T>>) store_converted(result, own, count);
}

// The paths and logits of the tokens order[0, n), if the caller wants them.
template <class T>
void report(const Forward<T>& f, int64_t tree, int64_t first, const Descent<T>& d, const int32_t* order, int64_t n) {
  for (int64_t i = 0; i < n && (f.path || f.logits); ++i) {
    const int64_t visit = ((first + order[i]) * f.shape.trees + tree) * d.levels;
    for (int64_t l = 0; f.path && l < d.levels; ++l) f.path[visit + l] = int32_t(d.visited(order[i], l));
    if (f.logits) std::copy_n(d.z + order[i] * d.levels, d.levels, f.logits + visit);
  }
}

template <class T>
Descent<T> descent(const Forward<T>& f, int64_t tree, int64_t first, int32_t* node, accumulator_t<T>* z) {
  const int64_t hidden = f.shape.hidden, root = tree * f.shape.tree_nodes();
  return {f.x + first * hidden, f.weight_in + root * hidden, f.bias_in + root, f.weight_out + root * hidden,
          hidden, f.shape.levels(), f.activation, tree > 0, node, z};
}

// Deep trees, much larger than the second-level cache: one after the other, in two halves. All tokens of a large block
// (threads take a part each) go down the first levels, whose rows stay in the cache; they are sorted by the subtree they
// reached, and subtree by subtree (threads take a part of the sorted tokens each, and with it a part of the tree) they go
// down the rest, are sorted by leaf and get their outputs. So a row comes from memory once a block, or little more.
template <class T> void forward_by_tree(const Forward<T>& f, const ParallelFor& host, int64_t grain) {
  using A = accumulator_t<T>;
  const Kernels<T>& k = pick<T>();
  const Shape& s = f.shape;
  const int64_t hidden = s.hidden, levels = s.levels(), top = stage_levels(levels);
  int64_t most = most_tokens;
  if (!std::is_same_v<T, A>) most = std::clamp<int64_t>((int64_t{4} << 20) / hidden, few_tokens, most);  // 16 MB of sums
  const int64_t block = std::min(s.tokens, most);
  const auto node = std::make_unique_for_overwrite<int32_t[]>(3 * block);
  const auto z = std::make_unique_for_overwrite<A[]>(block * levels);
  const auto own = own_sums<T>(block * hidden);
  int32_t *order = node.get() + block, *spare = order + block;
  for (int64_t first = 0; first < s.tokens; first += block) {
    const int64_t count = std::min(block, s.tokens - first);
    A* sums = sums_of(f.y + first * hidden, own.get());
    for (int64_t tree = 0; tree < s.trees; ++tree) {
      const Descent<T> d = descent(f, tree, first, node.get(), z.get());
      parallel(host, count, grain, [&](int64_t begin, int64_t end) {
        std::fill(d.node + begin, d.node + end, 0);
        std::iota(order + begin, order + end, int32_t(begin));
        k.descend(d, order + begin, spare + begin, end - begin, 0, top);
      });
      std::iota(order, order + count, 0);
      sort_by_node(order, spare, count, d.node, int(std::min(top, levels - 1)));
      parallel(host, count, grain, [&](int64_t begin, int64_t end) {
        for (int64_t n; begin < end; begin += n) {
          n = std::min(chunk_tokens, end - begin);
          k.descend(d, order + begin, spare + begin, n, top, levels);
          k.outputs(d, order + begin, n, sums);
          report(f, tree, first, d, order + begin, n);
        }
      });
    }
    if (own.get() == sums)
      parallel(host, count, grain, [&](int64_t begin, int64_t end) {
        finish_sums(f.y + (first + begin) * hidden, sums + begin * hidden, (end - begin) * hidden);
      });
  }
}

// Trees that fit the second-level cache, more or less: each thread takes blocks of tokens that fit there too, and goes
// through all trees with them, first down, then for the outputs.
template <class T> void forward_by_block(const Forward<T>& f, const ParallelFor& host, int64_t grain) {
  using A = accumulator_t<T>;
  const Kernels<T>& k = pick<T>();
  const Shape& s = f.shape;
  parallel(host, s.tokens, grain, [&](int64_t begin, int64_t end) {
    const int64_t hidden = s.hidden, levels = s.levels();
    const int64_t token_bytes = hidden * int64_t(sizeof(A)) + s.walk() * 8;
    const int64_t most = std::clamp<int64_t>(second_level_cache() / token_bytes, few_tokens, chunk_tokens);
    const int64_t block = std::min(end - begin, most);
    const auto node = std::make_unique_for_overwrite<int32_t[]>((2 * s.trees + 1) * block);
    const auto z = std::make_unique_for_overwrite<A[]>(s.trees * block * levels);
    const auto own = own_sums<T>(block * hidden);
    int32_t *order = node.get() + s.trees * block, *spare = order + s.trees * block;
    for (int64_t first = begin; first < end; first += block) {
      const int64_t n = std::min(block, end - first);
      A* sums = sums_of(f.y + first * hidden, own.get());
      for (int64_t tree = 0; tree < s.trees; ++tree) {
        const Descent<T> d = descent(f, tree, first, node.get() + tree * block, z.get() + tree * block * levels);
        std::fill_n(d.node, n, 0);
        std::iota(order + tree * block, order + tree * block + n, 0);
        k.descend(d, order + tree * block, spare, n, 0, levels);
      }
      for (int64_t tree = 0; tree < s.trees; ++tree) {
        const Descent<T> d = descent(f, tree, first, node.get() + tree * block, z.get() + tree * block * levels);
        k.outputs(d, order + tree * block, n, sums);
        report(f, tree, first, d, order + tree * block, n);
      }
      finish_sums(f.y + first * hidden, sums, n * hidden);
    }
  });
}

}  // namespace

bool is_valid_path(const Shape& s, const int32_t* path) {
  const int64_t levels = s.levels();
  for (int64_t i = 0; i < s.tokens * s.walk(); ++i)
    if (i % levels == 0 ? path[i] != 0 : (path[i] - 1) >> 1 != path[i - 1]) return false;
  return true;
}

template <class T> void forward(const Forward<T>& f, const ParallelFor& host) {
  constexpr int64_t few = 8, by_tree = 96;  // measured: below, another meeting of the threads costs more than it gives
  const int64_t grain = token_grain(f.shape, 2), tree_bytes = f.shape.tree_nodes() * f.shape.hidden * int64_t(sizeof(T));
  if (f.shape.tokens < few) {
    const Kernels<T>& k = pick<T>();
    parallel(host, f.shape.tokens, grain, [&](int64_t begin, int64_t end) { k.forward_few(f, begin, end); });
  } else if (f.shape.tokens >= by_tree && tree_bytes > second_level_cache()) {
    forward_by_tree(f, host, grain);
  } else {
    forward_by_block(f, host, grain);
  }
}

template <class T> void backward(const Backward<T>& b, const ParallelFor& host) {
  using A = accumulator_t<T>;
  const Kernels<T>& k = pick<T>();
  const Shape& s = b.shape;
  const int64_t hidden = s.hidden;
  const auto grad_logits = std::make_unique_for_overwrite<A[]>(s.tokens * s.walk());
  const auto values = std::make_unique_for_overwrite<A[]>(s.tokens * s.walk());
  const auto order = std::make_unique_for_overwrite<int64_t[]>(s.trees * s.tokens);
  const int64_t grain = token_grain(s, b.routing_gradient != 0 ? 2 + s.depth : 2);
  parallel(host, s.trees, std::max<int64_t>(1, 4096 / std::max<int64_t>(1, s.tokens)), [&](int64_t first, int64_t last) {
    for (int64_t tree = first; tree < last; ++tree) {
      int64_t* o = order.get() + tree * s.tokens;
      std::iota(o, o + s.tokens, int64_t{0});
      sort_by_leaf(s, b.path, tree, o, s.tokens);
    }
  });
  bool by_tree = false;
  if constexpr (std::is_same_v<T, A>) {  // deep trees, one after the other: threads take a part of the sorted tokens each
    by_tree = s.tree_nodes() * hidden * int64_t(sizeof(T)) > second_level_cache();
    for (int64_t tree = 0; by_tree && tree < s.trees; ++tree)
      parallel(host, s.tokens, grain, [&](int64_t begin, int64_t end) {
        const int64_t* o = order.get() + tree * s.tokens;
        k.backward_tokens(b, tree, o + begin, end - begin, grad_logits.get(), values.get(), b.grad_x, 0);
      });
  }
  if (!by_tree)  // threads take blocks of tokens through all trees
    parallel(host, s.tokens, grain, [&](int64_t begin, int64_t end) {
      const int64_t most = second_level_cache() / (hidden * int64_t(sizeof(A)));
      const int64_t block = std::min(end - begin, std::clamp<int64_t>(most, few_tokens, chunk_tokens));
      const auto part = std::make_unique_for_overwrite<int64_t[]>(block);
      const auto own = own_sums<T>(b.grad_x ? block * hidden : 0);
      for (int64_t first = begin; first < end; first += block) {
        const int64_t n = std::min(block, end - first);
        A* sums = b.grad_x ? sums_of(b.grad_x + first * hidden, own.get()) : nullptr;
        for (int64_t tree = 0; tree < s.trees; ++tree) {
          std::iota(part.get(), part.get() + n, first);
          sort_by_leaf(s, b.path, tree, part.get(), n);
          k.backward_tokens(b, tree, part.get(), n, grad_logits.get(), values.get(), sums, first);
        }
        if (b.grad_x) finish_sums(b.grad_x + first * hidden, sums, n * hidden);
      }
    });
  if (!b.grad_weight_in) return;

  // Each tree's columns in parts: a thread that has neighbouring parts of a tree takes them together.
  const int64_t parts = (hidden + column_part - 1) / column_part;
  const int64_t part_grain = (s.tokens * s.walk() + s.nodes()) * hidden < 50'000 ? s.trees * parts : 1;
  parallel(host, s.trees * parts, part_grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin, last; i < end; i = last) {
      const int64_t tree = i / parts;
      last = std::min(end, (tree + 1) * parts);
      const int64_t column = (i - tree * parts) * column_part;
      const int64_t column_end = std::min(hidden, (last - tree * parts) * column_part);
      k.backward_columns(b, tree, order.get() + tree * s.tokens, grad_logits.get(), values.get(), column, column_end);
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
