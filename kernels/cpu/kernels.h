// The arithmetic of one instruction set. Included by fff.cpp once per set, after simd.h, in the set's namespace.
// No include guard: that is the point.

constexpr int64_t node_columns = FFF_BYTES;  // four vectors of float for each of the two gradients of a row
constexpr int64_t token_block = 64;

// <a, b> over n elements. Four running sums hide the latency of the additions.
template <class T> FFF_INLINE accumulator_t<T> dot(const T* a, const T* b, int64_t n) {
  using A = accumulator_t<T>;
  constexpr int w = Lanes<A>::width;
  Vec<A> s0 = zero<A>(), s1 = s0, s2 = s0, s3 = s0;
  int64_t i = 0;
  for (; i + 4 * w <= n; i += 4 * w) {
    s0 += load(a + i) * load(b + i);
    s1 += load(a + i + w) * load(b + i + w);
    s2 += load(a + i + 2 * w) * load(b + i + 2 * w);
    s3 += load(a + i + 3 * w) * load(b + i + 3 * w);
  }
  for (; i + w <= n; i += w) s0 += load(a + i) * load(b + i);
  A total = sum<A>((s0 + s1) + (s2 + s3));
  for (; i < n; ++i) total += to_accumulator(a[i]) * to_accumulator(b[i]);
  return total;
}

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
    for (int v = 0; v < vectors; ++v) s[v] += c * load(row + v * w);
  }
  for (int v = 0; v < vectors; ++v) store<A>(sums + offset + v * w, s[v]);
}

// sums (+)= sum over k of coefficient[k] * rows[k], over `hidden` elements.
template <class T>
FFF_TARGET void combine(const accumulator_t<T>* coefficient, const T* const* rows, int64_t count, int64_t hidden, bool add,
                        accumulator_t<T>* sums) {
  using A = accumulator_t<T>;
  constexpr int w = Lanes<A>::width;
  constexpr int wide = FFF_BYTES == 64 ? 24 : 12;  // what fits the registers
  int64_t i = 0;
  for (; i + wide * w <= hidden; i += wide * w) combine_block<wide>(coefficient, rows, count, i, add, sums);
  for (; i + 4 * w <= hidden; i += 4 * w) combine_block<4>(coefficient, rows, count, i, add, sums);
  for (; i + w <= hidden; i += w) combine_block<1>(coefficient, rows, count, i, add, sums);
  for (; i < hidden; ++i) {
    A s = add ? sums[i] : A(0);
    for (int64_t k = 0; k < count; ++k) s += coefficient[k] * to_accumulator(rows[k][i]);
    sums[i] = s;
  }
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

// out[i] = act(z[i]); slope[i] = act'(z[i]) where wanted. Loops that the compiler vectorises.
template <class A> FFF_TARGET void activate(Activation activation, const A* z, int64_t n, A* out, A* slope) {
  switch (activation) {
    case Activation::gelu:
      for (int64_t i = 0; i < n; ++i) out[i] = z[i] * A(0.5) * (A(1) + erf_of(z[i] * A(0.70710678118654752440)));
      if (slope)
        for (int64_t i = 0; i < n; ++i)
          slope[i] = A(0.5) * (A(1) + erf_of(z[i] * A(0.70710678118654752440))) +
                     z[i] * A(0.39894228040143267794) * std::exp(A(-0.5) * z[i] * z[i]);
      break;
    case Activation::gelu_new:
      for (int64_t i = 0; i < n; ++i) {
        const A k = A(0.79788456080286535588), c = A(0.044715), s = z[i] * z[i];
        const A t = std::tanh(k * (z[i] + c * s * z[i]));
        out[i] = A(0.5) * z[i] * (A(1) + t);
        if (slope) slope[i] = A(0.5) * (A(1) + t) + A(0.5) * z[i] * (A(1) - t * t) * k * (A(1) + A(3) * c * s);
      }
      break;
    case Activation::relu:
      for (int64_t i = 0; i < n; ++i) out[i] = z[i] <= A(0) ? A(0) : z[i];  // written so that a NaN stays one
      if (slope)
        for (int64_t i = 0; i < n; ++i) slope[i] = z[i] > A(0) ? A(1) : A(0);
      break;
    case Activation::silu:
      for (int64_t i = 0; i < n; ++i) {
        const A s = sigmoid(z[i]);
        out[i] = z[i] * s;
        if (slope) slope[i] = s * (A(1) + z[i] * (A(1) - s));
      }
      break;
    case Activation::identity:
      for (int64_t i = 0; i < n; ++i) out[i] = z[i];
      if (slope)
        for (int64_t i = 0; i < n; ++i) slope[i] = A(1);
      break;
  }
}

// The descent and the sum for tokens [begin, end). A walk is one token in one tree. Walks go tree by tree over a block of
// tokens, so that a tree's rows stay in the second-level cache while they are wanted, and a few of them go down level by
// level side by side, so that their loads overlap. Each token adds up its trees in their order, whatever block it is in.
template <class T> FFF_TARGET void forward_range(const Forward<T>& f, int64_t begin, int64_t end) {
  using A = accumulator_t<T>;
  constexpr int64_t group = 8;
  const int64_t hidden = f.shape.hidden, trees = f.shape.trees, levels = f.shape.levels();
  const int64_t tree_nodes = f.shape.tree_nodes();
  int64_t token[group], tree[group];
  int32_t node[group];
  std::vector<A> z(group * levels), value(group * levels);
  std::vector<const T*> rows(group * levels);
  Sums<T> sums(std::min(token_block, end - begin), hidden);

  for (int64_t first = begin; first < end; first += token_block) {
    const int64_t count = std::min(token_block, end - first);
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
        combine(value.data() + i * levels, rows.data() + i * levels, levels, hidden, tree[i] > 0,
                sums.row(token[i] - first, f.y + token[i] * hidden));
        if (f.logits)
          std::copy_n(z.data() + i * levels, levels, f.logits + (token[i] * trees + tree[i]) * levels);
      }
    }
    for (int64_t t = 0; t < count; ++t) sums.finish(t, f.y + (first + t) * hidden);
  }
}

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

