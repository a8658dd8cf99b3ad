// A vector of floats or doubles at a time, in GCC's and Clang's portable vector types.
//
// RLHF_VECTOR_BYTES is 32 unless a file says otherwise before it includes this. With 64, for AVX-512
// alone, token_logprobs is 1.6x faster on Zen 4; but GCC 12 has no 64-byte comparison that gives a
// vector, and takes one that is used twice apart lane by lane: policy_loss is 4x slower with 64.
// (Without AVX-512 it takes all of them apart: token_logprobs was 8x slower with 64 than with 32 on an
// AMD EPYC with AVX2.)
//
// RLHF_ON_THIS_CPU(call) compiles what it is given for AVX-512, AVX2+FMA and plain x86-64 and runs
// the one that this CPU has (cpu.h), so one binary runs anywhere. Everything here is always_inline:
// it takes the instruction set of the function it lands in.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "cpu.h"

#define RLHF_INLINE static inline __attribute__((always_inline))
#define RLHF_INLINE_MEMBER inline __attribute__((always_inline))

#ifndef RLHF_VECTOR_BYTES
#define RLHF_VECTOR_BYTES 32
#endif
#if RLHF_VECTOR_BYTES == 64
#define RLHF_VECTORS vectors_of_64_bytes
#else
#define RLHF_VECTORS vectors_of_32_bytes
#endif

