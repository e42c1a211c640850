// Row and column log-sum-exp of a similarity matrix that is never stored: the CUDA op.
//
// The mathematics is that of similarity_logsumexp.cpp: L = s·I·Tᵀ, r_i = log Σ_j exp L_ij,
// c_j = log Σ_i exp L_ij; backward, P_ij = exp(L_ij - r_i)·∂r_i + exp(L_ij - c_j)·∂c_j, ∂I = s·P·T,
// ∂T = s·Pᵀ·I, ∂s = Σ P·(I·Tᵀ).
//
// The tiling. A tile is ROWS images by COLS texts: 4096 x 2048 float32 products are 32 MiB, less than the
// L2 cache of an A100 (40 MB) or H100 (50 MB), so that most of them are still there when the kernel that
// reads them follows the product that wrote them. cuBLAS multiplies (bf16, fp16 or fp32 in, fp32
// accumulated and out; fp32 as TF32 only where PyTorch is told to allow it); two kernels of our own read
// the tile once each:
//   statistics   (max, Σ exp(· - max)) of every row and column of each 128 x 128 patch, which a third,
//                small kernel merges into the running pairs of the whole rows and columns;
//   weights      P, in the inputs' dtype, for the two products of the gradients, and its share of ∂s.
//
// The trade-off. A kernel with its own tensor-core products would keep the tile in registers and move
// nothing through L2. Here 8 bytes per logit go there and back forward and 14 backward, 10 of them apart
// from the products: at D = 512 a quarter or so of the time, by arithmetic (10 bytes at 5 TB/s beside 4096
// operations at 700 TFLOP/s). The library product is chosen for being right on every GPU and every shape.
// Neither the tile's size nor this estimate has been tried on a GPU yet; `python csrc/benchmark.py --device
// cuda` does so. What has: the kernels and the walk over tiles, on a CPU (tests/cuda_on_cpu.h).
//
// Extra memory: 32 MiB of products, up to 32 MiB of P, and in float32 the gradients of the texts and of
// ROWS images. Nothing here waits for the GPU: the scale and the unit of P (below) are read on the device.

#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContext.h>
#include <ATen/cuda/Exceptions.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "similarity_logsumexp.h"