// The part of the backward pass that belongs to tokens: for each visit, dL/dlogit and the activation (both are wanted
// again when the weights' gradients are summed), and grad_x.
//
// Tree by tree over a block of tokens, so that a tree's rows stay in the second-level cache while they are wanted.
template <class T>
FFF_TARGET void backward_tokens(const Backward<T>& b, accumulator_t<T>* grad_logits, accumulator_t<T>* values,
                                int64_t begin, int64_t end) {
  using A = accumulator_t<T>;
  const int64_t hidden = b.shape.hidden, trees = b.shape.trees, levels = b.shape.levels(), walk = b.shape.walk();
  const int64_t tree_nodes = b.shape.tree_nodes();
  RoutingGradient<T> routing(b);
  std::vector<A> slope(levels), gain(levels);
  std::vector<const T*> rows(walk);
  Sums<T> sums(1, hidden);

  for (int64_t first = begin; first < end; first += token_block) {
    const int64_t last = std::min(first + token_block, end);
    for (int64_t k = 0; k < trees; ++k)
      for (int64_t t = first; t < last; ++t) {
        const int64_t visit = t * walk + k * levels;
        const int32_t* path = b.path + visit;
        const A* z = b.logits + visit;
        activate<A>(b.activation, z, levels, values + visit, slope.data());
        for (int64_t level = 0; level < levels; ++level) {
          const T* row = b.weight_out + (k * tree_nodes + path[level]) * hidden;
          gain[level] = dot(b.grad_y + t * hidden, row, hidden);
          grad_logits[visit + level] = gain[level] * slope[level];
        }
        routing.add(t, k, path, z, values + visit, gain.data(), grad_logits + visit);
      }
    for (int64_t t = first; b.grad_x && t < last; ++t) {
      for (int64_t visit = 0; visit < walk; ++visit)
        rows[visit] = b.weight_in + (visit / levels * tree_nodes + b.path[t * walk + visit]) * hidden;
      T* grad_x = b.grad_x + t * hidden;
      combine(grad_logits + t * walk, rows.data(), walk, hidden, false, sums.row(0, grad_x));
      sums.finish(0, grad_x);
    }
  }
}

// The gradients of the weights for nodes [first, last) and columns [column, column + vectors * width): each node sums its
// visits in the order of the tokens, whatever the threads do. A node that nobody visited gets zeros.
template <int vectors, class T>
FFF_TARGET void backward_columns(const Backward<T>& b, const Visits& visits, const accumulator_t<T>* grad_logits,
                                 const accumulator_t<T>* values, int64_t first, int64_t last, int64_t column) {
  using A = accumulator_t<T>;
  constexpr int w = Lanes<A>::width;
  const int64_t hidden = b.shape.hidden, walk = b.shape.walk();
  for (int64_t n = first; n < last; ++n) {
    Vec<A> in[vectors], out[vectors];
    for (int v = 0; v < vectors; ++v) in[v] = out[v] = zero<A>();
    for (int64_t i = visits.start[n]; i < visits.start[n + 1]; ++i) {
      const int64_t visit = visits.order[i], offset = visit / walk * hidden + column;
      const Vec<A> grad_z = broadcast<A>(grad_logits[visit]), value = broadcast<A>(values[visit]);
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) {
        in[v] += grad_z * load(b.x + offset + v * w);
        out[v] += value * load(b.grad_y + offset + v * w);
      }
    }
    for (int v = 0; v < vectors; ++v) {
      store_converted(b.grad_weight_in + n * hidden + column + v * w, reinterpret_cast<const A*>(&in[v]), w);
      store_converted(b.grad_weight_out + n * hidden + column + v * w, reinterpret_cast<const A*>(&out[v]), w);
    }
  }
}

template <class T>
FFF_TARGET void backward_nodes(const Backward<T>& b, const Visits& visits, const accumulator_t<T>* grad_logits,
                               const accumulator_t<T>* values, int64_t first, int64_t last, int64_t column,
                               int64_t column_end) {
  using A = accumulator_t<T>;
  constexpr int w = Lanes<A>::width, wide = node_columns / w;
  const int64_t hidden = b.shape.hidden, walk = b.shape.walk();
  if (column == 0)
    for (int64_t n = first; n < last; ++n) {
      A s = 0;
      for (int64_t i = visits.start[n]; i < visits.start[n + 1]; ++i) s += grad_logits[visits.order[i]];
      b.grad_bias_in[n] = from_accumulator<T>(s);
    }
  for (; column + wide * w <= column_end; column += wide * w)
    backward_columns<wide>(b, visits, grad_logits, values, first, last, column);
  for (; column + w <= column_end; column += w)
    backward_columns<1>(b, visits, grad_logits, values, first, last, column);
  for (; column < column_end; ++column)
    for (int64_t n = first; n < last; ++n) {
      A in = 0, out = 0;
      for (int64_t i = visits.start[n]; i < visits.start[n + 1]; ++i) {
        const int64_t visit = visits.order[i], at = visit / walk * hidden + column;
        in += grad_logits[visit] * to_accumulator(b.x[at]);
        out += values[visit] * to_accumulator(b.grad_y[at]);
      }
      b.grad_weight_in[n * hidden + column] = from_accumulator<T>(in);
      b.grad_weight_out[n * hidden + column] = from_accumulator<T>(out);
    }
}
