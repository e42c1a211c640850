// Row and column log-sum-exp of a similarity matrix that is never stored: the CUDA op. The head of
// similarity_logsumexp.cpp has the mathematics.
//
// The tiling. A tile is 4096 images by 2048 texts: its float32 products, 32 MiB, fit in the L2 cache of an
// A100 (40 MB) or H100 (50 MB), where the kernel that reads them mostly still finds them. cuBLAS multiplies
// (TF32 only where PyTorch is told to allow it); two kernels of our own read the tile once each:
//   statistics     (max, Σ exp(· - max)) of every row and column of each 128 x 128 patch, which a third,
//                  small kernel merges into the running sums of the whole rows and columns;
//   tile_weights   P, in the inputs' dtype, for the two products of the gradients, and its share of ∂s.
//
// The trade-off. A kernel with its own tensor-core products would move nothing through L2; the library's
// product is right on every GPU and for every shape. Extra memory: 32 MiB of products, up to 32 MiB of P,
// and the gradients in float32. Nothing waits for the GPU. No GPU has run it yet, a CPU has (cuda_on_cpu.h).

#include <ATen/cuda/CUDAContext.h>
#include <ATen/cuda/CUDADataType.h>
#include <ATen/cuda/Exceptions.h>
#include <c10/cuda/CUDAGuard.h>

#include "similarity_logsumexp.h"

namespace {

constexpr int64_t ROWS = 4096, COLS = 2048;
constexpr int PATCH = 128, WARPS = 8;
constexpr int LANE = PATCH / 32, BAND = PATCH / WARPS;  // columns of a lane and rows of a warp, in a patch

__device__ float warp_max(float x) {
  for (int lane = 16; lane; lane /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, lane));
  return x;
}

__device__ float warp_sum(float x) {
  for (int lane = 16; lane; lane /= 2) x += __shfl_xor_sync(0xffffffff, x, lane);
  return x;
}

// Two (max, sum) as one. A NaN logit is in no max (fmaxf drops it) but in the sum, and so in the result.
__device__ float2 merged(float2 a, float2 b) {
  float top = fmaxf(a.x, b.x);
  if (top == -INF) return {top, a.y + b.y};
  return {top, a.y * expf(a.x - top) + b.y * expf(b.x - top)};
}

// The pair of COUNT logits, STRIDE apart; with WARP of all the logits that a warp's lanes have.
template <int COUNT, int STRIDE, bool WARP> __device__ float2 pair_of(const float* logits) {
  float top = -INF, sum = 0;
  for (int k = 0; k < COUNT; k++) top = fmaxf(top, logits[k * STRIDE]);
  if (WARP) top = warp_max(top);
  float base = top == -INF ? 0 : top;
  for (int k = 0; k < COUNT; k++) sum += expf(logits[k * STRIDE] - base);
  return {top, WARP ? warp_sum(sum) : sum};
}

__device__ void put(Sums sums, int64_t i, float2 pair) { sums.max[i] = pair.x, sums.sum[i] = pair.y; }

// What a lane reads or writes at once.
template <class T> struct alignas(LANE * sizeof(T)) Lane {
  T value[LANE];
};
__device__ Lane<float> lane_at(const float* x) { return *reinterpret_cast<const Lane<float>*>(x); }

// The sums of every patch's rows and columns -> row_sums [cols/PATCH, ROWS], col_sums [rows/PATCH, COLS]
__global__ void __launch_bounds__(32 * WARPS)
    statistics(const float* products, Part tile, const float* scale, Sums row_sums, Sums col_sums) {
  __shared__ float2 bands[WARPS][PATCH];
  int col = blockIdx.x * PATCH + threadIdx.x * LANE, row = blockIdx.y * PATCH + threadIdx.y * BAND;
  float logits[BAND * LANE], s = *scale;
  for (int r = 0; r < BAND; r++) {
    Lane<float> product = lane_at(products + (row + r) * COLS + col);
    for (int c = 0; c < LANE; c++)
      logits[r * LANE + c] = row + r < tile.rows && col + c < tile.cols ? product.value[c] * s : -INF;
  }
  if (row_sums.max)
    for (int r = 0; r < BAND; r++) {
      float2 pair = pair_of<LANE, 1, true>(logits + r * LANE);
      if (threadIdx.x == 0) put(row_sums, blockIdx.x * ROWS + row + r, pair);
    }
  if (!col_sums.max) return;
  for (int c = 0; c < LANE; c++)
    bands[threadIdx.y][threadIdx.x * LANE + c] = pair_of<BAND, LANE, false>(logits + c);
  __syncthreads();
  int thread = threadIdx.y * 32 + threadIdx.x;
  if (thread >= PATCH) return;
  float2 pair = bands[0][thread];
  for (int w = 1; w < WARPS; w++) pair = merged(pair, bands[w][thread]);
  put(col_sums, blockIdx.y * COLS + blockIdx.x * PATCH + thread, pair);
}

