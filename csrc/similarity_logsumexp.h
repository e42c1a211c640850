// What the CPU op and the CUDA op share: the checks and the walk over groups.
#pragma once

#include <ATen/core/Tensor.h>

namespace similarity {

using at::Tensor;

struct Shape {
  int64_t G, N, M, D;
  bool grouped;
  std::vector<int64_t> rows() const { return grouped ? std::vector<int64_t>{G, N} : std::vector<int64_t>{N}; }
  std::vector<int64_t> cols() const { return grouped ? std::vector<int64_t>{G, M} : std::vector<int64_t>{M}; }
};

inline Shape check(const Tensor& image, const Tensor& text, const Tensor& scale) {
  TORCH_CHECK((image.dim() == 2 || image.dim() == 3) && (text.dim() == 2 || text.dim() == 3),
              "similarity_logsumexp: image and text must be [N, D] or [G, N, D], got image ", image.sizes(),
              " and text ", text.sizes());
  TORCH_CHECK(image.size(-1) == text.size(-1),
              "similarity_logsumexp: image and text differ in width D: image ", image.sizes(),
              " and text ", text.sizes());
  TORCH_CHECK(image.dim() == 2 || text.dim() == 2 || image.size(0) == text.size(0),
              "similarity_logsumexp: image and text differ in groups G: image ", image.sizes(),
              " and text ", text.sizes());
  TORCH_CHECK(image.scalar_type() == text.scalar_type(),
              "similarity_logsumexp: image and text differ in dtype: image ", image.scalar_type(),
              " and text ", text.scalar_type());
  TORCH_CHECK(image.scalar_type() == at::kFloat || image.scalar_type() == at::kBFloat16 ||
                  image.scalar_type() == at::kHalf,
              "similarity_logsumexp: image and text must be float32, bfloat16 or float16, got image ",
              image.scalar_type(), " and text ", text.scalar_type());
  TORCH_CHECK(scale.dim() == 0 && scale.scalar_type() == at::kFloat,
              "similarity_logsumexp: logit_scale must be one float32 number of shape [], got ",
              scale.scalar_type(), " ", scale.sizes());
  TORCH_CHECK(image.device() == text.device() && image.device() == scale.device(),
              "similarity_logsumexp: image, text and logit_scale must be on one device: image on ", image.device(),
              ", text on ", text.device(), ", logit_scale on ", scale.device());
  int64_t groups = image.dim() == 3 ? image.size(0) : text.dim() == 3 ? text.size(0) : 1;
  return {groups, image.size(-2), text.size(-2), image.size(-1), image.dim() == 3 || text.dim() == 3};
}

// The block that group g uses: its own, or the one that all groups share.
inline Tensor of_group(const Tensor& x, int64_t g) { return x.dim() == 3 ? x.select(0, g) : x; }

}  // namespace similarity
