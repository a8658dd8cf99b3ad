// decoder_layer on CPU: a whole layer of the Llama family for one new token a row.
//
// As modules of torch the same takes some 90 small operators a layer, most of whose time is the call
// (SmolLM2-135M: 15 to 20 ms a token). Here they are loops between the products of thin_linear.h.
#include "thin_linear.h"

namespace rlhf_fast {
namespace {

// out[r] = x[r] / sqrt(mean(x[r]^2) + epsilon) * weight
RLHF_INLINE void normalise_rows(const float* x, const float* weight, float epsilon, int64_t rows,
                                int64_t size, float* out) {
  for (int64_t r = 0; r < rows; ++r, x += size, out += size) {
    Floats squares = {};
    for (int64_t i = 0; i < size; i += kFloats) {
      const Floats v = load_some(x + i, size - i, 0.0f);
      squares += v * v;
    }
    const float scale = 1.0 / std::sqrt(sum(squares) / size + epsilon);
    for (int64_t i = 0; i < size; ++i) out[i] = weight[i] * (x[i] * scale);
  }
}
void normalise(const float* x, const float* weight, float epsilon, int64_t rows, int64_t size,
               float* out) {
  RLHF_ON_THIS_CPU(normalise_rows(x, weight, epsilon, rows, size, out));
}

// gate = silu(gate) * up
RLHF_INLINE void gate_all(float* gate, const float* up, int64_t size) {
  for (int64_t i = 0; i < size; i += kFloats) {
    const Floats g = load_some(gate + i, size - i, 0.0f), u = load_some(up + i, size - i, 0.0f);
    const Floats e = exp(clamp(-g, Floats{} - 88.0f, Floats{} + 88.0f));  // what exp is made for
    store_some(gate + i, g / (1.0f + e) * u, size - i);
  }
}
void gated(float* gate, const float* up, int64_t size) {
  RLHF_ON_THIS_CPU(gate_all(gate, up, size));
}

// x + y, in x
void add_to(std::vector<float>& x, const std::vector<float>& y) {
  for (size_t i = 0; i < x.size(); ++i) x[i] += y[i];
}

struct Attention {
  float *queries, *keys, *values;  // of the new tokens: [rows, heads or kv_heads, size]
  const float *cos, *sin;          // [rows, size]
  const uint8_t* mask;                // [rows, tokens], True = attend; the new token is the last
  float *cached_keys, *cached_values;  // [rows, kv_heads, room, size]
  float* out;                          // [rows, heads, size]
  int64_t heads, kv_heads, size, tokens, room;
  float scaling;
};

// x * cos + (-second half, first half of x) * sin
RLHF_INLINE void rotate(float* x, const float* cos, const float* sin, int64_t size) {
  const int64_t half = size / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[i], b = x[half + i];
    x[i] = a * cos[i] - b * sin[i];
    x[half + i] = b * cos[half + i] + a * sin[half + i];
  }
}

RLHF_INLINE float dot(const float* a, const float* b, int64_t size) {
  Floats total = {};
  for (int64_t i = 0; i < size; i += kFloats) {
    total += load_some(a + i, size - i, 0.0f) * load_some(b + i, size - i, 0.0f);
  }
  return sum(total);
}

// Units are the key-value heads of all rows: each takes its new token into the cache, then answers
// the query heads that share it.
RLHF_INLINE void attend_units(const Attention& a, int64_t begin, int64_t end) {
  std::vector<float> weights(a.tokens);
  const int64_t share = a.heads / a.kv_heads;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t row = unit / a.kv_heads;
    const float *cos = a.cos + row * a.size, *sin = a.sin + row * a.size;
    const uint8_t* mask = a.mask + row * a.tokens;
    float* keys = a.cached_keys + unit * a.room * a.size;
    float* values = a.cached_values + unit * a.room * a.size;
    float* key = a.keys + unit * a.size;
    rotate(key, cos, sin, a.size);
    std::copy_n(key, a.size, keys + (a.tokens - 1) * a.size);
    std::copy_n(a.values + unit * a.size, a.size, values + (a.tokens - 1) * a.size);
    for (int64_t head = unit * share; head < (unit + 1) * share; ++head) {
      float *query = a.queries + head * a.size, *out = a.out + head * a.size;
      rotate(query, cos, sin, a.size);
      float most = -std::numeric_limits<float>::infinity();
      for (int64_t t = 0; t < a.tokens; ++t) {
        if (!mask[t]) continue;  // padding may hold anything, and costs nothing
        weights[t] = dot(query, keys + t * a.size, a.size) * a.scaling;
        most = std::max(most, weights[t]);
      }
      float total = 0;
      std::fill_n(out, a.size, 0.0f);
      for (int64_t t = 0; t < a.tokens; ++t) {
        if (!mask[t]) continue;
        const float weight = std::exp(weights[t] - most);
        total += weight;
        for (int64_t i = 0; i < a.size; ++i) out[i] += weight * values[t * a.size + i];
      }
      for (int64_t i = 0; i < a.size; ++i) out[i] /= total;
    }
  }
}
void attend(const Attention* a, int64_t begin, int64_t end) {
  RLHF_ON_THIS_CPU(attend_units(*a, begin, end));
}

