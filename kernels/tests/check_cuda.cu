// A driver of the CUDA core, for compute-sanitizer: it needs no torch. Small shapes of all kinds, in all types, forward in every
// way that serves them and backward, in buffers of exactly the right size; results against sums in double along the same
// path, and twice, which must give the same bits. Given a number of seconds, random shapes follow until they are over.
//
//     nvcc -std=c++20 -O3 -arch=native -Ikernels kernels/tests/check_cuda.cu kernels/cuda/*.cu -o check && compute-sanitizer ./check
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <random>
#include <vector>

#include "cuda/common.cuh"

using namespace hf_fff_cuda;

namespace {

std::mt19937_64 bits(0);
int failures = 0, checks = 0;
bool poison = true;

void must(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::printf("%s: %s\n", what, cudaGetErrorString(error));
  std::exit(2);
}

float from_double(double v, float) { return float(v); }
double from_double(double v, double) { return v; }
bfloat16 from_double(double v, bfloat16) { return __float2bfloat16_rn(float(v)); }
float16 from_double(double v, float16) { return __float2half_rn(float(v)); }
double value(float v) { return v; }
double value(double v) { return v; }
double value(bfloat16 v) { return __bfloat162float(v); }
double value(float16 v) { return __half2float(v); }

template <class T> std::vector<T> random_values(int64_t count, double scale) {
  std::normal_distribution<double> normal(0, scale);
  std::vector<T> v(count);
  for (auto& x : v) x = from_double(normal(bits), T());
  return v;
}

template <class T> struct OnDevice {
  T* at = nullptr;
  size_t count;
  explicit OnDevice(size_t n) : count(n) {
    must(cudaMalloc(&at, std::max<size_t>(1, n * sizeof(T))), "allocate");
    if (poison) must(cudaMemset(at, 0xff, n * sizeof(T)), "poison");  // NaN
  }
  explicit OnDevice(const std::vector<T>& v) : OnDevice(v.size()) {
    must(cudaMemcpy(at, v.data(), count * sizeof(T), cudaMemcpyHostToDevice), "copy there");
  }
  OnDevice(const OnDevice&) = delete;
  ~OnDevice() { cudaFree(at); }
  std::vector<T> read() const {
    std::vector<T> v(count);
    must(cudaMemcpy(v.data(), at, count * sizeof(T), cudaMemcpyDeviceToHost), "copy back");
    return v;
  }
};

template <class T> bool same(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || !std::memcmp(a.data(), b.data(), a.size() * sizeof(T)));
}

void expect(bool good, const char* what, const char* type, const Shape& s) {
  ++checks;
  if (good) return;
  ++failures;
  std::printf("%s: %s, tokens %lld hidden %lld trees %lld depth %lld\n", what, type, (long long)s.tokens, (long long)s.hidden,
              (long long)s.trees, (long long)s.depth);
}

// ||a - b|| / ||b||
template <class T> double distance(const std::vector<T>& a, const std::vector<double>& b) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < b.size(); ++i) {
    const double d = value(a[i]) - b[i];
    if (!(d == d)) return 1e9;
    difference += d * d, norm += b[i] * b[i];
  }
  return norm > 0 ? std::sqrt(difference / norm) : std::sqrt(difference);
}

double gelu(double z) { return 0.5 * z * (1 + std::erf(z / std::sqrt(2.0))); }
double gelu_slope(double z) {
  return 0.5 * (1 + std::erf(z / std::sqrt(2.0))) + z * std::exp(-0.5 * z * z) / std::sqrt(2 * 3.14159265358979323846);
}

constexpr const char* kWays[] = {"automatic", "plain", "gather", "sorted", "tiles", "columns", "forest"};

