// Products on a CPU, float32: y [rows, outputs] = x [rows, inputs] · kernel.
//
// Of few rows reading the kernel takes most of the time, and the processor reads fastest what lies
// side by side: each thread takes some of the kernel's rows, whole, 32 or 64 at a time, and goes along
// them in tiles whose sums stay in registers, while it asks for the next tile's bytes. Panels of
// columns, as matrix libraries take them, are read in pieces that lie a row apart, of which the caches
// fetch ends that only another thread needs. Of many rows each thread takes some of the columns, and
// copies each tile of the kernel to where it lies densely.
//
// The inputs are summed in blocks, and blocks added in their order, whatever the number of rows and
// of threads, so that a row of y depends on neither.

#include "pallas_kernels/cpu.h"

namespace {

// Rows and vectors of a tile: its sums, columns and a number of x fit the registers, 32 of AVX-512
// and NEON, 16 of AVX.
constexpr int kRows = kLanes == 16 ? 8 : 4, kVectors = kLanes == 4 ? 4 : 3;
constexpr int64_t kTile = kLanes * kVectors, kFewRows = 64;
// A copied tile of so many inputs fits the second cache beside rows of x and y.
constexpr int64_t kDepth = 512;

struct Shape {
  int64_t rows, inputs, outputs, blocks;

  Shape(int64_t rows, int64_t inputs, int64_t outputs)
      : rows(rows), inputs(inputs), outputs(outputs), blocks(inputs < 2 ? 1 : 2) {
    while (blocks * kDepth < inputs) blocks *= 2;
  }
  int64_t begin(int64_t block) const { return block * inputs / blocks; }
};

// Sums of products that a tile begins with y, and that are added to y.
enum class Sums { kBegin, kContinue, kAdd };

// Multiplies R rows by V vectors of columns, over `depth` inputs. A row of the kernel's tile is
// `stride` floats from the last; `next`, if any, is where the next tile begins in the kernel itself.
template <int R, int V>
void MultiplyTile(const Shape& shape, const float* x, const float* kernel, int64_t stride, float* y,
                  int64_t depth, Sums how, const float* next) {
  Vector sums[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v)
      sums[r][v] = how == Sums::kContinue ? At(y + r * shape.outputs + v * kLanes) : Vector{};
  for (int64_t k = 0; k < depth; ++k) {
    Vector columns[V];
    for (int v = 0; v < V; ++v) {
      columns[v] = At(kernel + k * stride + v * kLanes);
      if (next) __builtin_prefetch(next + k * shape.outputs + v * kLanes);
    }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v)
        sums[r][v] = MultiplyAdd(x[r * shape.inputs + k], columns[v], sums[r][v]);
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) {
      Vector& out = At(y + r * shape.outputs + v * kLanes);
      out = how == Sums::kAdd ? out + sums[r][v] : sums[r][v];
    }
}

// The same of up to kTile columns.
template <int R>
void MultiplyColumns(const Shape& shape, const float* x, const float* kernel, int64_t stride,
                     float* y, int64_t depth, Sums how, const float* next, int64_t columns) {
  int64_t c = 0;
  if (columns == kTile)
    return MultiplyTile<R, kVectors>(shape, x, kernel, stride, y, depth, how, next);
  for (; c + kLanes <= columns; c += kLanes)
    MultiplyTile<R, 1>(shape, x, kernel + c, stride, y + c, depth, how, nullptr);
  for (; c < columns; ++c)
    for (int r = 0; r < R; ++r) {
      float& out = y[r * shape.outputs + c];
      float sum = how == Sums::kContinue ? out : 0;
      for (int64_t k = 0; k < depth; ++k)
        sum = std::fma(x[r * shape.inputs + k], kernel[k * stride + c], sum);
      out = how == Sums::kAdd ? out + sum : sum;
    }
}

