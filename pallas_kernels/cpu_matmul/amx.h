// Products of many rows on AMX, the matrix units of Intel's processors, which multiply bfloat16.
//
// A float32 is the sum of three bfloat16, and a product of two that of nine products, of which the six
// largest are summed in float32, as XLA's BF16_BF16_F32_X6 does: those left out are at most 2⁻²³ of the
// product (Henry, Tang and Heinecke 2019, arXiv 1904.06376).

#ifndef PALLAS_KERNELS_CPU_MATMUL_AMX_H_
#define PALLAS_KERNELS_CPU_MATMUL_AMX_H_

#include "pallas_kernels/cpu.h"

#if defined(__AMX_BF16__) && defined(__AVX512BW__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

namespace amx {

typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t HalfWords __attribute__((vector_size(32)));

// 16 rows of 32 bfloat16: inputs of 16 rows of x, or of 16 columns of the kernel, two inputs a word.
struct alignas(64) Tile {
  uint32_t words[16][16];
};

// Of 32 rows of x, or 32 columns of the kernel, 32 inputs in three parts, the largest first.
struct Step {
  Tile parts[3][2];
};

constexpr int64_t kInputs = 32, kRows = 32, kColumns = 32;
// A panel of so many inputs and columns fits the second cache beside 32 rows of x.
constexpr int64_t kDepth = 1024, kWidth = 128;
// Rows of the kernel that are asked for before they are read.
constexpr int64_t kAhead = 16;

inline int64_t CountSteps(int64_t inputs) { return (inputs + kInputs - 1) / kInputs; }

// Whether the system lets this process use the units.
inline bool IsAllowed() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // Linux's arch_prctl.
  static const bool allowed = !syscall(SYS_arch_prctl, kRequestPermission, kTileData);
  return allowed;
}

// Takes the next of the three bfloat16 whose sum floats are: the upper halves of words.
inline Words TakePart(Vector& x) {
  Words part = ((Words)x + 0x8000u) & 0xFFFF0000u;
  x -= (Vector)part;
  return part;
}

// Up to 16 floats; zeros behind them.
inline Vector Load(const float* from, int64_t count) {
  if (count >= kLanes) return At(from);
  Vector floats{};
  if (count > 0) std::memcpy(&floats, from, 4 * count);
  return floats;
}

// Splits up to 32 rows of x, `stride` floats apart, into steps.
inline void SplitRows(const float* x, int64_t rows, int64_t inputs, Step* steps) {
  for (int64_t step = 0; step < CountSteps(inputs); ++step)
    for (int64_t row = 0; row < kRows; ++row)
      for (int half = 0; half < 2; ++half) {
        int64_t k = step * kInputs + half * kLanes;
        Vector floats = Load(x + row * inputs + k, row < rows ? inputs - k : 0);
        for (auto& part : steps[step].parts) {
          HalfWords halves = __builtin_convertvector(TakePart(floats) >> 16, HalfWords);
          std::memcpy(&part[row / 16].words[row % 16][half * 8], &halves, sizeof(halves));
        }
      }
}

// Splits up to 128 columns of `depth` rows of a kernel, `stride` floats apart; each 32 columns' steps
// follow the last's.
inline void SplitColumns(const float* kernel, int64_t stride, int64_t depth, int64_t columns,
                         Step* panel) {
  int64_t steps = CountSteps(depth);
  for (int64_t k = 0; k < steps * kInputs; k += 2) {
    const float* row = kernel + k * stride;
    auto split = [&](int64_t c, Vector even, Vector odd) {
      for (auto& part : panel[c / kColumns * steps + k / kInputs].parts) {
        Words words = (TakePart(even) >> 16) | TakePart(odd);
        std::memcpy(part[c / kLanes % 2].words[k % kInputs / 2], &words, sizeof(words));
      }
    };
    int64_t c = 0;
    if (k + 1 < depth)
      for (; c + kLanes <= columns; c += kLanes) {
        __builtin_prefetch(row + kAhead * stride + c);
        __builtin_prefetch(row + (kAhead + 1) * stride + c);
        split(c, At(row + c), At(row + stride + c));
      }
    for (; c < (columns + kColumns - 1) / kColumns * kColumns; c += kLanes)
      split(c, Load(row + c, k < depth ? columns - c : 0),
            Load(row + stride + c, k + 1 < depth ? columns - c : 0));
  }
}

