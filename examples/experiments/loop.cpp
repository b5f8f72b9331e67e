// A layer in a loop on one thread, without torch: for counters of valgrind or perf; and rows in any order, as a tree reads them, for what
// the machine gives. `cpu_counters.py` compiles and runs it.
//
//   loop layer f32|bf16|int8 TREES DEPTH HIDDEN TOKENS CALLS     random weights and inputs -> microseconds a call
//   loop rows ROW_BYTES BYTES AHEAD SECONDS                      dot products with rows out of so many bytes, fetched AHEAD rows before -> GB/s
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "cpu/fff.h"

using namespace hf_fff;

namespace {

uint64_t state = 88172645463325252u;
uint32_t random_bits() {
  state ^= state << 13, state ^= state >> 7, state ^= state << 17;
  return uint32_t(state >> 32);
}

std::vector<float> random_values(int64_t count, float scale) {
  std::vector<float> values(count);
  for (auto& v : values) v = scale * (float(random_bits()) / 2147483648.f - 1.f);
  return values;
}

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

const ParallelFor one_thread{[](int64_t count, int64_t, ParallelFor::Body body, void* context) { body(context, 0, count); }};

int layer(const std::string& rows, Shape s, int64_t calls) {
  constexpr int64_t inputs = 4;  // in turn, so that paths differ from call to call
  const auto x = random_values(inputs * s.tokens * s.hidden, 1), weight_in = random_values(s.nodes() * s.hidden, 0.03f),
             bias_in = random_values(s.nodes(), 0.01f), weight_out = random_values(s.nodes() * s.hidden, 1);
  std::vector<float> y(s.tokens * s.hidden);
  double seconds = 0;
  const auto run = [&](const auto& call) {
    const double start = now();
    for (int64_t i = 0; i < calls; ++i) call(i % inputs * s.tokens * s.hidden);
    seconds = now() - start;
  };
  if (rows == "f32") {
    run([&](int64_t from) {
      forward<float>({s, Activation::gelu, x.data() + from, weight_in.data(), bias_in.data(), weight_out.data(), y.data(), nullptr, nullptr},
                     one_thread);
    });
  } else if (rows == "int8" || rows == "bf16") {
    const Rows kind = rows == "int8" ? Rows::int8 : Rows::bf16;
    const int64_t bytes = packed_bytes(kind, s);
    auto* packed = static_cast<uint8_t*>(std::aligned_alloc(64, size_t((bytes + 63) / 64 * 64)));
    if (!packed || !pack(kind, s, weight_in.data(), bias_in.data(), weight_out.data(), packed)) return 1;
    run([&](int64_t from) { forward_packed<float>({s.tokens, Activation::gelu, x.data() + from, packed, y.data()}, one_thread); });
    std::free(packed);
  } else {
    return std::fprintf(stderr, "rows of '%s' are not known (allowed: f32, bf16, int8)\n", rows.c_str()), 2;
  }
  double sum = 0;
  for (float v : y) sum += v;
  std::printf("{\"isa\": \"%s\", \"microseconds\": %.4f, \"sum\": %g}\n", isa(), 1e6 * seconds / double(calls), sum);
  return 0;
}

int rows_in_any_order(int64_t row_bytes, int64_t bytes, int64_t ahead, double seconds) {
  const int64_t n = row_bytes / 4, count = bytes / row_bytes;
  const auto rows = random_values(count * n, 1), x = random_values(n, 1);
  std::vector<uint32_t> order(1 << 16);
  for (auto& i : order) i = random_bits() % uint32_t(count);
  float sums = 0;
  double best = 0;
  for (const double start = now(); now() - start < seconds;) {  // short runs, of which the best counts: others use the machine too
    constexpr int64_t reads = 2048;
    const int64_t first = random_bits() % (order.size() - reads - ahead);
    const double begin = now();
    for (int64_t r = first; r < first + reads; ++r) {
      if (ahead)
        for (int64_t b = 0; b < n; b += 16) __builtin_prefetch(&rows[order[r + ahead] * n + b]);
      const float* row = &rows[order[r] * n];
      float sum = 0;
      for (int64_t i = 0; i < n; ++i) sum += row[i] * x[i];  // -ffast-math: in as many registers as there are
      sums += sum;
    }
    best = std::max(best, double(reads * n * 4) / (now() - begin));
  }
  std::printf("{\"gb_per_second\": %.2f, \"sum\": %g}\n", best / 1e9, double(sums));
  return 0;
}

}  // namespace

int main(int count, char** argument) {
  const auto number = [&](int i) { return std::atoll(argument[i]); };
  if (isa_error()) return std::fprintf(stderr, "%s\n", isa_error()), 2;
  if (count == 8 && argument[1] == std::string("layer"))
    return layer(argument[2], {number(6), number(5), number(3), number(4)}, number(7));
  if (count == 6 && argument[1] == std::string("rows"))
    return rows_in_any_order(number(2), number(3), number(4), std::atof(argument[5]));
  std::fprintf(stderr, "usage: layer ROWS TREES DEPTH HIDDEN TOKENS CALLS | rows ROW_BYTES BYTES AHEAD SECONDS\n");
  return 2;
}
