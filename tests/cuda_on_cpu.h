// Just enough of CUDA to run csrc/similarity_logsumexp.cu on the CPU, where no GPU is at hand: see test_fused.py.
//
// Each thread of a block is a fiber. The fibers take turns, and one gives up its turn only where CUDA's threads
// wait for one another: at __syncthreads, and at a shuffle within its warp. Between two such places a fiber runs
// alone, so where a barrier is missing it reads what the others have not written yet.
#pragma once

#include <ATen/ATen.h>
#include <torch/library.h>
#include <ucontext.h>

#include <cmath>
#include <functional>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(threads)
#define C10_CUDA_KERNEL_LAUNCH_CHECK()
#define TORCH_CUDABLAS_CHECK(call) call

struct dim3 {
  int x, y = 1, z = 1;
  dim3(int x, int y = 1) : x(x), y(y) {}
};
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
using std::min;
static dim3 gridDim(0), blockDim(0), blockIdx(0), threadIdx(0);

// ---- a block of threads

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  dim3 thread{0};
  bool done = false;
};
static std::vector<Fiber> fibers;
static ucontext_t scheduler;
static size_t current;
static float exchanged[1024];
static std::function<void()> body;

inline void give_up_turn() {
  size_t mine = current;
  swapcontext(&fibers[mine].context, &scheduler);
  threadIdx = fibers[mine].thread;
}

// Waits until all threads first..first+count of the block have come here as often; those that returned do not count.
inline void wait_for_each_other(std::vector<int>& arrivals, size_t first, size_t count) {
  int mine = ++arrivals[current];
  auto behind = [&](size_t i) { return !fibers[i].done && arrivals[i] < mine; };
  for (size_t i = first; i < first + count;) behind(i) ? give_up_turn() : void(i++);
}
static std::vector<int> block_arrivals, warp_arrivals;

inline void __syncthreads() { wait_for_each_other(block_arrivals, 0, fibers.size()); }

inline float __shfl_xor_sync(unsigned, float x, int lane) {
  size_t warp = current / 32 * 32;
  exchanged[current] = x;
  wait_for_each_other(warp_arrivals, warp, 32);
  float found = exchanged[warp + (current % 32 ^ lane)];
  wait_for_each_other(warp_arrivals, warp, 32);
  return found;
}

inline void run_fiber() {
  threadIdx = fibers[current].thread;
  body();
  fibers[current].done = true;
}

template <class... P, class... A> void launch(dim3 grid, dim3 block, void (*kernel)(P...), A... arguments) {
  gridDim = grid, blockDim = block;
  body = [&] { kernel(arguments...); };
  size_t threads = block.x * block.y;
  for (blockIdx.y = 0; blockIdx.y < grid.y; blockIdx.y++)
    for (blockIdx.x = 0; blockIdx.x < grid.x; blockIdx.x++) {
      fibers.resize(threads);
      block_arrivals.assign(threads, 0), warp_arrivals.assign(threads, 0);
      for (size_t i = 0; i < threads; i++) {
        fibers[i].stack.resize(1 << 16);
        fibers[i].done = false;
        fibers[i].thread = dim3(i % block.x, i / block.x);
        getcontext(&fibers[i].context);
        fibers[i].context.uc_stack.ss_sp = fibers[i].stack.data();
        fibers[i].context.uc_stack.ss_size = fibers[i].stack.size();
        fibers[i].context.uc_link = &scheduler;
        makecontext(&fibers[i].context, run_fiber, 0);
      }
      for (size_t left = threads; left;)
        for (current = 0, left = 0; current < threads; current++)
          if (!fibers[current].done) swapcontext(&scheduler, &fibers[current].context), left += !fibers[current].done;
    }
}

// ---- the libraries: streams and devices are nothing, and cuBLAS's product is three loops

using cudaStream_t = int;
enum cudaDataType_t { CUDA_R_32F, CUDA_R_16F, CUDA_R_16BF };
enum cublasOperation_t { CUBLAS_OP_N, CUBLAS_OP_T };
enum { CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT };
namespace at::cuda {
inline int getCurrentCUDABlasHandle() { return 0; }
inline cudaStream_t getCurrentCUDAStream(int64_t) { return 0; }
inline cudaDataType_t ScalarTypeToCudaDataType(at::ScalarType type) {
  return type == at::kFloat ? CUDA_R_32F : type == at::kHalf ? CUDA_R_16F : CUDA_R_16BF;
}
}  // namespace at::cuda
namespace c10::cuda {
struct CUDAGuard { CUDAGuard(at::Device) {} };
}  // namespace c10::cuda

// One number of a column-major matrix, which may be transposed.
inline double element(const void* x, cudaDataType_t type, cublasOperation_t as, int64_t stride, int64_t i, int64_t j) {
  int64_t at = as == CUBLAS_OP_N ? i + j * stride : j + i * stride;
  if (type == CUDA_R_32F) return static_cast<const float*>(x)[at];
  if (type == CUDA_R_16F) return static_cast<const at::Half*>(x)[at];
  return static_cast<const at::BFloat16*>(x)[at];
}

// c [m, n] = alpha·a [m, k]·b [k, n] + beta·c, as cuBLAS documents cublasGemmEx.
inline void cublasGemmEx(int, cublasOperation_t as_a, cublasOperation_t as_b, int64_t m, int64_t n, int64_t k,
                         const float* alpha, const void* a, cudaDataType_t type_a, int64_t lda, const void* b,
                         cudaDataType_t type_b, int64_t ldb, const float* beta, float* c, cudaDataType_t, int64_t ldc,
                         int, int) {
  TORCH_CHECK(m > 0 && n > 0 && ldc >= m && lda >= (as_a == CUBLAS_OP_N ? m : k) &&
                  ldb >= (as_b == CUBLAS_OP_N ? k : n),
              "cublasGemmEx would refuse these sizes and strides");
  for (int64_t i = 0; i < m; i++)
    for (int64_t j = 0; j < n; j++) {
      double sum = 0;
      for (int64_t l = 0; l < k; l++) sum += element(a, type_a, as_a, lda, i, l) * element(b, type_b, as_b, ldb, l, j);
      c[i + j * ldc] = *alpha * sum + (*beta ? *beta * c[i + j * ldc] : 0);
    }
}
