// Attention to pages of floats on a CPU: an online softmax over tiles of keys. Each thread takes a kv
// head of some of a row's tokens, with all their queries. Few queries read the pages where they lie;
// for many a tile's keys are turned around, so that scores are sums of vectors.

#include "vectors.h"

#include <vector>

namespace {

// Keys of a tile.
constexpr int64_t kKeys = 64;
// Tokens whose queries go through the tiles together, which are read once for them.
constexpr int64_t kTokens = 64;
// Queries that a loaded number is multiplied by, and vectors whose sums of so many queries fit the
// registers.
constexpr int kQueries = 4;
constexpr int kVectors = kLanes == 8 ? 2 : 4;
// From so many queries on, keys are turned around.
constexpr int64_t kManyQueries = 16;
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
  const int32_t *tables, *lengths, *limits, *starts;
  float *o, *lse;
  int64_t rows, heads, kv_heads, pages, page_size, features, value_features, value_dim;
  int64_t bias_reach, window, chunk;
  float scale, soft_cap;
};

// Tokens [first, end) of a row, counted from its first.
struct Work {
  int64_t row, first, end;
};

// The keys at positions from `start` on, and their values.
struct Tile {
  int64_t start, count;
  const float *keys[kKeys], *values[kKeys];
  float* columns;  // [features, kKeys] of the keys, or null
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
    int64_t reach = call.bias_reach;
    int64_t index = std::clamp(-distance, -reach, reach) + reach;
    score += call.biases[query.head * (2 * reach + 1) + index];
  }
  return score;
}

// Scores of Q queries and V vectors of keys, from the tile's t-th on.
template <int Q, int V>
void ScoreColumns(const Call& call, const Query* queries, const Tile& tile, int64_t t,
                  float (*scores)[kKeys]) {
  Vector sums[Q][V] = {};
  for (int64_t h = 0; h < call.features; ++h) {
    Vector keys[V];
    for (int v = 0; v < V; ++v) keys[v] = Load(tile.columns + h * kKeys + t + v * kLanes);
    for (int i = 0; i < Q; ++i)
      for (int v = 0; v < V; ++v) sums[i][v] = MultiplyAdd(queries[i].q[h], keys[v], sums[i][v]);
  }
  for (int i = 0; i < Q; ++i)
    for (int v = 0; v < V; ++v) Store(scores[i] + t + v * kLanes, sums[i][v] * call.scale);
}

template <int Q>
void ScoreKeys(const Call& call, const Query* queries, const Tile& tile, float (*scores)[kKeys]) {
  if (tile.columns) {
    for (int64_t t = 0; t < tile.count; t += kVectors * kLanes)
      ScoreColumns<Q, kVectors>(call, queries, tile, t, scores);
    return;
  }
  for (int64_t t = 0; t < tile.count; ++t) {
    Vector sums[Q] = {};
    for (int64_t h = 0; h < call.features; h += kLanes)
      for (int i = 0; i < Q; ++i)
        sums[i] = MultiplyAdd(Load(queries[i].q + h), Load(tile.keys[t] + h), sums[i]);
    for (int i = 0; i < Q; ++i) scores[i][t] = Sum(sums[i]) * call.scale;
  }
}

// Makes weights of a query's scores; returns what its result so far is to be multiplied by.
float WeighScores(const Call& call, Query& query, const Tile& tile, float* scores) {
  int64_t first = std::clamp<int64_t>(query.first - tile.start, 0, tile.count);
  int64_t end = std::clamp<int64_t>(query.end - tile.start, first, tile.count);
  if (call.soft_cap > 0 || call.slopes || call.biases)
    for (int64_t t = first; t < end; ++t)
      scores[t] = AdjustScore(call, query, scores[t], tile.start + t);
  std::fill(scores, scores + first, -kInfinity);
  std::fill(scores + end, scores + kKeys, -kInfinity);
  Vector highest = query.top - Vector{};
  for (int64_t t = 0; t < tile.count; t += kLanes) {
    Vector score = Load(scores + t);
    highest = score > highest ? score : highest;
  }
  float top = query.top;
  for (int lane = 0; lane < kLanes; ++lane) top = std::max(top, highest[lane]);
  // No key yet: −inf − −inf is NaN.
  float base = top == -kInfinity ? 0 : top;
  float decay = std::exp(query.top - base);
  Vector total = {};
  for (int64_t t = 0; t < tile.count; t += kLanes) {
    Vector score = Load(scores + t);
    Vector weight = score == -kInfinity ? Vector{} : Exp(score - base);
    Store(scores + t, weight);
    total += weight;
  }
  query.top = top;
  query.total = query.total * decay + Sum(total);
  return decay;
}

