// Row and column log-sum-exp of a similarity matrix that is never stored: the CPU op.
//
// The mathematics. With images I [N, D], texts T [M, D] and a scale s, the logits are L = s·I·Tᵀ [N, M].
// A contrastive loss needs of them only
//     r_i = log Σ_j exp L_ij        and        c_j = log Σ_i exp L_ij,
// besides the few positives L_ii, which cost O(N·D). Given ∂r and ∂c, the derivative is
//     P_ij = exp(L_ij - r_i)·∂r_i + exp(L_ij - c_j)·∂c_j          (∂loss/∂L)
//     ∂I = s·P·T,      ∂T = s·Pᵀ·I,      ∂s = Σ P_ij·(I·Tᵀ)_ij.
//
// The trade-off. Keeping L from forward to backward costs N·M floats; computing it again costs one more
// matrix product: four (L, L again, ∂I, ∂T) for three. Memory falls from O(N·M) to O((N + M)·D).
//
// The tiling. A block is ROWS images by PANEL texts, a tile ROWS images by COLS texts. A tile's logits
// (64 KiB) stay in a core's L2 cache between the product that writes them and the pass that reads them. In
// the backward pass a tile's P goes at once into ∂T, and the P of a block (1.5 MiB, in L3) into ∂I.
// The threads share the tiles of a block. A tile owns its columns' sums; its rows' sums go to a table that
// is merged in column order, so no bit depends on the number of threads.
//
// The matrix products are oneDNN's brgemm, which libtorch_cpu exports: C (+)= A·B on one core, row-major,
// summed in float32 (the BLAS does it where oneDNN has no kernel). Called inside the threads, it needs no
// barrier between product and pass. It takes no transposes, so tiles of Tᵀ and Pᵀ are written out.

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/native/CPUBlas.h>
#include <atomic>

#include "similarity_logsumexp.h"

namespace {

using Vec = at::vec::Vectorized<float>;
constexpr int64_t PANEL = 1536, ROWS = 256, COLS = 64;
constexpr int64_t LD = PANEL + 32;  // a row stride that is no power of two: rows spread over the cache's sets
template <class T> constexpr int64_t PAIR = 4 / sizeof(T);  // rows of B side by side: [K/2, n, 2] of bfloat16

// brgemm(m, n, k, lda, ldb, ldc, add, a, b, c): c [m, n] (+)= a [m, k]·b [k, n], of these row strides
using at::native::cpublas::brgemm;

// [rows, cols] -> [cols, rows]
template <class T>
void transpose(const T* from, int64_t ld_from, T* to, int64_t ld_to, int64_t rows, int64_t cols) {
  constexpr int64_t SIDE = 32;
  for (int64_t r = 0; r < rows; r += SIDE)
    for (int64_t c = 0; c < cols; c += SIDE)
      at::vec::transpose_mxn<T>(from + r * ld_from + c, ld_from, to + c * ld_to + r, ld_to,
                                std::min(SIDE, rows - r), std::min(SIDE, cols - c));
}

// [(G,) n, D] -> [(G,) n/PAIR, D, PAIR], under the old sizes
template <class T> Tensor interleave(const Tensor& x) {
  return x.unflatten(-2, {-1, PAIR<T>}).transpose(-1, -2).contiguous().view(x.sizes());
}

// Runs task(0) ... task(count - 1), each on the thread that is free next; then releases brgemm's AMX unit.
template <class T, class F> void parallel(int64_t count, F task) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(at::get_num_threads(), count), 1, [&](int64_t, int64_t) {
    for (int64_t t = next++; t < count; t = next++) task(t);
    if (PAIR<T> == 2) at::native::cpublas::brgemm_release();
  });
}

// Calls on_tile(tile, products, offset) for every tile of a block, on any thread, then after_block(block).
// `offset` [COLS] is added to a row of logits: its -inf takes the padding out of every sum.
template <class T, class F, class B> void for_tiles(const Inputs& x, F on_tile, B after_block) {
  int64_t D = x.images.size(-1), M = x.texts.size(-2);
  std::vector<float> offset(M, -INF);
  std::fill_n(offset.begin(), x.M, 0);
  Tensor packed = at::empty({PANEL / COLS, D * COLS}, x.images.options());  // Tᵀ: [D/PAIR, COLS, PAIR] a tile
  for (int64_t g = 0; g < x.G; g++)
    for (int64_t j = 0; j < M; j += PANEL) {
      int64_t cols = std::min(PANEL, M - j);
      for (int64_t i = 0; i < x.N; i += ROWS) {
        int64_t rows = std::min(ROWS, x.N - i);
        parallel<T>(cols / COLS, [&](int64_t t) {
          alignas(64) static thread_local float products[ROWS * COLS];
          Part tile{g, i, rows, j + t * COLS, COLS};
          T *text = row_of<T>(x.texts, g, tile.j), *transposed = row_of<T>(packed, 0, t);
          if (i == 0)  // a pair moves as one float: it is 32 bits for either dtype
            transpose((const float*)text, D / PAIR<T>, (float*)transposed, COLS, COLS, D / PAIR<T>);
          brgemm(rows, COLS, D, D, COLS, COLS, false, row_of<T>(x.images, g, i), transposed, products);
          on_tile(tile, products, &offset[tile.j]);
        });
        after_block(Part{g, i, rows, j, cols});
      }
    }
}

