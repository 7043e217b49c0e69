// Vectors of floats, and work on several threads, for the kernels beside this file.

#ifndef MAXLM_INFERENCE_CPU_VECTORS_H_
#define MAXLM_INFERENCE_CPU_VECTORS_H_

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <thread>
#include <type_traits>

#include "xla/ffi/api/ffi.h"

#if defined(__FMA__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace ffi = xla::ffi;

using FloatBuffer = ffi::Buffer<ffi::F32>;
using IntegerBuffer = ffi::Buffer<ffi::S32>;
using FloatResult = ffi::ResultBuffer<ffi::F32>;

// Floats in a vector register.
#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__FMA__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vector __attribute__((vector_size(4 * kLanes)));

// A vector in memory begins at any float.
inline Vector Load(const float* from) {
  Vector x;
  std::memcpy(&x, from, sizeof(x));
  return x;
}
inline void Store(float* to, const Vector& x) { std::memcpy(to, &x, sizeof(x)); }

// x · y + z, rounded once: a compiler may fuse one loop's products and sums and not another's, and
// a row's results would depend on how many rows there are.
inline Vector MultiplyAdd(const Vector& x, const Vector& y, const Vector& z) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(x, y, z);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(x, y, z);
#elif defined(__ARM_NEON)
  return vfmaq_f32(z, x, y);
#else
  Vector sum;
  for (int lane = 0; lane < kLanes; ++lane) sum[lane] = std::fma(x[lane], y[lane], z[lane]);
  return sum;
#endif
}

// Holds x in a register: a compiler may load it anew for each of the products that it is in.
inline Vector KeepInRegister(Vector x) {
#if defined(__FMA__)
  asm("" : "+v"(x));
#elif defined(__ARM_NEON)
  asm("" : "+w"(x));
#endif
  return x;
}

// x − 0 is x for every x, so nothing is subtracted; x + 0 would be, as −0 + 0 is not −0, by the units
// that multiply.
inline Vector MultiplyAdd(float x, const Vector& y, const Vector& z) {
  return MultiplyAdd(x - Vector{}, y, z);
}

// The sum of N floats, half to half.
template <int N = kLanes>
inline float Sum(const Vector& x) {
  if constexpr (N == 1) {
    return x[0];
  } else {
    typedef float Half __attribute__((vector_size(2 * N)));
    Half low, high;
    std::memcpy(&low, &x, 2 * N);
    std::memcpy(&high, reinterpret_cast<const char*>(&x) + 2 * N, 2 * N);
    low += high;
    Vector sums{};
    std::memcpy(&sums, &low, 2 * N);
    return Sum<N / 2>(sums);
  }
}

// Calls f(R, row) of the first of each kRows rows from `row` on, then of the rest; R, the rows, is a
// constant of its type.
template <int kRows, typename F>
void ForEachRows(int64_t rows, const F& f, int64_t row = 0) {
  for (; row + kRows <= rows; row += kRows) f(std::integral_constant<int, kRows>{}, row);
  if constexpr (kRows > 1) ForEachRows<kRows - 1>(rows, f, row);
}

// How many threads shall share the reading of so many floats: waking one takes as long as some
// thousands.
inline int64_t CountThreads(ffi::ThreadPool& pool, int64_t floats) {
  return std::clamp<int64_t>(floats / 16384, 1, std::max<int64_t>(1, pool.num_threads()));
}

// Calls f(part) of each part once, on several threads, and returns when all are done. This thread
// takes what no other has begun, so that it never waits for a thread that is itself waiting.
template <typename F>
void ForEachPart(ffi::ThreadPool& pool, int64_t threads, int64_t parts, F f) {
  struct Counters {
    std::atomic<int64_t> begun{0}, done{0};
  };
  auto counters = std::make_shared<Counters>();
  auto work = [counters, parts, f] {
    for (int64_t part; (part = counters->begun++) < parts; ++counters->done) f(part);
  };
  for (int64_t thread = 1; thread < std::min(threads, parts); ++thread)
    pool.Schedule(decltype(work)(work));
  work();
  while (counters->done < parts) std::this_thread::yield();
}

#endif  // MAXLM_INFERENCE_CPU_VECTORS_H_
