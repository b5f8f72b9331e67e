// A driver of the plain C++ core, for the sanitizers: `make sanitize`. It needs no torch. Random shapes in all storage
// types, forward and backward, in buffers of exactly the right size: results against sums in double along the same path,
// tokens alone against tokens in a batch, and one thread against three, the last two bit for bit. HF_FFF_ISA chooses what
// runs.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "cpu/fff.h"
#include "cpu/scalar.h"

using namespace hf_fff;

namespace {

std::mt19937_64 random_bits(0);
int failures = 0;

void in_one_thread(int64_t count, int64_t, ParallelFor::Body body, void* context) { body(context, 0, count); }

void in_three_threads(int64_t count, int64_t, ParallelFor::Body body, void* context) {
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < 3; ++i)
    if (i * count / 3 < (i + 1) * count / 3)
      threads.emplace_back([=] { body(context, i * count / 3, (i + 1) * count / 3); });
  for (auto& thread : threads) thread.join();
}

template <class T> std::vector<T> random_values(int64_t count, double scale) {
  std::normal_distribution<double> normal(0, scale);
  std::vector<T> v(count);
  for (auto& x : v) x = from_accumulator<T>(accumulator_t<T>(normal(random_bits)));
  return v;
}

template <class T> double value(T v) { return double(to_accumulator(v)); }
double gelu(double z) { return 0.5 * z * (1 + std::erf(z / std::sqrt(2.0))); }

template <class T> bool same(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || !std::memcmp(a.data(), b.data(), a.size() * sizeof(T)));
}

void expect(bool good, const char* what, const char* type, const Shape& s) {
  if (good) return;
  ++failures;
  std::printf("%s: %s, tokens %lld hidden %lld trees %lld depth %lld\n", what, type, (long long)s.tokens,
              (long long)s.hidden, (long long)s.trees, (long long)s.depth);
}

template <class T> void check(const char* type, double bound, Shape s) {
  using A = accumulator_t<T>;
  const ParallelFor one{in_one_thread}, three{in_three_threads};
  const auto x = random_values<T>(s.tokens * s.hidden, 1),
             weight_in = random_values<T>(s.nodes() * s.hidden, 1 / std::sqrt(double(s.hidden))),
             bias_in = random_values<T>(s.nodes(), 0.3), weight_out = random_values<T>(s.nodes() * s.hidden, 1),
             grad_y = random_values<T>(s.tokens * s.hidden, 1);
  const auto run = [&](Shape shape, const T* from, const ParallelFor& host, std::vector<T>& y,
                       std::vector<int32_t>* path, std::vector<A>* logits) {
    forward<T>({shape, Activation::gelu, from, weight_in.data(), bias_in.data(), weight_out.data(), y.data(),
                path ? path->data() : nullptr, logits ? logits->data() : nullptr}, host);
  };
  std::vector<T> y(s.tokens * s.hidden), again(y.size()), alone(s.hidden);
  std::vector<int32_t> path(s.tokens * s.walk()), path_again(path.size());
  std::vector<A> logits(path.size()), logits_again(path.size());
  run(s, x.data(), one, y, &path, &logits);
  run(s, x.data(), three, again, &path_again, &logits_again);
  expect(same(y, again) && same(path, path_again) && same(logits, logits_again), "threads change the result", type, s);
  run(s, x.data(), three, again, nullptr, nullptr);
  expect(same(y, again), "asking for the path changes the result", type, s);
  expect(is_valid_path(s, path.data()), "the path is none", type, s);
  double error = 0, norm = 0;
  for (int64_t t = 0; t < s.tokens; t += 1 + s.tokens / 50) {
    run({1, s.hidden, s.trees, s.depth}, x.data() + t * s.hidden, one, alone, nullptr, nullptr);
    expect(!std::memcmp(alone.data(), y.data() + t * s.hidden, s.hidden * sizeof(T)), "alone and in a batch differ", type,
           s);
    std::vector<double> sum(s.hidden);
    for (int64_t visit = 0; visit < s.walk(); ++visit) {
      const int64_t row = visit / s.levels() * s.tree_nodes() + path[t * s.walk() + visit];
      double z = value(bias_in[row]);
      for (int64_t i = 0; i < s.hidden; ++i) z += value(x[t * s.hidden + i]) * value(weight_in[row * s.hidden + i]);
      for (int64_t i = 0; i < s.hidden; ++i) sum[i] += gelu(z) * value(weight_out[row * s.hidden + i]);
      if ((visit + 1) % s.levels() && std::fabs(z) > 1e-3)
        expect((path[t * s.walk() + visit + 1] % 2 == 0) == (z > 0), "a wrong turn", type, s);
    }
    for (int64_t i = 0; i < s.hidden; ++i) {
      error += std::pow(value(y[t * s.hidden + i]) - sum[i], 2);
      norm += sum[i] * sum[i];
    }
  }
  expect(error <= bound * bound * norm, "the output is wrong", type, s);

  std::vector<T> grads[2][4];
  for (int i = 0; i < 2; ++i) {
    auto& [grad_x, grad_in, grad_bias, grad_out] = grads[i];
    grad_x.resize(x.size());
    grad_in.resize(weight_in.size());
    grad_bias.resize(bias_in.size());
    grad_out.resize(weight_out.size());
    backward<T>({s, Activation::gelu, grad_y.data(), x.data(), weight_in.data(), bias_in.data(), weight_out.data(),
                 path.data(), logits.data(), s.tokens % 2 ? 3.0 : 0.0, 1.0, grad_x.data(), grad_in.data(),
                 grad_bias.data(), grad_out.data()},
                i ? three : one);
  }
  for (int i = 0; i < 4; ++i) expect(same(grads[0][i], grads[1][i]), "threads change the gradients", type, s);
  // d/ds of <grad_y, y> when weight_out is scaled by s is <grad_out, weight_out> and <grad_y, y> both.
  double scaled = 0, direct = 0, size = 0;
  for (size_t i = 0; i < weight_out.size(); ++i) scaled += value(grads[0][3][i]) * value(weight_out[i]);
  for (size_t i = 0; i < y.size(); ++i) {
    direct += value(grad_y[i]) * value(y[i]);
    size += std::fabs(value(grad_y[i]) * value(y[i]));
  }
  expect(std::fabs(scaled - direct) <= 2 * bound * size, "the gradient of weight_out is wrong", type, s);
}