// Merges a vector of (max, sum) pairs into those at `max` and `sum`.
void merge(float* max, float* sum, Vec new_max, Vec new_sum) {
  Vec old = Vec::loadu(max), top = at::vec::maximum(old, new_max);
  Vec rescaled = Vec::loadu(sum) * (old - top).exp();
  at::vec::fmadd(new_sum, (new_max - top).exp(), rescaled).store(sum);
  top.store(max);
}

// One tile of the forward pass: logits replace its products; its rows' sums are set, its columns' merged.
void tile_logsumexp(float* x, int64_t rows, float scale, const float* offset, Sums row, Sums col) {
  constexpr int64_t W = Vec::size();
  auto larger = [](Vec a, Vec b) { return at::vec::maximum(a, b); };
  Vec col_max[COLS / W], col_sum[COLS / W];
  std::fill_n(col_max, COLS / W, Vec(-INF));
  std::fill_n(col_sum, COLS / W, Vec(0));
  for (int64_t r = 0; r < rows; r++) {
    Vec max(-INF);
    for (int64_t c = 0; c < COLS; c += W) {
      Vec logit = at::vec::fmadd(Vec::loadu(x + r * COLS + c), Vec(scale), Vec::loadu(offset + c));
      logit.store(x + r * COLS + c);
      max = at::vec::maximum(max, logit);
      col_max[c / W] = at::vec::maximum(col_max[c / W], logit);
    }
    if (row.max) row.max[r] = at::vec::vec_reduce_all<float>(larger, max);
  }
  for (int64_t r = 0; r < rows; r++) {
    Vec sum(0);
    for (int64_t c = 0; c < COLS; c += W) {
      Vec logit = Vec::loadu(x + r * COLS + c);
      if (row.max) sum = sum + (logit - Vec(row.max[r])).exp();
      if (col.max) col_sum[c / W] = col_sum[c / W] + (logit - col_max[c / W]).exp();
    }
    if (row.max) row.sum[r] = at::vec::vec_reduce_all<float>(std::plus<>(), sum);
  }
  if (!col.max) return;
  for (int64_t c = 0; c < COLS; c += W) merge(col.max + c, col.sum + c, col_max[c / W], col_sum[c / W]);
}

// One tile of the backward pass: s·P, from its products x, goes `to`; returns Σ P·(I·Tᵀ).
template <class T>
double tile_weights(const float* x, int64_t rows, float s, const float* offset, Side row, Side col, T* to) {
  double total = 0;
  for (int64_t r = 0; r < rows; r++) {
    alignas(64) float weight[COLS];
    Vec add(0);
    for (int64_t c = 0; c < COLS; c += Vec::size()) {
      Vec p(0), product = Vec::loadu(x + r * COLS + c);
      Vec logit = at::vec::fmadd(product, Vec(s), Vec::loadu(offset + c));
      if (row.grad) p = (logit - Vec(row.lse[r])).exp() * Vec(row.grad[r]);
      if (col.grad) p = p + (logit - Vec::loadu(col.lse + c)).exp() * Vec::loadu(col.grad + c);
      add = at::vec::fmadd(p, product, add);
      (p * Vec(s)).store(weight + c);
    }
    at::vec::convert(weight, to + r * LD, COLS);
    total += at::vec::vec_reduce_all<float>(std::plus<>(), add);
  }
  return total;
}

