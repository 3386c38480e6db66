// A block a row. At the owner: the others' vectors are polled for, summed, normed over the block,
// stored and pushed. Elsewhere: the row is pushed, and what it became is polled for.
#include <algorithm>
#include <type_traits>

#include "kernels/device.cuh"
#include "kernels/exchange.cuh"
#include "kernels/row_reduce.h"
#include "kernels/vector.cuh"

namespace lockstep::kernels {
namespace {

constexpr int kMaxThreads = 512, kMaxVectors = 2'048;

struct Params {
  std::byte* base[kMaxPeers];  // of this part of each rank's region
  int rank, size;
  WaitLimits limits;
  uint64_t* counter;
  size_t slot_bytes, source_bytes, gathered, scales;  // gathered and scales: from a slot's begin
  size_t row_bytes;                                   // of a row in its place
  CollectiveClock* clock;
  RowReduceArgs a;
};

template <typename T>
constexpr int kN = 16 / sizeof(T);

template <typename T>
__device__ __forceinline__ void Add(uint4 v, float (&sum)[kN<T>]) {
  float f[kN<T>];
  Unpack(Packed<T, kN<T>>{v}, f);
#pragma unroll
  for (int e = 0; e < kN<T>; ++e) sum[e] += f[e];
}

// What a thread has of a row that has been made, 16, 8 or 4 bytes, is taken away where it came.
__device__ __forceinline__ void Empty(uint4* at) { *at = NothingYet(); }
__device__ __forceinline__ void Empty(uint2* at) { *at = make_uint2(kNothingYet, kNothingYet); }
__device__ __forceinline__ void Empty(uint32_t* at) { *at = kNothingYet; }

// kPieces vectors a thread. Made: what one becomes, 8 or 4 bytes where it is e4m3.
template <typename T, int kMax, int kPieces, bool kE4m3>
__global__ void __launch_bounds__(kMaxThreads) RowReduceKernel(const __grid_constant__ Params p) {
  using Made =
      std::conditional_t<!kE4m3, uint4, std::conditional_t<sizeof(T) == 2, uint2, uint32_t>>;
  __shared__ float scratch[2][32];
  const RowReduceArgs& a = p.a;
  const int vectors = a.hidden / kN<T>;
  TriggerDependents();
  uint4 weight[kPieces] = {}, bias[kPieces] = {};
  const auto place = [&](int j) {
    return j * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
  };
#pragma unroll
  for (int j = 0; j < kPieces; ++j) {
    if (place(j) >= vectors) continue;
    weight[j] = __ldg(static_cast<const uint4*>(a.norm_weight) + place(j));
    if (a.bias != nullptr) bias[j] = __ldg(static_cast<const uint4*>(a.bias) + place(j));
  }
  WaitForPrevious();
  const uint64_t exchange = ExchangeNumber(p.counter);
  const size_t slot = (exchange & 1) * p.slot_bytes;
  const int row = static_cast<int>(blockIdx.x);
  const bool padding = a.slots != nullptr && __ldcg(a.slots + row) < 0;
  // Row 0 always travels: every exchange must hear from every rank.
  const auto reduce = [&] {
    if (padding && row != 0) return;
    const int owner = row % p.size;
    const size_t begin = size_t(row) * vectors;
    const bool timed = row == 0 && threadIdx.x == 0 && p.clock != nullptr;
    const uint64_t sent_ns = timed ? DeviceClockNs() : 0;
    const auto gathered = [&](int rank) {
      return reinterpret_cast<Made*>(p.base[rank] + slot + p.gathered + row * p.row_bytes);
    };
    const auto scale_at = [&](int rank) {
      return reinterpret_cast<uint32_t*>(p.base[rank] + slot + p.scales) + row;
    };
    const auto store = [&](int v, Made made) {
      if (padding) return;
      if constexpr (kE4m3) {
        reinterpret_cast<Made*>(static_cast<std::byte*>(a.quantized.values))[begin + v] = made;
      } else {
        static_cast<uint4*>(a.normed)[begin + v] = made;
      }
    };
    const auto inbox = [&](int at, int source) {
      return reinterpret_cast<uint4*>(p.base[at] + slot + source * p.source_bytes +
                                      row / p.size * p.row_bytes);
    };
    if (owner != p.rank) {
      uint4* const to = inbox(owner, p.rank);
#pragma unroll
      for (int j = 0; j < kPieces; ++j) {
        if (place(j) < vectors) {
          const uint4 mine = __ldcg(static_cast<const uint4*>(a.in) + begin + place(j));
          StoreSystem(to + place(j), Sendable(mine));
        }
      }
      PeerWaiter waiter(p.limits, PeerWait::kGather, exchange);
      const auto await = [&](auto* at) {
        auto v = LoadSystem(at);
        while (!Arrived(v) && !waiter.Over(owner)) v = LoadSystem(at);
        Empty(at);
        return v;
      };
#pragma unroll
      for (int j = 0; j < kPieces; ++j) {
        if (place(j) < vectors) store(place(j), await(gathered(p.rank) + place(j)));
      }
      if (kE4m3 && threadIdx.x == 0) {
        const uint32_t scale = await(scale_at(p.rank));
        if (!padding) a.quantized.scales[row] = __uint_as_float(scale);
      }
      if (timed) AddTo(&p.clock->wait_ns, sent_ns, DeviceClockNs());
      return;
    }
    float v[kPieces][kN<T>];
    float squares = 0.0f;
    PeerWaiter waiter(p.limits, PeerWait::kScatter, exchange);
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
      if (place(j) >= vectors) continue;
      const size_t at = begin + place(j);
      const uint4 mine = __ldcg(static_cast<const uint4*>(a.in) + at);
      const uint4 residual = __ldcg(static_cast<const uint4*>(a.residual) + at);
      uint4 got[kMax];
      for (;;) {
        int missing = -1;
#pragma unroll
        for (int r = 0; r < kMax; ++r) {
          if (r >= p.size) continue;
          got[r] = r == p.rank ? mine : LoadSystem(inbox(p.rank, r) + place(j));
        }
#pragma unroll
        for (int r = 0; r < kMax; ++r) {
          if (r < p.size && r != p.rank && !Arrived(got[r])) missing = r;
        }
        if (missing < 0 || waiter.Over(missing)) break;
      }
#pragma unroll
      for (int r = 0; r < kMax; ++r) {
        if (r < p.size && r != p.rank) Empty(inbox(p.rank, r) + place(j));
      }
      Unpack(Packed<T, kN<T>>{got[0]}, v[j]);
#pragma unroll
      for (int r = 1; r < kMax; ++r) {
        if (r < p.size) Add<T>(got[r], v[j]);
      }
      if (a.bias != nullptr) Add<T>(bias[j], v[j]);
      Add<T>(residual, v[j]);
      const Packed<T, kN<T>> rounded = Pack<T, kN<T>>(v[j]);
      if (!padding) static_cast<uint4*>(a.residual)[at] = rounded.raw;
      Unpack(rounded, v[j]);
#pragma unroll
      for (int e = 0; e < kN<T>; ++e) squares = fmaf(v[j][e], v[j][e], squares);
    }
    if (timed) AddTo(&p.clock->wait_ns, sent_ns, DeviceClockNs());
    squares = BlockSum(squares, scratch[0]);
    const float scale = rsqrtf(squares / static_cast<float>(a.hidden) + a.eps);
    float max = 0.0f;
    uint4 normed[kPieces];
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
      if (place(j) >= vectors) continue;
      float w[kN<T>];
      Unpack(Packed<T, kN<T>>{weight[j]}, w);
#pragma unroll
      for (int e = 0; e < kN<T>; ++e) v[j][e] *= scale * (a.plus_one ? w[e] + 1.0f : w[e]);
      const Packed<T, kN<T>> rounded = Pack<T, kN<T>>(v[j]);
      normed[j] = rounded.raw;
      Unpack(rounded, v[j]);
#pragma unroll
      for (int e = 0; e < kN<T>; ++e) max = fmaxf(max, fabsf(v[j][e]));
    }
    const auto send = [&](int at, Made made) {
      made = Sendable(made);
#pragma unroll
      for (int d = 1; d < kMax; ++d) {
        if (d >= p.size) break;
        const int peer = p.rank + d < p.size ? p.rank + d : p.rank + d - p.size;
        StoreSystem(gathered(peer) + at, made);
      }
      store(at, made);
    };
    if constexpr (!kE4m3) {
#pragma unroll
      for (int j = 0; j < kPieces; ++j) {
        if (place(j) < vectors) send(place(j), normed[j]);
      }
    } else {
      const RowScale to(BlockMax(max, scratch[1]));
#pragma unroll
      for (int j = 0; j < kPieces; ++j) {
        if (place(j) >= vectors) continue;
#pragma unroll
        for (int e = 0; e < kN<T>; ++e) v[j][e] *= to.inverse;
        const Packed<__nv_fp8_e4m3, kN<T>> packed = Pack<__nv_fp8_e4m3, kN<T>>(v[j]);
        send(place(j), packed.raw);
      }
      if (static_cast<int>(threadIdx.x) < p.size) {
        const int peer = static_cast<int>(threadIdx.x);
        const uint32_t bits = Sendable(__float_as_uint(to.scale));
        if (peer != p.rank) StoreSystem(scale_at(peer), bits);
        if (peer == p.rank && !padding) a.quantized.scales[row] = to.scale;
      }
    }
  };
  reduce();
  CountExchange(p.counter);
}