template <class T> void check(const char* name, Type type, double bound, Shape s, int capability, int processors) {
  using A = accumulator_t<T>;
  const int64_t T_ = s.tokens, H = s.hidden, N = s.tree_nodes(), L = s.levels();
  const auto x = random_values<T>(T_ * H, 1), weight_in = random_values<T>(s.nodes() * H, 1 / std::sqrt(double(H))),
             bias = random_values<T>(s.nodes(), 0.3), weight_out = random_values<T>(s.nodes() * H, 1), grad = random_values<T>(T_ * H, 1);
  const OnDevice<T> xd(x), in(weight_in), bd(bias), out(weight_out), gd(grad);
  const Problem problem{s, type, true, capability, processors};
  for (int w = 1; w <= 6; ++w) {
    const Way way = Way(w);
    if (forward_way(problem, way) != way) continue;
    OnDevice<T> y(T_ * H), again(T_ * H);
    OnDevice<int32_t> path(T_ * s.walk());
    OnDevice<A> logits(T_ * s.walk());
    {
      OnDevice<char> workspace(forward_workspace(problem, way, true));
      const char* error = forward({problem, Activation::gelu, xd.at, in.at, bd.at, out.at, y.at, path.at, logits.at, workspace.at}, way, 0);
      if (error) std::printf("%s\n", error), std::exit(2);
      OnDevice<char> other(forward_workspace(problem, way, false));
      forward({problem, Activation::gelu, xd.at, in.at, bd.at, out.at, again.at, nullptr, nullptr, other.at}, way, 0);
      must(cudaDeviceSynchronize(), kWays[w]);
    }
    expect(same(y.read(), again.read()), "forward differs from itself", name, s);
    const auto p = path.read();
    const auto z = logits.read();
    bool is_path = true;
    double off = 0;
    std::vector<double> want(T_ * H);
    std::vector<double> gx(T_ * H), gin(s.nodes() * H), gbias(s.nodes()), gout(s.nodes() * H);
    for (int64_t t = 0; t < T_; ++t)
      for (int64_t k = 0; k < s.trees; ++k) {
        int64_t n = 0;
        for (int64_t l = 0; l < L; ++l) {
          const int64_t at = (t * s.trees + k) * L + l, row = k * N + n;
          if (p[at] != n) { is_path = false; break; }
          double exact = value(bias[row]), gain = 0;
          for (int64_t c = 0; c < H; ++c) {
            exact += value(x[t * H + c]) * value(weight_in[row * H + c]);
            gain += value(grad[t * H + c]) * value(weight_out[row * H + c]);
          }
          off = std::max(off, std::abs(value(z[at]) - exact) / (1 + std::abs(exact)));
          const double act = gelu(exact), slope = gain * gelu_slope(exact);
          gbias[row] += slope;
          for (int64_t c = 0; c < H; ++c) {
            want[t * H + c] += act * value(weight_out[row * H + c]);
            gx[t * H + c] += slope * value(weight_in[row * H + c]);
            gin[row * H + c] += slope * value(x[t * H + c]);
            gout[row * H + c] += act * value(grad[t * H + c]);
          }
          if (l + 1 < L) n = p[at + 1] == 2 * n + 2 ? 2 * n + 2 : 2 * n + 1;
          if (l + 1 < L && std::abs(exact) > 1e-4) is_path &= (p[at + 1] == 2 * (p[at]) + 2) == (exact > 0);
        }
      }
    char what[64];
    std::snprintf(what, sizeof what, "forward (%s)", kWays[w]);
    expect(is_path, "path", name, s);
    const double error = distance(y.read(), want), logit_bound = sizeof(T) == 8 ? 1e-12 : 1e-5;
    if (error > bound || off > logit_bound) std::printf("%s: outputs %.2e, logits %.2e: ", what, error, off);
    expect(error <= bound && off <= logit_bound, what, name, s);
    if (w != 1) continue;
    // Backward along that path, twice.
    std::vector<T> first[4];
    for (int round = 0; round < 2; ++round) {
      OnDevice<T> into_x(T_ * H), into_in(s.nodes() * H), into_bias(s.nodes()), into_out(s.nodes() * H);
      OnDevice<char> workspace(backward_workspace(problem, true));
      const char* failed = backward({problem, Activation::gelu, gd.at, xd.at, in.at, bd.at, out.at, path.at, logits.at, nullptr, into_x.at,
                                     into_in.at, into_bias.at, into_out.at, workspace.at}, 0);
      if (failed) std::printf("%s\n", failed), std::exit(2);
      must(cudaDeviceSynchronize(), "backward");
      std::vector<T> got[4] = {into_x.read(), into_in.read(), into_bias.read(), into_out.read()};
      if (round) {
        for (int i = 0; i < 4; ++i) expect(same(got[i], first[i]), "backward differs from itself", name, s);
        break;
      }
      const std::vector<double>* wanted[4] = {&gx, &gin, &gbias, &gout};
      for (int i = 0; i < 4; ++i) {
        first[i] = got[i];
        const double e = distance(got[i], *wanted[i]);
        std::snprintf(what, sizeof what, "gradient %d (%.2e)", i, e);
        expect(e <= bound, what, name, s);
      }
    }
  }
}

void check_all(Shape s, int capability, int processors) {
  check<float>("float32", Type::float32, 1e-5, s, capability, processors);
  check<double>("float64", Type::float64, 1e-12, s, capability, processors);
  check<bfloat16>("bfloat16", Type::bfloat16, 1e-2, s, capability, processors);
  check<float16>("float16", Type::float16, 2e-3, s, capability, processors);
}

}  // namespace

int main(int count, char** arguments) {
  poison = !std::getenv("NO_POISON");  // which would hide from initcheck what is read before it is written
  cudaDeviceProp device;
  must(cudaGetDeviceProperties(&device, 0), "device");
  const int capability = device.major * 10 + device.minor, processors = device.multiProcessorCount;
  for (const Shape& s : std::vector<Shape>{{0, 8, 1, 2}, {1, 1, 1, 0}, {5, 33, 3, 4}, {70, 64, 1, 5}, {200, 64, 1, 6}, {130, 128, 1, 11},
                                           {300, 64, 1, 11}, {90, 40, 2, 9}, {40, 72, 5, 3}, {3, 1100, 1, 3}, {700, 16, 1, 4}, {33, 24, 1, 13},
                                           {9, 768, 2, 4}, {150, 192, 1, 8}, {1, 64, 1, 11}, {129, 8, 64, 0}, {130, 64, 4, 9}, {33, 128, 8, 8},
                                           {140, 64, 3, 4}, {20, 64, 16, 7}})
    check_all(s, capability, processors);
  const double seconds = count > 1 ? std::atof(arguments[1]) : 0;
  int shapes = 0;
  std::mt19937_64 draw(7);
  const std::time_t begin = std::time(nullptr);
  while (std::difftime(std::time(nullptr), begin) < seconds) {
    const int64_t choices[] = {1, 7, 8, 16, 24, 33, 64, 128, 192, 200};
    const int64_t trees = draw() % 2 ? 1 : 1 + draw() % 9, depth = draw() % 13, hidden = choices[draw() % 10];
    const int64_t most = std::max<int64_t>(2, 400000 / (hidden * trees * (depth + 1)));
    check_all({int64_t(draw() % std::min<int64_t>(most, 1500)), hidden, trees, depth}, capability, processors);
    ++shapes;
  }
  std::printf("%d checks, %d random shapes, %d failures on %s\n", checks, shapes, failures, device.name);
  return failures > 0;
}