template <class T> void forward(const Inputs& x, const Tensor& rows, const Tensor& cols) {
  float scale = x.scale.item<float>();
  Tensor tile_sums;  // of the rows, in each tile of a block
  if (rows.defined()) tile_sums = empty_sums(PANEL / COLS, ROWS, x.scale);
  auto on_tile = [&](const Part& tile, float* products, const float* offset) {
    Sums row = pairs_at<Sums>(tile_sums, tile.j % PANEL / COLS, 0);
    tile_logsumexp(products, tile.rows, scale, offset, row, pairs_at<Sums>(cols, tile.g, tile.j));
  };
  auto after_block = [&](const Part& block) {
    if (!rows.defined()) return;
    for (int64_t t = 0; t < block.cols / COLS; t++)
      for (int64_t r = 0; r < block.rows; r += Vec::size()) {
        Sums tile = pairs_at<Sums>(tile_sums, t, r), row = pairs_at<Sums>(rows, block.g, block.i + r);
        merge(row.max, row.sum, Vec::loadu(tile.max), Vec::loadu(tile.sum));
      }
  };
  for_tiles<T>(x, on_tile, after_block);
}

template <class T>
Tensor backward(const Inputs& x, const Tensor& rows, const Tensor& cols, Tensor d_images, Tensor d_texts) {
  float scale = x.scale.item<float>();
  int64_t D = x.images.size(-1);
  Tensor image_pairs = interleave<T>(x.images), text_pairs = interleave<T>(x.texts);
  Tensor weights = at::empty({std::min(ROWS, x.images.size(-2)), LD}, x.images.options());  // s·P of a block
  Tensor d_scale = at::zeros({x.texts.size(-2) / COLS}, at::kDouble);  // of each column of tiles
  auto on_tile = [&](const Part& tile, const float* products, const float* offset) {
    T* p = weights.data_ptr<T>() + tile.j % PANEL;
    Side row = pairs_at<Side>(rows, tile.g, tile.i), col = pairs_at<Side>(cols, tile.g, tile.j);
    double share = tile_weights<T>(products, tile.rows, scale, offset, row, col, p);
    d_scale.data_ptr<double>()[tile.j / COLS] += share;
    if (!d_texts.defined()) return;
    alignas(64) static thread_local T transposed[ROWS * COLS];
    int64_t height = round_up(tile.rows, PAIR<T>);
    if (height > tile.rows) std::fill_n(p + tile.rows * LD, COLS, T(0));
    transpose(p, LD, transposed, ROWS, height, COLS);
    brgemm(COLS, D, height, ROWS, D, D, true, transposed, row_of<T>(image_pairs, tile.g, tile.i),
           row_of<float>(d_texts, tile.g, tile.j));
  };
  auto after_block = [&](const Part& block) {
    if (!d_images.defined()) return;
    parallel<T>(round_up(D, COLS) / COLS, [&](int64_t strip) {
      int64_t d = strip * COLS;
      T* text = row_of<T>(text_pairs, block.g, block.j) + d * PAIR<T>;
      float* to = row_of<float>(d_images, block.g, block.i) + d;
      brgemm(block.rows, std::min(COLS, D - d), block.cols, LD, D, D, true, weights.data_ptr<T>(), text, to);
    });
  };
  for_tiles<T>(x, on_tile, after_block);
  return d_scale.sum().to(at::kFloat);
}

// n becomes a multiple of COLS, which is whole tiles of texts and whole vectors of rows, and D one of PAIR.
Tensor prepare(const Tensor& x) {
  bool bfloat16 = false;  // it is computed as float32 where brgemm has no instructions for it, or may not use them
#ifdef __x86_64__
  bfloat16 = x.scalar_type() == at::kBFloat16 && __builtin_cpu_supports("avx512bf16") &&
             at::native::cpublas::could_pack(at::kBFloat16);
#endif
  int64_t n = round_up(x.size(-2), COLS) - x.size(-2), d = bfloat16 ? x.size(-1) % 2 : 0;
  Tensor cast = x.to(bfloat16 ? at::kBFloat16 : at::kFloat);
  return n || d ? at::constant_pad_nd(cast, {0, d, 0, n}) : cast.contiguous();
}

template <class F> void with_dtype(const Tensor& x, F run) {
  x.scalar_type() == at::kFloat ? run(float()) : run(at::BFloat16());
}

}  // namespace

TORCH_LIBRARY(similarity, m) {
  m.def("logsumexp(Tensor image, Tensor text, Tensor scale, bool rows=True, bool cols=True)"
        " -> (Tensor, Tensor)");
  m.def("logsumexp_backward(Tensor? d_per_image, Tensor? d_per_text, Tensor image, Tensor text, Tensor scale,"
        " Tensor per_image, Tensor per_text, bool needs_image, bool needs_text) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(similarity, CPU, m) {
  m.impl("logsumexp", logsumexp);
  m.impl("logsumexp_backward", logsumexp_backward);
}
