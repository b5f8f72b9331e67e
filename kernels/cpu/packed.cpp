// Packed layers: packing, the choice between instruction sets, and how the work is split.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>
#include <string_view>
#include <type_traits>

#include "fff.h"
#include "layout.h"
#include "order.h"
#include "scalar.h"
#include "split.h"
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace hf_fff {
namespace {

constexpr char magic[8] = {'H', 'F', 'F', 'F', 'P', 'A', 'C', 'K'};
constexpr uint32_t version = 1;
constexpr int64_t most_levels = 32;

// A group of output rows, and what they are multiplied by: 4 integers or 2 bf16 numbers.
struct Term {
  uint32_t group, factors;
};

// What a token's sums start from, and what they are multiplied by at the end.
struct Sum {
  int32_t start;
  float scale;
};

// A layer, and where some tokens are in it.
struct Packed {
  const Layout& layout;
  const uint8_t* data;
  Activation activation;
  uint8_t* x;      // [tokens, row_bytes]
  float* x_scale;  // [tokens]
  int32_t* node;   // [tokens, trees]: the node that a walk reads next, at the end its leaf
  float* value;    // [tokens, values]
  Term* term;      // [tokens, terms]
  Sum* sum;        // [tokens]

  const Node* nodes() const { return reinterpret_cast<const Node*>(data + layout.nodes_at); }
};

template <class T> struct PackedKernels {
  void (*pack_tokens)(const Packed&, const T*, int64_t, int64_t);
  void (*walk)(const Packed&, const int32_t*, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t);
  void (*terms)(const Packed&, const int32_t*, int64_t, int64_t);
  void (*add_groups)(const Packed&, const int32_t*, int64_t, int64_t, int64_t, int64_t, T*);
};

#if defined(__x86_64__)
namespace packed_vnni {
#define FFF_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c,prefer-vector-width=512")))
#define FFF_BYTES 64
#define FFF_VNNI
#include "simd.h"
#include "packed.h"
FFF_PACKED_KERNELS(Int8)
#undef FFF_INLINE
#undef FFF_VNNI
#undef FFF_BYTES
#undef FFF_TARGET
}  // namespace packed_vnni

namespace packed_bf16 {
#define FFF_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c,prefer-vector-width=512")))
#define FFF_BYTES 64
#define FFF_BF16
#include "simd.h"
#include "packed.h"
FFF_PACKED_KERNELS(Bf16)
#undef FFF_INLINE
#undef FFF_BF16
#undef FFF_BYTES
#undef FFF_TARGET
}  // namespace packed_bf16

namespace packed_avx2 {
#define FFF_TARGET __attribute__((target("avx2,fma,f16c")))
#define FFF_BYTES 32
#include "simd.h"
#include "packed.h"
FFF_PACKED_KERNELS(Int8)
FFF_PACKED_KERNELS(Bf16)
#undef FFF_INLINE
#undef FFF_BYTES
#undef FFF_TARGET
}  // namespace packed_avx2
#endif

namespace packed_baseline {
#define FFF_TARGET
#define FFF_BYTES 16
#include "simd.h"
#include "packed.h"
FFF_PACKED_KERNELS(Int8)
FFF_PACKED_KERNELS(Bf16)
#undef FFF_INLINE
#undef FFF_BYTES
#undef FFF_TARGET
}  // namespace packed_baseline

template <class T> const PackedKernels<T>& pick(Rows rows) {
  const bool int8 = rows == Rows::int8;
#if defined(__x86_64__)
  const std::string_view set = isa();
  static const bool vnni = __builtin_cpu_supports("avx512vnni"), bf16 = __builtin_cpu_supports("avx512bf16");
  if (set == "avx512" && int8 && vnni) return packed_vnni::packed_kernels_Int8<T>;
  if (set == "avx512" && !int8 && bf16) return packed_bf16::packed_kernels_Bf16<T>;
  if (set != "baseline") return int8 ? packed_avx2::packed_kernels_Int8<T> : packed_avx2::packed_kernels_Bf16<T>;
#endif
  return int8 ? packed_baseline::packed_kernels_Int8<T> : packed_baseline::packed_kernels_Bf16<T>;
}

// Changes with every word that changes: the words' weights are odd.
uint64_t checksum(const void* bytes, int64_t count) {
  uint64_t total = 0;
  for (int64_t i = 0; i < count / 8; ++i) {
    uint64_t word;
    std::memcpy(&word, static_cast<const char*>(bytes) + 8 * i, 8);
    total += word * uint64_t(2 * i + 1);
  }
  return total;
}

// A row as integers (`excess` is added), or as bf16; returns the scale of the integers.
struct RowScale {
  float up, down;
  RowScale(const float* row, int64_t n) : up(0), down(0) {
    float most = 0;
    for (int64_t i = 0; i < n; ++i) most = std::max(most, std::fabs(row[i]));
    if (most >= 0x1p-100f) up = 127.f / most, down = most / 127.f;
  }
  int32_t integer(float v) const { return int32_t(std::nearbyint(v * up)); }
};

// The scratch memory of a call, for a block of tokens.
struct Scratch {
  std::unique_ptr<uint8_t[]> memory;
  uint8_t* at;
  explicit Scratch(int64_t bytes) : memory(std::make_unique_for_overwrite<uint8_t[]>(bytes + 64)), at(memory.get()) {
    at += -reinterpret_cast<uintptr_t>(at) & 63;
  }
  template <class A> A* take(int64_t count) {
    A* taken = reinterpret_cast<A*>(at);
    at += (count * int64_t(sizeof(A)) + 63) & ~int64_t{63};
    return taken;
  }
};

}  // namespace

int64_t packed_bytes(Rows rows, const Shape& s) { return Layout(rows, s.hidden, s.trees, s.depth).bytes; }

bool pack(Rows rows, const Shape& s, const float* weight_in, const float* bias_in, const float* weight_out, uint8_t* packed) {
  const Layout l(rows, s.hidden, s.trees, s.depth);
  const int64_t hidden = s.hidden, nodes = s.nodes();
  const auto finite = [](const float* v, int64_t n) { return std::all_of(v, v + n, [](float f) { return std::isfinite(f); }); };
  if (!finite(weight_in, nodes * hidden) || !finite(bias_in, nodes) || !finite(weight_out, nodes * hidden)) return false;
  std::memset(packed, 0, l.out_at);
  const bool int8 = rows == Rows::int8;
  Node* node = reinterpret_cast<Node*>(packed + l.nodes_at);
  for (int64_t n = 0; n < nodes; ++n) {
    const float* row = weight_in + n * hidden;
    uint8_t* to = packed + l.in_at + n * l.row_bytes;
    node[n] = {1.f, bias_in[n], 1.f, 0};
    if (int8) {
      const RowScale scale(row, hidden);
      node[n].scale_in = scale.down;
      node[n].scale_out = RowScale(weight_out + n * hidden, hidden).down;
      for (int64_t i = 0; i < hidden; ++i) {
        const int32_t q = scale.integer(row[i]);
        to[i] = uint8_t(q);
        node[n].row_sum += q;
      }
    } else {
      for (int64_t i = 0; i < hidden; ++i) {
        const bfloat16 b = to_bfloat16(row[i]);
        std::memcpy(to + 2 * i, &b, 2);
      }
    }
  }
  std::memset(packed + l.out_at, int8 ? 128 : 0, l.bytes - l.out_at);
  // Puts a row of weight_out into a slot of a group.
  const auto put = [&](int64_t n, int64_t group, int64_t slot) {
    const float* row = weight_out + n * hidden;
    const RowScale scale(row, hidden);
    for (int64_t i = 0; i < hidden; ++i) {
      uint8_t* to = packed + l.out_at + i / piece_columns * l.part_stride + group * l.group_stride +
                    i % piece_columns * 4 + slot * (int8 ? 1 : 2);
      const bfloat16 b = to_bfloat16(row[i]);
      if (int8) *to = uint8_t(scale.integer(row[i]) + 128);
      else std::memcpy(to, &b, 2);
    }
  };
  for (int64_t top = 0; top < l.tops; ++top)
    for (int64_t choice = 0; choice < l.top_choices; ++choice)
      for (int64_t i = 0, k = top * l.top_trees; i < l.top_trees && k < l.trees; ++i, ++k)
        for (int64_t level = 0; level < l.top_levels; ++level) {
          const int64_t last = choice >> i * (l.top_levels - 1) & ((int64_t{1} << (l.top_levels - 1)) - 1);
          const int64_t at = (int64_t{1} << level) - 1 + (last >> (l.top_levels - 1 - level));
          put(k * l.tree_nodes + at, l.top_group(top) + choice, l.top_value(k) % l.slots + level);
        }
  int64_t base = l.tops * l.top_choices;
  for (int64_t k = 0; k < l.trees; ++k)
    for (int64_t g = 0; g < l.body; ++g) {
      const int64_t last = l.last_level(g), width = int64_t{1} << last;
      for (int64_t i = 0; i < width; ++i)
        for (int64_t slot = 0; slot < l.slots; ++slot)
          put(k * l.tree_nodes + ((width + i) >> (l.slots - 1 - slot)) - 1, base + i, slot);
      base += width;
    }
  Header h{{}, version, uint32_t(rows), hidden, s.trees, s.depth, l.bytes, 0, 0};
  std::memcpy(h.magic, magic, sizeof magic);
  h.content = checksum(packed + sizeof h, l.bytes - int64_t(sizeof h));
  h.own = checksum(&h, sizeof h - 8);
  std::memcpy(packed, &h, sizeof h);
  return true;
}

const char* read_packed(const uint8_t* packed, int64_t bytes, bool whole, Rows* rows, Shape* shape) {
  Header h;
  if (bytes < int64_t(sizeof h)) return "it is shorter than a header";
  std::memcpy(&h, packed, sizeof h);
  if (std::memcmp(h.magic, magic, sizeof magic)) return "it does not start as a packed layer does";
  if (h.version != version) return "it was packed by another version of hf_fff; pack the layer again";
  if (h.own != checksum(&h, sizeof h - 8)) return "its header is damaged";
  if (h.bytes != bytes) return "it is not as long as its header says";
  if (whole && h.content != checksum(packed + sizeof h, bytes - int64_t(sizeof h))) return "it is damaged";
  *rows = Rows(h.rows);
  *shape = {0, h.hidden, h.trees, h.depth};
  return nullptr;
}

// Few tokens: each thread takes some through everything. Many tokens in one tree: down the first levels; then sorted by the
// subtree that they reached, threads take parts of the sorted tokens and with them parts of the tree. Many tokens in several
// trees: threads take trees on the way down, and columns for the outputs, each of them for all tokens of the block. So in both, a
// row comes from memory for one thread only, and once a block.
template <class T> void forward_packed(const PackedForward<T>& f, const ParallelFor& host) {
  Header h;
  std::memcpy(&h, f.packed, sizeof h);
  const Layout l(Rows(h.rows), h.hidden, h.trees, h.depth);
  const PackedKernels<T>& k = pick<T>(l.rows);
  constexpr int64_t many = 96, chunk = 128, near_bytes = 1 << 20;
  const int64_t most = l.trees == 1 ? 8192 : 1024;
  const int64_t block = std::min(f.tokens, most);
  const int64_t values = l.values(), count = l.terms();
  Scratch scratch(block * (l.row_bytes + 4 + 4 * l.trees + 4 * values + 8 * count + 8 + 8) + 8 * 64);
  Packed p{l, f.packed, f.activation, scratch.take<uint8_t>(block * l.row_bytes), scratch.take<float>(block),
           scratch.take<int32_t>(block * l.trees), scratch.take<float>(block * values), scratch.take<Term>(block * count),
           scratch.take<Sum>(block)};
  int32_t *order = scratch.take<int32_t>(block), *spare = scratch.take<int32_t>(block);
  std::fill_n(p.value, block * values, 0.f);  // those of slots that stand empty are never written
  const int64_t token_bytes = l.trees * l.levels * 2 * l.row_bytes;
  const int64_t grain = std::max<int64_t>(1, 100'000 / token_bytes);  // some microseconds of work
  int64_t fetched = 0;  // the first level whose rows may not be in the second-level cache
  if (f.tokens >= many)
    while (fetched < l.levels && ((int64_t{2} << fetched) - 1) * l.row_bytes <= near_bytes) ++fetched;
  for (int64_t first = 0; first < f.tokens; first += block) {
    const int64_t n = std::min(block, f.tokens - first);
    const T* x = f.x + first * l.hidden;
    T* y = f.y + first * l.hidden;
    if (n < many) {
      parallel(host, n, grain, [&](int64_t begin, int64_t end) {
        k.pack_tokens(p, x, begin, end);
        k.walk(p, nullptr, begin, end - begin, 0, l.trees, 0, l.levels, fetched);
        k.terms(p, nullptr, begin, end - begin);
        k.add_groups(p, nullptr, begin, end - begin, 0, l.parts, y);
      });
    } else if (l.trees == 1) {
      const int64_t stage = stage_levels(l.levels);
      parallel(host, n, grain, [&](int64_t begin, int64_t end) {
        std::iota(order + begin, order + end, int32_t(begin));
        k.pack_tokens(p, x, begin, end);
        k.walk(p, order + begin, 0, end - begin, 0, 1, 0, stage, fetched);
      });
      std::iota(order, order + n, 0);
      sort_by_node(order, spare, n, p.node, int(std::min(stage, l.levels - 1)));
      parallel(host, n, grain, [&](int64_t begin, int64_t end) {
        for (int64_t part; begin < end; begin += part) {
          part = std::min<int64_t>(1024, end - begin);
          int32_t* own = order + begin;
          for (int64_t level = stage, next; level < l.levels; level = next) {
            next = std::min(l.levels, level + stage);
            k.walk(p, own, 0, part, 0, 1, level, next, fetched);
            sort_by_node(own, spare + begin, part, p.node, int(std::min(next, l.levels - 1) - level));
          }
          k.terms(p, own, 0, part);
          k.add_groups(p, own, 0, part, 0, l.parts, y);
        }
      });
    } else {
      const int64_t chunks = (n + chunk - 1) / chunk;
      // Items of a tree, or of a part of the columns, follow each other: one for each chunk of tokens.
      const auto items = [&](int64_t of, const auto& f) {
        parallel(host, of * chunks, 1, [&](int64_t begin, int64_t end) {
          for (int64_t last; begin < end; begin = last) {
            const int64_t i = begin / chunks;
            last = std::min(end, (i + 1) * chunks);
            const int64_t token = (begin - i * chunks) * chunk;
            f(i, token, std::min(n, (last - i * chunks) * chunk) - token);
          }
        });
      };
      parallel(host, n, grain, [&](int64_t begin, int64_t end) { k.pack_tokens(p, x, begin, end); });
      items(l.trees, [&](int64_t tree, int64_t token, int64_t tokens) {
        k.walk(p, nullptr, token, tokens, tree, tree + 1, 0, l.levels, fetched);
      });
      parallel(host, n, grain, [&](int64_t begin, int64_t end) { k.terms(p, nullptr, begin, end - begin); });
      items(l.parts, [&](int64_t part, int64_t token, int64_t tokens) {
        k.add_groups(p, nullptr, token, tokens, part, part + 1, y);
      });
    }
  }
}

template void forward_packed<float>(const PackedForward<float>&, const ParallelFor&);
template void forward_packed<bfloat16>(const PackedForward<bfloat16>&, const ParallelFor&);
template void forward_packed<float16>(const PackedForward<float16>&, const ParallelFor&);

}  // namespace hf_fff
