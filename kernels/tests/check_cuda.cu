// A driver of the CUDA core, for compute-sanitizer and for many shapes: it needs no torch. Shapes of all kinds, in all types, forward in every
// way that serves them and backward in every way, in buffers of exactly the right size; results against sums in double along the same path,
// made on the GPU by plain kernels, and twice, which must give the same bits.
//
//     nvcc -std=c++20 -O3 -arch=native --extended-lambda -Ikernels kernels/tests/check_cuda.cu kernels/cuda/*.cu -o check
//     compute-sanitizer ./check               # some shapes
//     ./check 60 [10000]                      # and random ones for so many seconds, or until so many are done
//     compute-sanitizer --tool racecheck ./check race  # a few tiny ones, chosen to reach the kernels
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "cuda/common.cuh"

using namespace hf_fff_cuda;

namespace {

std::mt19937_64 draw(7);
int failures = 0, checks = 0;
bool poison = true, guarded = false;

void must(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::printf("%s: %s\n", what, cudaGetErrorString(error));
  std::exit(2);
}
void must(const char* error) {
  if (!error) return;
  std::printf("%s\n", error);
  std::exit(2);
}

// ---- buffers, and what is known of them when a shape is done ---------------------------------------------------------------

constexpr int kFacts = 256, kGuard = 64;  // bytes behind a buffer, that nobody may touch
struct Facts {
  double difference[kFacts], norm[kFacts];
  int flags[kFacts];
};
Facts* facts;  // on the device
struct Expected {
  char what[56];
  double bound;  // of the relative difference; 0: a flag
};
std::vector<Expected> expected;

constexpr int kBlock = 256;
template <class F> __global__ void each_kernel(int64_t count, F f) {
  for (int64_t i = blockIdx.x * int64_t(kBlock) + threadIdx.x; i < count; i += int64_t(gridDim.x) * kBlock) f(i);
}
template <class F> void each(int64_t count, F f) {
  if (count > 0) each_kernel<<<unsigned(std::min<int64_t>(divide_up(count, kBlock), 4096)), kBlock>>>(count, f);
}

int expect_flag(const char* what, const char* way) {
  expected.push_back({{}, 0});
  std::snprintf(expected.back().what, sizeof expected.back().what, "%s (%s)", what, way);
  return int(expected.size()) - 1;
}

void look_behind(const void* buffer) {  // whether what guards it is whole
  const unsigned char* end = static_cast<const unsigned char*>(buffer);
  int* flag = facts->flags + kFacts - 1;
  each(kGuard, [=] __device__(int64_t i) { if (end[i] != 0xa5) *flag = 1; });
}

template <class T> struct OnDevice {
  T* at = nullptr;
  int64_t count, bytes;
  explicit OnDevice(int64_t n) : count(n), bytes(n * int64_t(sizeof(T))) {
    must(cudaMallocAsync(&at, std::max<int64_t>(1, bytes) + (guarded ? kGuard : 0), 0), "allocate");
    if (poison && n) must(cudaMemsetAsync(at, 0xff, bytes, 0), "poison");  // NaN
    if (guarded) must(cudaMemsetAsync(reinterpret_cast<char*>(at) + bytes, 0xa5, kGuard, 0), "guard");
  }
  OnDevice(const OnDevice&) = delete;
  ~OnDevice() {
    if (guarded) look_behind(reinterpret_cast<char*>(at) + bytes);
    cudaFreeAsync(at, 0);
  }
};

template <class T> __device__ double value(T v) { return double(to_acc(v)); }

__device__ inline uint64_t mixed(uint64_t v) {
  v += 0x9e3779b97f4a7c15u;
  v = (v ^ (v >> 30)) * 0xbf58476d1ce4e5b9u;
  v = (v ^ (v >> 27)) * 0x94d049bb133111ebu;
  return v ^ (v >> 31);
}
template <class T> void fill(const OnDevice<T>& to, double scale) {  // normal
  T* at = to.at;
  const uint64_t seed = draw();
  each(to.count, [=] __device__(int64_t i) {
    const uint64_t r = mixed(seed + uint64_t(i));
    const double u = (double(r >> 32) + 0.5) / 4294967296.0, v = double(r & 0xffffffffu) / 4294967296.0;
    at[i] = from_acc<T>(accumulator_t<T>(scale * sqrt(-2 * log(u)) * cospi(2 * v)));
  });
}

template <class T> void expect_same(const OnDevice<T>& a, const OnDevice<T>& b, const char* what, const char* way) {
  int* flag = facts->flags + expect_flag(what, way);
  const char *left = reinterpret_cast<char*>(a.at), *right = reinterpret_cast<char*>(b.at);
  each(a.bytes, [=] __device__(int64_t i) { if (left[i] != right[i]) *flag = 1; });
}

// ||a - b|| / ||b||, of which a norm that is not the sum's own may be given.
template <class T>
void expect_near(const T* a, const OnDevice<double>& b, double bound, const char* what, const char* way, const double* squares = nullptr) {
  const int which = expect_flag(what, way);
  expected.back().bound = bound;
  double *difference = facts->difference + which, *norm = facts->norm + which;
  const double* right = b.at;
  each(b.count, [=] __device__(int64_t i) {
    double d = value(a[i]) - right[i];
    d = d == d ? d * d : 1e30;
    const double n = squares ? max(squares[i], right[i] * right[i]) : right[i] * right[i];
    if (d) atomicAdd(difference, d);
    if (n) atomicAdd(norm, n);
  });
}

void settle(const char* type, const Shape& s, int processors) {
  static Facts told;
  must(cudaMemcpy(&told, facts, sizeof told, cudaMemcpyDeviceToHost), "a kernel");
  must(cudaMemset(facts, 0, sizeof told), "facts");
  if (expected.size() >= kFacts) std::printf("too many facts\n"), std::exit(2);
  const auto fail = [&](const char* what, double error) {
    ++failures;
    std::printf("%s: %.2e: %s, tokens %lld hidden %lld trees %lld depth %lld, %d processors\n", what, error, type, (long long)s.tokens,
                (long long)s.hidden, (long long)s.trees, (long long)s.depth, processors);
  };
  for (size_t i = 0; i < expected.size(); ++i) {
    ++checks;
    const double error = told.norm[i] > 0 ? std::sqrt(told.difference[i] / told.norm[i]) : std::sqrt(told.difference[i]);
    if (told.flags[i] || !(error <= expected[i].bound)) fail(expected[i].what, error);
  }
  if (told.flags[kFacts - 1]) fail("something was written behind a buffer", 0);
  expected.clear();
}

// ---- the definition ------------------------------------------------------------------------------------------------------

__device__ double gelu(double z) { return 0.5 * z * (1 + erf(z * 0.70710678118654752440)); }
__device__ double gelu_slope(double z) { return 0.5 * (1 + erf(z * 0.70710678118654752440)) + z * exp(-0.5 * z * z) * 0.39894228040143267794; }

// Exact logits and gains along a path; whether it is one, and turns where they say, but near a tie.
template <class T>
void visits(const Shape& s, const T* x, const T* in, const T* bias, const T* out, const T* grad, const int32_t* path, double* z, double* gain,
            int* wrong) {
  each(s.tokens * s.walk() * kWarp, [=] __device__(int64_t i) {
    const int64_t at = i / kWarp, token = at / s.walk(), tree = at / s.levels() % s.trees, level = at % s.levels();
    const int lane = int(i % kWarp);
    const int64_t node = max(int64_t(0), min(int64_t(path[at]), s.tree_nodes() - 1)), row = tree * s.tree_nodes() + node;
    double sum = 0, other = 0;
    for (int64_t c = lane; c < s.hidden; c += kWarp)
      sum += value(x[token * s.hidden + c]) * value(in[row * s.hidden + c]), other += value(grad[token * s.hidden + c]) * value(out[row * s.hidden + c]);
    sum = warp_sum(sum) + value(bias[row]), other = warp_sum(other);
    if (lane) return;
    z[at] = sum, gain[at] = other;
    if (level == 0 ? path[at] != 0 : path[at] != 2 * path[at - 1] + 1 && path[at] != 2 * path[at - 1] + 2) *wrong = 1;
    if (level < s.depth && fabs(sum) > 1e-4 && (path[at + 1] == 2 * path[at] + 2) != (sum > 0)) *wrong = 1;
  });
}
// to[t] = sum of coefficient * weight[row]
template <class T> void along(const Shape& s, const int32_t* path, const double* coefficient, const T* weight, double* to) {
  each(s.tokens * s.hidden, [=] __device__(int64_t i) {
    const int64_t token = i / s.hidden, column = i % s.hidden;
    double sum = 0;
    for (int64_t v = 0; v < s.walk(); ++v) {
      const int64_t row = v / s.levels() * s.tree_nodes() + path[token * s.walk() + v];
      sum += coefficient[token * s.walk() + v] * value(weight[row * s.hidden + column]);
    }
    to[i] = sum;
  });
}
// to[row] = sum of coefficient * x[t]
template <class T> void over_tokens(const Shape& s, const int32_t* path, const double* coefficient, const T* x, double* to) {
  each(s.tokens * s.walk() * s.hidden, [=] __device__(int64_t i) {
    const int64_t at = i / s.hidden, column = i % s.hidden, row = at / s.levels() % s.trees * s.tree_nodes() + path[at];
    atomicAdd(to + row * s.hidden + column, coefficient[at] * value(x[at / s.walk() * s.hidden + column]));
  });
}

// And of the slopes, and of their squares.
void bias_sums(const Shape& s, const int32_t* path, const double* slopes, double* sums, double* squares) {
  each(s.tokens * s.walk(), [=] __device__(int64_t i) {
    const int64_t row = i / s.levels() % s.trees * s.tree_nodes() + path[i];
    atomicAdd(sums + row, slopes[i]), atomicAdd(squares + row, slopes[i] * slopes[i]);
  });
}
// Activations and slopes of all visits; whether the logits are right.
template <class A>
void coefficients(const OnDevice<A>& given, const A* extra, const double* z, const double* gain, double* values, double* slopes, const char* way) {
  int* off = facts->flags + expect_flag("logits", way);
  const A* logits = given.at;
  const double bound = sizeof(A) == 8 ? 1e-12 : 1e-5;
  each(given.count, [=] __device__(int64_t i) {
    values[i] = gelu(z[i]), slopes[i] = gain[i] * gelu_slope(z[i]) + (extra ? double(extra[i]) : 0);
    if (!(fabs(double(logits[i]) - z[i]) <= bound * (1 + fabs(z[i])))) *off = 1;
  });
}

struct Zeros : OnDevice<double> {
  explicit Zeros(int64_t n) : OnDevice<double>(n) { if (n) must(cudaMemsetAsync(at, 0, n * 8, 0), "zeros"); }
};

constexpr const char* kWays[] = {"automatic", "plain", "gather", "sorted", "tiles", "columns", "forest"};

// Backward along a path, in all ways, twice, and x and the weights alone; G: what the tiles' gradients are of.
template <class T, class G>
void check_backward(const Problem& problem, Way way, const char* name, double bound, Backward b, const OnDevice<double>& gx, const OnDevice<double>& gin,
                    const OnDevice<double>& gbias, const OnDevice<double>& gout, const OnDevice<double>& bias_squares) {
  const Shape& s = problem.shape;
  const Wide can = backward_wide(problem, way);
  const bool wide = sizeof(G) > sizeof(T);
  b.wide_x = wide && can.x, b.wide_weights = wide && can.weights;
  const int64_t size = sizeof(T), x_size = b.wide_x ? sizeof(G) : size, weight_size = b.wide_weights ? sizeof(G) : size;
  struct Results {
    OnDevice<char> x, in, bias, out;
  };
  const auto run = [&](const Results* into, bool x, bool weights) {
    OnDevice<char> workspace(backward_workspace(problem, way, x, weights));
    Backward call = b;
    call.grad_x = x ? into->x.at : nullptr;
    if (weights) call.grad_weight_in = into->in.at, call.grad_bias_in = into->bias.at, call.grad_weight_out = into->out.at;
    call.workspace = workspace.at;
    must(backward(call, way, 0));
  };
  Results first{OnDevice<char>(s.tokens * s.hidden * x_size), OnDevice<char>(s.nodes() * s.hidden * weight_size),
                OnDevice<char>(s.nodes() * weight_size), OnDevice<char>(s.nodes() * s.hidden * weight_size)};
  Results again{OnDevice<char>(first.x.count), OnDevice<char>(first.in.count), OnDevice<char>(first.bias.count), OnDevice<char>(first.out.count)};
  run(&first, true, true);
  run(&again, true, false), run(&again, false, true);
  expect_same(first.x, again.x, "grad_x alone differs", name), expect_same(first.in, again.in, "grad_in alone differs", name);
  expect_same(first.bias, again.bias, "grad_bias alone differs", name), expect_same(first.out, again.out, "grad_out alone differs", name);
  run(&again, true, true);
  expect_same(first.x, again.x, "grad_x differs from itself", name), expect_same(first.in, again.in, "grad_in differs from itself", name);
  expect_same(first.bias, again.bias, "grad_bias differs from itself", name), expect_same(first.out, again.out, "grad_out differs from itself", name);
  const auto near = [&](const OnDevice<char>& a, bool single, const OnDevice<double>& b, const char* what, const double* squares = nullptr) {
    if (single) expect_near(reinterpret_cast<G*>(a.at), b, bound, what, name, squares);
    else expect_near(reinterpret_cast<T*>(a.at), b, bound, what, name, squares);
  };
  near(first.x, b.wide_x, gx, "grad_x"), near(first.in, b.wide_weights, gin, "grad_in"), near(first.out, b.wide_weights, gout, "grad_out");
  near(first.bias, b.wide_weights, gbias, "grad_bias", bias_squares.at);
}

template <class T> void check(const char* type_name, Type type, double bound, Shape s, int capability, int processors) {
  using A = accumulator_t<T>;
  const int64_t T_ = s.tokens, H = s.hidden, visits_ = T_ * s.walk();
  const OnDevice<T> x(T_ * H), in(s.nodes() * H), bias(s.nodes()), out(s.nodes() * H), grad(T_ * H);
  fill(x, 1), fill(in, 1 / std::sqrt(double(H))), fill(bias, 0.3), fill(out, 1), fill(grad, 1);
  const Problem problem{s, type, true, capability, processors};
  const Zeros z(visits_), gain(visits_), value_(visits_), slope(visits_), want(T_ * H);
  for (int w = 1; w <= 6; ++w) {
    const Way way = Way(w);
    if (forward_way(problem, way) != way) continue;
    const OnDevice<T> y(T_ * H), again(T_ * H);
    const OnDevice<int32_t> path(visits_);
    const OnDevice<A> logits(visits_), extra(visits_);
    {
      const OnDevice<char> workspace(forward_workspace(problem, way, true)), other(forward_workspace(problem, way, false));
      must(forward({problem, Activation::gelu, x.at, in.at, bias.at, out.at, y.at, path.at, logits.at, workspace.at}, way, 0));
      must(forward({problem, Activation::gelu, x.at, in.at, bias.at, out.at, again.at, nullptr, nullptr, other.at}, way, 0));
    }
    expect_same(y, again, "forward differs from itself", kWays[w]);
    const bool with_extra = draw() % 2;
    fill(extra, 2);
    visits(s, x.at, in.at, bias.at, out.at, grad.at, path.at, z.at, gain.at, facts->flags + expect_flag("path", kWays[w]));
    coefficients(logits, with_extra ? extra.at : nullptr, z.at, gain.at, value_.at, slope.at, kWays[w]);
    along(s, path.at, value_.at, out.at, want.at);
    expect_near(y.at, want, bound, "forward", kWays[w]);
    if (w != 1) continue;
    const Zeros gx(T_ * H), gin(s.nodes() * H), gbias(s.nodes()), squares(s.nodes()), gout(s.nodes() * H);
    along(s, path.at, slope.at, in.at, gx.at);
    over_tokens(s, path.at, slope.at, x.at, gin.at), over_tokens(s, path.at, value_.at, grad.at, gout.at);
    bias_sums(s, path.at, slope.at, gbias.at, squares.at);
    const Backward b{problem, Activation::gelu, grad.at, x.at, in.at, bias.at, out.at, path.at, logits.at, with_extra ? extra.at : nullptr,
                     nullptr, nullptr, nullptr, nullptr, nullptr};
    check_backward<T, T>(problem, Way::plain, "plain", bound, b, gx, gin, gbias, gout, squares);
    if (backward_way(problem, false, Way::tiles) == Way::tiles) {
      check_backward<T, T>(problem, Way::tiles, "tiles", bound, b, gx, gin, gbias, gout, squares);
      if constexpr (sizeof(T) == 2) check_backward<T, float>(problem, Way::tiles, "tiles, wide", bound, b, gx, gin, gbias, gout, squares);
    }
  }
  settle(type_name, s, processors);
}

void check_type(int which, const Shape& s, int capability, int processors) {
  if (which == 0) check<float>("float32", Type::float32, 1e-5, s, capability, processors);
  if (which == 1) check<double>("float64", Type::float64, 1e-12, s, capability, processors);
  if (which == 2) check<bfloat16>("bfloat16", Type::bfloat16, 1e-2, s, capability, processors);
  if (which == 3) check<float16>("float16", Type::float16, 2e-3, s, capability, processors);
}

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

}  // namespace