// hidden [B, H]; weights: norm [H], q [heads D, H], k and v [KV D, H], o [H, heads D], norm [H],
// gate and up [inner, H], down [H, inner]; biases: [out] or none for each; cached_keys and
// cached_values [B, KV, room, D], written at t - 1; mask [B, t] bool; cos, sin [B, D] -> [B, H].
Tensor decoder_layer(const Tensor& hidden, std::vector<Tensor> weights,
                     std::vector<MaybeTensor> biases, const Tensor& cached_keys,
                     const Tensor& cached_values, const Tensor& mask, const Tensor& cos,
                     const Tensor& sin, double attention_epsilon, double mlp_epsilon,
                     double scaling) {
  const int64_t rows = hidden.size(0), width = hidden.size(1);
  const int64_t kv_heads = cached_keys.size(1), size = cached_keys.size(3);
  const int64_t heads = weights[1].size(0) / size, inner = weights[6].size(0);
  STD_TORCH_CHECK(weights[1].size(1) == width && heads % kv_heads == 0 &&
                      weights[2].size(0) == kv_heads * size && cos.size(0) == rows &&
                      cos.size(1) == size && mask.size(0) == rows &&
                      mask.size(1) <= cached_keys.size(2) && cached_keys.size(0) == rows,
                  "decoder_layer: the heads of the weights, cache, mask and angles do not fit");
  for (const Tensor& t : {hidden, mask, cos, sin, cached_keys, cached_values}) {
    STD_TORCH_CHECK(t.is_contiguous(), "decoder_layer: expected contiguous tensors");
  }
  const auto product = [&](int64_t index, std::vector<float>& out) {
    const int64_t outputs = weights[index].size(0);
    out.resize(rows * outputs);
    return Product{data<float>(weights[index]), data<float>(biases[index]), outputs, out.data()};
  };
  const float* from = data<float>(hidden);
  std::vector<float> x(from, from + rows * width), normed(rows * width), y;

  std::vector<float> q, k, v, context(rows * heads * size);
  normalise(x.data(), data<float>(weights[0]), attention_epsilon, rows, width, normed.data());
  thin_products(normed.data(), rows, width, {product(1, q), product(2, k), product(3, v)});
  const Attention attention{q.data(), k.data(), v.data(), data<float>(cos), data<float>(sin),
                            bits(mask), mutable_data<float>(cached_keys),
                            mutable_data<float>(cached_values), context.data(), heads, kv_heads,
                            size, mask.size(1), cached_keys.size(2), static_cast<float>(scaling)};
  parallel_rows(rows * kv_heads, 2 * heads / kv_heads * size * mask.size(1),
                [&](int64_t begin, int64_t end) { attend(&attention, begin, end); });
  thin_products(context.data(), rows, heads * size, {product(4, y)});
  add_to(x, y);

  std::vector<float> gate, up;
  normalise(x.data(), data<float>(weights[5]), mlp_epsilon, rows, width, normed.data());
  thin_products(normed.data(), rows, width, {product(6, gate), product(7, up)});
  gated(gate.data(), up.data(), rows * inner);
  thin_products(gate.data(), rows, inner, {product(8, y)});
  add_to(x, y);

  Tensor out = new_tensor({rows, width}, hidden.scalar_type());
  std::copy(x.begin(), x.end(), mutable_data<float>(out));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlhf_fast, CPU, m) { m.impl("decoder_layer", TORCH_BOX(&decoder_layer)); }

}  // namespace rlhf_fast
