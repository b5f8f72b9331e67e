// Where tokens are in a tree, and sorting them by it. Shared by all instruction sets.
#pragma once
#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "fff.h"

namespace hf_fff {

// One tree, and where the tokens of a block are in it.
template <class T> struct Descent {
  using A = accumulator_t<T>;
  const T *x, *weight_in, *bias_in, *weight_out;  // the block's [tokens, hidden]; the tree's
  int64_t hidden, levels;
  Activation activation;
  bool add;       // to what is in the sums already
  int32_t* node;  // [tokens]: the node that a token reads next; at the end its leaf
  A* z;           // [tokens, levels]

  // The node that a token at a leaf visited at `level`. In heap order counted from 1, n's parent is n / 2.
  int64_t visited(int64_t token, int64_t level) const { return ((node[token] + 1) >> (levels - 1 - level)) - 1; }
};

// Levels that tokens go down before they are sorted again: the rows of such a part of a tree, 127 at most, stay in the
// second-level cache.
constexpr int64_t stage_levels(int64_t levels) {
  const int64_t stages = (levels + 6) / 7;
  return (levels + stages - 1) / stages;
}

// Sorts the tokens order[0, n), which are grouped by their ancestors `since` levels up, by node. Stable.
inline void sort_by_node(int32_t* order, int32_t* spare, int64_t n, const int32_t* node, int since) {
  constexpr int most = 7;
  int64_t start[(1 << most) + 1];
  for (int64_t p = 0, q; p < n; p = q) {
    const int32_t ancestor = (node[order[p]] + 1) >> since;
    for (q = p + 1; q < n && (node[order[q]] + 1) >> since == ancestor;) ++q;
    if (q - p > 16) {  // counting sort
      const int32_t buckets = 1 << since;
      std::fill_n(start, buckets + 1, p);
      for (int64_t i = p; i < q; ++i) ++start[((node[order[i]] + 1) & (buckets - 1)) + 1];
      for (int32_t b = 1; b < buckets; ++b) start[b + 1] += start[b] - p;
      for (int64_t i = p; i < q; ++i) spare[start[(node[order[i]] + 1) & (buckets - 1)]++] = order[i];
      std::copy(spare + p, spare + q, order + p);
    } else {  // insertion sort
      for (int64_t i = p + 1, j; i < q; ++i) {
        const int32_t token = order[i];
        for (j = i; j > p && node[order[j - 1]] > node[token]; --j) order[j] = order[j - 1];
        order[j] = token;
      }
    }
  }
}

// Sorts the tokens order[0, n) by the leaf that they reached in a tree. Stable.
inline void sort_by_leaf(const Shape& s, const int32_t* path, int64_t tree, int64_t* order, int64_t n) {
  const int64_t leaves = int64_t{1} << s.depth;
  const auto leaf = [&](int64_t t) { return path[t * s.walk() + tree * s.levels() + s.depth] - (leaves - 1); };
  if (leaves > 4 * n + 256)
    return std::stable_sort(order, order + n, [&](int64_t a, int64_t b) { return leaf(a) < leaf(b); });
  std::vector<int64_t> start(leaves + 1), sorted(n);
  for (int64_t i = 0; i < n; ++i) ++start[leaf(order[i]) + 1];
  std::partial_sum(start.begin(), start.end(), start.begin());
  for (int64_t i = 0; i < n; ++i) sorted[start[leaf(order[i])]++] = order[i];
  std::copy(sorted.begin(), sorted.end(), order);
}

}  // namespace hf_fff