// Multiplies 32 rows by 32 columns over so many steps; the sums begin at y, whose rows are `stride`
// floats apart, where they `resume`.
inline void MultiplySteps(const Step* x, const Step* kernel, int64_t steps, float* y, int64_t stride,
                          bool resume) {
// Registers 0 to 3 hold sums, 4 and 5 rows, 6 and 7 columns; macros, as numbers must be literal.
#define LOAD(first, second, pair)          \
  _tile_loadd(first, (pair)[0].words, 64); \
  _tile_loadd(second, (pair)[1].words, 64)
#define MULTIPLY           \
  _tile_dpbf16ps(0, 4, 6); \
  _tile_dpbf16ps(1, 4, 7); \
  _tile_dpbf16ps(2, 5, 6); \
  _tile_dpbf16ps(3, 5, 7)
  // To the compiler loading a tile reads no memory: what was written is written before.
  std::atomic_signal_fence(std::memory_order_seq_cst);
  float* below = y + 16 * stride;
  if (resume) {
    _tile_loadd(0, y, 4 * stride);
    _tile_loadd(1, y + 16, 4 * stride);
    _tile_loadd(2, below, 4 * stride);
    _tile_loadd(3, below + 16, 4 * stride);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t step = 0; step < steps; ++step) {
    auto& [high, middle, low] = x[step].parts;
    auto& [kernel_high, kernel_middle, kernel_low] = kernel[step].parts;
    LOAD(4, 5, high);
    LOAD(6, 7, kernel_low);
    MULTIPLY;
    LOAD(6, 7, kernel_high);
    MULTIPLY;
    LOAD(6, 7, kernel_middle);
    MULTIPLY;
    LOAD(4, 5, middle);
    MULTIPLY;
    LOAD(6, 7, kernel_high);
    MULTIPLY;
    LOAD(4, 5, low);
    MULTIPLY;
  }
  _tile_stored(0, y, 4 * stride);
  _tile_stored(1, y + 16, 4 * stride);
  _tile_stored(2, below, 4 * stride);
  _tile_stored(3, below + 16, 4 * stride);
#undef LOAD
#undef MULTIPLY
}

// Multiplies rows, split, by the columns [start, end).
inline void MultiplyPanel(const Step* x, int64_t rows, int64_t inputs, const float* kernel, float* y,
                          int64_t outputs, int64_t start, int64_t end) {
  struct alignas(64) {
    uint8_t palette = 1, first_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  _tile_loadconfig(&config);
  int64_t steps = CountSteps(inputs), depth = std::min(steps, kDepth / kInputs);
  int64_t groups = (end - start + kColumns - 1) / kColumns;
  std::unique_ptr<Step[]> panel(new Step[groups * depth]);
  for (int64_t first = 0; first < steps; first += depth) {
    int64_t k = first * kInputs, count = std::min(depth, steps - first);
    SplitColumns(kernel + k * outputs + start, outputs, std::min(depth * kInputs, inputs - k),
                 end - start, panel.get());
    for (int64_t row = 0; row < rows; row += kRows)
      for (int64_t c = start; c < end; c += kColumns) {
        const Step* own = x + row / kRows * steps + first;
        const Step* columns = &panel[(c - start) / kColumns * count];
        float* out = y + row * outputs + c;
        if (row + kRows <= rows && c + kColumns <= end) {
          MultiplySteps(own, columns, count, out, outputs, first);
          continue;
        }
        alignas(64) float sums[kRows][kColumns];
        int64_t height = std::min(kRows, rows - row), bytes = 4 * std::min(kColumns, end - c);
        for (int64_t r = 0; first && r < height; ++r) std::memcpy(sums[r], out + r * outputs, bytes);
        MultiplySteps(own, columns, count, sums[0], kColumns, first);
        for (int64_t r = 0; r < height; ++r) std::memcpy(out + r * outputs, sums[r], bytes);
      }
  }
  _tile_release();
}

// y [rows, outputs] = x [rows, inputs] · kernel.
inline void Multiply(ffi::ThreadPool& pool, const float* x, const float* kernel, float* y,
                     int64_t rows, int64_t inputs, int64_t outputs) {
  int64_t threads = CountThreads(pool, inputs * outputs * (rows / 8));
  int64_t groups = (rows + kRows - 1) / kRows, steps = CountSteps(inputs);
  std::unique_ptr<Step[]> held(new Step[groups * steps]);
  Step* split = held.get();
  ForEachPart(pool, threads, groups, [=](int64_t group) {
    int64_t row = group * kRows;
    SplitRows(x + row * inputs, std::min(kRows, rows - row), inputs, split + group * steps);
  });
  // As many panels to each thread as to another.
  int64_t parts = threads * ((outputs + threads * kWidth - 1) / (threads * kWidth));
  int64_t width = ((outputs + parts - 1) / parts + kColumns - 1) / kColumns * kColumns;
  ForEachPart(pool, threads, (outputs + width - 1) / width, [=](int64_t part) {
    int64_t start = part * width;
    MultiplyPanel(split, rows, inputs, kernel, y, outputs, start, std::min(start + width, outputs));
  });
}

}  // namespace amx

#else

namespace amx {
inline bool IsAllowed() { return false; }
inline void Multiply(ffi::ThreadPool&, const float*, const float*, float*, int64_t, int64_t,
                     int64_t) {}
}  // namespace amx

#endif
#endif  // PALLAS_KERNELS_CPU_MATMUL_AMX_H_
