// Microseconds per all-reduce between processes over loopback.
//
//   bench_collectives [ranks...]        default: 2 4
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <string>
#include <vector>

#include "tests/fakes/exchanges.h"
#include "worker/comm/gloo_communicator.h"

namespace lockstep {
namespace {

int Rank(int rank, int size, const std::string& folder) {
  fakes::FileExchange exchange(folder);
  CommunicatorOptions options;
  options.id = "bench";
  options.rank = rank;
  options.size = size;
  options.bind_address = "127.0.0.1";
  auto comm = MakeGlooCommunicator(options);
  if (const absl::Status joined = comm->Join(exchange); !joined.ok()) {
    std::fprintf(stderr, "rank %d: %s\n", rank, joined.ToString().c_str());
    return 1;
  }
  for (size_t bytes = 1 << 10; bytes <= 4 << 20; bytes *= 4) {
    std::vector<float> values(bytes / sizeof(float), 0.0f);
    const int rounds = static_cast<int>(std::clamp<size_t>((64 << 20) / bytes, 50, 3000));
    std::vector<double> times;
    comm->ResetStats();
    for (int i = 0; i < rounds; ++i) {
      const auto start = std::chrono::steady_clock::now();
      if (!comm->AllReduceSum(absl::MakeSpan(values)).ok()) return 1;
      times.push_back(
          std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start)
              .count());
    }
    if (rank != 0) continue;
    std::sort(times.begin(), times.end());
    const CollectiveStats stats = comm->stats();
    std::printf(
        "%5d ranks %8zu bytes: median %8.1f us, p99 %8.1f us; wait %7.1f transfer %7.1f; %6.2f "
        "GB/s sent\n",
        size, bytes, times[times.size() / 2], times[times.size() * 99 / 100],
        1e-3 * stats.wait_ns / rounds, 1e-3 * stats.transfer_ns / rounds,
        1e-3 * stats.bytes_sent / rounds / times[times.size() / 2]);
    std::fflush(stdout);
  }
  // Whoever drops its communicator resets the connections.
  (void)exchange.Publish("done" + std::to_string(rank), "");
  for (int other = 0; other < size; ++other) {
    (void)exchange.Await("done" + std::to_string(other));
  }
  return 0;
}

int Main(int argc, char** argv) {
  std::vector<int> sizes;
  for (int i = 1; i < argc; ++i) sizes.push_back(std::atoi(argv[i]));
  if (sizes.empty()) sizes = {2, 4};
  int failed = 0;
  for (const int size : sizes) {
    if (size < 1 || size > 64) {
      std::fprintf(stderr, "bench_collectives: ranks must be 1 to 64\n");
      return 2;
    }
    char folder[] = "/tmp/bench_collectives.XXXXXX";
    if (mkdtemp(folder) == nullptr) return 1;
    for (int rank = 0; rank < size; ++rank) {
      if (fork() == 0) _exit(Rank(rank, size, folder));
    }
    for (int status = 0; wait(&status) > 0;) failed |= status;
    std::filesystem::remove_all(folder);
  }
  return failed != 0;
}

}  // namespace
}  // namespace lockstep

int main(int argc, char** argv) { return lockstep::Main(argc, argv); }
