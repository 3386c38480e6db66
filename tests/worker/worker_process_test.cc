// lockstep-worker as a process, with a real model, driven by a fake coordinator.
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "tests/fakes/fake_coordinator.h"
#include "tests/fakes/temp_dir.h"
#include "tests/integration/sanitizer_reports.h"
#include "wire/codec.h"
#include "wire/plan_digest.h"
#include "wire/protocol.h"

namespace lockstep {
namespace {

using fakes::FakeCoordinator;
using std::chrono::milliseconds;
using ::testing::Contains;
using ::testing::HasSubstr;
using ::testing::IsSupersetOf;
using ::testing::Not;
using worker::v1::CoordinatorMessage;
using worker::v1::WorkerMessage;

const char kBinary[] = LOCKSTEP_BINARY_DIR "/bin/lockstep-worker";
const char kModel[] = LOCKSTEP_SOURCE_DIR "/tests/golden/llama";

// What it logs is kept, and shown when its test fails.
class Process {
 public:
  explicit Process(std::vector<std::string> args) {
    WatchForSanitizerReports();
    std::vector<char*> argv;
    argv.reserve(args.size() + 1);
    for (std::string& arg : args) argv.push_back(arg.data());
    argv.push_back(nullptr);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_addopen(&actions, STDERR_FILENO, log_path_.c_str(),
                                     O_WRONLY | O_CREAT | O_APPEND, 0600);
    if (posix_spawn(&pid_, argv[0], &actions, nullptr, argv.data(), environ) != 0) pid_ = -1;
    posix_spawn_file_actions_destroy(&actions);
  }
  ~Process() {
    if (pid_ > 0) {
      kill(pid_, SIGKILL);
      waitpid(pid_, nullptr, 0);
    }
    if (::testing::Test::HasFailure()) std::cerr << Log();
  }
  void Signal(int number) const { kill(pid_, number); }
  std::string Log() const {
    std::ifstream file(log_path_);
    return {std::istreambuf_iterator<char>(file), {}};
  }
  // True once it has logged `text`; false when it has not within the bound.
  bool AwaitLog(const std::string& text, std::chrono::seconds bound = Bound(20)) const {
    const auto deadline = std::chrono::steady_clock::now() + bound;
    while (Log().find(text) == std::string::npos) {
      if (std::chrono::steady_clock::now() > deadline) return false;
      std::this_thread::sleep_for(milliseconds(1));
    }
    return true;
  }
  // The exit code, -signal, or nothing when it has not ended within the bound.
  std::optional<int> Await(std::chrono::seconds bound) {
    const auto deadline = std::chrono::steady_clock::now() + bound;
    int status = 0;
    while (waitpid(pid_, &status, WNOHANG) == 0) {
      if (std::chrono::steady_clock::now() > deadline) return std::nullopt;
      std::this_thread::sleep_for(milliseconds(1));
    }
    pid_ = -1;
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
  }

 private:
  const TempDir directory_;
  const std::string log_path_ = directory_.File("log");
  pid_t pid_ = -1;
};

// A group of worker processes, each on the stream of its number at first.
class Group {
 public:
  explicit Group(uint32_t size, std::vector<std::string> flags = {})
      : coordinator("127.0.0.1:0"), flags_(std::move(flags)) {
    for (uint32_t rank = 0; rank < size; ++rank) Spawn();
  }

  // Starts a worker and waits until it has attached.
  void Spawn() {
    std::vector<std::string> args = {kBinary, "--coordinator", coordinator.address(), "--threads",
                                     "1"};
    args.insert(args.end(), flags_.begin(), flags_.end());
    processes.push_back(std::make_unique<Process>(args));
    ASSERT_TRUE(coordinator.AwaitHello(streams.size()));
    streams.push_back(streams.size());
  }

