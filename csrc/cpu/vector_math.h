// Vectors of the width this translation unit is compiled for, their exponential,
// and the sigmoid and softplus made of it.
//
// Included by the kernels only, once per instruction set. All of it sits
// in an unnamed namespace: a shared instantiation could be linked from the
// widest unit into the others.
#pragma once

#include <cstdint>

namespace {

#if defined(__AVX512F__)
inline constexpr int vector_bytes = 64;
#elif defined(__AVX2__)
inline constexpr int vector_bytes = 32;
#else
inline constexpr int vector_bytes = 16;
#endif

template <class Real>
struct Lanes;

template <>
struct Lanes<float> {
  typedef float Vec __attribute__((vector_size(vector_bytes)));
  typedef std::int32_t Int __attribute__((vector_size(vector_bytes)));
  static constexpr int count = vector_bytes / 4;
  static constexpr int mantissa_bits = 23;
  static constexpr int exponent_bias = 127;
  static constexpr float round_magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float lowest = -3.4028234663852886e38f;
  static constexpr float normal_limit = -87.0f;  // exp is a normal number above
  static constexpr float underflow = -104.0f;    // exp is 0 below, and inf above overflow
  static constexpr float overflow = 89.0f;
  static constexpr float ln2_high = 0.693145751953125f;  // 16 bits, so that n * ln2_high is exact
  static constexpr float ln2_low = 1.4286068203094173e-06f;
  // Chebyshev fit of exp on |r| <= ln 2 / 2, highest power first; error 2e-9.
  static constexpr float exp_fit[] = {
      1.39411189e-03f, 8.375134775e-03f, 4.166635277e-02f, 1.666641541e-01f, 5.000000047e-01f, 1.000000038f, 1.0f};
  // Chebyshev fit of log(1 + e) / e on 0 <= e <= 1, highest power first; error 5e-9.
  static constexpr float log1p_fit[] = {-3.176057e-03f,     1.9542526e-02f,    -5.6373611e-02f,  1.0543624e-01f, -1.5269667e-01f,
                                        1.9663274e-01f,     -2.4951616e-01f,   3.332971e-01f,    -4.9999893e-01f, 1.0f};
};

template <>
struct Lanes<double> {
  typedef double Vec __attribute__((vector_size(vector_bytes)));
  typedef std::int64_t Int __attribute__((vector_size(vector_bytes)));
  static constexpr int count = vector_bytes / 8;
  static constexpr int mantissa_bits = 52;
  static constexpr int exponent_bias = 1023;
  static constexpr double round_magic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double lowest = -1.7976931348623157e308;
  static constexpr double normal_limit = -708.0;
  static constexpr double underflow = -746.0;
  static constexpr double overflow = 710.0;
  static constexpr double ln2_high = 0.6931471803691238;  // 32 bits
  static constexpr double ln2_low = 1.9082149292705877e-10;
  // As above; error 3e-18.
  static constexpr double exp_fit[] = {2.51100492048186598e-8,
                                       2.76326547225277919e-7,
                                       2.75572408872298686e-6,
                                       2.4801485441561313e-5,
                                       1.98412698900764028e-4,
                                       1.38888889523528629e-3,
                                       8.33333333331958962e-3,
                                       4.16666666664879525e-2,
                                       0.166666666666666808,
                                       0.50000000000000184,
                                       1.0,
                                       0.999999999999999997};
  // As above; error 1e-17.
  static constexpr double log1p_fit[] = {2.4437973948580947e-05,  -2.827421139374107e-04, 1.5535244034334333e-03,
                                         -5.4217339910016095e-03, 1.3598778090617254e-02, -2.6398779480743217e-02,
                                         4.1925709853904154e-02,  -5.718978534193906e-02, 7.015296236526472e-02,
                                         -8.070954578430206e-02,  9.009095815198633e-02,  -9.979768096586568e-02,
                                         1.1107211585299538e-01,  -0.12499427063514382,   0.14285651975275926,
                                         -0.16666661848248537,    0.19999999749856523,    -0.24999999992009522,
                                         0.33333333333197523,     -0.4999999999999908,    1.0};
};

template <class Real>
using Vec = typename Lanes<Real>::Vec;

template <class Real>
inline Vec<Real> load(const Real* from) {
  Vec<Real> v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

template <class Real>
inline void store(Real* to, Vec<Real> v) {
  __builtin_memcpy(to, &v, sizeof v);
}

template <class Real>
inline Vec<Real> splat(Real value) {
  return value - Vec<Real>{};
}

// A NaN in `value` stays: a comparison with NaN is false.
template <class Real>
inline Vec<Real> at_least(Vec<Real> value, Real bound) {
  return value < bound ? splat<Real>(bound) : value;
}

template <class Real>
inline Vec<Real> at_most(Vec<Real> value, Real bound) {
  return value > bound ? splat<Real>(bound) : value;
}

template <class Real>
inline Real sum_of_lanes(Vec<Real> v) {
  Real sum = 0;
  for (int lane = 0; lane < Lanes<Real>::count; ++lane) sum += v[lane];
  return sum;
}

// Ignores NaN: it comes out of the sum of exponentials that follows every
// maximum.
template <class Real>
inline Vec<Real> larger(Vec<Real> a, Vec<Real> b) {
  return a > b ? a : b;
}

template <class Real>
inline Real largest_lane(Vec<Real> v) {
  Real largest = v[0];
  for (int lane = 1; lane < Lanes<Real>::count; ++lane) largest = v[lane] > largest ? v[lane] : largest;
  return largest;
}

// exp(x) = 2^n exp(r) with n = round(x / ln 2) and |r| <= ln 2 / 2.
template <class Real>
struct ReducedExponential {
  Vec<Real> exp_r;
  typename Lanes<Real>::Int n;

  explicit ReducedExponential(Vec<Real> x) {
    using L = Lanes<Real>;
    const Vec<Real> shifted = x * static_cast<Real>(1.4426950408889634) + L::round_magic;
    const Vec<Real> rounded = shifted - L::round_magic;
    const Vec<Real> r = (x - rounded * L::ln2_high) - rounded * L::ln2_low;
    exp_r = splat<Real>(L::exp_fit[0]);
#pragma GCC unroll 16
    for (unsigned k = 1; k < sizeof L::exp_fit / sizeof(Real); ++k) exp_r = exp_r * r + L::exp_fit[k];
    n = (typename L::Int)shifted - (typename L::Int)splat<Real>(L::round_magic);
  }
};

// exp for x up to about 88 (709 in double), as where a maximum or a cap bounds
// x; about one unit in the last place, and 0 where the result would be
// subnormal. NaN stays.
template <class Real>
inline Vec<Real> bounded_exponential(Vec<Real> x) {
  using L = Lanes<Real>;
  const ReducedExponential<Real> e(x);
  const Vec<Real> result = e.exp_r * (Vec<Real>)((e.n + L::exponent_bias) << L::mantissa_bits);
  return x < L::normal_limit ? Vec<Real>{} : result;
}

// exp for any x. 2^n is applied in two factors: right down to the smallest
// subnormal and up to inf.
template <class Real>
inline Vec<Real> exponential(Vec<Real> x) {
  using L = Lanes<Real>;
  const ReducedExponential<Real> e(at_most<Real>(at_least<Real>(x, L::underflow), L::overflow));
  const typename L::Int half = e.n >> 1;
  const typename L::Int rest = e.n - half;
  const Vec<Real> scaled = e.exp_r * (Vec<Real>)((half + L::exponent_bias) << L::mantissa_bits);
  return scaled * (Vec<Real>)((rest + L::exponent_bias) << L::mantissa_bits);
}

// 1 / (1 + exp(-x)) and log(1 + exp(x)) for any x, from one exponential of -|x|;
// each within two units in the last place, however small, down to where that
// exponential is 0. NaN stays.
template <class Real>
struct SigmoidAndSoftplus {
  Vec<Real> sigmoid, softplus;

  explicit SigmoidAndSoftplus(Vec<Real> x) {
    using L = Lanes<Real>;
    const Vec<Real> below = bounded_exponential<Real>(x > Real(0) ? -x : x);
    const Vec<Real> above_zero = Real(1) / (Real(1) + below);
    sigmoid = x > Real(0) ? above_zero : below * above_zero;
    Vec<Real> fit = splat<Real>(L::log1p_fit[0]);
#pragma GCC unroll 32
    for (unsigned k = 1; k < sizeof L::log1p_fit / sizeof(Real); ++k) fit = fit * below + L::log1p_fit[k];
    softplus = at_least<Real>(x, 0) + below * fit;
  }
};

}  // namespace