// Adds the values' V vectors from the h-th number on.
template <int Q, int V>
void AddValues(const Query* queries, const Tile& tile, const float (*weights)[kKeys],
               const float* decays, int64_t h) {
  Vector sums[Q][V];
  for (int i = 0; i < Q; ++i)
    for (int v = 0; v < V; ++v) sums[i][v] = Load(queries[i].o + h + v * kLanes) * decays[i];
  for (int64_t t = 0; t < tile.count; ++t)
    for (int v = 0; v < V; ++v) {
      Vector values = Load(tile.values[t] + h + v * kLanes);
      for (int i = 0; i < Q; ++i) sums[i][v] = MultiplyAdd(weights[i][t], values, sums[i][v]);
    }
  for (int i = 0; i < Q; ++i)
    for (int v = 0; v < V; ++v) Store(queries[i].o + h + v * kLanes, sums[i][v]);
}

// Adds a tile to the queries' results.
template <int Q>
void AddKeys(const Call& call, Query* queries, const Tile& tile) {
  int64_t first = queries[0].first, end = queries[0].end;
  for (int i = 1; i < Q; ++i)
    first = std::min(first, queries[i].first), end = std::max(end, queries[i].end);
  if (end <= tile.start || first >= tile.start + tile.count) return;
  float weights[Q][kKeys], decays[Q];
  ScoreKeys<Q>(call, queries, tile, weights);
  for (int i = 0; i < Q; ++i) decays[i] = WeighScores(call, queries[i], tile, weights[i]);
  int64_t h = 0;
  for (; h + kVectors * kLanes <= call.value_dim; h += kVectors * kLanes)
    AddValues<Q, kVectors>(queries, tile, weights, decays, h);
  for (; h < call.value_dim; h += kLanes) AddValues<Q, 1>(queries, tile, weights, decays, h);
}

void AttendHead(const Call& call, const Work& work, int64_t kv_head) {
  int64_t group = call.heads / call.kv_heads;
  int64_t num_queries = group * (work.end - work.first);
  int64_t row = work.row;
  int64_t row_queries = call.starts[row + 1] - call.starts[row];
  // The position of the row's first query.
  int64_t begin = call.lengths[row] - row_queries;
  // The keys [first, end) that some query sees.
  int64_t first = call.lengths[row], end = 0;
  auto queries = std::make_unique<Query[]>(num_queries);
  for (int64_t i = 0; i < num_queries; ++i) {
    Query& query = queries[i];
    int64_t index = work.first + i / group;
    int64_t token = call.starts[row] + index;
    query.head = kv_head * group + i % group;
    query.position = begin + index;
    query.end = std::min<int64_t>(query.position + 1, call.limits[row]);
    query.first = call.window ? std::max<int64_t>(0, query.position + 1 - call.window) : 0;
    if (call.chunk)
      query.first = std::max(query.first, query.position - query.position % call.chunk);
    query.q = call.q + (token * call.heads + query.head) * call.features;
    query.o = call.o + (token * call.heads + query.head) * call.value_dim;
    query.lse = call.lse + token * call.heads + query.head;
    query.top = call.sinks && query.position >= 0 ? call.sinks[query.head] : -kInfinity;
    query.total = query.top == -kInfinity ? 0 : 1;
    std::fill_n(query.o, call.value_dim, 0.0f);
    first = std::min(first, query.first);
    end = std::max(end, query.end);
  }
  bool turns = num_queries >= kManyQueries;
  std::unique_ptr<float[]> columns(turns ? new float[call.features * kKeys] : nullptr);
  // Where a tile begins does not depend on which queries are taken together.
  for (int64_t start = first / kKeys * kKeys; start < end; start += kKeys) {
    Tile tile{start, std::min(kKeys, end - start), {}, {}, columns.get()};
    for (int64_t t = 0; t < tile.count; ++t) {
      int64_t key = start + t;
      int64_t page = call.tables[row * call.pages + key / call.page_size];
      int64_t slot = (page * call.kv_heads + kv_head) * call.page_size + key % call.page_size;
      tile.keys[t] = call.keys + slot * call.features;
      tile.values[t] = call.values + slot * call.value_features;
      if (turns)
        for (int64_t h = 0; h < call.features; ++h) columns[h * kKeys + t] = tile.keys[t][h];
    }
    ForEachRows<kQueries>(num_queries,
                          [&](auto Q, int64_t i) { AddKeys<Q>(call, &queries[i], tile); });
  }
  for (int64_t i = 0; i < num_queries; ++i) {
    Query& query = queries[i];
    *query.lse = query.total > 0 ? query.top + std::log(query.total) : -kInfinity;
    float scale = query.total > 0 ? 1 / query.total : 1;
    for (int64_t h = 0; h < call.value_dim; ++h) query.o[h] *= scale;
  }
}

