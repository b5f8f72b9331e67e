// The forward pass. Included once per instruction set, after rows.h and activation.h. No include guard: that is
// the point.

// Few tokens [begin, end): a walk is one token in one tree, and a few walks go down level by level side by side, so that
// their loads overlap.
template <class T> FFF_TARGET void forward_few(const Forward<T>& f, int64_t begin, int64_t end) {
  using A = accumulator_t<T>;
  constexpr int64_t group = 8;
  const int64_t hidden = f.shape.hidden, trees = f.shape.trees, levels = f.shape.levels();
  const int64_t tree_nodes = f.shape.tree_nodes();
  int64_t token[group], tree[group];
  int32_t node[group];
  std::vector<A> z(group * levels), value(group * levels);
  std::vector<const T*> rows(group * levels);
  Sums<T> sums(std::min(few_tokens, end - begin), hidden);

  for (int64_t first = begin; first < end; first += few_tokens) {
    const int64_t count = std::min(few_tokens, end - first);
    for (int64_t walk = 0; walk < count * trees; walk += group) {
      const int64_t walks = std::min(group, count * trees - walk);
      for (int64_t i = 0; i < walks; ++i) {
        token[i] = first + (walk + i) % count;
        tree[i] = (walk + i) / count;
        node[i] = 0;
      }
      for (int64_t level = 0; level < levels; ++level)
        for (int64_t i = 0; i < walks; ++i) {
          const int64_t root = tree[i] * tree_nodes, row = root + node[i];
          const A logit =
              dot(f.x + token[i] * hidden, f.weight_in + row * hidden, hidden) + to_accumulator(f.bias_in[row]);
          z[i * levels + level] = logit;
          rows[i * levels + level] = f.weight_out + row * hidden;
          if (f.path) f.path[(token[i] * trees + tree[i]) * levels + level] = node[i];
          node[i] = 2 * node[i] + 1 + (logit > A(0));
          if (level + 1 < levels) prefetch_row(f.weight_in + (root + node[i]) * hidden, hidden * sizeof(T));
        }
      activate<A>(f.activation, z.data(), walks * levels, value.data(), nullptr);
      for (int64_t i = 0; i < walks; ++i) {
        combine(value.data() + i * levels, rows.data() + i * levels, levels, 0, hidden, tree[i] > 0,
                sums.row(token[i] - first, f.y + token[i] * hidden));
        if (f.logits)
          std::copy_n(z.data() + i * levels, levels, f.logits + (token[i] * trees + tree[i]) * levels);
      }
    }
    for (int64_t t = 0; t < count; ++t) sums.finish(t, f.y + (first + t) * hidden);
  }
}

// Many tokens: see forward_by_tree and forward_by_block in fff.cpp for how the following two work together.

// Takes the tokens order[0, n), which are grouped by node, from `level` to `end`, and sorts them by the nodes they reach.
// A few tokens go down side by side. What the next few will read is fetched ahead; of the rows, those that were not read
// lately.
template <class T>
FFF_TARGET void descend(const Descent<T>& d, int32_t* order, int32_t* spare, int64_t n, int64_t level, int64_t end) {
  using A = accumulator_t<T>;
  constexpr int64_t group = 4, remembered = 1024;
  const int64_t hidden = d.hidden, bytes = hidden * sizeof(T);
  int32_t fetched[remembered];
  std::fill_n(fetched, remembered, -1);
  for (int64_t stage_end; level < end; level = stage_end) {
    stage_end = std::min(end, level + stage_levels(d.levels));
    const int64_t stage = stage_end - level, piece = (bytes + 64 * stage - 1) / (64 * stage) * 64;
    for (int64_t p = 0; p < n; p += group) {
      const int64_t count = std::min(group, n - p);
      int32_t at[group];  // threads share cache lines of d.node: they are written once
      const char* next[group];
      for (int64_t i = 0; i < count; ++i) {
        at[i] = d.node[order[p + i]];
        next[i] = reinterpret_cast<const char*>(d.x + order[std::min(p + count + i, n - 1)] * hidden);
      }
      for (int64_t l = level; l < stage_end; ++l) {
        const int64_t from = (l - level) * piece, to = std::min(from + piece, bytes);
        for (int64_t i = 0; i < count; ++i) {
          const int64_t token = order[p + i], node = at[i];
          const A logit = dot(d.x + token * hidden, d.weight_in + node * hidden, hidden) + to_accumulator(d.bias_in[node]);
          d.z[token * d.levels + l] = logit;
          for (int64_t o = from; o < to; o += 64) __builtin_prefetch(next[i] + o, 0, 2);
          if (l + 1 == d.levels) continue;
          const int32_t child = int32_t(2 * node + 1 + (logit > A(0)));
          at[i] = child;
          if (l + 1 < stage_end && fetched[child % remembered] != child) {
            fetched[child % remembered] = child;
            prefetch_row(d.weight_in + child * hidden, bytes);
          }
        }
      }
      for (int64_t i = 0; i < count; ++i) d.node[order[p + i]] = at[i];
    }
    sort_by_node(order, spare, n, d.node, int(std::min(stage_end, d.levels - 1) - level));
  }
}

// sums[token] (+)= the output of one tree, for the tokens order[0, n), sorted by leaf.
template <class T>
FFF_TARGET void outputs(const Descent<T>& d, const int32_t* order, int64_t n, accumulator_t<T>* sums) {
  using A = accumulator_t<T>;
  const int64_t hidden = d.hidden, levels = d.levels;
  A z[run_tokens * most_levels], value[run_tokens * most_levels];
  const T* rows[run_tokens * most_levels];
  A* sum[run_tokens];
  for (int64_t p = 0; p < n; p += run_tokens) {
    const int64_t count = std::min(run_tokens, n - p);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t token = order[p + i];
      std::copy_n(d.z + token * levels, levels, z + i * levels);
      for (int64_t l = 0; l < levels; ++l) rows[i * levels + l] = d.weight_out + d.visited(token, l) * hidden;
      sum[i] = sums + token * hidden;
    }
    activate<A>(d.activation, z, count * levels, value, nullptr);
    combine_run(value, rows, count, levels, hidden, d.add, sum);
  }
}