using Pointer = void (*)(Params);
template <typename T, int kMax>
Pointer FindOf(int pieces, bool e4m3) {
  switch (pieces) {
    case 1:
      return e4m3 ? RowReduceKernel<T, kMax, 1, true> : RowReduceKernel<T, kMax, 1, false>;
    case 2:
      return e4m3 ? RowReduceKernel<T, kMax, 2, true> : RowReduceKernel<T, kMax, 2, false>;
    default:
      return e4m3 ? RowReduceKernel<T, kMax, 4, true> : RowReduceKernel<T, kMax, 4, false>;
  }
}
template <typename T>
Pointer FindOf(int size, int pieces, bool e4m3) {
  if (size <= 2) return FindOf<T, 2>(pieces, e4m3);
  if (size <= 4) return FindOf<T, 4>(pieces, e4m3);
  return FindOf<T, 8>(pieces, e4m3);
}
Pointer Find(Type type, int size, int pieces, bool e4m3) {
  switch (type) {
    case Type::kF16:
      return FindOf<__half>(size, pieces, e4m3);
    case Type::kBF16:
      return FindOf<__nv_bfloat16>(size, pieces, e4m3);
    case Type::kF32:
    case Type::kE4M3:
      break;
  }
  return nullptr;
}

int PiecesOf(int vectors) {
  int pieces = 1;
  while (vectors > pieces * kMaxThreads) pieces *= 2;
  return pieces;
}

