#include "tests/fakes/fake_worker.h"

#include <grpcpp/grpcpp.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <map>
#include <mutex>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/worker.grpc.pb.h"
#include "tests/fakes/fake_slots.h"
#include "wire/codec.h"
#include "wire/protocol.h"

namespace lockstep {
namespace {

using worker::v1::Configure;
using worker::v1::CoordinatorMessage;
using worker::v1::Failure;
using worker::v1::WorkerMessage;

constexpr std::chrono::seconds kPatience{20};

uint32_t UniquePid() {
  static std::atomic<uint32_t> next{100};
  return next++;
}

}  // namespace

struct FakeWorker::Impl {
  explicit Impl(FakeWorkerOptions o) : options(std::move(o)) {
    if (options.pid == 0) options.pid = UniquePid();
    if (options.instance.empty()) options.instance = absl::StrCat("fake-", options.pid);
    if (options.protocol_version == 0) options.protocol_version = wire::kProtocolVersion;
    grpc::ChannelArguments args;
    args.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);  // its own connection
    channel = grpc::CreateCustomChannel(options.address, grpc::InsecureChannelCredentials(), args);
    stub = worker::v1::WorkerPlane::NewStub(channel);
    stream = stub->Attach(&context);
    SayHello();
    reader = std::thread([this] { Read(); });
    heart = std::thread([this] { Beat(); });
  }

  ~Impl() {
    context.TryCancel();
    {
      const std::lock_guard lock(mutex);
      leaving = true;
      frozen = false;
      changed.notify_all();
    }
    reader.join();
    heart.join();
  }

  void SayHello() {
    WorkerMessage message;
    auto& hello = *message.mutable_hello();
    hello.set_protocol_version(options.protocol_version);
    hello.set_build_version("fake");
    hello.set_host(options.host);
    hello.set_pid(options.pid);
    hello.set_instance(options.instance);
    hello.set_backend(options.backend);
    hello.set_device("fake processor");
    hello.set_memory_total_bytes(uint64_t{8} << 30);
    hello.set_memory_free_bytes(uint64_t{4} << 30);
    hello.set_collective_library("fake collectives 1.0");
    hello.set_preferred_rank(options.preferred_rank);
    hello.set_num_cpu_threads(4);
    Write(message);
  }

  void Write(const WorkerMessage& message) {
    const std::lock_guard lock(write_mutex);
    stream->Write(message);
  }

  void Read() {
    CoordinatorMessage message;
    while (stream->Read(&message)) {
      std::unique_lock lock(mutex);
      changed.wait(lock, [this] { return !frozen; });
      if (leaving) break;
      std::vector<WorkerMessage> answers = Take(message);
      changed.notify_all();
      lock.unlock();
      for (const WorkerMessage& answer : answers) Write(answer);
    }
    const grpc::Status status = stream->Finish();
    const std::lock_guard lock(mutex);
    ended = true;
    changed.notify_all();
  }

  // What to answer; with the mutex held.
  std::vector<WorkerMessage> Take(const CoordinatorMessage& message) {
    switch (message.message_case()) {
      case CoordinatorMessage::kConfigure:
        return TakeConfigure(message.configure());
      case CoordinatorMessage::kPlan:
        return TakePlan(message.plan());
      case CoordinatorMessage::kCloseEpoch: {
        closed_epoch = message.close_epoch().epoch();
        slots.reset();
        if (!options.release) return {};
        WorkerMessage released;
        released.mutable_released()->set_epoch(closed_epoch);
        return {released};
      }
      case CoordinatorMessage::kCommKey:
        keys[message.comm_key().key()] = message.comm_key().value();
        return {};
      case CoordinatorMessage::kRefusal:
        refusal = message.refusal().reason();
        return {};
      case CoordinatorMessage::kShutdown:
        shut_down = true;
        return {};
      default:
        return {};
    }
  }

  std::vector<WorkerMessage> TakeConfigure(const Configure& c) {
    configure = c;
    steps = 0;
    plans.clear();
    slots = std::make_unique<FakeSlots>(c.block_size());
    if (!options.load) return {};
    WorkerMessage answer;
    if (!options.load_failure.empty()) {
      Failure& failure = *answer.mutable_failure();
      failure.set_epoch(c.epoch());
      failure.set_code(static_cast<uint32_t>(absl::StatusCode::kDataLoss));
      failure.set_message(options.load_failure);
      failure.set_recoverable(options.load_recoverable);
      return {answer};
    }
    auto& ready = *answer.mutable_ready();
    ready.set_epoch(c.epoch());
    ready.set_rank(c.rank());
    ready.set_weight_bytes(options.weight_bytes);
    ready.set_checkpoint_bytes(options.weight_bytes);
    ready.set_kv_bytes(c.num_kv_blocks() * c.block_size() * 64);
    ready.set_collective_library("fake collectives 1.0");
    ready.set_shard("all of it");
    auto& phase = *ready.add_phases();
    phase.set_name("weights");
    phase.set_seconds(0.01);
    return {answer};
  }

  std::vector<WorkerMessage> TakePlan(const worker::v1::StepPlan& encoded) {
    if (slots == nullptr || encoded.epoch() != configure.epoch()) return {};
    plans.push_back(encoded.SerializeAsString());
    const absl::StatusOr<StepPlan> plan = wire::Decode(encoded);
    if (!plan.ok()) {
      complaint = std::string(plan.status().message());
      return {};
    }
    WorkerMessage answer;
    if (fail_next) {
      *answer.mutable_failure() = *std::exchange(fail_next, nullptr);
      answer.mutable_failure()->set_epoch(plan->epoch);
      answer.mutable_failure()->set_step(plan->step);
      return {answer};
    }
    StepResult result = slots->Run(*plan);
    if (complaint.empty()) complaint = slots->complaint();
    ++steps;
    if (configure.rank() != 0) result.sampled.clear();
    if (lie_about_digest) result.digest ^= 1;
    if (skip_a_collective) --result.num_collectives;
    *answer.mutable_result() = wire::Encode(result);
    if (hold_results) {
      held.push_back(answer);
      return {};
    }
    return {answer};
  }

