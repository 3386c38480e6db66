// What happens to one row between two matrix products, over a vector type V of
// vec_*.h. Included by kernels_*.cc alone.
#ifndef LOCKSTEP_WORKER_BACKEND_CPU_ROWS_INL_H_
#define LOCKSTEP_WORKER_BACKEND_CPU_ROWS_INL_H_

#include <cstdint>

#include "worker/backend/cpu/half.h"
#include "worker/backend/cpu/kernels.h"

namespace lockstep::cpu {

// e^x to about one unit in the last place, 0 below -87.3 and clamped above 88.3:
// x = n ln 2 + r, a polynomial of r (Cephes' expf), times 2^n. NaN stays NaN.
template <class V>
inline typename V::F Exp(typename V::F x) {
  using F = typename V::F;
  const F lowest = V::Set(-87.3f);
  const F at = V::Min(V::Set(88.3f), V::Max(lowest, x));
  const F n = V::Round(V::Mul(at, V::Set(1.44269504088896341f)));
  F r = V::Fma(n, V::Set(-0.693359375f), at);
  r = V::Fma(n, V::Set(2.12194440e-4f), r);
  F p = V::Set(1.9875691500e-4f);
  p = V::Fma(p, r, V::Set(1.3981999507e-3f));
  p = V::Fma(p, r, V::Set(8.3334519073e-3f));
  p = V::Fma(p, r, V::Set(4.1665795894e-2f));
  p = V::Fma(p, r, V::Set(1.6666665459e-1f));
  p = V::Fma(p, r, V::Set(5.0000001201e-1f));
  p = V::Fma(p, V::Mul(r, r), V::Add(r, V::Set(1.0f)));
  return V::ZeroBelow(V::Mul(p, V::Pow2(n)), x, lowest);
}

// Calls whole(i) for each whole vector at i, then rest(i, count) for what is left.
template <class Whole, class Rest>
inline void ForEachVector(int64_t n, Whole whole, Rest rest) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) whole(i);
  if (i < n) rest(i, n - i);
}

template <class V>
inline float MaxOf(const float* x, int64_t n) {
  float max = x[0];
  int64_t i = 0;
  if (n >= kLanes) {
    typename V::F acc = V::Load(x);
    for (i = kLanes; i + kLanes <= n; i += kLanes) acc = V::Max(acc, V::Load(x + i));
    float lanes[kLanes];
    V::Store(lanes, acc);
    for (float lane : lanes) max = lane > max ? lane : max;
  }
  for (; i < n; ++i) max = x[i] > max ? x[i] : max;
  return max;
}

// out[i] = exp(x[i] - bias) and their sum, lanes over i.
template <class V>
inline float ExpLanes(const float* x, float bias, int64_t n, float* out) {
  const typename V::F b = V::Set(bias);
  typename V::F sum = V::Zero();
  ForEachVector(
      n,
      [&](int64_t i) {
        const typename V::F e = Exp<V>(V::Sub(V::Load(x + i), b));
        sum = V::Add(sum, e);
        V::Store(out + i, e);
      },
      [&](int64_t i, int64_t rest) {
        V::StoreFirst(out + i, Exp<V>(V::Sub(V::LoadFirst(x + i, rest), b)), rest);
        sum = V::Add(sum, V::LoadFirst(out + i, rest));
      });
  return V::Sum(sum);
}

// The same with the sum kept in double: thousands of terms at a time in lanes.
template <class V>
double ExpSum(const float* x, float bias, int64_t n, float* out) {
  constexpr int64_t kRun = 1024;
  double sum = 0.0;
  for (int64_t i = 0; i < n; i += kRun) {
    sum += ExpLanes<V>(x + i, bias, n - i < kRun ? n - i : kRun, out + i);
  }
  return sum;
}

template <class V>
float Max(const float* x, int64_t n) {
  return MaxOf<V>(x, n);
}

// x * 0 is 0 for finite x and NaN otherwise.
template <class V>
bool AllFinite(const float* x, int64_t n) {
  const typename V::F zero = V::Zero();
  typename V::F sum = zero;
  ForEachVector(
      n, [&](int64_t i) { sum = V::Fma(V::Load(x + i), zero, sum); },
      [&](int64_t i, int64_t rest) { sum = V::Fma(V::LoadFirst(x + i, rest), zero, sum); });
  return V::Sum(sum) == 0.0f;
}

