// The backward pass. Included once per instruction set, after rows.h and activation.h. No include guard: that is
// the point.

// The straight-through routing gradient: for a visited inner node with logit z let v_right, v_left be
// <grad_y, output of the path that descends greedily from that child>; dL/dz gets
// alpha * (v_right - v_left) * s(z/tau) * (1 - s(z/tau)) / tau. One of the two is the rest of the visited path; for the
// other, the greedy path from the sibling is walked, for all levels of a tree side by side.
template <class T> struct RoutingGradient {
  using A = accumulator_t<T>;
  const Backward<T>& b;
  const int64_t hidden, depth, tree_nodes, others;  // others: nodes on all siblings' greedy paths
  const A alpha, tau;
  std::vector<A> z, gain, value;
  std::vector<int32_t> node;

  explicit RoutingGradient(const Backward<T>& backward)
      : b(backward), hidden(b.shape.hidden), depth(b.shape.depth), tree_nodes(b.shape.tree_nodes()),
        others(b.routing_gradient != 0 ? depth * (depth + 1) / 2 : 0), alpha(A(b.routing_gradient)),
        tau(A(b.routing_temperature)), z(others), gain(others), value(others), node(depth) {}

  // Adds to grad_z for token t in tree k; path, path_z, path_value and path_gain belong to the visited nodes.
  FFF_TARGET void add(int64_t t, int64_t k, const int32_t* path, const A* path_z, const A* path_value, const A* path_gain,
                      A* grad_z) {
    if (!others) return;
    const T *x = b.x + t * hidden, *grad_y = b.grad_y + t * hidden;
    const int64_t root = k * tree_nodes;
    for (int64_t level = 0; level < depth; ++level)
      node[level] = 4 * path[level] + 3 - path[level + 1];  // the two children of n add up to 4n + 3
    // The walk that left the path at `level` has depth - level nodes. Stored by step, then by level.
    int64_t at = 0;
    for (int64_t step = 0; step < depth; ++step)
      for (int64_t level = 0; level + step < depth; ++level, ++at) {
        int32_t& n = node[level];
        const int64_t row = (root + n) * hidden;
        z[at] = dot(x, b.weight_in + row, hidden) + to_accumulator(b.bias_in[root + n]);
        gain[at] = dot(grad_y, b.weight_out + row, hidden);
        n = 2 * n + 1 + (z[at] > A(0));
      }
    activate<A>(b.activation, z.data(), others, value.data(), nullptr);
    A taken = path_value[depth] * path_gain[depth];  // <grad_y, output of the rest of the visited path>
    for (int64_t level = depth - 1; level >= 0; --level) {
      A other = 0;
      at = level;
      for (int64_t step = 0; level + step < depth; ++step) {
        other += value[at] * gain[at];
        at += depth - step;
      }
      const A difference = path[level + 1] == 2 * path[level] + 2 ? taken - other : other - taken;
      const A s = sigmoid(path_z[level] / tau);
      grad_z[level] += alpha * difference * s * (A(1) - s) / tau;
      taken += path_value[level] * path_gain[level];
    }
  }
};

// What belongs to the tokens order[0, n), sorted by leaf, in one tree: for each visit dL/dlogit and the activation (both are
// wanted again for the weights' gradients), and, where wanted, grad_x (+)= the tree's part, into sums[token - first].
template <class T>
FFF_TARGET void backward_tokens(const Backward<T>& b, int64_t tree, const int64_t* order, int64_t n,
                                accumulator_t<T>* grad_logits, accumulator_t<T>* values, accumulator_t<T>* sums,
                                int64_t first) {
  using A = accumulator_t<T>;
  const int64_t hidden = b.shape.hidden, levels = b.shape.levels(), walk = b.shape.walk();
  const int64_t root = tree * b.shape.tree_nodes();
  RoutingGradient<T> routing(b);
  A slope[most_levels], gain[most_levels], coefficient[run_tokens * most_levels];
  const T* rows[run_tokens * most_levels];
  A* sum[run_tokens];
  for (int64_t p = 0; p < n; p += run_tokens) {
    const int64_t count = std::min(run_tokens, n - p);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t t = order[p + i], visit = t * walk + tree * levels;
      const int32_t* path = b.path + visit;
      const T* grad_y = b.grad_y + t * hidden;
      prefetch_row(b.grad_y + order[std::min(p + i + 2, n - 1)] * hidden, hidden * sizeof(T));
      activate<A>(b.activation, b.logits + visit, levels, values + visit, slope);
      const T* out[most_levels];
      for (int64_t l = 0; l < levels; ++l) out[l] = b.weight_out + (root + path[l]) * hidden;
      int64_t l = 0;
      for (; l + rows_at_once <= levels; l += rows_at_once) dots<rows_at_once>(grad_y, out + l, hidden, gain + l);
      for (; l < levels; ++l) dots<1>(grad_y, out + l, hidden, gain + l);
      for (l = 0; l < levels; ++l) grad_logits[visit + l] = gain[l] * slope[l];
      routing.add(t, tree, path, b.logits + visit, values + visit, gain, grad_logits + visit);
      if (!b.grad_x) continue;
      std::copy_n(grad_logits + visit, levels, coefficient + i * levels);
      for (l = 0; l < levels; ++l) rows[i * levels + l] = b.weight_in + (root + path[l]) * hidden;
      sum[i] = sums + (t - first) * hidden;
    }
    if (b.grad_x) combine_run(coefficient, rows, count, levels, hidden, tree > 0, sum);
  }
}