size_t SourceBytes(int max_rows, size_t row_bytes, int size) {
  return RoundUpTo((max_rows + size - 1) / size * row_bytes, 256);
}
size_t ScalesBytes(int max_rows) { return RoundUpTo(max_rows * sizeof(uint32_t), 256); }
size_t SlotBytes(int max_rows, size_t row_bytes, int size) {
  return SourceBytes(max_rows, row_bytes, size) * size + RoundUpTo(max_rows * row_bytes, 256) +
         ScalesBytes(max_rows);
}

// In whole turns of the ranks, so that a row's owner does not depend on the launch it is in.
int RowsOfLaunch(const RowReduce& reduce) {
  return reduce.max_rows - reduce.max_rows % reduce.peers.size;
}

}  // namespace

size_t RowReduceBytes(int max_rows, size_t row_bytes, int size) {
  return 2 * SlotBytes(max_rows, row_bytes, size);
}

cudaError_t InitRowReduce() {
  for (const Type type : {Type::kF16, Type::kBF16}) {
    for (const int size : {2, 4, 8}) {
      for (const int pieces : {1, 2, 4}) {
        for (const bool e4m3 : {false, true}) {
          cudaFuncAttributes attributes;
          const cudaError_t error =
              cudaFuncGetAttributes(&attributes, Find(type, size, pieces, e4m3));
          if (error != cudaSuccess) return error;
        }
      }
    }
  }
  return cudaSuccess;
}

