// The op's two functions, written once. The source for the CPU and that for CUDA each define the four
// functions declared first, all in an unnamed namespace, so that neither sees the other's.
#pragma once

#include <ATen/ATen.h>
#include <torch/library.h>

namespace {

using at::Tensor;
constexpr float INF = std::numeric_limits<float>::infinity();
constexpr int64_t PADDING = 128;  // of the numbers kept of rows and columns, as tiles go beyond the last

struct Inputs {
  Tensor images, texts, scale;  // [(G,) N, D], [(G,) M, D], []; `prepare` may pad them
  int64_t G, N, M;              // without the padding
};

// The embeddings as the device wants them, perhaps with zeros appended.
Tensor prepare(const Tensor& x);
// Calls run(T()) for the dtype T of x.
template <class F> void with_dtype(const Tensor& x, F run);
// Merges every tile's sums of exponentials into those of the rows and columns (Sums, below).
template <class T> void forward(const Inputs& x, const Tensor& rows, const Tensor& cols);
// Adds every tile's share to the gradients (float32) and returns ∂s; rows and cols hold a Side each.
template <class T>
Tensor backward(const Inputs& x, const Tensor& rows, const Tensor& cols, Tensor d_images, Tensor d_texts);

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Row i of x [(G,) n, width] in group g; without G, all groups share the one block.
template <class T> T* row_of(const Tensor& x, int64_t g, int64_t i) {
  return x.data_ptr<T>() + ((x.dim() == 3 ? g * x.size(1) : 0) + i) * x.size(-1);
}

// Rows i, i + 1, ... and columns j, j + 1, ... of the logits of group g.
struct Part {
  int64_t g, i, rows, j, cols;
};

// Sums of exponentials, each carried as (max, sum), which means sum·exp(max), so no finite logit overflows.
struct Sums {
  float *max = nullptr, *sum = nullptr;
};
// What the backward pass reads of rows or columns: their log-sum-exps, and the gradients of these.
struct Side {
  const float *lse = nullptr, *grad = nullptr;
};
// Either lies in a tensor x [2, G, n], undefined where that output is not used. Group g's from i on:
template <class P> P pairs_at(const Tensor& x, int64_t g, int64_t i) {
  if (!x.defined()) return {};
  float* first = x.data_ptr<float>() + g * x.size(2) + i;
  return {first, first + x.stride(0)};
}

// The sums of nothing: (-inf, 0).
Tensor empty_sums(int64_t G, int64_t n, const Tensor& scale) {
  Tensor sums = at::zeros({2, G, round_up(n, PADDING)}, scale.options());
  sums[0].fill_(-INF);
  return sums;
}

Inputs check(const Tensor& image, const Tensor& text, const Tensor& scale) {
  bool two_or_three = std::min(image.dim(), text.dim()) >= 2 && std::max(image.dim(), text.dim()) <= 3;
  bool fit = two_or_three && image.size(-1) == text.size(-1) &&
             (image.dim() == 2 || text.dim() == 2 || image.size(0) == text.size(0)) &&
             image.scalar_type() == text.scalar_type() && image.device() == text.device();
  bool number = scale.dim() == 0 && scale.scalar_type() == at::kFloat && scale.device() == image.device();
  TORCH_CHECK(fit && number, "similarity_logsumexp: image, text and logit_scale do not fit each other: ",
              image.sizes(), image.options(), text.sizes(), text.options(), scale.sizes(), scale.options());
  int64_t G = image.dim() == 3 ? image.size(0) : text.dim() == 3 ? text.size(0) : 1;
  return {prepare(image), prepare(text), scale, G, image.size(-2), text.size(-2)};
}

auto logsumexp(const Tensor& image, const Tensor& text, const Tensor& scale, bool rows, bool cols) {
  Inputs x = check(image, text, scale);
  Tensor row_sums, col_sums;
  if (rows) row_sums = empty_sums(x.G, x.N, scale);
  if (cols) col_sums = empty_sums(x.G, x.M, scale);
  with_dtype(x.images, [&](auto t) { forward<decltype(t)>(x, row_sums, col_sums); });
  auto finish = [&](const Tensor& sums, int64_t n) {
    if (!sums.defined()) return at::empty({0}, scale.options());
    Tensor lse = (sums[0] + sums[1].log()).narrow(1, 0, n).contiguous();
    return image.dim() == 3 || text.dim() == 3 ? lse : lse[0];
  };
  return std::tuple(finish(row_sums, x.N), finish(col_sums, x.M));
}

auto logsumexp_backward(const std::optional<Tensor>& d_per_image, const std::optional<Tensor>& d_per_text,
                        const Tensor& image, const Tensor& text, const Tensor& scale, const Tensor& per_image,
                        const Tensor& per_text, bool needs_image, bool needs_text) {
  Inputs x = check(image, text, scale);
  auto pairs = [&](const Tensor& lse, const std::optional<Tensor>& grad, int64_t n) {
    if (!grad || grad->numel() == 0) return Tensor();
    return at::constant_pad_nd(at::stack({lse, *grad}).view({2, x.G, n}), {0, round_up(n, PADDING) - n});
  };
  Tensor rows = pairs(per_image, d_per_image, x.N), cols = pairs(per_text, d_per_text, x.M);
  Tensor d_images, d_texts, d_scale;
  if (needs_image) d_images = at::zeros_like(x.images, at::kFloat);
  if (needs_text) d_texts = at::zeros_like(x.texts, at::kFloat);
  with_dtype(x.images, [&](auto t) { d_scale = backward<decltype(t)>(x, rows, cols, d_images, d_texts); });
  auto finish = [](const Tensor& grad, const Tensor& like) {
    if (!grad.defined()) return at::zeros(like.sizes(), like.options());
    return grad.narrow(-2, 0, like.size(-2)).narrow(-1, 0, like.size(-1)).to(like.options()).contiguous();
  };
  return std::tuple(finish(d_images, image), finish(d_texts, text), d_scale);
}

}  // namespace
