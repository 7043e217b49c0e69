// Products of many rows on AMX, the matrix units of Intel's processors, which multiply 8-bit integers.
//
// A row of x, or a column of the kernel, is a unit times numbers of three digits in base 256, each in
// [−128, 127], the first at most 127: 24 bits, as float32 has, beside the row's largest. Of the nine
// products of digits eight are summed as integers, so without rounding; the last is at most 2⁻³² of
// the largest product (Ootomo, Ozaki and Yokota 2024, arXiv 2306.11975, who do so for float64).

#ifndef PALLAS_KERNELS_CPU_MATMUL_AMX_H_
#define PALLAS_KERNELS_CPU_MATMUL_AMX_H_

#include "pallas_kernels/cpu.h"

// Clang 14 writes the macro in one word.
#if (defined(__AMX_INT8__) || defined(__AMXINT8__)) && defined(__AVX512BW__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

namespace amx {

typedef uint32_t Words __attribute__((vector_size(64)));
typedef int32_t Integers __attribute__((vector_size(64)));
typedef uint8_t Bytes __attribute__((vector_size(16)));

constexpr int kDigits = 3;
// Rows and columns of a tile, and inputs that it holds of each, four in a word.
constexpr int64_t kRows = 16, kInputs = 64;
// A panel of so many inputs and columns fits the second cache beside 16 rows of x.
constexpr int64_t kDepth = 1536, kWidth = 256;
// Rows of the kernel that are asked for before they are read.
constexpr int64_t kAhead = 16;

// 64 inputs of 16 rows of x, or of 16 columns of the kernel: the third digits, the second, the first.
typedef uint32_t Tile[16][16];
struct alignas(64) Step {
  Tile digits[kDigits];
};

inline int64_t CountSteps(int64_t inputs) { return (inputs + kInputs - 1) / kInputs; }

// Whether the system lets this process use the units.
inline bool IsAllowed() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // Linux's arch_prctl.
  static const bool allowed = !syscall(SYS_arch_prctl, kRequestPermission, kTileData);
  return allowed;
}

// Up to 16 floats; zeros behind them.
inline Vector LoadFirst(const float* from, int64_t count) {
  if (count >= kLanes) return Load(from);
  Vector floats{};
  if (count > 0) std::memcpy(&floats, from, 4 * count);
  return floats;
}

// The larger of two magnitudes' bits, of which those of infinities and NaNs are the largest.
inline Words TakeLarger(Words largest, const Vector& x) {
  Words bits = (Words)x & 0x7FFFFFFFu;
  return bits > largest ? bits : largest;
}

// What the first digits count, where the others count 256th and 65536th parts of it, and how many third
// digits' units a float is. A float that is not finite has a unit that makes its whole row NaN.
struct Scale {
  Vector unit, count;

  explicit Scale(Words largest)
      : unit((Vector)largest / 127.0f), count(largest ? 65536.0f / unit : Vector{}) {}
};

// The digits of floats, in each word's lowest bytes, the last first.
inline Words TakeDigits(const Vector& x, const Vector& count) {
  // With 128 more each are bytes, which overflow into none.
  return ((Words)_mm512_cvtps_epi32(x * count) + 0x808080u) ^ 0x808080u;
}

// Splits up to 16 rows of x, which may be of any length; writes each row's unit.
inline void SplitRows(const float* x, int64_t rows, int64_t inputs, Step* steps, float* units) {
  for (int64_t row = 0; row < kRows; ++row) {
    const float* floats = x + row * inputs;
    int64_t count = row < rows ? inputs : 0;
    Words largest{};
    for (int64_t k = 0; k < count; k += kLanes)
      largest = TakeLarger(largest, LoadFirst(floats + k, count - k));
    uint32_t bits = 0;
    for (int lane = 0; lane < kLanes; ++lane) bits = std::max(bits, largest[lane]);
    Scale scale(bits + Words{});
    units[row] = scale.unit[0];
    for (int64_t k = 0; k < CountSteps(inputs) * kInputs; k += kLanes) {
      Words words = TakeDigits(LoadFirst(floats + k, count - k), scale.count);
      for (int digit = 0; digit < kDigits; ++digit) {
        Bytes bytes = __builtin_convertvector(words >> 8 * digit, Bytes);
        std::memcpy(&steps[k / kInputs].digits[digit][row][k % kInputs / 4], &bytes, sizeof(bytes));
      }
    }
  }
}

// Splits up to kWidth columns of `depth` rows of a kernel, `stride` floats apart; each 16 columns'
// steps follow the last's. Writes each column's unit.
inline void SplitColumns(const float* kernel, int64_t stride, int64_t depth, int64_t columns,
                         Step* panel, float* units) {
  int64_t steps = CountSteps(depth);
  Words largest[kWidth / kLanes] = {};
  for (int64_t k = 0; k < depth; ++k)
    for (int64_t c = 0; c < columns; c += kLanes) {
      const float* row = kernel + k * stride + c;
      __builtin_prefetch(row + kAhead * stride);
      largest[c / kLanes] = TakeLarger(largest[c / kLanes], LoadFirst(row, columns - c));
    }
  Vector counts[kWidth / kLanes];
  for (int64_t c = 0; c < columns; c += kLanes) {
    Scale scale(largest[c / kLanes]);
    Store(units + c, scale.unit);
    counts[c / kLanes] = scale.count;
  }
  for (int64_t k = 0; k < steps * kInputs; k += 4)
    for (int64_t c = 0; c < columns; c += kLanes) {
      Words words[4];
      for (int i = 0; i < 4; ++i)
        words[i] = TakeDigits(
            LoadFirst(kernel + (k + i) * stride + c, k + i < depth ? columns - c : 0),
            counts[c / kLanes]);
      for (int digit = 0; digit < kDigits; ++digit) {
        Words four{};
        for (int i = 0; i < 4; ++i) four |= (words[i] >> 8 * digit & 0xFFu) << 8 * i;
        Step& step = panel[c / kLanes * steps + k / kInputs];
        std::memcpy(step.digits[digit][k % kInputs / 4], &four, sizeof(four));
      }
    }
}

