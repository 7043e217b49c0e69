// Products of few rows on a CPU, float32: y [rows, outputs] = x [rows, inputs] · kernel.
//
// Reading the kernel takes most of the time, and the processor reads fastest what lies side by side:
// each thread takes some of the kernel's rows, whole, 32 or 64 at a time, and goes along them in tiles
// whose sums stay in registers, while it asks for the next tile's bytes. Panels of columns, as matrix
// libraries take them, are read in pieces that lie a row apart, of which the caches fetch ends that
// only another thread needs. The inputs are summed in blocks, and blocks added in their order,
// whatever the number of rows and of threads, so that a row of y depends on neither.

#include "vectors.h"

namespace {

// Rows and vectors of a tile: its sums, columns and a number of x fit the registers, 32 of AVX-512
// and NEON, 16 of AVX.
constexpr int kRows = kLanes == 16 ? 8 : 4;
constexpr int kVectors = kLanes == 4 ? 4 : 3;
// Columns of a tile.
constexpr int64_t kTile = kLanes * kVectors;
// Inputs of a block at most.
constexpr int64_t kDepth = 512;

struct Shape {
  int64_t rows;
  int64_t inputs;
  int64_t outputs;
  // Blocks of inputs, a power of two; a function of the inputs alone, so that results are too.
  int64_t blocks;

  Shape(int64_t rows, int64_t inputs, int64_t outputs)
      : rows(rows), inputs(inputs), outputs(outputs), blocks(inputs < 2 ? 1 : 2) {
    while (blocks * kDepth < inputs) blocks *= 2;
  }
  // The first input of a block.
  int64_t begin(int64_t block) const { return block * inputs / blocks; }
};

// Multiplies R rows by V vectors of columns, over `depth` inputs; the sums begin at y where they
// `resume`. `next`, if any, is where the next tile begins.
template <int R, int V>
void MultiplyTile(const Shape& shape, const float* x, const float* kernel, float* y, int64_t depth,
                  bool resume, const float* next) {
  Vector sums[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v)
      sums[r][v] = resume ? Load(y + r * shape.outputs + v * kLanes) : Vector{};
  for (int64_t k = 0; k < depth; ++k) {
    Vector columns[V];
    for (int v = 0; v < V; ++v) {
      columns[v] = Load(kernel + k * shape.outputs + v * kLanes);
      if (next) __builtin_prefetch(next + k * shape.outputs + v * kLanes);
    }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v)
        sums[r][v] = MultiplyAdd(x[r * shape.inputs + k], columns[v], sums[r][v]);
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) Store(y + r * shape.outputs + v * kLanes, sums[r][v]);
}

// The same of up to kTile columns.
template <int R>
void MultiplyColumns(const Shape& shape, const float* x, const float* kernel, float* y,
                     int64_t depth, bool resume, const float* next, int64_t columns) {
  int64_t c = 0;
  if (columns == kTile)
    return MultiplyTile<R, kVectors>(shape, x, kernel, y, depth, resume, next);
  for (; c + kLanes <= columns; c += kLanes)
    MultiplyTile<R, 1>(shape, x, kernel + c, y + c, depth, resume, nullptr);
  for (; c < columns; ++c)
    for (int r = 0; r < R; ++r) {
      float& out = y[r * shape.outputs + c];
      float sum = resume ? out : 0;
      for (int64_t k = 0; k < depth; ++k)
        sum = std::fma(x[r * shape.inputs + k], kernel[k * shape.outputs + c], sum);
      out = sum;
    }
}

// Multiplies rows by one block of the columns [start, stop).
void MultiplyBlock(const Shape& shape, const float* x, const float* kernel, float* y, int64_t block,
                   int64_t start, int64_t stop) {
  int64_t begin = shape.begin(block);
  int64_t end = shape.begin(block + 1);
  // The processor follows some 32 streams of bytes; of more rows sums are loaded less often instead.
  int64_t streams = shape.rows <= kRows ? 32 : 64;
  for (int64_t k = begin; k < end; k += streams)
    for (int64_t c = start; c < stop; c += kTile) {
      const float* tile = kernel + k * shape.outputs + c;
      const float* next =
          c + kTile < stop ? tile + kTile : kernel + (k + streams) * shape.outputs + start;
      ForEachRows<kRows>(shape.rows, [&](auto R, int64_t row) {
        MultiplyColumns<R>(shape, x + row * shape.inputs + k, tile, y + row * shape.outputs + c,
                           std::min(streams, end - k), k > begin, next,
                           std::min(kTile, stop - c));
      });
    }
}

