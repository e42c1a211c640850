// Row and column log-sum-exp of a similarity matrix that is never stored: the CPU op.
//
// The mathematics. With images I [N, D], texts T [M, D] and a scale s, the logits are
// L = s·I·Tᵀ [N, M], and a contrastive loss needs of them only
//     r_i = log Σ_j exp L_ij        and        c_j = log Σ_i exp L_ij,
// besides the few positives L_ii, which cost O(N·D). Given ∂r and ∂c, the derivative is
//     P_ij = exp(L_ij - r_i)·∂r_i + exp(L_ij - c_j)·∂c_j          (∂loss/∂L)
//     ∂I = s·P·T,      ∂T = s·Pᵀ·I,      ∂s = Σ P_ij·(I·Tᵀ)_ij.
//
// The trade-off. Keeping L from forward to backward costs N·M floats; computing it again costs one
// more matrix product: four (L, L again, ∂I, ∂T) where the stored matrix needs three. Memory
// falls from O(N·M) to O((N + M)·D).
//
// The tiling. Columns are walked in panels of PANEL texts, rows in steps of ROWS images; a tile is ROWS
// x COLS. A tile's logits (64 KiB) stay in a core's L2 cache between the product which writes them and
// the pass which reads them. In the forward pass a sum is carried as a pair (max, Σ exp(· - max)), so
// no finite logit overflows. In the backward pass a tile's P goes at once into ∂T, and the P of a whole
// block [BLOCK, PANEL] (3 MiB, in L3) into ∂I.
//
// The threads take columns of tiles, which own what they add to a column; what they add to the rows
// goes to a table which is merged in column order. Neither the tiles nor the order of any
// addition depends on the number of threads, so the bits do not either.
//
// The matrix products are oneDNN's brgemm, which libtorch_cpu exports: C (+)= A·B on one core, on
// row-major blocks, float32 accumulation for float32 and bfloat16 alike (where oneDNN has no
// kernel, the float32 one falls back to the BLAS). Called inside the threads, it needs no barrier
// between product and pass. It takes no transposes, so panels are packed: Tᵀ for the logits, Iᵀ for
// ∂Tᵀ = Iᵀ·P; and for bfloat16 it wants B with pairs of rows interleaved, [K/2, n, 2].

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <atomic>
#include <numeric>

#include "similarity_logsumexp.h"

namespace similarity {

using Vec = at::vec::Vectorized<float>;
constexpr int64_t PANEL = 1536, BLOCK = 512, ROWS = 256, COLS = 64;
constexpr int64_t LD = PANEL + 32;  // a row stride that is no power of two: rows spread over the cache's sets
constexpr int64_t V = COLS / Vec::size();
constexpr float INF = std::numeric_limits<float>::infinity();

// How many rows of B brgemm wants side by side.
template <class T> constexpr int64_t PAIR = 4 / sizeof(T);

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// [..., n, D], zeros appended up to the given size.
Tensor pad(const Tensor& x, int64_t rows, int64_t cols) {
  if (x.size(-2) == rows && x.size(-1) == cols) return x.contiguous();
  return at::constant_pad_nd(x, {0, cols - x.size(-1), 0, rows - x.size(-2)});
}

// [K, n] -> [K/PAIR, n, PAIR]
template <class T> Tensor interleave(const Tensor& x) {
  return x.view({-1, PAIR<T>, x.size(1)}).transpose(1, 2).contiguous();
}

// [n·height, w] -> the transposes of its n blocks, [n, w, height]
template <class T> Tensor transpose_blocks(const Tensor& x, int64_t height) {
  constexpr int64_t SIDE = 32;
  int64_t n = x.size(0) / height, w = x.size(1);
  Tensor out = at::empty({n, w, height}, x.options());
  const T* from = x.const_data_ptr<T>();
  T* to = out.data_ptr<T>();
  at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; block++)
      for (int64_t r = 0; r < height; r += SIDE)
        for (int64_t c = 0; c < w; c += SIDE)
          at::vec::transpose_mxn<T>(from + (block * height + r) * w + c, w, to + (block * w + c) * height + r, height,
                                    std::min(SIDE, height - r), std::min(SIDE, w - c));
  });
  return out;
}

// [n, D] -> the transposes of its tiles with pairs interleaved, [n/COLS, D/PAIR, COLS, PAIR]: a pair
// is 32 bits for either dtype, so it moves as one float.
Tensor transposed_tiles(const Tensor& x) { return transpose_blocks<float>(x.view(at::kFloat), COLS); }