namespace rlhf_fast {
namespace RLHF_VECTORS {  // files of either width can be linked together

#define RLHF_ON_THIS_CPU(...) \
  on_this_cpu([=]() __attribute__((always_inline)) { __VA_ARGS__; })

template <class F>
inline void on_this_cpu(F f) {
#if RLHF_X86_LEVELS && RLHF_VECTOR_BYTES == 64
  return on_avx512(f);
#elif RLHF_X86_LEVELS
#ifndef RLHF_AVX512_ELSEWHERE
  if (cpu == kAvx512) return on_avx512(f);
#endif
  if (cpu == kAvx2) return on_avx2(f);
#endif
  f();
}

constexpr int kBytes = RLHF_VECTOR_BYTES;
constexpr int kFloats = kBytes / 4, kDoubles = kBytes / 8;

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

typedef float Floats __attribute__((vector_size(kBytes)));
typedef int32_t Ints __attribute__((vector_size(kBytes)));
typedef double Doubles __attribute__((vector_size(kBytes)));
typedef int64_t Longs __attribute__((vector_size(kBytes)));

// Accumulator type, its vector, and how many fit, for an element type.
template <class T>
struct Lane {
  using Scalar = float;
  using Vector = Floats;
  using Mask = Ints;
  static constexpr int width = kFloats;
};
template <>
struct Lane<double> {
  using Scalar = double;
  using Vector = Doubles;
  using Mask = Longs;
  static constexpr int width = kDoubles;
};

RLHF_INLINE Floats load(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
RLHF_INLINE Doubles load(const double* p) {
  Doubles v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
RLHF_INLINE Floats load(const bf16* p) {
  typedef uint16_t Halves __attribute__((vector_size(kBytes / 2)));
  Halves h;
  std::memcpy(&h, p, sizeof h);
  typedef uint32_t Words __attribute__((vector_size(kBytes)));
  const Words w = __builtin_convertvector(h, Words) << 16;
  Floats v;
  std::memcpy(&v, &w, sizeof v);
  return v;
}
RLHF_INLINE Floats load(const fp16* p) {
  // Exponent and mantissa shifted into place, then scaled by 2^112 to move the bias (this also
  // normalises subnormals); infinities and NaN keep an all-ones exponent.
  typedef uint16_t Halves __attribute__((vector_size(kBytes / 2)));
  typedef uint32_t Words __attribute__((vector_size(kBytes)));
  Halves h;
  std::memcpy(&h, p, sizeof h);
  const Words w = __builtin_convertvector(h, Words);
  const Words magnitude = (w & 0x7fffu) << 13;
  Floats v;
  std::memcpy(&v, &magnitude, sizeof v);
  v *= 0x1p112f;
  Words bits;
  std::memcpy(&bits, &v, sizeof v);
  bits = magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : bits;
  bits |= (w & 0x8000u) << 16;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

RLHF_INLINE void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }
RLHF_INLINE void store(double* p, Doubles v) { std::memcpy(p, &v, sizeof v); }
RLHF_INLINE void store(bf16* p, Floats v) {
  // Round to nearest even; NaN stays NaN.
  typedef uint32_t Words __attribute__((vector_size(kBytes)));
  typedef uint16_t Halves __attribute__((vector_size(kBytes / 2)));
  Words w;
  std::memcpy(&w, &v, sizeof v);
  w = (w + 0x7fffu + ((w >> 16) & 1u)) >> 16;
  w = v != v ? Words{} + 0x7fc0u : w;
  const Halves h = __builtin_convertvector(w, Halves);
  std::memcpy(p, &h, sizeof h);
}
RLHF_INLINE void store(fp16* p, Floats v) {
  // One hardware conversion a lane where there is one (x86-64-v3), a library call elsewhere.
  for (int i = 0; i < kFloats; ++i) {
    const _Float16 h = static_cast<_Float16>(v[i]);
    std::memcpy(p + i, &h, sizeof h);
  }
}

RLHF_INLINE float widen(float x) { return x; }
RLHF_INLINE double widen(double x) { return x; }
RLHF_INLINE float widen(bf16 x) {
  const uint32_t w = static_cast<uint32_t>(x.bits) << 16;
  float v;
  std::memcpy(&v, &w, sizeof v);
  return v;
}
RLHF_INLINE float widen(fp16 x) {
  _Float16 h;
  std::memcpy(&h, &x, sizeof h);
  return static_cast<float>(h);
}

// e^x and e^x - 1 together.
template <class V>
struct Exponential {
  V exp;
  V minus_one;
};

// Both to about 1 ulp for -87.3 <= x <= 88; NaN stays NaN.
// Cody-Waite reduction x = n ln 2 + r, |r| <= ln 2 / 2; then t = e^r - 1 = r + r^2 q(r), q the
// degree-4 minimax fit (relative error 3e-9, a twentieth of half an ulp). The large constant
// rounds x / ln 2 to an integer in the low mantissa bits, biased for the exponent field of 2^n.
constexpr float kLeastExponent = -87.3f;
RLHF_INLINE Exponential<Floats> exponential_of_normal(Floats x) {
  constexpr float magic = 0x1.8p23f + 127.0f;
  const Floats shifted = x * 0x1.715476p0f + magic;
  const Floats n = shifted - magic;
  Floats r = x - n * 0x1.62e4p-1f;
  r = r - n * 0x1.7f7d1cp-20f;
  Floats q = 0x1.6a21acp-10f * r + 0x1.123b6ap-7f;
  q = q * r + 0x1.5558fap-5f;
  q = q * r + 0x1.55549p-3f;
  q = q * r + 0x1.fffffcp-2f;
  const Floats t = q * (r * r) + r;
  Ints bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = bits << 23;
  Floats scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return {(t + 1.0f) * scale, t * scale + (scale - 1.0f)};
}
// Below -87.3, -inf included, e^x is 0.
RLHF_INLINE Exponential<Floats> exponential(Floats x) {
  const Floats bounded = x < kLeastExponent ? Floats{} + kLeastExponent : x;  // keeps NaN
  const Exponential<Floats> e = exponential_of_normal(bounded);
  return {x < kLeastExponent ? Floats{} : e.exp, e.minus_one};
}
RLHF_INLINE Exponential<Doubles> exponential(Doubles x) {
  Exponential<Doubles> e;
  for (int i = 0; i < kDoubles; ++i) {
    e.exp[i] = std::exp(x[i]);
    e.minus_one[i] = std::expm1(x[i]);
  }
  return e;
}
RLHF_INLINE Floats exp(Floats x) { return exponential(x).exp; }
RLHF_INLINE Floats exp_of_normal(Floats x) { return exponential_of_normal(x).exp; }
RLHF_INLINE Doubles exp(Doubles x) {
  for (int i = 0; i < kDoubles; ++i) x[i] = std::exp(x[i]);
  return x;
}

RLHF_INLINE Doubles exp_of_normal(Doubles x) { return exp(x); }

RLHF_INLINE Floats logarithm(Floats x) {
  for (int i = 0; i < kFloats; ++i) x[i] = std::log(x[i]);
  return x;
}
RLHF_INLINE Doubles logarithm(Doubles x) {
  for (int i = 0; i < kDoubles; ++i) x[i] = std::log(x[i]);
  return x;
}

RLHF_INLINE Floats tanh(Floats x) {
  for (int i = 0; i < kFloats; ++i) x[i] = std::tanh(x[i]);
  return x;
}
RLHF_INLINE Doubles tanh(Doubles x) {
  for (int i = 0; i < kDoubles; ++i) x[i] = std::tanh(x[i]);
  return x;
}

template <class V>
RLHF_INLINE V max(V a, V b) {
  return a > b ? a : b;
}
template <class V>
RLHF_INLINE V min(V a, V b) {
  return a < b ? a : b;
}
// x held in [low, high]; NaN stays NaN.
template <class V>
RLHF_INLINE V clamp(V x, V low, V high) {
  x = x < low ? low : x;
  return x > high ? high : x;
}

RLHF_INLINE float tanh(float x) { return std::tanh(x); }
RLHF_INLINE double tanh(double x) { return std::tanh(x); }

// Sums over the lanes, in double.
RLHF_INLINE double sum(Floats v) {
  double s = 0;
  for (int i = 0; i < kFloats; ++i) s += v[i];
  return s;
}
RLHF_INLINE double sum(Doubles v) {
  double s = 0;
  for (int i = 0; i < kDoubles; ++i) s += v[i];
  return s;
}
template <class V>
RLHF_INLINE auto largest(V v) {
  typedef std::remove_reference_t<decltype(v[0])> S;
  if constexpr (sizeof(V) > 16) {  // by halves: no chain over all lanes
    typedef S Half __attribute__((vector_size(sizeof(V) / 2)));
    Half halves[2];
    std::memcpy(halves, &v, sizeof v);
    return largest(max(halves[0], halves[1]));
  } else {
    S m = v[0];
    for (unsigned i = 1; i < sizeof(V) / sizeof(S); ++i) m = v[i] > m ? v[i] : m;
    return m;
  }
}

template <class V>
RLHF_INLINE auto smallest(V v) {
  return -largest(-v);
}

// The first n (1 to a vector) elements, the rest `fill`.
template <class T>
RLHF_INLINE typename Lane<T>::Vector load_some(const T* p, int64_t n, float fill) {
  using L = Lane<T>;
  if (n >= L::width) return load(p);
  typename L::Vector v = typename L::Vector{} + fill;
  for (int64_t i = 0; i < n; ++i) v[i] = widen(p[i]);
  return v;
}

template <class T>
RLHF_INLINE void store_some(T* p, typename Lane<T>::Vector v, int64_t n) {
  if (n >= Lane<T>::width) return store(p, v);
  T lanes[Lane<T>::width];
  store(lanes, v);
  for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
}

// Masks are vectors of 1 and 0, so that they have V's own lanes and can be multiplied and summed.
template <class V>
RLHF_INLINE V select(V mask, V a, V b) {
  return mask != V{} ? a : b;
}
template <class V>
RLHF_INLINE V greater(V a, V b) {
  return a > b ? V{} + 1 : V{};
}

// 1 where a byte is not 0, of the first n mask bytes; lanes beyond n are 0.
template <class T>
RLHF_INLINE typename Lane<T>::Vector load_mask(const uint8_t* p, int64_t n) {
  using L = Lane<T>;
  typedef int8_t Bytes __attribute__((vector_size(L::width)));
  Bytes b;
  if (n >= L::width) {
    std::memcpy(&b, p, sizeof b);
  } else {
    int8_t some[L::width] = {};
    for (int64_t i = 0; i < n; ++i) some[i] = p[i];
    std::memcpy(&b, some, sizeof b);
  }
  const Bytes ones = (b != Bytes{}) & (Bytes{} + 1);
  return __builtin_convertvector(__builtin_convertvector(ones, typename L::Mask),
                                 typename L::Vector);
}

// Sums that must survive cancellation: double lanes, whatever V is.
typedef double WideDoubles __attribute__((vector_size(2 * kBytes)));
RLHF_INLINE void add(WideDoubles& total, Floats v) {
  total += __builtin_convertvector(v, WideDoubles);
}
RLHF_INLINE void add(Doubles& total, Doubles v) { total += v; }
RLHF_INLINE double sum(WideDoubles v) {
  double s = 0;
  for (int i = 0; i < kFloats; ++i) s += v[i];
  return s;
}
template <class V>
using Wide = std::conditional_t<sizeof(V{}[0]) == 4, WideDoubles, Doubles>;

// Sums of x - pivot and of its square, for a mean and a variance. The pivot is one of the x (and
// what a lane without a value holds): so neither the squares' rounding nor a mean far from 0 costs
// the variance digits, and of equal numbers it is 0.
template <class V>
struct Moments {
  Wide<V> sum{}, squares{};

  RLHF_INLINE_MEMBER void add(V x, double pivot) {
    const Wide<V> d = __builtin_convertvector(x, Wide<V>) - pivot;
    sum += d;
    squares += d * d;
  }
};

// a b, and 0 where a is 0, whatever b is: the product with a coefficient, infinite b included.
template <class V>
RLHF_INLINE V times(V a, V b) {
  return select(a, a * b, V{});
}

}  // namespace RLHF_VECTORS
using namespace RLHF_VECTORS;

// Of an op compiled at either width, the one for this CPU.
template <auto of_32_bytes, auto of_64_bytes>
struct OfThisCpu;
template <class R, class... A, R (*of_32_bytes)(A...), R (*of_64_bytes)(A...)>
struct OfThisCpu<of_32_bytes, of_64_bytes> {
  static R run(A... arguments) {
    return (cpu == kAvx512 ? of_64_bytes : of_32_bytes)(arguments...);
  }
};
}  // namespace rlhf_fast