// Multiplies R rows by V columns of a column-major kernel, which lie one behind the other.
template <int R, int V>
void MultiplyDense(const Shape& shape, const float* x, const float* kernel, float* y) {
  Vector sums[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sums[r][v] = Vector{};
  int64_t whole = shape.inputs / kLanes * kLanes;
  for (int64_t k = 0; k < whole; k += kLanes) {
    Vector columns[V];
    for (int v = 0; v < V; ++v) {
      columns[v] = Load(kernel + v * shape.inputs + k);
      __builtin_prefetch(kernel + (V + v) * shape.inputs + k);
    }
    for (int r = 0; r < R; ++r) {
      Vector row = KeepInRegister(Load(x + r * shape.inputs + k));
      for (int v = 0; v < V; ++v) sums[r][v] = MultiplyAdd(row, columns[v], sums[r][v]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) {
      float sum = Sum(sums[r][v]);
      for (int64_t k = whole; k < shape.inputs; ++k)
        sum = std::fma(x[r * shape.inputs + k], kernel[v * shape.inputs + k], sum);
      y[r * shape.outputs + v] = sum;
    }
}

// Multiplies all rows by the columns [start, end) of a column-major kernel.
void MultiplyDenseRange(const Shape& shape, const float* x, const float* kernel, float* y,
                        int64_t start, int64_t end) {
  for (int64_t c = start; c < end; c += kVectors)
    ForEachRows<kRows>(shape.rows, [&](auto R, int64_t row) {
      const float* inputs = x + row * shape.inputs;
      const float* columns = kernel + c * shape.inputs;
      float* out = y + row * shape.outputs + c;
      if (c + kVectors <= end) return MultiplyDense<R, kVectors>(shape, inputs, columns, out);
      for (int64_t i = 0; i < end - c; ++i)
        MultiplyDense<R, 1>(shape, inputs, columns + i * shape.inputs, out + i);
    });
}

// Multiplies by a row-major kernel: blocks on several threads, then their sum.
void MultiplyBlocks(ffi::ThreadPool& pool, const Shape& shape, const float* x, const float* kernel,
                    float* y) {
  int64_t threads = CountThreads(pool, shape.inputs * shape.outputs);
  // Blocks to each thread; where there are more threads than blocks, ranges of columns, of whole tiles.
  int64_t blocks_each = (shape.blocks + threads - 1) / threads;
  int64_t block_groups = (shape.blocks + blocks_each - 1) / blocks_each;
  int64_t shares = (threads + shape.blocks - 1) / shape.blocks;
  int64_t width = (shape.outputs + shares * kTile - 1) / (shares * kTile) * kTile;
  int64_t ranges = (shape.outputs + width - 1) / width;
  // The first block's sums are y itself.
  int64_t size = shape.rows * shape.outputs;
  std::unique_ptr<float[]> later_sums(new float[(shape.blocks - 1) * size]);
  float* sums = later_sums.get();
  auto sums_of = [=](int64_t block) { return block ? sums + (block - 1) * size : y; };
  ForEachPart(pool, threads, block_groups * ranges, [=](int64_t part) {
    int64_t first = part / ranges * blocks_each;
    int64_t last = std::min(first + blocks_each, shape.blocks);
    int64_t start = part % ranges * width;
    int64_t stop = std::min(start + width, shape.outputs);
    for (int64_t block = first; block < last; ++block)
      MultiplyBlock(shape, x, kernel, sums_of(block), block, start, stop);
  });
  for (int64_t block = 1; block < shape.blocks; ++block)
    for (int64_t i = 0; i < size; ++i) y[i] += sums_of(block)[i];
}

ffi::Error Multiply(ffi::ThreadPool pool, FloatBuffer x, FloatBuffer kernel, bool column_major,
                    FloatResult y) {
  Shape shape(x.dimensions()[0], x.dimensions()[1], y->dimensions()[1]);
  const float* rows = x.typed_data();
  const float* weights = kernel.typed_data();
  float* out = y->typed_data();
  if (column_major) {
    int64_t threads = CountThreads(pool, shape.inputs * shape.outputs);
    int64_t width = (shape.outputs + threads - 1) / threads;
    ForEachPart(pool, threads, (shape.outputs + width - 1) / width, [=](int64_t part) {
      int64_t start = part * width;
      int64_t end = std::min(start + width, shape.outputs);
      MultiplyDenseRange(shape, rows, weights, out, start, end);
    });
  } else {
    MultiplyBlocks(pool, shape, rows, weights, out);
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    CpuMatmul, Multiply,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
        .Arg<FloatBuffer>().Arg<FloatBuffer>()
        .Attr<bool>("column_major")
        .Ret<FloatBuffer>());