// running [n], merged with each of sums [count, n] of stride `stride`
__global__ void merge(Sums sums, int64_t stride, int count, Sums running, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  float2 pair = {running.max[i], running.sum[i]};
  for (int t = 0; t < count; t++) pair = merged(pair, {sums.max[t * stride + i], sums.sum[t * stride + i]});
  put(running, i, pair);
}

// weights [rows, COLS] = P / unit in the dtype of the next products; d_scale[patch][warp] += Σ P·product
template <class T> __global__ void __launch_bounds__(32 * WARPS)
    tile_weights(const float* products, Part tile, const float* scale, const float* unit, Side row_side,
                 Side col_side, T* weights, double* d_scale) {
  int col = blockIdx.x * PATCH + threadIdx.x * LANE, row = blockIdx.y * PATCH + threadIdx.y * BAND;
  float total = 0, s = *scale, per_unit = 1 / *unit;
  Lane<float> lse = {}, grad = {};
  if (col_side.grad) lse = lane_at(col_side.lse + col), grad = lane_at(col_side.grad + col);
#pragma unroll 4
  for (int r = row; r < min(row + BAND, int(tile.rows)); r++) {
    Lane<float> product = lane_at(products + r * COLS + col);
    Lane<T> out;
    for (int c = 0; c < LANE; c++) {
      float logit = product.value[c] * s, p = 0;
      if (col + c < tile.cols) {
        if (row_side.grad) p += expf(logit - row_side.lse[r]) * row_side.grad[r];
        if (col_side.grad) p += expf(logit - lse.value[c]) * grad.value[c];
        total += p * product.value[c];
      }
      out.value[c] = static_cast<T>(p * per_unit);
    }
    *reinterpret_cast<Lane<T>*>(weights + r * COLS + col) = out;
  }
  total = warp_sum(total);
  if (threadIdx.x == 0) d_scale[(blockIdx.y * gridDim.x + blockIdx.x) * WARPS + threadIdx.y] += total;
}