  void Beat() {
    std::unique_lock lock(mutex);
    while (!leaving && !ended) {
      changed.wait_for(lock, std::chrono::milliseconds(wire::kHeartbeatIntervalMs),
                       [this] { return leaving || ended; });
      if (leaving || ended || frozen) continue;
      WorkerMessage message;
      message.mutable_heartbeat()->set_epoch(configure.epoch());
      lock.unlock();
      Write(message);
      lock.lock();
    }
  }

  template <typename F>
  bool Wait(F condition) {
    std::unique_lock lock(mutex);
    return changed.wait_for(lock, kPatience, condition);
  }

  FakeWorkerOptions options;
  std::shared_ptr<grpc::Channel> channel;
  std::unique_ptr<worker::v1::WorkerPlane::Stub> stub;
  grpc::ClientContext context;
  std::unique_ptr<grpc::ClientReaderWriter<WorkerMessage, CoordinatorMessage>> stream;
  std::mutex write_mutex;

  std::mutex mutex;  // guards what follows
  std::condition_variable changed;
  bool leaving = false, ended = false, frozen = false;
  bool hold_results = false, lie_about_digest = false, skip_a_collective = false;
  std::unique_ptr<Failure> fail_next;
  Configure configure;
  std::unique_ptr<FakeSlots> slots;
  uint64_t closed_epoch = 0, steps = 0;
  std::vector<WorkerMessage> held;
  std::vector<std::string> plans;
  std::map<std::string, std::string> keys;
  std::string refusal, complaint;
  bool shut_down = false;

  std::thread reader, heart;
};

FakeWorker::FakeWorker(FakeWorkerOptions options)
    : impl_(std::make_unique<Impl>(std::move(options))) {}
FakeWorker::~FakeWorker() = default;

void FakeWorker::Die() { impl_->context.TryCancel(); }

void FakeWorker::Freeze() {
  const std::lock_guard lock(impl_->mutex);
  impl_->frozen = true;
}

void FakeWorker::Thaw() {
  const std::lock_guard lock(impl_->mutex);
  impl_->frozen = false;
  impl_->changed.notify_all();
}

void FakeWorker::HoldResults(bool hold) {
  std::vector<WorkerMessage> late;
  {
    const std::lock_guard lock(impl_->mutex);
    impl_->hold_results = hold;
    if (!hold) late.swap(impl_->held);
  }
  for (const WorkerMessage& message : late) impl_->Write(message);
}

void FakeWorker::LieAboutDigest(bool lie) {
  const std::lock_guard lock(impl_->mutex);
  impl_->lie_about_digest = lie;
}

void FakeWorker::SkipACollective(bool skip) {
  const std::lock_guard lock(impl_->mutex);
  impl_->skip_a_collective = skip;
}

void FakeWorker::FailNextStep(int code, const std::string& message, bool recoverable) {
  auto failure = std::make_unique<Failure>();
  failure->set_code(static_cast<uint32_t>(code));
  failure->set_message(message);
  failure->set_recoverable(recoverable);
  const std::lock_guard lock(impl_->mutex);
  impl_->fail_next = std::move(failure);
}

void FakeWorker::SendGarbage() {
  // Field 1 with a wire type that is not its own: none of the messages there are.
  WorkerMessage message;
  message.GetReflection()->MutableUnknownFields(&message)->AddVarint(1, 7);
  impl_->Write(message);
}

bool FakeWorker::WaitForEpoch(uint64_t epoch) {
  return impl_->Wait([this, epoch] { return impl_->configure.epoch() >= epoch; });
}
bool FakeWorker::WaitForClose(uint64_t epoch) {
  return impl_->Wait([this, epoch] { return impl_->closed_epoch >= epoch; });
}
bool FakeWorker::WaitForSteps(uint64_t steps) {
  return impl_->Wait([this, steps] { return impl_->steps >= steps; });
}
bool FakeWorker::WaitForEnd() {
  return impl_->Wait([this] { return impl_->ended; });
}
bool FakeWorker::WaitForKey(const std::string& key, std::string* value) {
  if (!impl_->Wait([this, &key] { return impl_->keys.contains(key); })) return false;
  const std::lock_guard lock(impl_->mutex);
  *value = impl_->keys[key];
  return true;
}

void FakeWorker::PublishKey(const std::string& key, const std::string& value) {
  WorkerMessage message;
  message.mutable_comm_key()->set_epoch(configure().epoch());
  message.mutable_comm_key()->set_key(key);
  message.mutable_comm_key()->set_value(value);
  impl_->Write(message);
}

Configure FakeWorker::configure() const {
  const std::lock_guard lock(impl_->mutex);
  return impl_->configure;
}
std::string FakeWorker::refusal() const {
  const std::lock_guard lock(impl_->mutex);
  return impl_->refusal;
}
bool FakeWorker::told_to_shut_down() const {
  const std::lock_guard lock(impl_->mutex);
  return impl_->shut_down;
}
uint32_t FakeWorker::pid() const { return impl_->options.pid; }
std::vector<std::string> FakeWorker::plans() const {
  const std::lock_guard lock(impl_->mutex);
  return impl_->plans;
}
std::string FakeWorker::complaint() const {
  const std::lock_guard lock(impl_->mutex);
  return impl_->complaint;
}

}  // namespace lockstep
