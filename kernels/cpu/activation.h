// Activations and their derivatives. Included once per instruction set. No include guard: that is the point.

// out[i] = act(z[i]); slope[i] = act'(z[i]) where wanted. Loops that the compiler vectorises.
template <class A> FFF_TARGET void activate(Activation activation, const A* z, int64_t n, A* out, A* slope) {
  switch (activation) {
    case Activation::gelu:
      for (int64_t i = 0; i < n; ++i) out[i] = z[i] * A(0.5) * (A(1) + erf_of(z[i] * A(0.70710678118654752440)));
      if (slope)
        for (int64_t i = 0; i < n; ++i)
          slope[i] = A(0.5) * (A(1) + erf_of(z[i] * A(0.70710678118654752440))) +
                     z[i] * A(0.39894228040143267794) * exp_of(A(-0.5) * z[i] * z[i]);
      break;
    case Activation::gelu_new:  // (1 + tanh(u)) / 2 = sigmoid(2u)
      for (int64_t i = 0; i < n; ++i) {
        const A k = A(1.59576912160573071176), c = A(0.044715), square = z[i] * z[i];
        const A s = sigmoid(k * z[i] * (A(1) + c * square));
        out[i] = z[i] * s;
        if (slope) slope[i] = s + out[i] * (A(1) - s) * k * (A(1) + A(3) * c * square);
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