// c (+)= a·b, of row-major matrices or transposed views of such. cuBLAS is column-major, where the same
// bytes are the transposes: cᵀ = bᵀ·aᵀ, hence the exchanged order.
void multiply(const Tensor& c, const Tensor& a, const Tensor& b, float add) {
  auto as = [](const Tensor& x) { return x.stride(1) == 1 ? CUBLAS_OP_N : CUBLAS_OP_T; };
  auto stride = [](const Tensor& x) {  // a single row says nothing by its stride
    return x.stride(1) == 1 ? std::max(x.stride(0), x.size(1)) : x.stride(1);
  };
  auto type = at::cuda::ScalarTypeToCudaDataType(a.scalar_type());
  float one = 1;
  TORCH_CUDABLAS_CHECK(cublasGemmEx(
      at::cuda::getCurrentCUDABlasHandle(), as(b), as(a), c.size(1), c.size(0), a.size(1), &one, b.data_ptr(),
      type, stride(b), a.data_ptr(), type, stride(a), &add, c.data_ptr<float>(), CUDA_R_32F, stride(c),
      CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
}

// Rows i ... i + n - 1 of x [(G,) n, D] in group g.
Tensor rows_of(const Tensor& x, int64_t g, int64_t i, int64_t n) {
  return (x.dim() == 3 ? x[g] : x).narrow(0, i, n);
}

// Calls use(tile, image, text, products, grid) for every tile; each block of the grid has a patch.
template <class F> void for_tiles(const Inputs& x, F use) {
  c10::cuda::CUDAGuard guard(x.scale.device());
  Tensor products = at::empty({std::min(ROWS, round_up(x.N, PATCH)), COLS}, x.scale.options());
  for (int64_t g = 0; g < x.G; g++)
    for (int64_t i = 0; i < x.N; i += ROWS)
      for (int64_t j = 0; j < x.M; j += COLS) {
        Part tile{g, i, std::min(ROWS, x.N - i), j, std::min(COLS, x.M - j)};
        Tensor image = rows_of(x.images, g, i, tile.rows), text = rows_of(x.texts, g, j, tile.cols);
        multiply(products.narrow(0, 0, tile.rows).narrow(1, 0, tile.cols), image, text.t(), 0);
        dim3 grid(round_up(tile.cols, PATCH) / PATCH, round_up(tile.rows, PATCH) / PATCH);
        use(tile, image, text, products.const_data_ptr<float>(), grid);
      }
}

Tensor prepare(const Tensor& x) { return x.contiguous(); }

template <class F> void with_dtype(const Tensor& x, F run) {
  if (x.scalar_type() == at::kBFloat16) return run(at::BFloat16());
  if (x.scalar_type() == at::kHalf) return run(at::Half());
  run(float());
}

template <class T> void forward(const Inputs& x, const Tensor& rows, const Tensor& cols) {
  cudaStream_t stream = at::cuda::getCurrentCUDAStream(x.scale.get_device());
  const float* scale = x.scale.const_data_ptr<float>();
  Tensor row_patches, col_patches;  // the sums of a tile's patches
  if (rows.defined()) row_patches = empty_sums(COLS / PATCH, ROWS, x.scale);
  if (cols.defined()) col_patches = empty_sums(ROWS / PATCH, COLS, x.scale);
  Sums row_sums = pairs_at<Sums>(row_patches, 0, 0), col_sums = pairs_at<Sums>(col_patches, 0, 0);
  auto merge_into = [&](Sums running, int n, Sums patches, int64_t stride, int count) {
    if (!running.max) return;
    merge<<<(n + 127) / 128, 128, 0, stream>>>(patches, stride, count, running, n);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  };
  for_tiles(x, [&](const Part& tile, auto&, auto&, const float* products, dim3 grid) {
    statistics<<<grid, dim3(32, WARPS), 0, stream>>>(products, tile, scale, row_sums, col_sums);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    merge_into(pairs_at<Sums>(rows, tile.g, tile.i), tile.rows, row_sums, ROWS, grid.x);
    merge_into(pairs_at<Sums>(cols, tile.g, tile.j), tile.cols, col_sums, COLS, grid.y);
  });
}

template <class T>
Tensor backward(const Inputs& x, const Tensor& rows, const Tensor& cols, Tensor d_images, Tensor d_texts) {
  cudaStream_t stream = at::cuda::getCurrentCUDAStream(x.scale.get_device());
  Tensor weights = at::empty({std::min(ROWS, x.N), COLS}, x.images.options());
  Tensor d_scale = at::zeros({ROWS / PATCH, COLS / PATCH, WARPS}, x.scale.options().dtype(at::kDouble));

  // P is at most |∂r| + |∂c|, for a mean over 32768 rows some 1e-5, where float16 has few bits left.
  // In units of max|∂|/256 it neither vanishes nor overflows; the unit returns with the scale.
  Tensor unit = at::full({}, 1e-30, x.scale.options());
  for (const Tensor& side : {rows, cols})
    if (side.defined() && side.numel()) unit = at::maximum(unit, side[1].abs().amax() / 256);

  for_tiles(x, [&](const Part& tile, auto& image, auto& text, const float* products, dim3 grid) {
    Side row = pairs_at<Side>(rows, tile.g, tile.i), col = pairs_at<Side>(cols, tile.g, tile.j);
    tile_weights<T><<<grid, dim3(32, WARPS), 0, stream>>>(
        products, tile, x.scale.const_data_ptr<float>(), unit.const_data_ptr<float>(), row, col,
        weights.data_ptr<T>(), d_scale.data_ptr<double>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    Tensor P = weights.narrow(0, 0, tile.rows).narrow(1, 0, tile.cols);
    if (d_images.defined()) multiply(rows_of(d_images, tile.g, tile.i, tile.rows), P, text, 1);
    if (d_texts.defined()) multiply(rows_of(d_texts, tile.g, tile.j, tile.cols), P.t(), image, 1);
  });
  Tensor factor = x.scale * unit;
  if (d_images.defined()) d_images.mul_(factor);
  if (d_texts.defined()) d_texts.mul_(factor);
  return d_scale.sum().to(at::kFloat);
}

}  // namespace

TORCH_LIBRARY_IMPL(similarity, CUDA, m) {
  m.impl("logsumexp", logsumexp);
  m.impl("logsumexp_backward", logsumexp_backward);
}