// Multiplies few rows by one block of the columns [start, stop).
void MultiplyBlock(const Shape& shape, const float* x, const float* kernel, float* y, int64_t block,
                   int64_t start, int64_t stop) {
  int64_t begin = shape.begin(block), end = shape.begin(block + 1);
  // The processor follows some 32 streams of bytes; of more rows sums are loaded less often instead.
  int64_t streams = shape.rows <= kRows ? 32 : 64;
  for (int64_t k = begin; k < end; k += streams)
    for (int64_t c = start; c < stop; c += kTile) {
      const float* tile = kernel + k * shape.outputs + c;
      const float* next =
          c + kTile < stop ? tile + kTile : kernel + (k + streams) * shape.outputs + start;
      ForEachRows<kRows>(shape.rows, [&](auto R, int64_t row) {
        MultiplyColumns<R>(shape, x + row * shape.inputs + k, tile, shape.outputs,
                           y + row * shape.outputs + c, std::min(streams, end - k),
                           k == begin ? Sums::kBegin : Sums::kContinue, next,
                           std::min(kTile, stop - c));
      });
    }
}

// Multiplies many rows by the columns [start, end).
void MultiplyPanels(const Shape& shape, const float* x, const float* kernel, float* y,
                    int64_t start, int64_t end) {
  struct alignas(64) Panel {
    float columns[kDepth][kTile];
  };
  auto panel = std::make_unique<Panel>();
  for (int64_t block = 0; block < shape.blocks; ++block)
    for (int64_t c = start; c < end; c += kTile) {
      int64_t k = shape.begin(block), depth = shape.begin(block + 1) - k, stride = shape.outputs;
      int64_t columns = std::min(kTile, end - c);
      const float *tile = kernel + k * stride + c, *next = c + kTile < end ? tile + kTile : nullptr;
      if (columns == kTile) {
        for (int64_t i = 0; i < depth; ++i)
          std::memcpy(panel->columns[i], tile + i * stride, sizeof(panel->columns[i]));
        tile = panel->columns[0], stride = kTile;
      }
      ForEachRows<kRows>(shape.rows, [&](auto R, int64_t row) {
        MultiplyColumns<R>(shape, x + row * shape.inputs + k, tile, stride,
                           y + row * shape.outputs + c, depth,
                           block ? Sums::kAdd : Sums::kBegin, row ? nullptr : next, columns);
      });
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
  Shape shape(x.dimensions()[0], x.dimensions()[1], y->dimensions()[1]);
  const float *rows = x.typed_data(), *weights = kernel.typed_data();
  float* out = y->typed_data();
  bool few = shape.rows <= kFewRows;
  // A product takes at least as long as reading the kernel, and as 8 of its rows do.
  int64_t work = shape.inputs * shape.outputs * (few ? 1 : shape.rows / 8);
  int64_t threads = CountThreads(pool, work);
  // Whole tiles of columns to each thread; of few rows only what blocks leave to share.
  bool in_blocks = few && !column_major;
  int64_t shares = in_blocks ? (threads + shape.blocks - 1) / shape.blocks : threads;
  int64_t width = std::max<int64_t>(1, (shape.outputs + shares - 1) / shares);
  width = (width + kTile - 1) / kTile * kTile;
  int64_t ranges = (shape.outputs + width - 1) / width;
  if (in_blocks) {
    int64_t size = shape.rows * shape.outputs;
    std::unique_ptr<float[]> others(new float[(shape.blocks - 1) * size]);
    float* sums = others.get();
    auto sums_of = [=](int64_t block) { return block ? sums + (block - 1) * size : out; };
    int64_t each = (shape.blocks + threads - 1) / threads;
    ForEachPart(pool, threads, (shape.blocks + each - 1) / each * ranges, [=](int64_t part) {
      int64_t first = part / ranges * each, start = part % ranges * width;
      for (int64_t block = first; block < std::min(first + each, shape.blocks); ++block)
        MultiplyBlock(shape, rows, weights, sums_of(block), block, start,
                      std::min(start + width, shape.outputs));
    });
    for (int64_t block = 1; block < shape.blocks; ++block)
      for (int64_t i = 0; i < size; ++i) out[i] += sums_of(block)[i];
    return ffi::Error::Success();
  }
  ForEachPart(pool, threads, ranges, [=](int64_t part) {
    int64_t start = part * width, end = std::min(start + width, shape.outputs);
    (column_major ? MultiplyDenseRange : MultiplyPanels)(shape, rows, weights, out, start, end);
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(CpuMatmul, Multiply,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Attr<bool>("column_major")
                                  .Ret<ffi::Buffer<ffi::F32>>());