// Multiplies 16 rows by 16 columns over so many steps. Sums are of those products whose unit is the
// first digits', its 256th part, and so on.
inline void MultiplySteps(const Step* x, const Step* kernel, int64_t steps, Tile* sums) {
  // To the compiler loading a tile reads no memory: what was written is written before. Registers 0 to
  // 3 hold sums, 4 and 5 rows, 6 and 7 columns.
  std::atomic_signal_fence(std::memory_order_seq_cst);
  _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
  for (int64_t step = 0; step < steps; ++step) {
    auto& [third, second, first] = x[step].digits;
    auto& [kernel_third, kernel_second, kernel_first] = kernel[step].digits;
    _tile_loadd(4, first, 64);
    _tile_loadd(6, kernel_first, 64);  _tile_dpbssd(0, 4, 6);
    _tile_loadd(7, kernel_second, 64); _tile_dpbssd(1, 4, 7);
    _tile_loadd(5, second, 64);        _tile_dpbssd(2, 5, 7); _tile_dpbssd(1, 5, 6);
    _tile_loadd(7, kernel_third, 64);  _tile_dpbssd(2, 4, 7); _tile_dpbssd(3, 5, 7);
    _tile_loadd(4, third, 64);         _tile_dpbssd(2, 4, 6);
    _tile_loadd(7, kernel_second, 64); _tile_dpbssd(3, 4, 7);
  }
  _tile_stored(0, sums[0], 64); _tile_stored(1, sums[1], 64);
  _tile_stored(2, sums[2], 64); _tile_stored(3, sums[3], 64);
}

// Multiplies rows, split, by the columns [start, end).
inline void MultiplyPanel(const Step* x, const float* row_units, int64_t rows, int64_t inputs,
                          const float* kernel, float* y, int64_t outputs, int64_t start,
                          int64_t end) {
  struct alignas(64) {
    uint8_t palette = 1, first_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  _tile_loadconfig(&config);
  int64_t steps = CountSteps(inputs), depth = std::min(steps, kDepth / kInputs);
  std::unique_ptr<Step[]> panel(new Step[kWidth / kLanes * depth]);
  float column_units[kWidth];
  for (int64_t first = 0; first < steps; first += depth) {
    int64_t k = first * kInputs, count = std::min(depth, steps - first);
    SplitColumns(kernel + k * outputs + start, outputs, std::min(depth * kInputs, inputs - k),
                 end - start, panel.get(), column_units);
    for (int64_t row = 0; row < rows; row += kRows)
      for (int64_t c = start; c < end; c += kLanes) {
        float* out = y + row * outputs + c;
        int64_t height = std::min(kRows, rows - row);
        for (int64_t r = 0; r < height; ++r) __builtin_prefetch(out + r * outputs, 1);
        alignas(64) Tile sums[4];
        MultiplySteps(x + row / kRows * steps + first, &panel[(c - start) / kLanes * count], count,
                      sums);
        for (int64_t r = 0; r < height; ++r, out += outputs) {
          Vector sum{};
          for (int i = 3; i >= 0; --i) {
            Integers integers;
            std::memcpy(&integers, sums[i][r], sizeof(integers));
            sum = MultiplyAdd(1 / 256.0f, sum, __builtin_convertvector(integers, Vector));
          }
          sum *= row_units[row + r] * Load(column_units + c - start);
          if (first) sum += LoadFirst(out, end - c);
          if (c + kLanes <= end) Store(out, sum);
          else std::memcpy(out, &sum, 4 * (end - c));
        }
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
  std::unique_ptr<float[]> held_units(new float[groups * kRows]);
  Step* split = held.get();
  float* units = held_units.get();
  ForEachPart(pool, threads, groups, [=](int64_t group) {
    int64_t row = group * kRows;
    SplitRows(x + row * inputs, std::min(kRows, rows - row), inputs, split + group * steps,
              units + row);
  });
  // As many panels to each thread as to another.
  int64_t parts = threads * ((outputs + threads * kWidth - 1) / (threads * kWidth));
  int64_t width = ((outputs + parts - 1) / parts + kLanes - 1) / kLanes * kLanes;
  ForEachPart(pool, threads, (outputs + width - 1) / width, [=](int64_t part) {
    int64_t start = part * width;
    MultiplyPanel(split, units, rows, inputs, kernel, y, outputs, start,
                  std::min(start + width, outputs));
  });
}

}  // namespace amx

#else

namespace amx {
inline bool IsAllowed() { return false; }
template <typename... T> void Multiply(T&&...) {}
}  // namespace amx

#endif
#endif  // PALLAS_KERNELS_CPU_MATMUL_AMX_H_