template <class T>
void multiply(int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb, float* c,
              int64_t ldc, bool add) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, /*is_vnni=*/PAIR<T> == 2);
}

// Runs task(0, tile) ... task(count - 1, tile), each on the thread that is free next, with a buffer of
// that thread. The matrix unit (AMX), which brgemm leaves configured, is released at the end.
template <class T, class F> void parallel(int64_t count, F task) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(at::get_num_threads(), count), 1, [&](int64_t, int64_t) {
    alignas(64) static thread_local float tile[ROWS * COLS];
    for (int64_t t; (t = next++) < count;) task(t, tile);
    if (PAIR<T> == 2) at::native::cpublas::brgemm_release();
  });
}

// All numbers of a vector combined, in an order that is always the same.
template <class F> float reduce(F combine, Vec x) { return at::vec::vec_reduce_all<float>(combine, x); }

// Two vectors of P, to a row of the matrix in the dtype of the next product.
inline void store(float* to, Vec a, Vec b) { a.store(to), b.store(to + Vec::size()); }
inline void store(at::BFloat16* to, Vec a, Vec b) { at::vec::convert_from_float<at::BFloat16>(a, b).store(to); }

// A sum of exponentials is carried as (max, sum), which means sum·exp(max); nothing yet is (-inf, 0).
// Merges `count` pairs, `stride` apart, into the pairs at max and sum: as many as a vector holds.
void merge(float* max, float* sum, const float* maxes, const float* sums, int64_t count, int64_t stride) {
  Vec top = Vec::loadu(max);
  for (int64_t t = 0; t < count; t++) top = at::vec::maximum(top, Vec::loadu(maxes + t * stride));
  Vec add = Vec::loadu(sum) * (Vec::loadu(max) - top).exp();
  for (int64_t t = 0; t < count; t++)
    add = at::vec::fmadd(Vec::loadu(sums + t * stride), (Vec::loadu(maxes + t * stride) - top).exp(), add);
  top.store(max);
  add.store(sum);
}

// A panel of texts: where it starts, and the vector added to the logits of its last tile, which
// takes the columns beyond the panel's last text out of every sum.
struct Panel {
  int64_t start, size, tiles;
  alignas(64) float last[COLS];
  alignas(64) float inner[COLS] = {};
  Panel(int64_t start, int64_t texts)
      : start(start), size(std::min(PANEL, texts - start)), tiles((size + COLS - 1) / COLS) {
    for (int64_t c = 0; c < COLS; c++) last[c] = (tiles - 1) * COLS + c < size ? 0 : -INF;
  }
  const float* offset(int64_t tile) const { return tile == tiles - 1 ? last : inner; }
};

// One tile of the forward pass: its logits in place of its products; the (max, sum) of each of its
// rows set, of each of its columns merged.
void tile_logsumexp(float* x, int64_t rows, float scale, const float* offset, float* row_max, float* row_sum,
                    float* col_max, float* col_sum) {
  Vec col_top[V], col_add[V];
  for (int64_t v = 0; v < V; v++) col_top[v] = Vec(-INF), col_add[v] = Vec(0);
  for (int64_t r = 0; r < rows; r++) {
    Vec top(-INF);
    for (int64_t v = 0; v < V; v++) {
      float* at = x + r * COLS + v * Vec::size();
      Vec logit = at::vec::fmadd(Vec::loadu(at), Vec(scale), Vec::loadu(offset + v * Vec::size()));
      logit.store(at);
      top = at::vec::maximum(top, logit);
      col_top[v] = at::vec::maximum(col_top[v], logit);
    }
    if (row_max) row_max[r] = reduce([](Vec a, Vec b) { return at::vec::maximum(a, b); }, top);
  }
  for (int64_t r = 0; r < rows; r++) {
    Vec add(0);
    for (int64_t v = 0; v < V; v++) {
      Vec logit = Vec::loadu(x + r * COLS + v * Vec::size());
      if (row_max) add = add + (logit - Vec(row_max[r])).exp();
      if (col_max) col_add[v] = col_add[v] + (logit - col_top[v]).exp();
    }
    if (row_max) row_sum[r] = reduce([](Vec a, Vec b) { return a + b; }, add);
  }
  if (!col_max) return;
  alignas(64) float top[COLS], add[COLS];
  for (int64_t v = 0; v < V; v++) {
    col_top[v].store(top + v * Vec::size());
    col_add[v].store(add + v * Vec::size());
  }
  for (int64_t c = 0; c < COLS; c += Vec::size()) merge(col_max + c, col_sum + c, top + c, add + c, 1, 0);
}