// One row as integers: nearest to 127 times its share of the largest; `scale` is what one of them is worth.
std::vector<int> integers(const float* row, int64_t n, float* scale) {
  float most = 0;
  for (int64_t i = 0; i < n; ++i) most = std::max(most, std::fabs(row[i]));
  *scale = most / 127.f;
  std::vector<int> q(n);
  for (int64_t i = 0; i < n && most > 0; ++i) q[i] = int(std::nearbyint(row[i] * (127.f / most)));
  return q;
}

uint64_t digest = 14695981039346656037u;  // of all outputs over int8 rows: equal for every instruction set

// Packed layers against their definition, in double along a path of its own, but for the sums of integers.
template <class T> void check_packed(const char* type, Rows rows, Shape s) {
  const bool int8 = rows == Rows::int8;
  const ParallelFor one{in_one_thread}, three{in_three_threads};
  const auto x = random_values<T>(s.tokens * s.hidden, 1);
  const auto weight_in = random_values<float>(s.nodes() * s.hidden, 1 / std::sqrt(double(s.hidden))),
             bias_in = random_values<float>(s.nodes(), 0.3), weight_out = random_values<float>(s.nodes() * s.hidden, 1);
  std::vector<uint8_t> packed(packed_bytes(rows, s));
  expect(pack(rows, s, weight_in.data(), bias_in.data(), weight_out.data(), packed.data()), "does not pack", type, s);
  Rows found;
  Shape shape;
  const char* error = read_packed(packed.data(), int64_t(packed.size()), true, &found, &shape);
  expect(!error && found == rows && shape.hidden == s.hidden && shape.trees == s.trees && shape.depth == s.depth,
         error ? error : "the header is wrong", type, s);
  if (s.nodes() * s.hidden < 5000)
    for (int i = 0; i < 40; ++i) {
      auto damaged = packed;
      damaged[random_bits() % damaged.size()] ^= 1 << random_bits() % 8;
      expect(read_packed(damaged.data(), int64_t(damaged.size()), true, &found, &shape), "damage is not seen", type, s);
      damaged.resize(random_bits() % damaged.size());
      expect(read_packed(damaged.data(), int64_t(damaged.size()), true, &found, &shape), "a cut is not seen", type, s);
    }
  const auto run = [&](int64_t tokens, const T* from, const ParallelFor& host, std::vector<T>& y) {
    forward_packed<T>({tokens, Activation::gelu, from, packed.data(), y.data()}, host);
  };
  std::vector<T> y(s.tokens * s.hidden), again(y.size()), alone(s.hidden);
  run(s.tokens, x.data(), one, y);
  run(s.tokens, x.data(), three, again);
  expect(same(y, again), "threads change the packed result", type, s);
  for (size_t i = 0; int8 && i < y.size() * sizeof(T); ++i)
    digest = (digest ^ reinterpret_cast<const uint8_t*>(y.data())[i]) * 1099511628211u;
  double error2 = 0, norm2 = 0;
  for (int64_t t = 0; t < s.tokens; t += 1 + s.tokens / 7) {
    run(1, x.data() + t * s.hidden, one, alone);
    const std::vector<T> there(y.begin() + t * s.hidden, y.begin() + (t + 1) * s.hidden);
    expect(same(alone, there), "a token alone differs from one in a batch, packed", type, s);
    std::vector<float> token(s.hidden);
    for (int64_t i = 0; i < s.hidden; ++i) token[i] = float(value(x[t * s.hidden + i]));
    float x_scale, in_scale, out_scale;
    const auto qx = integers(token.data(), s.hidden, &x_scale);
    std::vector<double> sum(s.hidden);
    for (int64_t tree = 0; tree < s.trees; ++tree)
      for (int64_t level = 0, n = 0; level < s.levels(); ++level) {
        const int64_t row = tree * s.tree_nodes() + n;
        double z = 0;
        if (int8) {
          const auto q = integers(weight_in.data() + row * s.hidden, s.hidden, &in_scale);
          for (int64_t i = 0; i < s.hidden; ++i) z += qx[i] * q[i];
          z *= double(x_scale) * in_scale;
        } else {
          for (int64_t i = 0; i < s.hidden; ++i)
            z += double(to_float(to_bfloat16(token[i]))) * to_float(to_bfloat16(weight_in[row * s.hidden + i]));
        }
        z += bias_in[row];
        const auto q = integers(weight_out.data() + row * s.hidden, s.hidden, &out_scale);
        for (int64_t i = 0; i < s.hidden; ++i)
          sum[i] += gelu(z) * (int8 ? q[i] * double(out_scale) : to_float(to_bfloat16(weight_out[row * s.hidden + i])));
        n = 2 * n + 1 + (z > 0);
      }
    for (int64_t i = 0; i < s.hidden; ++i) {
      error2 += std::pow(value(there[i]) - sum[i], 2);
      norm2 += sum[i] * sum[i];
    }
  }
  // What is left: factors of output rows as 8 bit integers or bf16, and a turn that rounding decides otherwise.
  expect(error2 <= 0.03 * 0.03 * norm2, "the packed output is wrong", type, s);
}

