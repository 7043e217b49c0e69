// Attention of decoding rows to pages of floats on a CPU: an online softmax over pieces of pages,
// read where they lie. Each thread takes kv heads of rows, with all their queries.

#include "pallas_kernels/cpu.h"

namespace {

// Keys whose scores are held at once, and queries that a key, once loaded, is multiplied by.
constexpr int64_t kKeys = 64;
constexpr int kQueries = 4;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// e^x of numbers of at most 0, within 2e-7 of it: 2^n · e^r, |r| ≤ ln 2 / 2, by Taylor's series.
inline Vector Exp(Vector x) {
  typedef int32_t Integers __attribute__((vector_size(4 * kLanes)));
  x = x < -87.0f ? Vector{} - 87.0f : x;
  Integers n = __builtin_convertvector(x * 1.44269504f - 0.5f, Integers);
  Vector whole = __builtin_convertvector(n, Vector);
  Vector r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  Vector y = 1 / 5040.0f * r + 1 / 720.0f;
  for (float c : {1 / 120.0f, 1 / 24.0f, 1 / 6.0f, 0.5f, 1.0f, 1.0f}) y = y * r + c;
  Integers bits = (n + 127) << 23;
  Vector scale;
  std::memcpy(&scale, &bits, sizeof(scale));
  return y * scale;
}

struct Call {
  const float *q, *keys, *values, *slopes, *sinks, *biases;
  const int32_t *tables, *lengths, *limits;
  float *o, *lse;
  int64_t rows, each, heads, kv_heads, pages, page_size, features, value_features, value_dim;
  int64_t bias_reach, window;
  float scale, soft_cap;
};

struct Query {
  const float* q;
  float *o, *lse;
  int64_t head, position, first, end;  // it sees the keys of [first, end)
  float top, total;
};

float AdjustScore(const Call& call, const Query& query, float score, int64_t key) {
  int64_t distance = query.position - key;
  if (call.soft_cap > 0) score = call.soft_cap * std::tanh(score / call.soft_cap);
  if (call.slopes) score -= call.slopes[query.head] * distance;
  if (call.biases) {
    int64_t reach = call.bias_reach, at = std::clamp(-distance, -reach, reach) + reach;
    score += call.biases[query.head * (2 * reach + 1) + at];
  }
  return score;
}

// Adds a piece of a page, the keys at positions from `start` on, to the queries' results.
template <int Q>
void AddKeys(const Call& call, Query* queries, const float* keys, const float* values,
             int64_t start, int64_t count) {
  float weights[Q][kKeys], decays[Q];
  for (int64_t t = 0; t < count; ++t) {
    Vector sums[Q] = {};
    for (int64_t h = 0; h < call.features; h += kLanes)
      for (int i = 0; i < Q; ++i)
        sums[i] = MultiplyAdd(At(queries[i].q + h), At(keys + t * call.features + h), sums[i]);
    for (int i = 0; i < Q; ++i) weights[i][t] = Sum(sums[i]) * call.scale;
  }
  bool adjusts = call.soft_cap > 0 || call.slopes || call.biases;
  for (int i = 0; i < Q; ++i) {
    Query& query = queries[i];
    float top = query.top;
    for (int64_t t = 0; t < (count + kLanes - 1) / kLanes * kLanes; ++t) {
      int64_t key = start + t;
      float& score = weights[i][t];
      if (t >= count || key < query.first || key >= query.end) score = -kInfinity;
      else if (adjusts) score = AdjustScore(call, query, score, key);
      top = std::max(top, score);
    }
    // No key yet: −inf − −inf is NaN.
    float base = top == -kInfinity ? 0 : top;
    decays[i] = std::exp(query.top - base);
    Vector total = {};
    for (int64_t t = 0; t < count; t += kLanes) {
      Vector& own = At(weights[i] + t);
      own = own == -kInfinity ? Vector{} : Exp(own - base);
      total += own;
    }
    query.top = top;
    query.total = query.total * decays[i] + Sum(total);
  }
  for (int64_t h = 0; h < call.value_dim; h += kLanes) {
    Vector sums[Q];
    for (int i = 0; i < Q; ++i) sums[i] = At(queries[i].o + h) * decays[i];
    for (int64_t t = 0; t < count; ++t)
      for (int i = 0; i < Q; ++i)
        sums[i] = MultiplyAdd(weights[i][t], At(values + t * call.value_features + h), sums[i]);
    for (int i = 0; i < Q; ++i) At(queries[i].o + h) = sums[i];
  }
}

void AttendHead(const Call& call, int64_t row, int64_t kv_head) {
  int64_t group = call.heads / call.kv_heads, first = call.lengths[row], end = 0;
  auto queries = std::make_unique<Query[]>(group * call.each);
  for (int64_t i = 0; i < group * call.each; ++i) {
    Query& query = queries[i];
    int64_t token = row * call.each + i / group;
    query.head = kv_head * group + i % group;
    query.position = call.lengths[row] - call.each + i / group;
    query.end = std::min<int64_t>(query.position + 1, call.limits[row]);
    query.first = call.window ? std::max<int64_t>(0, query.position + 1 - call.window) : 0;
    query.q = call.q + (token * call.heads + query.head) * call.features;
    query.o = call.o + (token * call.heads + query.head) * call.value_dim;
    query.lse = call.lse + token * call.heads + query.head;
    query.top = call.sinks && query.position >= 0 ? call.sinks[query.head] : -kInfinity;
    query.total = query.top == -kInfinity ? 0 : 1;
    std::fill_n(query.o, call.value_dim, 0.0f);
    first = std::min(first, query.first), end = std::max(end, query.end);
  }
  for (int64_t start = first, count; start < end; start += count) {
    int64_t slot = start % call.page_size;
    count = std::min({kKeys, call.page_size - slot, end - start});
    int64_t page = call.tables[row * call.pages + start / call.page_size];
    int64_t at = (page * call.kv_heads + kv_head) * call.page_size + slot;
    ForEachRows<kQueries>(group * call.each, [&](auto Q, int64_t i) {
      AddKeys<Q>(call, &queries[i], call.keys + at * call.features,
                 call.values + at * call.value_features, start, count);
    });
  }
  for (int64_t i = 0; i < group * call.each; ++i) {
    Query& query = queries[i];
    *query.lse = query.total > 0 ? query.top + std::log(query.total) : -kInfinity;
    float scale = query.total > 0 ? 1 / query.total : 1;
    for (int64_t h = 0; h < call.value_dim; ++h) query.o[h] *= scale;
  }
}

ffi::Error Attend(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::Buffer<ffi::F32> keys,
                  ffi::Buffer<ffi::F32> values, ffi::Buffer<ffi::S32> tables,
                  ffi::Buffer<ffi::S32> lengths, ffi::Buffer<ffi::S32> limits,
                  ffi::Buffer<ffi::F32> slopes, ffi::Buffer<ffi::F32> sinks,
                  ffi::Buffer<ffi::F32> biases, int64_t each, int64_t window, float scale,
                  float soft_cap, ffi::ResultBuffer<ffi::F32> o, ffi::ResultBuffer<ffi::F32> lse) {
  auto given = [](ffi::Buffer<ffi::F32>& x) -> const float* {
    return x.element_count() ? x.typed_data() : nullptr;
  };
  Call call{};
  call.q = q.typed_data(), call.keys = keys.typed_data(), call.values = values.typed_data();
  call.slopes = given(slopes), call.sinks = given(sinks), call.biases = given(biases);
  call.tables = tables.typed_data(), call.lengths = lengths.typed_data();
  call.limits = limits.typed_data(), call.o = o->typed_data(), call.lse = lse->typed_data();
  call.each = each, call.rows = o->dimensions()[0] / each, call.heads = q.dimensions()[1];
  call.kv_heads = keys.dimensions()[1], call.page_size = keys.dimensions()[2];
  call.features = keys.dimensions()[3], call.value_features = values.dimensions()[3];
  call.value_dim = o->dimensions()[2], call.pages = tables.dimensions()[1];
  call.bias_reach = call.biases ? biases.dimensions()[1] / 2 : 0, call.window = window;
  call.scale = scale, call.soft_cap = soft_cap;
  int64_t tokens = std::accumulate(call.lengths, call.lengths + call.rows, int64_t{0});
  int64_t threads = CountThreads(pool, tokens * call.kv_heads * call.features);
  ForEachPart(pool, threads, call.rows * call.kv_heads, [call](int64_t part) {
    AttendHead(call, part / call.kv_heads, part % call.kv_heads);
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(PagedAttention, Attend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("each")
                                  .Attr<int64_t>("window")
                                  .Attr<float>("scale")
                                  .Attr<float>("soft_cap")
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
