#include "cli/bench/load_client.h"

#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <unordered_set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "cli/open_channel.h"
#include "proto/inference.grpc.pb.h"

namespace lockstep {
namespace {

constexpr int kStreamsPerLane = 32;
constexpr int kMaxMessageBytes = 64 << 20;

std::shared_ptr<grpc::Channel> OwnConnection(const std::string& address,
                                             const ServerAccess& access) {
  grpc::ChannelArguments args;
  args.SetMaxReceiveMessageSize(kMaxMessageBytes);
  // Channels to one address share a connection unless told not to.
  args.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  // What a retry would need is kept ready at a cost on every message.
  args.SetInt(GRPC_ARG_ENABLE_RETRIES, 0);
  return OpenChannel(address, access, args);
}

}  // namespace

int LanesFor(int64_t streams) {
  const int64_t processors = std::max(1u, std::thread::hardware_concurrency());
  const int64_t wanted = (streams + kStreamsPerLane - 1) / kStreamsPerLane;
  return static_cast<int>(std::clamp<int64_t>(wanted, 1, processors));
}

struct LoadClient::Lane {
  std::shared_ptr<grpc::Channel> channel;
  std::unique_ptr<v1::Inference::Stub> stub;
  grpc::CompletionQueue queue;
  std::thread thread;
  std::mutex mutex;
  std::condition_variable idle;
  std::unordered_set<Call*> calls;  // under way; guarded by mutex

  void Loop();
};

// One operation is under way at any time, so the call itself is the only tag.
class LoadClient::Call {
 public:
  Call(Lane* lane, const v1::GenerateRequest& request, int64_t due_ns, Done done, Observe observe)
      : done_(std::move(done)), observe_(std::move(observe)) {
    log_.arrivals.reserve(std::max(1u, request.sampling().max_tokens()));
    if (request.sampling().ignore_eos()) log_.asked_tokens = request.sampling().max_tokens();
    reader_ = lane->stub->PrepareAsyncGenerateStream(&context_, request, &lane->queue);
    log_.sent_ns = NowNs();
    log_.due_ns = due_ns == 0 ? log_.sent_ns : due_ns;
  }

  void Start() {
    // gRPC's queue hands the call over to the lane's thread; said once more
    // here, where race checkers that cannot see into gRPC read it.
    state_.store(State::kStarting, std::memory_order_release);
    reader_->StartCall(this);
  }
  void Cancel() { context_.TryCancel(); }

  // True: another operation is under way. False: the stream has ended.
  bool Proceed(bool ok, int64_t now_ns) {
    switch (state_.load(std::memory_order_acquire)) {
      case State::kStarting:
        state_.store(State::kReading, std::memory_order_relaxed);
        reader_->Read(&event_, this);
        return true;
      case State::kReading:
        if (ok) {
          Note(now_ns);
          reader_->Read(&event_, this);
        } else {
          state_.store(State::kEnding, std::memory_order_relaxed);
          reader_->Finish(&status_, this);
        }
        return true;
      case State::kEnding:
        break;
    }
    log_.end_ns = now_ns;
    log_.status =
        absl::Status(static_cast<absl::StatusCode>(status_.error_code()), status_.error_message());
    return false;
  }

  void Report() { done_(std::move(log_)); }

 private:
  enum class State { kStarting, kReading, kEnding };

  void Note(int64_t now_ns) {
    if (observe_) observe_(event_);
    if (event_.has_chunk()) {
      const auto tokens = static_cast<uint32_t>(event_.chunk().token_ids_size());
      if (tokens == 0) return;
      log_.output_tokens += tokens;
      log_.arrivals.push_back({now_ns, tokens});
    } else if (event_.has_prompt()) {
      log_.prompt_tokens = event_.prompt().prompt_tokens();
      log_.cached_tokens = event_.prompt().cached_tokens();
    }
  }

  const Done done_;
  const Observe observe_;
  grpc::ClientContext context_;
  std::unique_ptr<grpc::ClientAsyncReader<v1::GenerateEvent>> reader_;
  v1::GenerateEvent event_;
  grpc::Status status_;
  std::atomic<State> state_ = State::kStarting;
  RequestLog log_;
};

void LoadClient::Lane::Loop() {
  void* tag = nullptr;
  bool ok = false;
  while (queue.Next(&tag, &ok)) {
    Call* const call = static_cast<Call*>(tag);
    if (call->Proceed(ok, NowNs())) continue;
    call->Report();  // may send the next
    {
      std::lock_guard lock(mutex);
      calls.erase(call);
      if (calls.empty()) idle.notify_all();
    }
    delete call;
  }
}

LoadClient::LoadClient(const std::string& address, int lanes, const ServerAccess& access) {
  for (int i = 0; i < std::max(lanes, 1); ++i) {
    auto lane = std::make_unique<Lane>();
    lane->channel = OwnConnection(address, access);
    lane->stub = v1::Inference::NewStub(lane->channel);
    lane->thread = std::thread([lane = lane.get()] { lane->Loop(); });
    lanes_.push_back(std::move(lane));
  }
}

LoadClient::~LoadClient() {
  Cancel();
  // A queue that is shut down takes no operation, and an ending call has one to come.
  for (auto& lane : lanes_) {
    std::unique_lock lock(lane->mutex);
    lane->idle.wait(lock, [&] { return lane->calls.empty(); });
    lane->queue.Shutdown();
  }
  for (auto& lane : lanes_) lane->thread.join();
}

absl::Status LoadClient::Connect(int64_t timeout_ms) {
  const auto until = std::chrono::system_clock::now() + std::chrono::milliseconds(timeout_ms);
  for (auto& lane : lanes_) {
    if (!lane->channel->WaitForConnected(until)) {
      return absl::UnavailableError(absl::StrCat("no connection within ", timeout_ms, " ms"));
    }
  }
  return absl::OkStatus();
}

void LoadClient::Send(const v1::GenerateRequest& request, int64_t due_ns, Done done,
                      Observe observe) {
  Lane* const lane = lanes_[next_lane_++ % lanes_.size()].get();
  Call* const call = new Call(lane, request, due_ns, std::move(done), std::move(observe));
  std::lock_guard lock(lane->mutex);
  lane->calls.insert(call);
  if (cancelled_) call->Cancel();  // before it can be answered
  call->Start();
}

std::vector<RequestLog> LoadClient::RunAll(const std::vector<v1::GenerateRequest>& requests) {
  std::vector<RequestLog> logs(requests.size());
  std::mutex mutex;
  std::condition_variable changed;
  size_t ended = 0;
  for (size_t i = 0; i < requests.size(); ++i) {
    Send(requests[i], 0, [&, i](RequestLog log) {
      std::lock_guard lock(mutex);
      logs[i] = std::move(log);
      ++ended;
      changed.notify_one();
    });
  }
  std::unique_lock lock(mutex);
  changed.wait(lock, [&] { return ended == requests.size(); });
  return logs;
}

void LoadClient::Cancel() {
  cancelled_ = true;
  for (auto& lane : lanes_) {
    std::lock_guard lock(lane->mutex);
    for (Call* call : lane->calls) call->Cancel();
  }
}

}  // namespace lockstep