int64_t between(int64_t low, int64_t high) { return low + int64_t(random_bits() % uint64_t(high - low + 1)); }

}  // namespace

int main(int count, char** arguments) {
  if (isa_error()) return std::puts(isa_error()), 0;  // nothing to check here
  const int rounds = count > 1 ? std::atoi(arguments[1]) : 12;
  std::vector<Shape> shapes{{0, 8, 2, 3},      {3000, 9, 1, 11}, {700, 65, 1, 12},
                            {300, 400, 1, 11}, {200, 33, 3, 14}, {1500, 7, 8, 0}};
  for (int i = 0; i < rounds; ++i)
    shapes.push_back({between(1, i % 3 ? 150 : 1200), between(1, i % 2 ? 70 : 800), between(1, 5), between(0, 7)});
  for (const Shape& s : shapes) {
    check<float>("float32", 1e-5, s);
    check<double>("float64", 1e-12, s);
    check<bfloat16>("bfloat16", 2e-2, s);
    check<float16>("float16", 2e-3, s);
    for (const Rows rows : {Rows::int8, Rows::bf16}) {
      check_packed<float>(rows == Rows::int8 ? "int8, x float32" : "bf16, x float32", rows, s);
      check_packed<bfloat16>(rows == Rows::int8 ? "int8, x bfloat16" : "bf16, x bfloat16", rows, s);
      check_packed<float16>(rows == Rows::int8 ? "int8, x float16" : "bf16, x float16", rows, s);
    }
  }
  std::printf("%s: %zu shapes, %d failures, int8 outputs %016llx\n", isa(), shapes.size(), failures,
              (unsigned long long)digest);
  return failures != 0;
}