int main(int count, char** arguments) {
  poison = !std::getenv("NO_POISON");  // which would hide from initcheck what is read before it is written
  cudaDeviceProp device;
  must(cudaGetDeviceProperties(&device, 0), "device");
  const int capability = device.major * 10 + device.minor, processors = device.multiProcessorCount;
  must(cudaMalloc(&facts, sizeof(Facts)), "facts");
  must(cudaMemset(facts, 0, sizeof(Facts)), "facts");
  cudaMemPool_t pool;
  must(cudaDeviceGetDefaultMemPool(&pool, 0), "pool");
  uint64_t all = ~uint64_t{0};
  must(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &all), "pool");
  const bool race = count > 1 && !std::strcmp(arguments[1], "race");
  int shapes = 0;
  const double begin = now();
  if (race) {  // one processor: tiles of 128 tokens, too
    const struct { Shape shape; int type, processors; } few[] = {
        {{5, 33, 2, 3}, 0, 132}, {{130, 64, 1, 4}, 0, 1},   {{9, 768, 2, 3}, 0, 132},  {{150, 64, 1, 3}, 1, 1},
        {{70, 64, 1, 7}, 2, 132}, {{260, 64, 1, 6}, 2, 1},  {{720, 64, 1, 6}, 2, 1},  {{40, 192, 2, 6}, 2, 132}, {{40, 128, 1, 11}, 3, 132}, {{129, 8, 9, 0}, 2, 132},
        {{33, 64, 3, 5}, 2, 132}, {{130, 64, 3, 5}, 2, 1}};
    for (const auto& f : few) {
      const double start = now();
      check_type(f.type, f.shape, capability, f.processors);
      std::printf("tokens %lld hidden %lld trees %lld depth %lld: %.1f s\n", (long long)f.shape.tokens, (long long)f.shape.hidden,
                  (long long)f.shape.trees, (long long)f.shape.depth, now() - start);
      std::fflush(stdout);
    }
  } else {
    for (const Shape& s : std::vector<Shape>{{0, 8, 1, 2}, {1, 1, 1, 0}, {5, 33, 3, 4}, {70, 64, 1, 5}, {200, 64, 1, 6}, {130, 128, 1, 11},
                                             {300, 64, 1, 11}, {90, 40, 2, 9}, {40, 72, 5, 3}, {3, 1100, 1, 3}, {700, 16, 1, 4}, {33, 24, 1, 13},
                                             {9, 768, 2, 4}, {150, 192, 1, 8}, {1, 64, 1, 11}, {129, 8, 64, 0}, {300, 192, 3, 7}, {2000, 64, 1, 2}, {130, 64, 4, 9}, {33, 128, 8, 8},
                                             {140, 64, 3, 4}, {20, 64, 16, 7}, {800, 64, 1, 7}})
      for (int type = 0; type < 4; ++type) check_type(type, s, capability, type % 2 ? processors : 1);
  }
  const double seconds = !race && count > 1 ? std::atof(arguments[1]) : 0, most = count > 2 ? std::atof(arguments[2]) : 1e9;
  guarded = seconds > 0;
  while (now() - begin < seconds && shapes < most) {
    const int64_t choices[] = {1, 7, 8, 16, 24, 33, 64, 64, 128, 128, 192, 200, 256, 320, 768};
    const int64_t trees = draw() % 2 ? 1 : 1 + draw() % 9, hidden = choices[draw() % 15];
    int64_t depth = draw() % 13;
    while (hidden * trees << depth > 3500000) --depth;
    const int64_t most_tokens = std::clamp<int64_t>(2000000 / (hidden * trees * (depth + 1)), 2, 3000);
    const int which[] = {0, 1, 2, 2, 2, 3}, of[] = {processors, processors, 1, 5};
    check_type(which[draw() % 6], {int64_t(draw() % most_tokens), hidden, trees, depth}, capability, of[draw() % 4]);
    ++shapes;
  }
  std::printf("%d checks, %d random shapes, %d failures on %s\n", checks, shapes, failures, device.name);
  return failures > 0;
}