// The gradients of the weights of one tree, in some columns. The tokens that visited a node follow each other when they are
// sorted by leaf, so one pass over the sorted tokens sums for the nodes of the path that it is on, a node a level; a node
// that the pass leaves is complete. Each sum is in the order of the tokens, whatever the threads do.
constexpr int64_t chunk = 32;     // tokens whose columns stay in the first-level cache while the levels take turns
constexpr int levels_at_once = 2;

template <class T> struct Chunk {
  using A = accumulator_t<T>;
  const Backward<T>& b;
  int64_t root, count;
  const T *x[chunk], *grad_y[chunk];          // the tokens' rows,
  A grad_logit[chunk * most_levels], value[chunk * most_levels];
  int64_t leave[chunk];                       // the first level where a token's path is not the one of the token before it
  const int32_t* left[chunk];                 // the path of that one
};

template <class V, class T> FFF_INLINE V load_as(const T* p) {
  if constexpr (std::is_same_v<V, accumulator_t<T>>) return to_accumulator(*p);
  else return load(p);
}
template <class V, class T> FFF_INLINE void store_as(T* p, V v) {
  using A = accumulator_t<T>;
  if constexpr (std::is_same_v<V, A>) {
    *p = from_accumulator<T>(v);
  } else if constexpr (std::is_same_v<T, A>) {
    store<A>(p, v);
  } else {
    A lanes[sizeof(V) / sizeof(A)];
    store<A>(lanes, v);
    store_converted(p, lanes, sizeof(V) / sizeof(A));
  }
}

// Levels [level, level + at_once), `vectors` of type V from `column` on. Running sums are kept in `sums`: for each level those
// of grad_weight_in, then those of grad_weight_out.
template <class V, int vectors, int at_once, class T>
FFF_INLINE void add_chunk(const Chunk<T>& c, int64_t levels, int64_t level, int64_t column, accumulator_t<T>* sums,
                          int64_t columns) {
  using A = accumulator_t<T>;
  constexpr int64_t w = sizeof(V) / sizeof(A);
  const int64_t hidden = c.b.shape.hidden;
  V in[at_once][vectors], out[at_once][vectors];
  for (int l = 0; l < at_once; ++l)
    for (int v = 0; v < vectors; ++v) {
      in[l][v] = load_as<V>(sums + (2 * l) * columns + v * w);
      out[l][v] = load_as<V>(sums + (2 * l + 1) * columns + v * w);
    }
  for (int64_t i = 0; i < c.count; ++i) {
    if (c.leave[i] < level + at_once)
#pragma GCC unroll 4
      for (int l = 0; l < at_once; ++l)
        if (c.leave[i] <= level + l) {
          const int64_t at = (c.root + c.left[i][level + l]) * hidden + column;
#pragma GCC unroll 4
          for (int v = 0; v < vectors; ++v) {
            store_as<V>(c.b.grad_weight_in + at + v * w, in[l][v]);
            store_as<V>(c.b.grad_weight_out + at + v * w, out[l][v]);
            in[l][v] = out[l][v] = V{};
          }
        }
    V x[vectors], g[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      x[v] = in_register(load_as<V>(c.x[i] + column + v * w));
      g[v] = in_register(load_as<V>(c.grad_y[i] + column + v * w));
    }
#pragma GCC unroll 4
    for (int l = 0; l < at_once; ++l) {
      const V grad_logit = c.grad_logit[i * levels + level + l] - V{}, value = c.value[i * levels + level + l] - V{};
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        in[l][v] = fused(grad_logit, x[v], in[l][v]);
        out[l][v] = fused(value, g[v], out[l][v]);
      }
    }
  }
  for (int l = 0; l < at_once; ++l)
    for (int v = 0; v < vectors; ++v) {
      store_as<V>(sums + (2 * l) * columns + v * w, in[l][v]);
      store_as<V>(sums + (2 * l + 1) * columns + v * w, out[l][v]);
    }
}

template <class V, int vectors, class T>
FFF_INLINE void add_levels(const Chunk<T>& c, int64_t levels, int64_t column, accumulator_t<T>* sums, int64_t columns) {
  int64_t level = 0;
  for (; level + levels_at_once <= levels; level += levels_at_once)
    add_chunk<V, vectors, levels_at_once>(c, levels, level, column, sums + 2 * level * columns, columns);
  for (; level < levels; ++level) add_chunk<V, vectors, 1>(c, levels, level, column, sums + 2 * level * columns, columns);
}

