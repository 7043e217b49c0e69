// Products of few rows on a CPU, float32: y [rows, outputs] = x [rows, inputs] · kernel.
//
// Reading the kernel takes most of the time. A kernel whose columns are split into panels, as
// matrix libraries do, is read in pieces of some hundred bytes that lie a whole row apart, which
// neither the caches' prefetching nor the pages' translations follow. Here each thread takes
// kBlock rows of the kernel at a time and goes along them, in tiles whose sums stay in registers,
// and asks for the next tile's bytes while it multiplies. The sums over inputs are always made in
// the same order, so that a row of y does not depend on the other rows.

#include "pallas_kernels/cpu.h"

namespace {

// Rows and vectors of a tile: its sums, columns and a number of x fit the registers, 32 of AVX-512
// and NEON, 16 of AVX.
constexpr int kRows = kLanes == 16 ? 8 : 4, kVectors = kLanes == 4 ? 4 : 3;
constexpr int64_t kTile = kLanes * kVectors, kBlock = 64;

struct Shape {
  int64_t rows, inputs, outputs;
};

// Adds x · kernel of R rows, `depth` inputs and V vectors of columns to y, or writes it there
// where `first`. `next` is where the next tile of the kernel begins.
template <int R, int V>
void MultiplyTile(const Shape& shape, const float* x, const float* kernel, float* y, int64_t depth,
                  bool first, const float* next) {
  Vector sums[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v)
      sums[r][v] = first ? Vector{} : At(y + r * shape.outputs + v * kLanes);
  for (int64_t k = 0; k < depth; ++k) {
    Vector columns[V];
    for (int v = 0; v < V; ++v) {
      columns[v] = At(kernel + k * shape.outputs + v * kLanes);
      __builtin_prefetch(next + k * shape.outputs + v * kLanes);
    }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v)
        sums[r][v] = MultiplyAdd(x[r * shape.inputs + k], columns[v], sums[r][v]);
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) At(y + r * shape.outputs + v * kLanes) = sums[r][v];
}

// The same of up to kTile columns.
template <int R>
void MultiplyColumns(const Shape& shape, const float* x, const float* kernel, float* y,
                     int64_t depth, bool first, const float* next, int64_t columns) {
  int64_t c = 0;
  if (columns == kTile)
    return MultiplyTile<R, kVectors>(shape, x, kernel, y, depth, first, next);
  for (; c + kLanes <= columns; c += kLanes)
    MultiplyTile<R, 1>(shape, x, kernel + c, y + c, depth, first, next + c);
  for (; c < columns; ++c)
    for (int r = 0; r < R; ++r) {
      float sum = first ? 0 : y[r * shape.outputs + c];
      for (int64_t k = 0; k < depth; ++k)
        sum = std::fma(x[r * shape.inputs + k], kernel[k * shape.outputs + c], sum);
      y[r * shape.outputs + c] = sum;
    }
}

// Multiplies R rows by V columns of a column-major kernel, which lie one behind the other.
template <int R, int V>
void MultiplyDense(const Shape& shape, const float* x, const float* kernel, float* y) {
  Vector sums[R][V] = {};
  int64_t whole = shape.inputs / kLanes * kLanes;
  for (int64_t k = 0; k < whole; k += kLanes) {
    Vector columns[V];
    for (int v = 0; v < V; ++v) {
      columns[v] = At(kernel + v * shape.inputs + k);
      __builtin_prefetch(kernel + (V + v) * shape.inputs + k);
    }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v)
        sums[r][v] = MultiplyAdd(At(x + r * shape.inputs + k), columns[v], sums[r][v]);
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) {
      float sum = Sum(sums[r][v]);
      for (int64_t k = whole; k < shape.inputs; ++k)
        sum = std::fma(x[r * shape.inputs + k], kernel[v * shape.inputs + k], sum);
      y[r * shape.outputs + v] = sum;
    }
}

// Multiplies the columns [start, end).
void MultiplyRange(const Shape& shape, const float* x, const float* kernel, float* y,
                   int64_t start, int64_t end) {
  for (int64_t k = 0; k < shape.inputs; k += kBlock)
    for (int64_t c = start; c < end; c += kTile) {
      bool last = c + kTile >= end;
      const float* next =
          kernel + (last ? (k + kBlock) * shape.outputs + start : k * shape.outputs + c + kTile);
      ForEachRows<kRows>(shape.rows, [&](auto R, int64_t row) {
        MultiplyColumns<R>(shape, x + row * shape.inputs + k, kernel + k * shape.outputs + c,
                           y + row * shape.outputs + c, std::min(kBlock, shape.inputs - k), k == 0,
                           next, std::min(kTile, end - c));
      });
    }
}

void MultiplyDenseRange(const Shape& shape, const float* x, const float* kernel, float* y,
                        int64_t start, int64_t end) {
  for (int64_t c = start; c < end; c += kVectors)
    ForEachRows<kRows>(shape.rows, [&](auto R, int64_t row) {
      const float *own = x + row * shape.inputs, *columns = kernel + c * shape.inputs;
      float* out = y + row * shape.outputs + c;
      if (c + kVectors <= end) return MultiplyDense<R, kVectors>(shape, own, columns, out);
      for (int64_t i = 0; i < end - c; ++i)
        MultiplyDense<R, 1>(shape, own, columns + i * shape.inputs, out + i);
    });
}

ffi::Error Multiply(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> kernel,
                    bool column_major, ffi::ResultBuffer<ffi::F32> y) {
  Shape shape{x.dimensions()[0], x.dimensions()[1], y->dimensions()[1]};
  int64_t threads = CountThreads(pool, shape.inputs * shape.outputs);
  // Whole tiles to each thread.
  int64_t width = std::max<int64_t>(1, (shape.outputs + threads - 1) / threads);
  width = (width + kTile - 1) / kTile * kTile;
  const float *rows = x.typed_data(), *weights = kernel.typed_data();
  float* out = y->typed_data();
  ForEachPart(pool, threads, (shape.outputs + width - 1) / width, [=](int64_t part) {
    int64_t start = part * width, end = std::min(start + width, shape.outputs);
    (column_major ? MultiplyDenseRange : MultiplyRange)(shape, rows, weights, out, start, end);
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(SkinnyMatmul, Multiply,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Attr<bool>("column_major")
                                  .Ret<ffi::Buffer<ffi::F32>>());