template <class V>
void RmsNorm(const float* x, const float* weight, float weight_offset, float eps, int64_t n,
             float* out) {
  typename V::F squares = V::Zero();
  const auto square = [&](typename V::F v) { squares = V::Fma(v, v, squares); };
  ForEachVector(
      n, [&](int64_t i) { square(V::Load(x + i)); },
      [&](int64_t i, int64_t rest) { square(V::LoadFirst(x + i, rest)); });
  const float mean = V::Sum(squares) / static_cast<float>(n);
  const typename V::F scale = V::Set(1.0f / __builtin_sqrtf(mean + eps));
  const typename V::F offset = V::Set(weight_offset);
  const auto normed = [&](typename V::F v, typename V::F w) {
    return V::Mul(V::Add(w, offset), V::Mul(v, scale));
  };
  ForEachVector(
      n, [&](int64_t i) { V::Store(out + i, normed(V::Load(x + i), V::Load(weight + i))); },
      [&](int64_t i, int64_t rest) {
        V::StoreFirst(out + i, normed(V::LoadFirst(x + i, rest), V::LoadFirst(weight + i, rest)),
                      rest);
      });
}

template <class V>
void LayerNorm(const float* x, const float* weight, const float* bias, float eps, int64_t n,
               float* out) {
  typename V::F sum = V::Zero();
  ForEachVector(
      n, [&](int64_t i) { sum = V::Add(sum, V::Load(x + i)); },
      [&](int64_t i, int64_t rest) { sum = V::Add(sum, V::LoadFirst(x + i, rest)); });
  const float mean = V::Sum(sum) / static_cast<float>(n);
  const typename V::F center = V::Set(mean);
  typename V::F squares = V::Zero();
  ForEachVector(
      n,
      [&](int64_t i) {
        const typename V::F d = V::Sub(V::Load(x + i), center);
        squares = V::Fma(d, d, squares);
      },
      [&](int64_t i, int64_t rest) {
        float lanes[kLanes] = {};  // lanes past the end must not add (0 - mean)^2
        V::StoreFirst(lanes, V::Sub(V::LoadFirst(x + i, rest), center), rest);
        const typename V::F d = V::Load(lanes);
        squares = V::Fma(d, d, squares);
      });
  const float variance = V::Sum(squares) / static_cast<float>(n);
  const typename V::F scale = V::Set(1.0f / __builtin_sqrtf(variance + eps));
  const auto normed = [&](typename V::F v, typename V::F w, typename V::F b) {
    return V::Add(V::Mul(V::Mul(V::Sub(v, center), scale), w), b);
  };
  ForEachVector(
      n,
      [&](int64_t i) {
        V::Store(out + i, normed(V::Load(x + i), V::Load(weight + i), V::Load(bias + i)));
      },
      [&](int64_t i, int64_t rest) {
        V::StoreFirst(out + i,
                      normed(V::LoadFirst(x + i, rest), V::LoadFirst(weight + i, rest),
                             V::LoadFirst(bias + i, rest)),
                      rest);
      });
}

// x / (1 + e^-x)
template <class V>
inline typename V::F Silu(typename V::F x) {
  return V::Div(x, V::Add(V::Set(1.0f), Exp<V>(V::Sub(V::Zero(), x))));
}

// x / 2 * (1 + tanh(y)), y = sqrt(2/pi) (x + 0.044715 x^3); (1 + tanh(y)) / 2 is
// the logistic function of 2 y.
template <class V>
inline typename V::F GeluTanh(typename V::F x) {
  using F = typename V::F;
  const F cubic = V::Fma(V::Mul(V::Mul(x, x), x), V::Set(0.044715f), x);
  const F y = V::Mul(cubic, V::Set(-2.0f * 0.7978845608028654f));
  return V::Div(x, V::Add(V::Set(1.0f), Exp<V>(y)));
}