// The columns that the pass over the tokens reads for `token`, and those that it writes when it comes there from `before`.
template <class T>
FFF_INLINE void fetch(const Backward<T>& b, int64_t tree, int64_t before, int64_t token, int64_t column, int64_t bytes) {
  const int64_t hidden = b.shape.hidden, levels = b.shape.levels(), root = tree * b.shape.tree_nodes();
  const int32_t* path = b.path + (token * b.shape.trees + tree) * levels;
  const int32_t* left = b.path + (before * b.shape.trees + tree) * levels;
  prefetch_row(b.x + token * hidden + column, bytes);
  prefetch_row(b.grad_y + token * hidden + column, bytes);
  for (int64_t l = levels - 1; l >= 0 && path[l] != left[l]; --l) {
    prefetch_row(b.grad_weight_in + (root + left[l]) * hidden + column, bytes);
    prefetch_row(b.grad_weight_out + (root + left[l]) * hidden + column, bytes);
  }
}

template <class T>
FFF_TARGET void backward_columns(const Backward<T>& b, int64_t tree, const int64_t* order,
                                 const accumulator_t<T>* grad_logits, const accumulator_t<T>* values, int64_t column,
                                 int64_t column_end) {
  using A = accumulator_t<T>;
  constexpr int w = Lanes<A>::width, vectors = FFF_BYTES == 64 ? 4 : 2;
  const int64_t hidden = b.shape.hidden, levels = b.shape.levels(), walk = b.shape.walk(), tokens = b.shape.tokens;
  const int64_t root = tree * b.shape.tree_nodes(), columns = column_end - column;
  std::vector<A> sums(2 * levels * columns), bias(levels);
  Chunk<T> c{b, root, 0, {}, {}, {}, {}, {}, {}};
  int64_t written[most_levels];  // the nodes of a level before this one have their gradients
  for (int64_t l = 0; l < levels; ++l) written[l] = (int64_t{1} << l) - 1;
  const auto zeros = [&](int64_t from, int64_t to) {  // for nodes that nobody visited
    for (int64_t n = root + from; n < root + to; ++n) {
      std::fill_n(b.grad_weight_in + n * hidden + column, columns, T{});
      std::fill_n(b.grad_weight_out + n * hidden + column, columns, T{});
      if (column == 0) b.grad_bias_in[n] = T{};
    }
  };
  const int32_t* before = nullptr;
  for (int64_t p = 0; p < tokens; p += chunk) {
    c.count = std::min(chunk, tokens - p);
    for (int64_t i = 0; i < c.count; ++i) {
      const int64_t t = order[p + i], visit = t * walk + tree * levels;
      const int32_t* path = b.path + visit;
      c.x[i] = b.x + t * hidden, c.grad_y[i] = b.grad_y + t * hidden;
      std::copy_n(grad_logits + visit, levels, c.grad_logit + i * levels);
      std::copy_n(values + visit, levels, c.value + i * levels);
      c.left[i] = before;
      c.leave[i] = before ? 0 : levels;
      while (before && c.leave[i] < levels && path[c.leave[i]] == before[c.leave[i]]) ++c.leave[i];
      for (int64_t l = 0; l < levels; ++l) {
        if (column == 0 && l >= c.leave[i]) b.grad_bias_in[root + before[l]] = from_accumulator<T>(bias[l]), bias[l] = 0;
        bias[l] += grad_logits[visit + l];
        if (path[l] >= written[l]) zeros(written[l], path[l]), written[l] = path[l] + 1;
      }
      before = path;
    }
    int64_t at = 0;
    // What the next chunk will read and write is fetched meanwhile, row by row, a few tokens' rows for each step.
    const int64_t steps = std::max<int64_t>(1, columns / (vectors * w)), each = (chunk + steps - 1) / steps;
    const int64_t stop = std::min(p + 2 * chunk, tokens);
    int64_t ahead = std::min(p + chunk, stop);
    for (; at + vectors * w <= columns; at += vectors * w) {
      for (int64_t i = 0; i < each && ahead < stop; ++i, ++ahead)
        fetch(b, tree, order[ahead - 1], order[ahead], column, columns * sizeof(T));
      add_levels<Vec<A>, vectors>(c, levels, column + at, sums.data() + at, columns);
    }
    for (; at + w <= columns; at += w) add_levels<Vec<A>, 1>(c, levels, column + at, sums.data() + at, columns);
    for (; at < columns; ++at) add_levels<A, 1>(c, levels, column + at, sums.data() + at, columns);
  }
  for (int64_t l = 0; l < levels; ++l) {
    if (before) {
      const int64_t n = root + before[l];
      store_converted(b.grad_weight_in + n * hidden + column, sums.data() + 2 * l * columns, columns);
      store_converted(b.grad_weight_out + n * hidden + column, sums.data() + (2 * l + 1) * columns, columns);
      if (column == 0) b.grad_bias_in[n] = from_accumulator<T>(bias[l]);
    }
    zeros(written[l], (int64_t{2} << l) - 1);
  }
}