// What the backward pass reads of one side: its log-sum-exp and the gradient of it; both null where
// the loss did not use that output.
struct Side {
  const float *lse = nullptr, *grad = nullptr;
  Side from(int64_t i) const { return grad ? Side{lse + i, grad + i} : Side{}; }
};

// One tile of the backward pass: s·P from its products, row by row; returns Σ P·(I·Tᵀ).
template <class T>
double tile_weights(const float* x, int64_t rows, float scale, const float* offset, Side row, Side col, T* weights) {
  double total = 0;
  for (int64_t r = 0; r < rows; r++) {
    Vec add(0);
    for (int64_t v = 0; v < V; v += 2) {
      Vec p[2];
      for (int64_t h = 0; h < 2; h++) {
        int64_t c = (v + h) * Vec::size();
        Vec product = Vec::loadu(x + r * COLS + c);
        Vec logit = at::vec::fmadd(product, Vec(scale), Vec::loadu(offset + c));
        p[h] = Vec(0);
        if (row.grad) p[h] = (logit - Vec(row.lse[r])).exp() * Vec(row.grad[r]);
        if (col.grad) p[h] = p[h] + (logit - Vec::loadu(col.lse + c)).exp() * Vec::loadu(col.grad + c);
        add = at::vec::fmadd(p[h], product, add);
        p[h] = p[h] * Vec(scale);
      }
      store(weights + r * LD + v * Vec::size(), p[0], p[1]);
    }
    total += reduce([](Vec a, Vec b) { return a + b; }, add);
  }
  return total;
}

// [rows, COLS] of stride LD -> [rows/2, COLS, 2]; an odd last row is paired with zeros.
void interleave_rows(const at::BFloat16* x, int64_t rows, at::BFloat16* out) {
  static const at::BFloat16 zeros[COLS] = {};
  for (int64_t r = 0; r < rows; r += 2) {
    const at::BFloat16 *first = x + r * LD, *second = r + 1 < rows ? first + LD : zeros;
    for (int64_t c = 0; c < COLS; c++) {
      uint32_t pair = first[c].x | uint32_t(second[c].x) << 16;
      std::memcpy(out + (r * COLS + 2 * c), &pair, 4);
    }
  }
}

// One group: image [N, D], text [M, D], padded to PAIR columns. A null output costs nothing.
template <class T>
void forward_group(const Tensor& image, const Tensor& text, float scale, float* rows_out, float* cols_out) {
  int64_t N = image.size(0), M = text.size(0), D = image.size(1);
  int64_t most_tiles = round_up(std::min(PANEL, M), COLS) / COLS;
  int64_t height = round_up(N, Vec::size());
  Tensor row_pairs = at::zeros({2, most_tiles, height}, at::kFloat);
  float *tile_max = row_pairs.data_ptr<float>(), *tile_sum = tile_max + most_tiles * height;
  std::vector<float> row_max(height, -INF), row_sum(height, 0);
  const T* images = image.const_data_ptr<T>();

  for (int64_t j = 0; j < M; j += PANEL) {
    Panel panel(j, M);
    Tensor packed = transposed_tiles(pad(text.narrow(0, j, panel.size), panel.tiles * COLS, D));
    const T* texts = static_cast<const T*>(packed.const_data_ptr());
    std::vector<float> col_max(panel.tiles * COLS, -INF), col_sum(panel.tiles * COLS, 0);
    parallel<T>(panel.tiles, [&](int64_t t, float* x) {
      for (int64_t i = 0; i < N; i += ROWS) {
        int64_t rows = std::min(ROWS, N - i);
        multiply<T>(rows, COLS, D, images + i * D, D, texts + t * D * COLS, COLS, x, COLS, false);
        tile_logsumexp(x, rows, scale, panel.offset(t),
                       rows_out ? tile_max + t * height + i : nullptr, tile_sum + t * height + i,
                       cols_out ? col_max.data() + t * COLS : nullptr, col_sum.data() + t * COLS);
      }
    });
    if (rows_out)
      for (int64_t i = 0; i < height; i += Vec::size())
        merge(&row_max[i], &row_sum[i], tile_max + i, tile_sum + i, panel.tiles, height);
    if (cols_out)
      for (int64_t c = 0; c < panel.size; c++) cols_out[j + c] = col_max[c] + std::log(col_sum[c]);
  }
  if (rows_out)
    for (int64_t i = 0; i < N; i++) rows_out[i] = row_max[i] + std::log(row_sum[i]);
}

