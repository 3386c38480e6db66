// Which kernel takes which part of a message.
#include <algorithm>
#include <type_traits>

#include "kernels/all_reduce.h"
#include "kernels/all_reduce_kernel.cuh"
#include "kernels/device.cuh"
#include "kernels/device_attributes.h"
#include "kernels/exchange.cuh"

namespace lockstep::kernels {
namespace {

using all_reduce::AllReduceKernel;
using all_reduce::kMaxCluster;
using all_reduce::kMaxThreads;
using all_reduce::kStretch;
using all_reduce::kTileVectors;
using all_reduce::Params;

// From here on the norm is a kernel of its own: blocks that wait for the rest of
// their row hold up a large message.
constexpr size_t kNormApartBytes = 2 << 20;

using Kernel = void (*)(Params);

// How a launch goes about it.
struct Form {
  bool two_shot = false, rows = false, pushed = false;
};

template <typename T, int kMax>
Kernel KernelOf(const Form& form) {
  const auto [two_shot, rows, pushed] = form;
  if (pushed) return AllReduceKernel<T, kMax, false, true, true>;
  if (two_shot) {
    return rows ? AllReduceKernel<T, kMax, true, true> : AllReduceKernel<T, kMax, true, false>;
  }
  return rows ? AllReduceKernel<T, kMax, false, true> : AllReduceKernel<T, kMax, false, false>;
}
template <typename T>
Kernel KernelOf(int size, const Form& form) {
  if (size <= 2) return KernelOf<T, 2>(form);
  if (size <= 4) return KernelOf<T, 4>(form);
  return KernelOf<T, 8>(form);
}
Kernel KernelOf(Type type, int size, const Form& form) {
  switch (type) {
    case Type::kF32:
      return KernelOf<float>(size, form);
    case Type::kF16:
      return KernelOf<__half>(size, form);
    case Type::kBF16:
      return KernelOf<__nv_bfloat16>(size, form);
    case Type::kE4M3:
      break;
  }
  return nullptr;
}

// How a message lies over rows and vectors.
struct Shape {
  bool has_rows = false;
  int rows = 0, row_vectors = 0, tail_elements = 0;
  size_t total_vectors = 0;
  int cluster = 1;
};

// Of the width alone: see the head of this file.
int ClusterFor(int row_vectors) {
  if (!HasClusters()) return 1;
  if (row_vectors <= 128) return 1;
  if (row_vectors <= 256) return 2;
  return row_vectors <= 1024 ? 4 : kMaxCluster;
}

// False: no path takes it.
bool ShapeOf(const AllReduceArgs& args, Shape* shape) {
  if (args.type == Type::kE4M3 || args.rows <= 0 || args.hidden <= 0) return false;
  const size_t elements = 16 / TypeBytes(args.type);
  shape->has_rows = args.norm_weight != nullptr || args.bias != nullptr ||
                    args.residual != nullptr || args.residual_out != nullptr ||
                    args.slots != nullptr;
  const size_t total = size_t(args.rows) * args.hidden;
  if (shape->has_rows) {
    shape->rows = args.rows;
    shape->row_vectors = static_cast<int>(args.hidden / elements);
    shape->cluster = args.blocks_per_row > 0 ? args.blocks_per_row : ClusterFor(shape->row_vectors);
    if (args.hidden % elements != 0 || shape->row_vectors > shape->cluster * kMaxThreads) {
      return false;
    }
  } else {
    shape->row_vectors = kTileVectors;
    shape->rows =
        static_cast<int>((total + elements * kTileVectors - 1) / (elements * kTileVectors));
    shape->tail_elements = static_cast<int>(total % elements);
  }
  shape->total_vectors = (total + elements - 1) / elements;
  return true;
}

int OwnedVectors(const Shape& shape, int size) {
  return static_cast<int>(RoundUpTo(shape.row_vectors, size_t(kStretch) * size) / size);
}

// How many rows one launch takes; more of them follow one another.
int RowsAtOnce(const Shape& shape, const ExchangeLayout& layout, int size, AllReducePath path,
               bool pushed) {
  const size_t row = size_t(shape.row_vectors) * 16;
  size_t rows = 0;
  if (path == AllReducePath::kOneShot)
    rows = (pushed ? PartsOf(layout, size).one_shot_source : layout.one_shot_bytes) / row;
  if (path == AllReducePath::kTwoShot) {
    rows = std::min(layout.two_shot_bytes / row,
                    PartsOf(layout, size).scatter_source / 16 / OwnedVectors(shape, size));
  }
  return static_cast<int>(std::min<size_t>(rows, shape.rows));
}

bool Aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

Params ParamsOf(const Peers& peers, const ExchangeLayout& layout, bool two_shot) {
  const RegionParts parts = PartsOf(layout, peers.size);
  Params p = {};
  for (int r = 0; r < peers.size; ++r) p.base[r] = peers.base[r] + layout.offset;
  p.rank = peers.rank;
  p.size = peers.size;
  p.limits = LimitsOf(peers);
  p.clock = peers.clock;
  p.counter = reinterpret_cast<uint64_t*>(
      p.base[p.rank] + (two_shot ? RegionParts::kTwoShotCounter : RegionParts::kOneShotCounter));
  const size_t source = two_shot ? parts.scatter_source : parts.one_shot_source;
  p.receive = static_cast<uint32_t>((two_shot ? parts.scatter : parts.one_shot) / 16);
  p.receive_source = static_cast<uint32_t>(source / 16);
  p.receive_slot = p.receive_source * peers.size;
  p.sums = static_cast<uint32_t>(parts.sums / 16);
  p.sums_slot = static_cast<uint32_t>(parts.sums_slot / 16);
  return p;
}

// Rows [first, first + rows) of the message.
void SetRows(const AllReduceArgs& args, const Shape& shape, int first, int rows, Params* p) {
  const size_t skip = size_t(first) * shape.row_vectors * 16;
  p->rows = rows;
  p->row_vectors = shape.row_vectors;
  p->hidden = args.hidden;
  p->cluster = shape.cluster;
  p->total_vectors = static_cast<uint32_t>(std::min(
      size_t(rows) * shape.row_vectors, shape.total_vectors - size_t(first) * shape.row_vectors));
  p->tail_elements = first + rows == shape.rows ? shape.tail_elements : 0;
  p->owned_vectors = OwnedVectors(shape, p->size);
  p->in = Advance(args.in, skip);
  p->out = Advance(args.out, skip);
  p->bias = args.bias;
  p->residual = Advance(args.residual, skip);
  p->residual_out = Advance(args.residual_out, skip);
  p->norm_weight = args.norm_weight;
  p->eps = args.eps;
  p->plus_one = args.plus_one;
  p->slots = args.slots == nullptr ? nullptr : args.slots + first;
}

cudaError_t Run(const Launch& launch, const AllReduceArgs& args, const Shape& shape, bool two_shot,
                const Params& p) {
  const Form form = {.two_shot = two_shot, .rows = shape.has_rows, .pushed = args.pushed};
  const int most =
      args.max_blocks > 0 ? std::min(args.max_blocks, kMaxExchangeBlocks) : kMaxExchangeBlocks;
  const int rows = std::max(1, std::min(p.rows, most / shape.cluster));
  const size_t threads = RoundUpTo((shape.row_vectors + shape.cluster - 1) / shape.cluster, 32);
  return LaunchKernel(launch, KernelOf(args.type, p.size, form), dim3(rows * shape.cluster),
                      dim3(static_cast<unsigned>(threads)), 0, static_cast<unsigned>(shape.cluster),
                      p);
}

// The norm alone, of what an exchange left in residual_out.
cudaError_t RunNorm(const Launch& launch, const AllReduceArgs& args, const Shape& shape, Params p) {
  p.size = 1;
  // Not an exchange: it must not take a slot's turn.
  p.counter = reinterpret_cast<uint64_t*>(p.base[p.rank] + RegionParts::kNoCounter);
  p.base[0] = p.base[p.rank];
  p.rank = 0;
  AllReduceArgs norm = args;
  norm.in = args.residual_out;
  norm.pushed = false;
  norm.bias = norm.residual = nullptr;
  norm.residual_out = nullptr;
  SetRows(norm, shape, 0, shape.rows, &p);
  return Run(launch, norm, shape, false, p);
}

}  // namespace

AllReducePath ChooseAllReduce(const AllReduceArgs& args, const ExchangeLayout& layout, int size) {
  Shape shape;
  if (!ShapeOf(args, &shape)) return AllReducePath::kNone;
  if (args.pushed) {
    // What is passed over as padding would stay behind in its slot.
    const bool fits = shape.has_rows && args.slots == nullptr &&
                      RowsAtOnce(shape, layout, size, AllReducePath::kOneShot, true) >= shape.rows;
    return fits ? AllReducePath::kOneShot : AllReducePath::kNone;
  }
  if (shape.total_vectors * 16 <= layout.one_shot_bytes) return AllReducePath::kOneShot;
  // For two ranks a second crossing saves no bytes.
  const AllReducePath path = size > 2 ? AllReducePath::kTwoShot : AllReducePath::kOneShot;
  return RowsAtOnce(shape, layout, size, path, false) > 0 ? path : AllReducePath::kNone;
}

cudaError_t AllReduce(const Launch& launch, const Peers& peers, const ExchangeLayout& layout,
                      AllReducePath path, const AllReduceArgs& args) {
  if (args.rows == 0) return cudaSuccess;
  Shape shape;
  if (peers.size < 1 || peers.size > kMaxPeers || !ShapeOf(args, &shape)) {
    return cudaErrorInvalidValue;
  }
  const int at_once = RowsAtOnce(shape, layout, peers.size, path, args.pushed);
  if (at_once == 0) return cudaErrorInvalidValue;
  if (args.pushed && path != ChooseAllReduce(args, layout, peers.size))
    return cudaErrorInvalidValue;
  for (const void* p : {args.in, static_cast<const void*>(args.out), args.bias, args.residual,
                        static_cast<const void*>(args.residual_out), args.norm_weight}) {
    if (!Aligned(p)) return cudaErrorMisalignedAddress;
  }
  const bool two_shot = path == AllReducePath::kTwoShot;
  Params p = ParamsOf(peers, layout, two_shot);
  const bool norm_apart = args.norm_weight != nullptr && args.residual_out != nullptr &&
                          shape.total_vectors * 16 >= kNormApartBytes;
  AllReduceArgs exchange = args;
  if (norm_apart) {
    exchange.norm_weight = nullptr;
    exchange.out = nullptr;
  }
  for (int first = 0; first < shape.rows; first += at_once) {
    SetRows(exchange, shape, first, std::min(at_once, shape.rows - first), &p);
    const cudaError_t error = Run(launch, exchange, shape, two_shot, p);
    if (error != cudaSuccess) return error;
  }
  return norm_apart ? RunNorm(launch, args, shape, p) : cudaSuccess;
}

cudaError_t LoadAllReduceKernels() {
  for (const Type type : {Type::kF32, Type::kF16, Type::kBF16}) {
    for (const int size : {2, 4, 8}) {
      for (const Form& form : {Form{}, Form{.two_shot = true}, Form{.rows = true},
                               Form{.two_shot = true, .rows = true}, Form{.pushed = true}}) {
        cudaFuncAttributes attributes;
        const cudaError_t error = cudaFuncGetAttributes(&attributes, KernelOf(type, size, form));
        if (error != cudaSuccess) return error;
      }
    }
  }
  return cudaSuccess;
}

}  // namespace lockstep::kernels
