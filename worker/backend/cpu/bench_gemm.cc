// y = x w^T on one thread: the cpu backend's own product against OpenBLAS and
// oneDNN, so that the price of a fixed order of sums is visible.
//
//   bench_gemm [n k]        default: 4096 4096
//
// Each figure is the best of several runs, the libraries taking turns; weights
// come from a ring of matrices larger than the caches.
#include <cblas.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <oneapi/dnnl/dnnl.hpp>
#include <vector>

#include "worker/backend/cpu/gemm.h"
#include "worker/backend/cpu/half.h"

extern "C" void openblas_set_num_threads(int threads);

namespace lockstep::cpu {
namespace {

constexpr int kRing = 6;

double Seconds(const std::function<void(int)>& run, int calls) {
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < calls; ++i) run(i % kRing);
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() / calls;
}

struct Contender {
  const char* name;
  int64_t weight_bytes;  // an element
  std::function<void(int)> run;
  double best = 1e9;
};

class OneDnn {
 public:
  using Dims = dnnl::memory::dims;
  OneDnn(int64_t m, int64_t n, int64_t k, dnnl::memory::data_type type, float* x, void* w, float* y)
      : engine_(dnnl::engine::kind::cpu, 0), stream_(engine_) {
    using Tag = dnnl::memory::format_tag;
    const dnnl::memory::desc xd({m, k}, dnnl::memory::data_type::f32, Tag::ab);
    const dnnl::memory::desc yd({m, n}, dnnl::memory::data_type::f32, Tag::ab);
    const dnnl::memory::desc wd({k, n}, type, Tag::ba);
    // 16-bit weights take 16-bit inputs there: x is converted once, outside the timing.
    const dnnl::memory::desc xt({m, k}, type, Tag::ab);
#if DNNL_VERSION_MAJOR >= 3  // Ubuntu 24.04's; Debian 12 has 2.7
    primitive_ = dnnl::matmul({engine_, xt, wd, yd});
#else
    primitive_ = dnnl::matmul({{xt, wd, yd}, engine_});
#endif
    x_ = dnnl::memory(xt, engine_);
    dnnl::memory from(xd, engine_, x);
    dnnl::reorder(from, x_).execute(stream_, from, x_);
    y_ = dnnl::memory(yd, engine_, y);
    const size_t bytes = wd.get_size();
    for (int i = 0; i < kRing; ++i) {
      w_.emplace_back(wd, engine_, static_cast<std::byte*>(w) + i * bytes);
    }
    stream_.wait();
  }
  void Run(int i) {
    primitive_.execute(stream_,
                       {{DNNL_ARG_SRC, x_}, {DNNL_ARG_WEIGHTS, w_[i]}, {DNNL_ARG_DST, y_}});
    stream_.wait();
  }

 private:
  dnnl::engine engine_;
  dnnl::stream stream_;
  dnnl::matmul primitive_;
  dnnl::memory x_, y_;
  std::vector<dnnl::memory> w_;
};

void Bench(int64_t m, int64_t n, int64_t k) {
  const Kernels& kernels = BestKernels();
  ThreadPool pool(1);
  GemmWorkspace workspace(kernels, 1);
  std::vector<float> x(m * k), y(m * n), w(kRing * n * k);
  std::vector<BFloat16> w16(w.size());
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 17) * 0.1f - 0.8f;
  for (size_t i = 0; i < w.size(); ++i) {
    w[i] = static_cast<float>((i * 2654435761u >> 16) % 255) * 0.01f - 1.27f;
    w16[i] = ToBFloat16(w[i]);
  }
  const auto own = [&](int i, void* weights, DType dtype, int64_t slices) {
    const int64_t bytes = n * k * DTypeBytes(dtype);
    const WeightTensor tensor{static_cast<std::byte*>(weights) + i * bytes, dtype, n, k};
    Gemm(kernels, pool, workspace, x.data(), k, m, tensor, slices, y.data(), n);
  };
  OneDnn dnnl32(m, n, k, dnnl::memory::data_type::f32, x.data(), w.data(), y.data());
  OneDnn dnnl16(m, n, k, dnnl::memory::data_type::bf16, x.data(), w16.data(), y.data());
  Contender contenders[] = {
      {"lockstep float32", 4, [&](int i) { own(i, w.data(), DType::kFloat32, 1); }},
      {"lockstep float32, 8 slices", 4, [&](int i) { own(i, w.data(), DType::kFloat32, 8); }},
      {"OpenBLAS float32", 4,
       [&](int i) {
         const float* weights = w.data() + i * n * k;
         if (m == 1) {
           cblas_sgemv(CblasRowMajor, CblasNoTrans, static_cast<int>(n), static_cast<int>(k), 1.0f,
                       weights, static_cast<int>(k), x.data(), 1, 0.0f, y.data(), 1);
         } else {
           cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, static_cast<int>(m),
                       static_cast<int>(n), static_cast<int>(k), 1.0f, x.data(),
                       static_cast<int>(k), weights, static_cast<int>(k), 0.0f, y.data(),
                       static_cast<int>(n));
         }
       }},
      {"oneDNN float32", 4, [&](int i) { dnnl32.Run(i); }},
      {"lockstep bfloat16", 2, [&](int i) { own(i, w16.data(), DType::kBFloat16, 1); }},
      {"oneDNN bfloat16", 2, [&](int i) { dnnl16.Run(i); }},
  };
  const int calls = m <= 8 ? 2 * kRing : m <= 64 ? kRing : 2;
  for (int round = 0; round < 5; ++round) {
    for (Contender& c : contenders) c.best = std::min(c.best, Seconds(c.run, calls));
  }
  const double best32 = std::min(contenders[2].best, contenders[3].best);
  for (const Contender& c : contenders) {
    const double library = c.weight_bytes == 4 ? best32 : contenders[5].best;
    std::printf("%4ld  %-27s %8.1f GFLOP/s %6.1f GB/s of weights   %5.2f x the faster library\n",
                static_cast<long>(m), c.name, 2e-9 * static_cast<double>(m * n * k) / c.best,
                1e-9 * static_cast<double>(n * k * c.weight_bytes) / c.best, library / c.best);
  }
}

int Main(int argc, char** argv) {
  // oneDNN's threads, before its first use.
  setenv("OMP_NUM_THREADS", "1", 1);
  openblas_set_num_threads(1);
  const int64_t n = argc > 2 ? std::atol(argv[1]) : 4096, k = argc > 2 ? std::atol(argv[2]) : 4096;
  std::printf("n %ld, k %ld, one thread, %s\n   m\n", static_cast<long>(n), static_cast<long>(k),
              BestKernels().name);
  for (const int64_t m : {1, 8, 64, 512}) Bench(m, n, k);
  return 0;
}

}  // namespace
}  // namespace lockstep::cpu

int main(int argc, char** argv) { return lockstep::cpu::Main(argc, argv); }
