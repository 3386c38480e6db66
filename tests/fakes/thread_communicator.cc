#include "tests/fakes/thread_communicator.h"

#include <condition_variable>
#include <cstring>
#include <functional>
#include <mutex>
#include <string>

#include "absl/strings/str_cat.h"

namespace lockstep {
namespace {

// One call of all ranks: each deposits what it brings, the last to arrive
// combines, all leave with the outcome.
class Meeting {
 public:
  explicit Meeting(int size) : size_(size), buffers_(size), calls_(size) {}

  absl::Status Meet(int rank, const std::string& call, void* buffer,
                    absl::FunctionRef<void(const std::vector<void*>&)> combine) {
    std::unique_lock lock(mutex_);
    if (!status_.ok()) return status_;
    buffers_[rank] = buffer;
    calls_[rank] = call;
    const uint64_t meeting = meeting_;
    if (++arrived_ == size_) {
      for (const std::string& other : calls_) {
        if (other != call) {
          status_ = absl::InternalError(absl::StrCat("ranks differ: ", call, " and ", other));
        }
      }
      if (status_.ok()) combine(buffers_);
      arrived_ = 0;
      ++meeting_;
      changed_.notify_all();
    } else {
      changed_.wait(lock, [&] { return meeting_ != meeting || !status_.ok(); });
    }
    return status_;
  }

  void Abort() {
    std::lock_guard lock(mutex_);
    status_.Update(absl::AbortedError("the communicator was aborted"));
    changed_.notify_all();
  }

 private:
  const int size_;
  std::mutex mutex_;
  std::condition_variable changed_;
  absl::Status status_;
  std::vector<void*> buffers_;
  std::vector<std::string> calls_;
  int arrived_ = 0;
  uint64_t meeting_ = 0;
};

class ThreadCommunicator final : public Communicator {
 public:
  ThreadCommunicator(std::shared_ptr<Meeting> meeting, int rank, int size)
      : meeting_(std::move(meeting)), rank_(rank), size_(size) {}

  int rank() const override { return rank_; }
  int size() const override { return size_; }

  absl::Status AllReduceSum(absl::Span<float> values) override {
    Count(values.size() * sizeof(float));
    return meeting_->Meet(rank_, absl::StrCat("AllReduceSum ", values.size()), values.data(),
                          [&](const std::vector<void*>& buffers) {
                            for (size_t i = 0; i < values.size(); ++i) {
                              std::vector<float> level;
                              for (void* b : buffers) level.push_back(static_cast<float*>(b)[i]);
                              while (level.size() > 1) {
                                std::vector<float> next;
                                for (size_t j = 0; j + 1 < level.size(); j += 2) {
                                  next.push_back(level[j] + level[j + 1]);
                                }
                                if (level.size() % 2 == 1) next.push_back(level.back());
                                level = next;
                              }
                              for (void* b : buffers) static_cast<float*>(b)[i] = level[0];
                            }
                          });
  }

  absl::Status Gather(absl::Span<const float> mine, absl::Span<float> all, int root) override {
    Count(mine.size() * sizeof(float));
    if (rank_ == root && all.size() != mine.size() * size_) {
      return absl::InvalidArgumentError("Gather: all is not size() times mine");
    }
    GatherArgs args{mine.data(), all.data()};
    return meeting_->Meet(rank_, absl::StrCat("Gather ", mine.size(), " to ", root), &args,
                          [&](const std::vector<void*>& buffers) {
                            float* to = static_cast<GatherArgs*>(buffers[root])->all;
                            for (size_t r = 0; r < buffers.size(); ++r) {
                              std::memcpy(to + r * mine.size(),
                                          static_cast<GatherArgs*>(buffers[r])->mine,
                                          mine.size() * sizeof(float));
                            }
                          });
  }

  absl::Status Broadcast(absl::Span<std::byte> data, int root) override {
    Count(data.size());
    return meeting_->Meet(rank_, absl::StrCat("Broadcast ", data.size(), " from ", root),
                          data.data(), [&](const std::vector<void*>& buffers) {
                            for (void* b : buffers) {
                              if (b != buffers[root]) std::memcpy(b, buffers[root], data.size());
                            }
                          });
  }

  absl::Status Barrier() override {
    Count(0);
    return meeting_->Meet(rank_, "Barrier", nullptr, [](const std::vector<void*>&) {});
  }

  void Abort() override { meeting_->Abort(); }

 private:
  struct GatherArgs {
    const float* mine;
    float* all;
  };
  void Count(size_t bytes) {
    ++stats_.count;
    if (size_ > 1) stats_.bytes_sent += bytes;
  }

  const std::shared_ptr<Meeting> meeting_;
  const int rank_, size_;
};

}  // namespace

std::vector<std::unique_ptr<Communicator>> MakeThreadCommunicators(int size) {
  auto meeting = std::make_shared<Meeting>(size);
  std::vector<std::unique_ptr<Communicator>> ranks;
  for (int rank = 0; rank < size; ++rank) {
    ranks.push_back(std::make_unique<ThreadCommunicator>(meeting, rank, size));
  }
  return ranks;
}

}  // namespace lockstep