  worker::v1::Configure Configure(uint64_t epoch, const std::string& model) const {
    worker::v1::Configure c;
    c.set_epoch(epoch);
    c.set_tp_size(static_cast<uint32_t>(streams.size()));
    c.set_model_path(model);
    c.set_dtype("float32");
    c.set_load_format("auto");
    c.set_block_size(16);
    c.set_num_kv_blocks(32);
    c.set_max_num_seqs(4);
    c.set_max_batched_tokens(64);
    c.set_max_model_len(128);
    // The epoch's own: they do not change what is in memory.
    c.set_group("g" + std::to_string(epoch));
    c.set_communicator("test" + std::to_string(epoch));
    c.set_max_skew_ms(20'000 + epoch);
    return c;
  }

  void SendAll(const CoordinatorMessage& message) {
    for (const size_t stream : streams) coordinator.Send(stream, message);
  }

  // True when every rank is ready.
  bool Form(uint64_t epoch) {
    epoch_ = epoch;
    step_ = 0;
    for (uint32_t rank = 0; rank < streams.size(); ++rank) {
      CoordinatorMessage message;
      *message.mutable_configure() = Configure(epoch, kModel);
      message.mutable_configure()->set_rank(rank);
      coordinator.Send(streams[rank], message);
    }
    for (const size_t stream : streams) {
      const auto ready = coordinator.AwaitCase(stream, WorkerMessage::kReady);
      if (!ready || ready->ready().epoch() != epoch) return false;
      phases.clear();
      for (const auto& phase : ready->ready().phases()) phases.push_back(phase.name());
    }
    return true;
  }

  bool Close() {
    CoordinatorMessage message;
    message.mutable_close_epoch()->set_epoch(epoch_);
    SendAll(message);
    return std::all_of(streams.begin(), streams.end(), [&](size_t stream) {
      return coordinator.AwaitCase(stream, WorkerMessage::kReleased).has_value();
    });
  }

  // The plan of the next step: `computed` of the known tokens are done.
  CoordinatorMessage NextPlan(const std::vector<TokenId>& known, uint32_t computed, bool first) {
    StepPlan plan;
    plan.epoch = epoch_;
    plan.step = ++step_;
    const uint32_t count = static_cast<uint32_t>(known.size()) - computed;
    if (first) {
      NewSequence sequence;
      sequence.slot = Slot(0);
      sequence.tokens = known;
      sequence.num_prompt_tokens = static_cast<uint32_t>(known.size());
      for (uint32_t i = 0; i < 8; ++i) sequence.block_ids.push_back(BlockId(3 * i));
      sequence.sampling.temperature = 0;
      plan.new_sequences = {sequence};
    }
    plan.spans = {{Slot(0), count}};
    PlanDigest digest(plan.epoch, plan.step);
    digest.Add(Slot(0), computed, count, 8, true);
    plan.digest = digest.value();
    CoordinatorMessage message;
    *message.mutable_plan() = wire::Encode(plan);
    return message;
  }

  // Greedy tokens; shorter when something goes wrong.
  std::vector<TokenId> Generate(std::vector<TokenId> known, size_t count) {
    std::vector<TokenId> generated;
    uint32_t computed = 0;
    while (generated.size() < count) {
      SendAll(NextPlan(known, computed, generated.empty()));
      for (size_t rank = 0; rank < streams.size(); ++rank) {
        const auto message = coordinator.AwaitCase(streams[rank], WorkerMessage::kResult);
        if (!message) return generated;
        const auto result = wire::Decode(message->result());
        if (!result.ok() || result->step != step_) return generated;
        if (rank == 0) generated.push_back(result->sampled.at(0).token);
      }
      computed = static_cast<uint32_t>(known.size());
      known.push_back(generated.back());
    }
    return generated;
  }

  FakeCoordinator coordinator;
  std::vector<std::unique_ptr<Process>> processes;
  std::vector<size_t> streams;      // by rank
  std::vector<std::string> phases;  // of the last rank's start

 private:
  const std::vector<std::string> flags_;
  uint64_t epoch_ = 0, step_ = 0;
};

struct Golden {
  std::vector<TokenId> prompt, greedy;
};

std::vector<Golden> LoadGolden() {
  std::ifstream file(std::string(kModel) + "/golden.json");
  std::vector<Golden> cases;
  const nlohmann::json json = nlohmann::json::parse(file);
  for (const auto& c : json.at("cases")) {
    Golden golden{c.at("prompt").get<std::vector<TokenId>>(),
                  c.at("greedy").get<std::vector<TokenId>>()};
    if (golden.prompt.size() <= 64) cases.push_back(golden);  // one step's worth
  }
  EXPECT_FALSE(cases.empty());
  return cases;
}

TEST(WorkerProcess, GeneratesTheReferenceTokensOnOneTwoAndFourRanks) {
  for (const uint32_t size : {1u, 2u, 4u}) {
    Group group(size);
    for (const Golden& golden : LoadGolden()) {
      static uint64_t epoch = 0;
      ASSERT_TRUE(group.Form(++epoch));
      EXPECT_EQ(group.Generate(golden.prompt, golden.greedy.size()), golden.greedy)
          << "tp " << size;
      ASSERT_TRUE(group.Close());
    }
    CoordinatorMessage shutdown;
    shutdown.mutable_shutdown();
    group.SendAll(shutdown);
    for (const auto& process : group.processes) {
      EXPECT_EQ(process->Await(Bound(5)), 0);
    }
  }
}

TEST(WorkerProcess, ASurvivorGoesOnInTheNextEpochAfterAKill) {
  const Golden golden = LoadGolden().front();
  Group group(2);
  ASSERT_TRUE(group.Form(1));
  ASSERT_EQ(group.Generate(golden.prompt, 3).size(), 3u);
  group.processes[1]->Signal(SIGKILL);
  ASSERT_TRUE(group.coordinator.AwaitEnd(1, 1'000 * kSlowdown));
  group.streams.pop_back();  // only the survivor answers
  ASSERT_TRUE(group.Close());
  group.streams.clear();
  group.streams = {0, 1};
  group.Spawn();  // stream 2
  group.streams = {0, 2};
  const auto start = std::chrono::steady_clock::now();
  ASSERT_TRUE(group.Form(2));
  EXPECT_LT(std::chrono::steady_clock::now() - start, Bound(5));
  EXPECT_EQ(group.Generate(golden.prompt, golden.greedy.size()), golden.greedy);
}

TEST(WorkerProcess, ANextEpochFindsTheModelInMemory) {
  Group group(1);
  ASSERT_TRUE(group.Form(1));
  EXPECT_THAT(group.phases, IsSupersetOf({"open", "load", "buffers"}));
  ASSERT_TRUE(group.Close());
  ASSERT_TRUE(group.Form(2));
  for (const char* phase : {"open", "load", "buffers"}) {
    EXPECT_THAT(group.phases, Not(Contains(phase)));
  }
}

TEST(WorkerProcess, RefusesAModelThatTheCoordinatorDoesNotHave) {
  Group group(1);
  CoordinatorMessage message;
  *message.mutable_configure() = group.Configure(1, kModel);
  message.mutable_configure()->set_model_digest(1);
  group.SendAll(message);
  const auto failure = group.coordinator.AwaitCase(0, WorkerMessage::kFailure);
  ASSERT_TRUE(failure);
  EXPECT_THAT(failure->failure().message(),
              AllOf(HasSubstr(kModel), HasSubstr("not the model that the coordinator has")));
  EXPECT_FALSE(failure->failure().recoverable());
}

TEST(WorkerProcess, ItsOwnStandingStillIsNotTheCoordinatorsSilence) {
  const Golden golden = LoadGolden().front();
  Group group(1);
  ASSERT_TRUE(group.Form(1));
  const auto deadline = std::chrono::steady_clock::now() + Bound(40);
  const auto await_heartbeats = [&](size_t count) {
    while (group.coordinator.num_heartbeats(0) < count) {
      ASSERT_LT(std::chrono::steady_clock::now(), deadline);
      ASSERT_FALSE(group.coordinator.AwaitEnd(0, 1));
    }
  };
  await_heartbeats(2);  // it watches by now
  group.coordinator.FallSilent(true);
  group.processes[0]->Signal(SIGSTOP);
  // What a silent coordinator would not be given.
  std::this_thread::sleep_for(milliseconds(wire::kHeartbeatTimeoutMs + 500));
  const size_t before = group.coordinator.num_heartbeats(0);
  group.processes[0]->Signal(SIGCONT);
  await_heartbeats(before + 1);
  group.coordinator.FallSilent(false);
  EXPECT_EQ(group.Generate(golden.prompt, 3).size(), 3u);
}

TEST(WorkerProcess, LeavesACollectiveWithAStoppedPeerWhenTheEpochIsClosed) {
  const Golden golden = LoadGolden().front();
  Group group(2);
  ASSERT_TRUE(group.Form(1));
  group.processes[1]->Signal(SIGSTOP);
  group.SendAll(group.NextPlan(golden.prompt, 0, true));
  group.streams = {0};
  ASSERT_TRUE(group.Close());
  // One that is asked to end while a peer is stopped does not wait for it.
  group.processes[0]->Signal(SIGTERM);
  EXPECT_EQ(group.processes[0]->Await(Bound(3)), 0);
}

TEST(WorkerProcess, EndsByItselfWhenItCannotLetGoOfAClosedEpoch) {
  const ThreadsMayLeak rank_1_never_returns;
  Group group(2, {"--inject", "hang@phase=kv,rank=1"});
  for (uint32_t rank = 0; rank < 2; ++rank) {
    CoordinatorMessage message;
    *message.mutable_configure() = group.Configure(1, kModel);
    message.mutable_configure()->set_rank(rank);
    group.coordinator.Send(rank, message);
  }
  // A rank 1 that does not hang yet could still let go.
  ASSERT_TRUE(group.processes[1]->AwaitLog("injected: hang"));
  ASSERT_TRUE(group.coordinator.AwaitCase(0, WorkerMessage::kReady));
  CoordinatorMessage close;
  close.mutable_close_epoch()->set_epoch(1);
  group.SendAll(close);
  EXPECT_EQ(group.processes[1]->Await(Bound(5)), 75);
  ASSERT_TRUE(group.coordinator.AwaitCase(0, WorkerMessage::kReleased));
}

TEST(WorkerProcess, EndsWithItsReasonWhenRefused) {
  Group group(1);
  CoordinatorMessage refusal;
  refusal.mutable_refusal()->set_reason("another protocol version");
  group.SendAll(refusal);
  EXPECT_EQ(group.processes[0]->Await(Bound(5)), 1);
}

TEST(WorkerProcess, NamesTheFileOfABrokenCheckpoint) {
  namespace fs = std::filesystem;
  const TempDir directory;
  const fs::path broken = directory.path();
  fs::copy(std::string(kModel) + "/config.json", broken / "config.json",
           fs::copy_options::overwrite_existing);
  fs::copy(std::string(kModel) + "/model.safetensors", broken / "model.safetensors",
           fs::copy_options::overwrite_existing);
  fs::resize_file(broken / "model.safetensors", 3000);
  Group group(1);
  CoordinatorMessage message;
  *message.mutable_configure() = group.Configure(1, broken.string());
  group.SendAll(message);
  const auto failure = group.coordinator.AwaitCase(0, WorkerMessage::kFailure);
  ASSERT_TRUE(failure);
  EXPECT_THAT(failure->failure().message(), HasSubstr("model.safetensors"));
  EXPECT_FALSE(failure->failure().recoverable());
}

TEST(WorkerProcess, RefusesKeysAndValuesThatItsBackendDoesNotKeep) {
  Group group(1);
  CoordinatorMessage message;
  *message.mutable_configure() = group.Configure(1, kModel);
  message.mutable_configure()->set_dtype("bfloat16");
  message.mutable_configure()->set_kv_dtype("float8_e4m3fn");
  group.SendAll(message);
  const auto failure = group.coordinator.AwaitCase(0, WorkerMessage::kFailure);
  ASSERT_TRUE(failure);
  EXPECT_THAT(failure->failure().message(),
              AllOf(HasSubstr("Configure.kv_dtype float8_e4m3fn"), HasSubstr("--backend cuda")));
  EXPECT_FALSE(failure->failure().recoverable());
  ASSERT_TRUE(group.Close());
  EXPECT_TRUE(group.Form(2));  // as it is without
}

TEST(WorkerProcess, EndsWithItsParentWhenToldTo) {
  FakeCoordinator coordinator("127.0.0.1:0");
  Process shell({"/bin/sh", "-c",
                 std::string(kBinary) + " --exit-with-parent --coordinator " +
                     coordinator.address() + " & wait"});
  ASSERT_TRUE(coordinator.AwaitHello(0));
  shell.Signal(SIGKILL);
  EXPECT_TRUE(coordinator.AwaitEnd(0, 3'000 * kSlowdown));
}

}  // namespace
}  // namespace lockstep