// One group's share of the gradients, added: to d_image [N, D] and d_text [M, D] (float32, undefined
// where not needed). Returns its share of the scale's.
template <class T>
double backward_group(const Tensor& image, const Tensor& text, float scale, Side row, Side col, Tensor d_image,
                      Tensor d_text) {
  int64_t N = image.size(0), M = text.size(0), D = image.size(1);
  int64_t most_tiles = round_up(std::min(PANEL, M), COLS) / COLS;
  Tensor weights = at::empty({std::min(BLOCK, N), LD}, image.options());  // s·P of a block ...
  Tensor weight_pairs;                                                    // ... and for bfloat16 its tiles, interleaved
  if (PAIR<T> == 2) weight_pairs = at::empty({most_tiles, ROWS, COLS}, image.options());
  Tensor d_panel;  // ∂Tᵀ of the panel
  if (d_text.defined()) d_panel = at::empty({most_tiles, D, COLS}, at::kFloat);
  const T* images = image.const_data_ptr<T>();
  std::vector<double> d_scale(most_tiles, 0);

  for (int64_t j = 0; j < M; j += PANEL) {
    Panel panel(j, M);
    Tensor padded = pad(text.narrow(0, j, panel.size), panel.tiles * COLS, D);
    Tensor packed = transposed_tiles(padded), pairs = interleave<T>(padded);
    const T *texts = static_cast<const T*>(packed.const_data_ptr()), *text_pairs = pairs.const_data_ptr<T>();
    std::vector<float> col_lse(panel.tiles * COLS, 0), col_grad(panel.tiles * COLS, 0);
    if (col.grad) {
      std::copy_n(col.lse + j, panel.size, col_lse.data());
      std::copy_n(col.grad + j, panel.size, col_grad.data());
    }
    if (d_text.defined()) d_panel.zero_();
    for (int64_t block = 0; block < N; block += BLOCK) {
      int64_t block_end = std::min(block + BLOCK, N);
      Tensor transposed;  // Iᵀ, ROWS at a time
      if (d_text.defined()) {
        int64_t height = block_end - block;
        transposed = transpose_blocks<T>(pad(image.narrow(0, block, height), round_up(height, ROWS), D), ROWS);
      }
      parallel<T>(panel.tiles, [&](int64_t t, float* x) {
        Side tile_col = col.grad ? Side{&col_lse[t * COLS], &col_grad[t * COLS]} : Side{};
        for (int64_t i = block; i < block_end; i += ROWS) {
          int64_t rows = std::min(ROWS, block_end - i);
          T *p = weights.data_ptr<T>() + (i - block) * LD + t * COLS, *b = p;
          multiply<T>(rows, COLS, D, images + i * D, D, texts + t * D * COLS, COLS, x, COLS, false);
          d_scale[t] += tile_weights<T>(x, rows, scale, panel.offset(t), row.from(i), tile_col, p);
          if (!d_text.defined()) continue;
          if constexpr (PAIR<T> == 2) interleave_rows(p, rows, b = weight_pairs.data_ptr<T>() + t * ROWS * COLS);
          multiply<T>(D, COLS, round_up(rows, PAIR<T>), transposed.const_data_ptr<T>() + (i - block) * D, ROWS,
                      b, PAIR<T> == 2 ? COLS : LD, d_panel.data_ptr<float>() + t * D * COLS, COLS, true);
        }
      });
      if (!d_image.defined()) continue;
      constexpr int64_t high = 64, wide = 128, deep = 512;
      int64_t across = (D + wide - 1) / wide, down = (block_end - block + high - 1) / high;
      int64_t width = panel.tiles * COLS;
      parallel<T>(across * down, [&](int64_t task, float*) {
        int64_t d = task % across * wide, r = task / across * high;
        for (int64_t c = 0; c < width; c += deep)
          multiply<T>(std::min(high, block_end - block - r), std::min(wide, D - d), std::min(deep, width - c),
                      weights.data_ptr<T>() + r * LD + c, LD, text_pairs + c * D + d * PAIR<T>, D,
                      d_image.data_ptr<float>() + (block + r) * D + d, D, true);
      });
    }
    if (d_text.defined())
      for (int64_t t = 0; t < panel.tiles; t++) {
        int64_t texts_left = std::min(COLS, panel.size - t * COLS);
        Tensor d_tile = transpose_blocks<float>(d_panel[t], D)[0];
        d_text.narrow(0, j + t * COLS, texts_left).add_(d_tile.narrow(0, 0, texts_left));
      }
  }
  return std::accumulate(d_scale.begin(), d_scale.end(), 0.0);
}