template <class V>
inline typename V::F Gelu(typename V::F x) {
  float lanes[kLanes];
  V::Store(lanes, x);
  for (float& v : lanes) v = 0.5f * v * (1.0f + __builtin_erff(v * 0.70710678118654752f));
  return V::Load(lanes);
}

template <class V, class Fn>
inline void ActivateWith(Fn fn, const float* gate, const float* up, int64_t n, float* out) {
  ForEachVector(
      n,
      [&](int64_t i) {
        const typename V::F a = fn(V::Load(gate + i));
        V::Store(out + i, up == nullptr ? a : V::Mul(a, V::Load(up + i)));
      },
      [&](int64_t i, int64_t rest) {
        const typename V::F a = fn(V::LoadFirst(gate + i, rest));
        V::StoreFirst(out + i, up == nullptr ? a : V::Mul(a, V::LoadFirst(up + i, rest)), rest);
      });
}

template <class V>
void Activate(Activation activation, const float* gate, const float* up, int64_t n, float* out) {
  using F = typename V::F;
  switch (activation) {
    case Activation::kSilu:
      return ActivateWith<V>([](F x) { return Silu<V>(x); }, gate, up, n, out);
    case Activation::kGeluTanh:
      return ActivateWith<V>([](F x) { return GeluTanh<V>(x); }, gate, up, n, out);
    case Activation::kGelu:
      return ActivateWith<V>([](F x) { return Gelu<V>(x); }, gate, up, n, out);
    case Activation::kRelu:
      return ActivateWith<V>([](F x) { return V::Max(V::Zero(), x); }, gate, up, n, out);
  }
}

template <class V>
void Rope(float* x, const float* cos, const float* sin, int64_t half) {
  using F = typename V::F;
  const auto low = [](F a, F b, F c, F s) { return V::Sub(V::Mul(a, c), V::Mul(b, s)); };
  const auto high = [](F a, F b, F c, F s) { return V::Add(V::Mul(b, c), V::Mul(a, s)); };
  float* y = x + half;
  ForEachVector(
      half,
      [&](int64_t i) {
        const F a = V::Load(x + i), b = V::Load(y + i), c = V::Load(cos + i), s = V::Load(sin + i);
        V::Store(x + i, low(a, b, c, s));
        V::Store(y + i, high(a, b, c, s));
      },
      [&](int64_t i, int64_t rest) {
        const F a = V::LoadFirst(x + i, rest), b = V::LoadFirst(y + i, rest);
        const F c = V::LoadFirst(cos + i, rest), s = V::LoadFirst(sin + i, rest);
        V::StoreFirst(x + i, low(a, b, c, s), rest);
        V::StoreFirst(y + i, high(a, b, c, s), rest);
      });
}

template <class V, class T>
inline void WidenOf(const T* x, int64_t n, float* out) {
  ForEachVector(
      n, [&](int64_t i) { V::Store(out + i, V::Load(x + i)); },
      [&](int64_t i, int64_t rest) { V::StoreFirst(out + i, V::LoadFirst(x + i, rest), rest); });
}

template <class V>
void Widen(const void* x, DType dtype, int64_t n, float* out) {
  switch (dtype) {
    case DType::kBFloat16:
      return WidenOf<V>(static_cast<const BFloat16*>(x), n, out);
    case DType::kFloat16:
      return WidenOf<V>(static_cast<const Float16*>(x), n, out);
    default:
      return WidenOf<V>(static_cast<const float*>(x), n, out);
  }
}

template <class V>
void Narrow(const float* x, int64_t n, DType dtype, void* out) {
  switch (dtype) {
    case DType::kBFloat16:
      for (int64_t i = 0; i < n; ++i) static_cast<BFloat16*>(out)[i] = ToBFloat16(x[i]);
      return;
    case DType::kFloat16:
      for (int64_t i = 0; i < n; ++i) static_cast<Float16*>(out)[i] = ToFloat16(x[i]);
      return;
    default:
      for (int64_t i = 0; i < n; ++i) static_cast<float*>(out)[i] = x[i];
      return;
  }
}

}  // namespace lockstep::cpu

#endif  // LOCKSTEP_WORKER_BACKEND_CPU_ROWS_INL_H_