bool RowReduceTakes(const RowReduceArgs& args, const RowReduce& reduce) {
  if (args.type != Type::kBF16 && args.type != Type::kF16) return false;
  const size_t row_bytes = args.hidden * TypeBytes(args.type);
  return reduce.peers.size > 1 && reduce.peers.size <= kMaxPeers &&
         reduce.max_rows >= reduce.peers.size && row_bytes % 16 == 0 &&
         row_bytes / 16 <= kMaxVectors && row_bytes <= reduce.row_bytes &&
         args.norm_weight != nullptr && args.residual != nullptr &&
         (args.quantized.values == nullptr || args.hidden % 16 == 0);
}

cudaError_t ReduceRows(const Launch& launch, const RowReduce& reduce, const RowReduceArgs& args) {
  if (args.rows == 0) return cudaSuccess;
  if (args.rows < 0 || !RowReduceTakes(args, reduce) ||
      (args.normed == nullptr) == (args.quantized.values == nullptr)) {
    return cudaErrorInvalidValue;
  }
  for (const void* at :
       {args.in, args.bias, static_cast<const void*>(args.residual), args.norm_weight,
        static_cast<const void*>(args.normed), static_cast<const void*>(args.quantized.values)}) {
    if (!Aligned16(at)) return cudaErrorMisalignedAddress;
  }
  const Peers& peers = reduce.peers;
  Params p = {};
  for (int r = 0; r < peers.size; ++r) p.base[r] = peers.base[r] + reduce.offset;
  p.rank = peers.rank;
  p.size = peers.size;
  p.limits = LimitsOf(peers);
  p.counter = reduce.counter;
  p.slot_bytes = SlotBytes(reduce.max_rows, reduce.row_bytes, peers.size);
  p.source_bytes = SourceBytes(reduce.max_rows, reduce.row_bytes, peers.size);
  p.gathered = p.source_bytes * peers.size;
  p.scales = p.slot_bytes - ScalesBytes(reduce.max_rows);
  p.row_bytes = reduce.row_bytes;
  p.clock = peers.clock;
  const int vectors = static_cast<int>(args.hidden * TypeBytes(args.type) / 16);
  const int pieces = PiecesOf(vectors);
  const unsigned threads = ((vectors + pieces - 1) / pieces + 31) / 32 * 32;
  const Pointer kernel = Find(args.type, peers.size, pieces, args.quantized.values != nullptr);
  const size_t row_bytes = args.hidden * TypeBytes(args.type);
  const int most = RowsOfLaunch(reduce);
  for (int first = 0; first < args.rows; first += most) {
    p.a = args;
    p.a.rows = std::min(args.rows - first, most);
    p.a.in = Advance(args.in, first * row_bytes);
    p.a.residual = Advance(args.residual, first * row_bytes);
    p.a.normed = Advance(args.normed, first * row_bytes);
    p.a.quantized.values = Advance(args.quantized.values, size_t(first) * args.hidden);
    if (args.quantized.scales != nullptr) p.a.quantized.scales = args.quantized.scales + first;
    if (args.slots != nullptr) p.a.slots = args.slots + first;
    const cudaError_t error = LaunchKernel(launch, kernel, dim3(p.a.rows), dim3(threads), 0, 1, p);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace lockstep::kernels