// Whether brgemm has bfloat16 instructions to use; without them bfloat16 is computed as float32.
bool has_bfloat16() {
#if defined(__x86_64__) && defined(__GNUC__)
  return __builtin_cpu_supports("avx512bf16") && at::globalContext().userEnabledMkldnn();
#else
  return false;
#endif
}

template <class F> auto with_dtype(const Tensor& image, F run) {
  return image.scalar_type() == at::kBFloat16 && has_bfloat16() ? run(at::BFloat16()) : run(float());
}

// [(G,) n, D], contiguous, in dtype T, its width padded to a positive multiple of PAIR.
template <class T> Tensor prepare(const Tensor& x) {
  int64_t width = std::max(round_up(x.size(-1), PAIR<T>), PAIR<T>);
  return pad(x.to(c10::CppTypeToScalarType<T>::value), x.size(-2), width);
}

std::tuple<Tensor, Tensor> logsumexp(const Tensor& image, const Tensor& text, const Tensor& scale, bool rows,
                                     bool cols) {
  Shape shape = check(image, text, scale);
  Tensor per_image = at::empty(rows ? shape.rows() : std::vector<int64_t>{0}, at::kFloat);
  Tensor per_text = at::empty(cols ? shape.cols() : std::vector<int64_t>{0}, at::kFloat);
  with_dtype(image, [&](auto zero) {
    using T = decltype(zero);
    Tensor images = prepare<T>(image), texts = prepare<T>(text);
    for (int64_t g = 0; g < shape.G; g++)
      forward_group<T>(of_group(images, g), of_group(texts, g), scale.item<float>(),
                       rows ? per_image.data_ptr<float>() + g * shape.N : nullptr,
                       cols ? per_text.data_ptr<float>() + g * shape.M : nullptr);
  });
  return {per_image, per_text};
}

std::tuple<Tensor, Tensor, Tensor> logsumexp_backward(
    const std::optional<Tensor>& d_per_image, const std::optional<Tensor>& d_per_text, const Tensor& image,
    const Tensor& text, const Tensor& scale, const Tensor& per_image, const Tensor& per_text, bool needs_image,
    bool needs_text) {
  Shape shape = check(image, text, scale);
  Tensor d_image, d_text;
  double d_scale = 0;
  with_dtype(image, [&](auto zero) {
    using T = decltype(zero);
    Tensor images = prepare<T>(image), texts = prepare<T>(text);
    if (needs_image) d_image = at::zeros(images.sizes(), at::kFloat);
    if (needs_text) d_text = at::zeros(texts.sizes(), at::kFloat);
    Tensor d_rows, d_cols;
    if (d_per_image) d_rows = d_per_image->contiguous();
    if (d_per_text) d_cols = d_per_text->contiguous();
    Side rows, cols;
    if (d_rows.defined()) rows = {per_image.const_data_ptr<float>(), d_rows.const_data_ptr<float>()};
    if (d_cols.defined()) cols = {per_text.const_data_ptr<float>(), d_cols.const_data_ptr<float>()};
    for (int64_t g = 0; g < shape.G; g++)
      d_scale += backward_group<T>(of_group(images, g), of_group(texts, g), scale.item<float>(),
                                   rows.from(g * shape.N), cols.from(g * shape.M),
                                   needs_image ? of_group(d_image, g) : Tensor(),
                                   needs_text ? of_group(d_text, g) : Tensor());
  });
  auto finish = [&](const Tensor& grad) {
    if (!grad.defined()) return at::empty({0}, image.options());
    return grad.narrow(-1, 0, shape.D).to(image.scalar_type()).contiguous();
  };
  return {finish(d_image), finish(d_text), at::scalar_tensor(d_scale, scale.options())};
}

}  // namespace similarity

TORCH_LIBRARY(similarity, m) {
  m.def("logsumexp(Tensor image, Tensor text, Tensor logit_scale, bool rows, bool cols) -> (Tensor, Tensor)");
  m.def(
      "logsumexp_backward(Tensor? d_per_image, Tensor? d_per_text, Tensor image, Tensor text, Tensor logit_scale, "
      "Tensor per_image, Tensor per_text, bool needs_image, bool needs_text) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(similarity, CPU, m) {
  m.impl("logsumexp", similarity::logsumexp);
  m.impl("logsumexp_backward", similarity::logsumexp_backward);
}