namespace similarity {
namespace {

constexpr int64_t ROWS = 4096, COLS = 2048;
constexpr int PATCH = 128, WARPS = 8;
constexpr int BAND = PATCH / WARPS;  // a warp has BAND rows of a patch, a lane 4 columns of them
constexpr float INF = std::numeric_limits<float>::infinity();
static_assert(PATCH == 4 * 32);

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// ---- the matrix products

template <class T> constexpr cudaDataType_t CUDA_TYPE = CUDA_R_32F;
template <> constexpr cudaDataType_t CUDA_TYPE<at::Half> = CUDA_R_16F;
template <> constexpr cudaDataType_t CUDA_TYPE<at::BFloat16> = CUDA_R_16BF;

struct Block {  // of a row-major matrix, read as it lies or transposed
  const void* data;
  int64_t stride;
  cublasOperation_t as = CUBLAS_OP_N;
};

// c [m, n] (+)= a [m, k] · b [k, n], row-major. cuBLAS is column-major, where the same bytes are the
// transposes: cᵀ = bᵀ·aᵀ, hence the exchanged order.
template <class T>
void multiply(int64_t m, int64_t n, int64_t k, Block a, Block b, float* c, int64_t stride, float add) {
  float one = 1;
  auto at_least_1 = [](int64_t stride) { return std::max<int64_t>(stride, 1); };  // D may be 0
  TORCH_CUDABLAS_CHECK(cublasGemmEx(at::cuda::getCurrentCUDABlasHandle(), b.as, a.as, n, m, k, &one,
                                    b.data, CUDA_TYPE<T>, at_least_1(b.stride), a.data, CUDA_TYPE<T>,
                                    at_least_1(a.stride), &add, c, CUDA_R_32F, at_least_1(stride),
                                    CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
}

// ---- the kernels

__device__ float warp_max(float x) {
  for (int lane = 16; lane; lane /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, lane));
  return x;
}

__device__ float warp_sum(float x) {
  for (int lane = 16; lane; lane /= 2) x += __shfl_xor_sync(0xffffffff, x, lane);
  return x;
}

// A sum of exponentials is carried as (max, sum), which means sum·exp(max); nothing yet is (-inf, 0).
// A NaN logit is in no max (fmaxf drops it) but in the sum, and so in the result.
__device__ float2 merged(float2 a, float2 b) {
  float top = fmaxf(a.x, b.x);
  if (top == -INF) return {top, a.y + b.y};
  return {top, a.y * expf(a.x - top) + b.y * expf(b.x - top)};
}

__device__ float finite_or_zero(float top) { return top == -INF ? 0 : top; }

// products [rows, cols] of stride `stride` -> row_pairs [cols/PATCH, ROWS], col_pairs [rows/PATCH, COLS]
__global__ void __launch_bounds__(32 * WARPS)
    statistics(const float* products, int rows, int cols, int64_t stride, const float* scale, float2* row_pairs,
               float2* col_pairs) {
  __shared__ float2 bands[WARPS][PATCH];
  int col = blockIdx.x * PATCH + threadIdx.x * 4, row = blockIdx.y * PATCH + threadIdx.y * BAND;
  float logits[BAND][4], s = *scale;
#pragma unroll
  for (int r = 0; r < BAND; r++) {
    float4 x = {};
    if (row + r < rows) x = *reinterpret_cast<const float4*>(products + (row + r) * stride + col);
    float product[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int c = 0; c < 4; c++) logits[r][c] = row + r < rows && col + c < cols ? product[c] * s : -INF;
  }
  if (row_pairs) {
#pragma unroll
    for (int r = 0; r < BAND; r++) {
      float top = warp_max(fmaxf(fmaxf(logits[r][0], logits[r][1]), fmaxf(logits[r][2], logits[r][3])));
      float base = finite_or_zero(top), sum = 0;
#pragma unroll
      for (int c = 0; c < 4; c++) sum += expf(logits[r][c] - base);
      sum = warp_sum(sum);
      if (threadIdx.x == 0 && row + r < rows) row_pairs[blockIdx.x * ROWS + row + r] = {top, sum};
    }
  }
  if (!col_pairs) return;
#pragma unroll
  for (int c = 0; c < 4; c++) {
    float top = -INF, sum = 0;
#pragma unroll
    for (int r = 0; r < BAND; r++) top = fmaxf(top, logits[r][c]);
    float base = finite_or_zero(top);
#pragma unroll
    for (int r = 0; r < BAND; r++) sum += expf(logits[r][c] - base);
    bands[threadIdx.y][threadIdx.x * 4 + c] = {top, sum};
  }
  __syncthreads();
  int thread = threadIdx.y * 32 + threadIdx.x;
  if (thread >= PATCH) return;
  float2 pair = bands[0][thread];
  for (int w = 1; w < WARPS; w++) pair = merged(pair, bands[w][thread]);
  col_pairs[blockIdx.y * COLS + blockIdx.x * PATCH + thread] = pair;
}

// running [n] merged with each of pairs [count, n], rows of `stride`
__global__ void merge(const float2* pairs, int64_t stride, int count, float2* running, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  float2 pair = running[i];
  for (int t = 0; t < count; t++) pair = merged(pair, pairs[t * stride + i]);
  running[i] = pair;
}

template <class T> struct alignas(4 * sizeof(T)) Four {
  T value[4];
};

// weights = P / unit in the dtype of the next products; d_scale[patch] += Σ P·product
template <class T>
__global__ void __launch_bounds__(32 * WARPS)
    tile_weights(const float* products, int rows, int cols, int64_t stride, const float* scale, const float* unit,
                 const float* row_lse, const float* row_grad, const float* col_lse, const float* col_grad, T* weights,
                 double* d_scale) {
  __shared__ float bands[WARPS];
  int col = blockIdx.x * PATCH + threadIdx.x * 4, row = blockIdx.y * PATCH + threadIdx.y * BAND;
  float lse[4], grad[4], total = 0, s = *scale, per_unit = 1 / *unit;
#pragma unroll
  for (int c = 0; c < 4; c++) {
    bool used = col_grad && col + c < cols;
    lse[c] = used ? col_lse[col + c] : 0;
    grad[c] = used ? col_grad[col + c] : 0;
  }
#pragma unroll 4
  for (int r = row; r < min(row + BAND, rows); r++) {
    float4 x = *reinterpret_cast<const float4*>(products + r * stride + col);
    float product[4] = {x.x, x.y, x.z, x.w};
    Four<T> out;
#pragma unroll
    for (int c = 0; c < 4; c++) {
      float logit = product[c] * s, p = 0;
      if (col + c < cols) {
        if (row_grad) p += expf(logit - row_lse[r]) * row_grad[r];
        if (col_grad) p += expf(logit - lse[c]) * grad[c];
        total += p * product[c];
      }
      out.value[c] = static_cast<T>(p * per_unit);
    }
    *reinterpret_cast<Four<T>*>(weights + r * stride + col) = out;
  }
  total = warp_sum(total);
  if (threadIdx.x == 0) bands[threadIdx.y] = total;
  __syncthreads();
  if (threadIdx.x || threadIdx.y) return;
  double sum = 0;
  for (int w = 0; w < WARPS; w++) sum += bands[w];
  d_scale[blockIdx.y * gridDim.x + blockIdx.x] += sum;
}

// ---- the op

template <class F> void with_dtype(const Tensor& image, F run) {
  if (image.scalar_type() == at::kBFloat16) return run(at::BFloat16());
  if (image.scalar_type() == at::kHalf) return run(at::Half());
  run(float());
}

dim3 patches(int64_t rows, int64_t cols) {
  return dim3((cols + PATCH - 1) / PATCH, (rows + PATCH - 1) / PATCH);
}

// Calls run(j, number of texts) for every tile along the texts.
template <class F> void for_tiles(int64_t n, int64_t size, F run) {
  for (int64_t start = 0; start < n; start += size) run(start, std::min(size, n - start));
}

std::tuple<Tensor, Tensor> logsumexp(const Tensor& image, const Tensor& text, const Tensor& scale, bool rows,
                                     bool cols) {
  Shape shape = check(image, text, scale);
  c10::cuda::CUDAGuard guard(image.device());
  cudaStream_t stream = at::cuda::getCurrentCUDAStream();
  int64_t G = shape.G, N = shape.N, M = shape.M, D = shape.D;
  Tensor images = image.contiguous(), texts = text.contiguous();
  auto float32 = image.options().dtype(at::kFloat);
  int64_t stride = std::min(COLS, round_up(M, PATCH));
  Tensor products = at::empty({std::min(ROWS, N), stride}, float32);
  Tensor patch_rows = at::empty({COLS / PATCH, ROWS, 2}, float32);
  Tensor patch_cols = at::empty({ROWS / PATCH, COLS, 2}, float32);
  auto empty_pairs = [&](int64_t groups, int64_t n) {
    Tensor pairs = at::zeros({groups, n, 2}, float32);
    pairs.select(-1, 0).fill_(-INF);
    return pairs;
  };
  Tensor row_pairs = empty_pairs(G, rows ? N : 0), col_pairs = empty_pairs(G, cols ? M : 0);
  auto pointer = [](const Tensor& pairs) { return reinterpret_cast<float2*>(pairs.data_ptr<float>()); };

  with_dtype(image, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t g = 0; g < G; g++) {
      const T *I = of_group(images, g).const_data_ptr<T>(), *X = of_group(texts, g).const_data_ptr<T>();
      for_tiles(N, ROWS, [&](int64_t i, int64_t m) {
        for_tiles(M, COLS, [&](int64_t j, int64_t n) {
          multiply<T>(m, n, D, {I + i * D, D}, {X + j * D, D, CUBLAS_OP_T}, products.data_ptr<float>(), stride, 0);
          dim3 grid = patches(m, n);
          statistics<<<grid, dim3(32, WARPS), 0, stream>>>(
              products.data_ptr<float>(), m, n, stride, scale.const_data_ptr<float>(),
              rows ? pointer(patch_rows) : nullptr, cols ? pointer(patch_cols) : nullptr);
          C10_CUDA_KERNEL_LAUNCH_CHECK();
          if (rows) {
            float2* running = pointer(row_pairs) + g * N + i;
            merge<<<(m + 127) / 128, 128, 0, stream>>>(pointer(patch_rows), ROWS, grid.x, running, m);
            C10_CUDA_KERNEL_LAUNCH_CHECK();
          }
          if (cols) {
            float2* running = pointer(col_pairs) + g * M + j;
            merge<<<(n + 127) / 128, 128, 0, stream>>>(pointer(patch_cols), COLS, grid.y, running, n);
            C10_CUDA_KERNEL_LAUNCH_CHECK();
          }
        });
      });
    }
  });
  auto finish = [](const Tensor& pairs, bool used, std::vector<int64_t> sizes) {
    Tensor lse = pairs.select(-1, 0) + pairs.select(-1, 1).log();
    return used ? lse.view(sizes) : lse.view({0});
  };
  return {finish(row_pairs, rows, shape.rows()), finish(col_pairs, cols, shape.cols())};
}

std::tuple<Tensor, Tensor, Tensor> logsumexp_backward(
    const std::optional<Tensor>& d_per_image, const std::optional<Tensor>& d_per_text, const Tensor& image,
    const Tensor& text, const Tensor& scale, const Tensor& per_image, const Tensor& per_text, bool needs_image,
    bool needs_text) {
  Shape shape = check(image, text, scale);
  int64_t G = shape.G, N = shape.N, M = shape.M, D = shape.D;
  c10::cuda::CUDAGuard guard(image.device());
  cudaStream_t stream = at::cuda::getCurrentCUDAStream();
  Tensor images = image.contiguous(), texts = text.contiguous();
  auto float32 = image.options().dtype(at::kFloat);
  int64_t stride = std::min(COLS, round_up(M, PATCH)), height = std::min(ROWS, N);
  Tensor products = at::empty({height, stride}, float32), weights = at::empty({height, stride}, image.options());
  Tensor d_image = at::empty(needs_image ? image.sizes() : at::IntArrayRef{0}, image.options());
  Tensor d_block;  // ∂I of the rows at hand, and below ∂T, both short of the factor s·unit
  if (needs_image) d_block = at::empty({height, D}, float32);
  Tensor d_text = at::zeros(needs_text ? text.sizes() : at::IntArrayRef{0}, float32);
  Tensor d_scale = at::zeros({ROWS / PATCH * (COLS / PATCH)}, float32.dtype(at::kDouble));
  Tensor d_rows, d_cols;
  if (d_per_image) d_rows = d_per_image->contiguous();
  if (d_per_text) d_cols = d_per_text->contiguous();

  // P is at most |∂r| + |∂c|, for a mean over 32768 rows some 1e-5, where float16 has few bits left.
  // In units of max|∂|/256 it neither vanishes nor overflows; the unit returns with the scale.
  Tensor unit = at::full({}, 1e-30, float32);
  for (const Tensor& grad : {d_rows, d_cols})
    if (grad.defined() && grad.numel()) unit = at::maximum(unit, grad.abs().amax() / 256);
  Tensor factor = scale * unit;

  with_dtype(image, [&](auto zero) {
    using T = decltype(zero);
    bool shared = images.dim() == 2;  // by all groups: a block's gradient is summed over them before it is written
    for (int64_t s = 0; s < (shared ? 1 : G); s++) {
      const T* I = of_group(images, s).const_data_ptr<T>();
      for_tiles(N, ROWS, [&](int64_t i, int64_t m) {
        if (needs_image) d_block.zero_();
        for (int64_t g = shared ? 0 : s; g < (shared ? G : s + 1); g++) {
          const T* X = of_group(texts, g).const_data_ptr<T>();
          for_tiles(M, COLS, [&](int64_t j, int64_t n) {
            multiply<T>(m, n, D, {I + i * D, D}, {X + j * D, D, CUBLAS_OP_T}, products.data_ptr<float>(), stride, 0);
            auto part = [](const Tensor& used, const Tensor& x, int64_t start) -> const float* {
              return used.defined() ? x.const_data_ptr<float>() + start : nullptr;
            };
            tile_weights<T><<<patches(m, n), dim3(32, WARPS), 0, stream>>>(
                products.data_ptr<float>(), m, n, stride, scale.const_data_ptr<float>(), unit.const_data_ptr<float>(),
                part(d_rows, per_image, g * N + i), part(d_rows, d_rows, g * N + i),
                part(d_cols, per_text, g * M + j), part(d_cols, d_cols, g * M + j),
                weights.data_ptr<T>(), d_scale.data_ptr<double>());
            C10_CUDA_KERNEL_LAUNCH_CHECK();
            const T* P = weights.const_data_ptr<T>();
            if (needs_image) multiply<T>(m, D, n, {P, stride}, {X + j * D, D}, d_block.data_ptr<float>(), D, 1);
            if (needs_text) {
              float* d_texts = of_group(d_text, g).template data_ptr<float>() + j * D;
              multiply<T>(n, D, m, {P, stride, CUBLAS_OP_T}, {I + i * D, D}, d_texts, D, 1);
            }
          });
        }
        if (needs_image) of_group(d_image, s).narrow(0, i, m).copy_(d_block.narrow(0, 0, m) * factor);
      });
    }
  });
  return {d_image, d_text.mul_(factor).to(image.scalar_type()), d_scale.sum().to(at::kFloat)};
}

}  // namespace
}  // namespace similarity

TORCH_LIBRARY_IMPL(similarity, CUDA, m) {
  m.impl("logsumexp", similarity::logsumexp);
  m.impl("logsumexp_backward", similarity::logsumexp_backward);
}