ffi::Error Attend(ffi::ThreadPool pool, FloatBuffer q, FloatBuffer keys, FloatBuffer values,
                  IntegerBuffer tables, IntegerBuffer lengths, IntegerBuffer limits,
                  IntegerBuffer starts, FloatBuffer slopes, FloatBuffer sinks, FloatBuffer biases,
                  int64_t window, int64_t chunk, float scale, float soft_cap, FloatResult o,
                  FloatResult lse) {
  // What a call goes without is an empty array.
  auto optional = [](FloatBuffer& x) { return x.element_count() ? x.typed_data() : nullptr; };
  Call call{};
  call.q = q.typed_data();
  call.keys = keys.typed_data();
  call.values = values.typed_data();
  call.slopes = optional(slopes);
  call.sinks = optional(sinks);
  call.biases = optional(biases);
  call.tables = tables.typed_data();
  call.lengths = lengths.typed_data();
  call.limits = limits.typed_data();
  call.starts = starts.typed_data();
  call.o = o->typed_data();
  call.lse = lse->typed_data();
  call.rows = lengths.dimensions()[0];
  call.heads = q.dimensions()[1];
  call.kv_heads = keys.dimensions()[1];
  call.page_size = keys.dimensions()[2];
  call.features = keys.dimensions()[3];
  call.value_features = values.dimensions()[3];
  call.value_dim = o->dimensions()[2];
  call.pages = tables.dimensions()[1];
  call.bias_reach = call.biases ? biases.dimensions()[1] / 2 : 0;
  call.window = window;
  call.chunk = chunk;
  call.scale = scale;
  call.soft_cap = soft_cap;
  std::vector<Work> works;
  int64_t pairs = 0;
  for (int64_t row = 0; row < call.rows; ++row) {
    int64_t count = call.starts[row + 1] - call.starts[row];
    pairs += call.lengths[row] * std::max<int64_t>(1, count / kQueries);
    for (int64_t first = 0; first < count; first += kTokens)
      works.push_back({row, first, std::min(first + kTokens, count)});
  }
  int64_t threads = CountThreads(pool, pairs * call.kv_heads * call.features);
  ForEachPart(pool, threads, works.size() * call.kv_heads, [call, &works](int64_t part) {
    AttendHead(call, works[part / call.kv_heads], part % call.kv_heads);
  });
  // Tokens of no row.
  int64_t used = call.starts[call.rows] * call.heads;
  std::fill(call.o + used * call.value_dim, call.o + o->element_count(), 0.0f);
  std::fill(call.lse + used, call.lse + lse->element_count(), -kInfinity);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    CpuPagedAttention, Attend,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
        .Arg<FloatBuffer>().Arg<FloatBuffer>().Arg<FloatBuffer>()
        .Arg<IntegerBuffer>().Arg<IntegerBuffer>().Arg<IntegerBuffer>().Arg<IntegerBuffer>()
        .Arg<FloatBuffer>().Arg<FloatBuffer>().Arg<FloatBuffer>()
        .Attr<int64_t>("window").Attr<int64_t>("chunk").Attr<float>("scale")
        .Attr<float>("soft_cap")
        .Ret<FloatBuffer>().Ret<FloatBuffer>());
