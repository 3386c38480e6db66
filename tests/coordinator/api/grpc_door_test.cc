// The gRPC door with a real client, and that both doors are one path.
#include <gmock/gmock.h>
#include <google/protobuf/util/message_differencer.h>
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <chrono>
#include <future>
#include <limits>
#include <string>
#include <thread>
#include <vector>

#include "coordinator/retry_delay.h"
#include "proto/error_details.pb.h"
#include "proto/health.grpc.pb.h"
#include "proto/inference.grpc.pb.h"
#include "tests/coordinator/api/api_fixture.h"

namespace lockstep {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;
using Health = grpc::health::v1::Health;
using HealthResponse = grpc::health::v1::HealthCheckResponse;

class GrpcDoorTest : public ApiFixture {
 protected:
  void SetUp() override {
    ApiFixture::SetUp();
    channel_ = grpc::CreateChannel("127.0.0.1:" + std::to_string(server_->grpc_port()),
                                   grpc::InsecureChannelCredentials());
    stub_ = v1::Inference::NewStub(channel_);
  }

  struct Streamed {
    grpc::Status status;
    std::vector<v1::GenerateEvent> events;
    std::multimap<std::string, std::string> trailers;
  };
  Streamed Stream(const v1::GenerateRequest& request) {
    Streamed out;
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(30));
    auto reader = stub_->GenerateStream(&context, request);
    v1::GenerateEvent event;
    while (reader->Read(&event)) out.events.push_back(event);
    out.status = reader->Finish();
    for (const auto& [key, value] : context.GetServerTrailingMetadata()) {
      out.trailers.emplace(std::string(key.data(), key.size()),
                           std::string(value.data(), value.size()));
    }
    return out;
  }
  grpc::Status Generate(const v1::GenerateRequest& request, v1::GenerateResponse* response) {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(30));
    return stub_->Generate(&context, request, response);
  }
  HealthResponse::ServingStatus Check(const std::string& service) {
    auto health = Health::NewStub(channel_);
    grpc::ClientContext context;
    grpc::health::v1::HealthCheckRequest request;
    request.set_service(service);
    HealthResponse response;
    const grpc::Status status = health->Check(&context, request, &response);
    return status.ok() ? response.status() : HealthResponse::UNKNOWN;
  }

  static v1::GenerateRequest Ask(const std::string& text, uint32_t max_tokens = 40) {
    v1::GenerateRequest request;
    request.set_text(text);
    request.mutable_sampling()->set_max_tokens(max_tokens);
    return request;
  }

  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<v1::Inference::Stub> stub_;
};

TEST_F(GrpcDoorTest, StreamsPromptThenChunksThenFinish) {
  AnswerWith("A small green lamp.");
  v1::GenerateRequest request = Ask("Describe:");
  request.set_request_id("mine");
  const Streamed streamed = Stream(request);
  ASSERT_TRUE(streamed.status.ok()) << streamed.status.error_message();
  const auto& events = streamed.events;
  ASSERT_GE(events.size(), 3u);
  const std::vector<TokenId> prompt = *model_.tokenizer->Encode("Describe:", true);
  EXPECT_EQ(events[0].prompt().request_id(), "mine");
  EXPECT_EQ(events[0].prompt().prompt_tokens(), prompt.size());
  EXPECT_THAT(events[0].prompt().prompt_token_ids(), ::testing::ElementsAreArray(prompt));
  std::string text;
  std::vector<TokenId> ids;
  for (size_t i = 1; i + 1 < events.size(); ++i) {
    ASSERT_TRUE(events[i].has_chunk());
    text += events[i].chunk().text();
    ids.insert(ids.end(), events[i].chunk().token_ids().begin(),
               events[i].chunk().token_ids().end());
  }
  EXPECT_EQ(text, "A small green lamp.");
  ASSERT_TRUE(events.back().has_finish());
  const v1::Finish& finish = events.back().finish();
  EXPECT_EQ(finish.reason(), v1::FINISH_REASON_STOP);
  EXPECT_EQ(finish.stop_token_id(), 2u);
  EXPECT_EQ(finish.completion_tokens(), ids.size());
  EXPECT_EQ(ids.back(), 2u);
}

TEST_F(GrpcDoorTest, UnaryEqualsTheStreamJoined) {
  engine_.script = [](const Request&) {
    return Script{.tokens = {{70, 71, 72, 2}, {80, 81, 82, 83, 2}}};
  };
  v1::GenerateRequest request = Ask("x");
  request.mutable_sampling()->set_n(2);
  request.mutable_sampling()->set_logprobs(2);
  request.mutable_sampling()->set_prompt_logprobs(0);
  v1::GenerateResponse whole;
  ASSERT_TRUE(Generate(request, &whole).ok());
  v1::GenerateResponse joined;
  joined.add_completions();
  joined.add_completions();
  for (const v1::GenerateEvent& event : Stream(request).events) {
    if (event.has_prompt()) *joined.mutable_prompt() = event.prompt();
    if (event.has_chunk()) {
      v1::Completion* const to =
          joined.mutable_completions(static_cast<int>(event.chunk().index()));
      to->mutable_text()->append(event.chunk().text());
      to->mutable_token_ids()->MergeFrom(event.chunk().token_ids());
      to->mutable_logprobs()->MergeFrom(event.chunk().logprobs());
    }
    if (event.has_finish()) {
      *joined.mutable_completions(static_cast<int>(event.finish().index()))->mutable_finish() =
          event.finish();
    }
  }
  joined.mutable_prompt()->set_request_id(whole.prompt().request_id());
  std::string difference;
  google::protobuf::util::MessageDifferencer differencer;
  differencer.ReportDifferencesToString(&difference);
  EXPECT_TRUE(differencer.Compare(whole, joined)) << difference;
  EXPECT_FALSE(whole.prompt().prompt_logprobs(0).has_chosen());
  EXPECT_EQ(whole.completions(0).logprobs_size(), 4);
  EXPECT_EQ(whole.completions(0).logprobs(0).chosen().token(), model_.tokenizer->TokenText(70));
  ASSERT_EQ(whole.completions(0).logprobs(0).top_size(), 2);
  EXPECT_EQ(whole.completions(0).logprobs(0).top(0).rank(), 1u);
  EXPECT_EQ(whole.completions(0).logprobs(0).top(1).rank(), 2u);
}

// One request, described to either door, is the same request to the engine and
// gives the same answer.
TEST_F(GrpcDoorTest, TheRequestsIdComesBack) {
  struct Seen {
    grpc::Status status;
    std::string in_metadata, in_answer;
  };
  const auto ask = [&](const std::string& metadata, const std::string& field) {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(30));
    if (!metadata.empty()) context.AddMetadata("x-request-id", metadata);
    v1::GenerateRequest request;
    request.set_text("ab");
    request.set_request_id(field);
    request.mutable_sampling()->set_max_tokens(2);
    v1::GenerateResponse response;
    Seen seen{stub_->Generate(&context, request, &response), "", response.prompt().request_id()};
    const auto& initial = context.GetServerInitialMetadata();
    if (const auto found = initial.find("x-request-id"); found != initial.end()) {
      seen.in_metadata = std::string(found->second.data(), found->second.size());
    }
    return seen;
  };
  Seen seen = ask("from-a-proxy", "");
  EXPECT_TRUE(seen.status.ok()) << seen.status.error_message();
  EXPECT_EQ(seen.in_metadata, "from-a-proxy");
  EXPECT_EQ(seen.in_answer, "from-a-proxy");

  seen = ask("from-a-proxy", "my own");
  EXPECT_EQ(seen.in_metadata, "my own");
  EXPECT_EQ(seen.in_answer, "my own");

  seen = ask("", "");
  EXPECT_EQ(seen.in_metadata.size(), 32u);
  EXPECT_EQ(seen.in_answer, seen.in_metadata);

  seen = ask(std::string(129, 'x'), "");
  EXPECT_EQ(seen.status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(seen.status.error_message(), HasSubstr("x-request-id"));
}

TEST_F(GrpcDoorTest, BothDoorsAreOnePath) {
  AnswerWith("It is stop of the \xe2\x9c\x93 line.");
  v1::GenerateRequest request = Ask("Where?", 33);
  v1::SamplingParams& s = *request.mutable_sampling();
  s.set_temperature(0.5f), s.set_top_p(0.25f), s.set_min_p(0.125f), s.set_top_k(7);
  s.set_repetition_penalty(1.5f), s.set_presence_penalty(-0.5f), s.set_frequency_penalty(0.75f);
  s.set_seed(-5), s.set_min_tokens(2), s.set_n(2), s.set_logprobs(3);
  s.add_stop("top of"), s.add_stop_token_ids(900);
  (*s.mutable_logit_bias())[12] = 1.5f;
  request.set_priority(4);
  v1::GenerateResponse by_grpc;
  ASSERT_TRUE(Generate(request, &by_grpc).ok());
  const RawResponse by_http = Complete({{"prompt", "Where?"},
                                        {"max_tokens", 33},
                                        {"temperature", 0.5},
                                        {"top_p", 0.25},
                                        {"min_p", 0.125},
                                        {"top_k", 7},
                                        {"repetition_penalty", 1.5},
                                        {"presence_penalty", -0.5},
                                        {"frequency_penalty", 0.75},
                                        {"seed", -5},
                                        {"min_tokens", 2},
                                        {"n", 2},
                                        {"logprobs", 3},
                                        {"stop", {"top of"}},
                                        {"stop_token_ids", {900}},
                                        {"logit_bias", {{"12", 1.5}}},
                                        {"priority", 4},
                                        {"return_token_ids", true}});
  ASSERT_EQ(by_http.status, 200) << by_http.body;

  const std::vector<Request> seen = engine_.submitted();
  ASSERT_EQ(seen.size(), 2u);
  const SamplingParams &a = seen[0].sampling, &b = seen[1].sampling;
  EXPECT_EQ(seen[0].prompt, seen[1].prompt);
  EXPECT_EQ(seen[0].ending_ids, seen[1].ending_ids);
  EXPECT_EQ(seen[0].priority, seen[1].priority);
  EXPECT_EQ(std::tie(a.max_tokens, a.temperature, a.top_p, a.top_k, a.min_p, a.repetition_penalty,
                     a.presence_penalty, a.frequency_penalty, a.seed, a.logit_bias, a.stop,
                     a.stop_token_ids, a.min_tokens, a.n, a.logprobs),
            std::tie(b.max_tokens, b.temperature, b.top_p, b.top_k, b.min_p, b.repetition_penalty,
                     b.presence_penalty, b.frequency_penalty, b.seed, b.logit_bias, b.stop,
                     b.stop_token_ids, b.min_tokens, b.n, b.logprobs));
  const json choices = by_http.json()["choices"];
  for (int i = 0; i < 2; ++i) {
    const v1::Completion& completion = by_grpc.completions(i);
    EXPECT_EQ(choices[i]["text"], completion.text());
    EXPECT_EQ(completion.text(), "It is s");
    EXPECT_EQ(choices[i]["token_ids"], json(std::vector<TokenId>(completion.token_ids().begin(),
                                                                 completion.token_ids().end())));
    EXPECT_EQ(choices[i]["stop_reason"], completion.finish().stop_string());
    EXPECT_EQ(choices[i]["finish_reason"], "stop");
    EXPECT_EQ(completion.finish().reason(), v1::FINISH_REASON_STOP);
  }
}

TEST_F(GrpcDoorTest, WithoutMaxTokensTheContextIsTheLimit) {
  v1::GenerateRequest request;
  request.mutable_token_ids()->add_ids(5);
  request.mutable_sampling()->set_ignore_eos(true);
  v1::GenerateResponse response;
  ASSERT_TRUE(Generate(request, &response).ok());
  EXPECT_EQ(response.completions(0).finish().completion_tokens(), 63u);
  EXPECT_EQ(response.completions(0).finish().reason(), v1::FINISH_REASON_LENGTH);
}

TEST_F(GrpcDoorTest, ARefusalNamesTheField) {
  v1::GenerateRequest request = Ask("x");
  request.mutable_sampling()->set_temperature(3);
  const Streamed streamed = Stream(request);
  EXPECT_EQ(streamed.status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(streamed.status.error_message(), "temperature: 3 is above 2; allowed: [0, 2]");
  EXPECT_TRUE(streamed.events.empty());
  v1::GenerateResponse response;
  EXPECT_EQ(Generate(v1::GenerateRequest(), &response).error_code(),
            grpc::StatusCode::INVALID_ARGUMENT);
  request = Ask("x");
  request.set_model("other");
  EXPECT_EQ(Generate(request, &response).error_code(), grpc::StatusCode::NOT_FOUND);
  request = Ask("x");
  request.mutable_sampling()->set_top_p(std::numeric_limits<float>::quiet_NaN());
  EXPECT_THAT(Generate(request, &response).error_message(), HasSubstr("top_p: not a finite"));
}

TEST_F(GrpcDoorTest, FullMeansRetryInfoAndPushback) {
  engine_.script = [](const Request&) {
    absl::Status full = absl::ResourceExhaustedError("the queue is full");
    SetRetryDelay(&full, 7);
    return Script{.fail_after = 0, .failure = full};
  };
  const Streamed streamed = Stream(Ask("x"));
  EXPECT_EQ(streamed.status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  google::rpc::Status details;
  ASSERT_TRUE(details.ParseFromString(streamed.status.error_details()));
  EXPECT_EQ(details.code(), 8);
  ASSERT_EQ(details.details_size(), 1);
  google::rpc::RetryInfo retry;
  ASSERT_TRUE(details.details(0).UnpackTo(&retry));
  EXPECT_EQ(retry.retry_delay().seconds(), 7);
  const auto pushback = streamed.trailers.find("grpc-retry-pushback-ms");
  ASSERT_NE(pushback, streamed.trailers.end());
  EXPECT_EQ(pushback->second, "7000");
  EXPECT_EQ(Post(http(), "/v1/completions", R"({"prompt":"x"})").headers.at("retry-after"), "7");
}

TEST_F(GrpcDoorTest, EndingTheCallCancels) {
  engine_.Hold();
  grpc::ClientContext context;
  auto reader = stub_->GenerateStream(&context, Ask("x"));
  ASSERT_TRUE(engine_.WaitSubmitted(1));
  engine_.Tick(1);
  v1::GenerateEvent event;
  ASSERT_TRUE(reader->Read(&event));
  context.TryCancel();
  EXPECT_TRUE(engine_.WaitCancelled(1));
  EXPECT_TRUE(engine_.WaitIdle());
  while (reader->Read(&event)) {
  }
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::CANCELLED);
}

TEST_F(GrpcDoorTest, ADeadlineIsTheRequests) {
  engine_.Hold();
  grpc::ClientContext context;
  const auto before = engine_.NowMs();
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(1));
  v1::GenerateResponse response;
  const grpc::Status status = stub_->Generate(&context, Ask("x"), &response);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  const std::vector<Request> seen = engine_.submitted();
  ASSERT_EQ(seen.size(), 1u);
  EXPECT_GE(seen[0].deadline_ms, before);
  EXPECT_LE(seen[0].deadline_ms, before + 2000);
  EXPECT_TRUE(engine_.WaitIdle());
}

TEST_F(GrpcDoorTest, CancellingAtEveryChunkLeavesNothing) {
  engine_.script = [](const Request&) { return Script{.tokens = {{70}}}; };
  for (int chunks = 0; chunks < 40; ++chunks) {
    grpc::ClientContext context;
    auto reader = stub_->GenerateStream(&context, Ask("x", 60));
    v1::GenerateEvent event;
    for (int i = 0; i < chunks && reader->Read(&event); ++i) {
    }
    context.TryCancel();
    reader->Finish();
  }
  EXPECT_TRUE(engine_.WaitIdle());
}

TEST_F(GrpcDoorTest, TokenizeAndDetokenize) {
  grpc::ClientContext one, two, three, four;
  v1::TokenizeRequest request;
  request.set_text("hello there");
  v1::TokenizeResponse tokens;
  ASSERT_TRUE(stub_->Tokenize(&one, request, &tokens).ok());
  EXPECT_THAT(tokens.token_ids(),
              ::testing::ElementsAreArray(*model_.tokenizer->Encode("hello there", true)));
  EXPECT_EQ(tokens.max_model_len(), 64u);
  v1::DetokenizeRequest back;
  back.mutable_token_ids()->CopyFrom(tokens.token_ids());
  v1::DetokenizeResponse text;
  ASSERT_TRUE(stub_->Detokenize(&two, back, &text).ok());
  EXPECT_THAT(text.text(), HasSubstr("hello there"));
  back.mutable_token_ids()->Resize(limits::kTokenizeTokens + 1, 5);
  grpc::ClientContext five;
  EXPECT_THAT(stub_->Detokenize(&five, back, &text).error_message(), HasSubstr("too many"));
  back.mutable_token_ids()->Truncate(2);
  back.add_token_ids(5000);
  EXPECT_THAT(stub_->Detokenize(&three, back, &text).error_message(), HasSubstr("token id 5000"));
  v1::TokenizeResponse none;
  EXPECT_EQ(stub_->Tokenize(&four, v1::TokenizeRequest(), &none).error_code(),
            grpc::StatusCode::INVALID_ARGUMENT);
}

TEST_F(GrpcDoorTest, ModelInfoDescribesRanksAndStartup) {
  engine_.SetRanks({{.rank = 0,
                     .host = "a",
                     .device = "cpu",
                     .collective_library = "gloo",
                     .shard = "heads 0-3",
                     .pid = 11,
                     .checkpoint_bytes = 900,
                     .memory = {.weights = 1000, .kv = 64},
                     .phases = {{"load", 0.5}}}});
  server_->SetStartup({{"read model", 0.25}});
  grpc::ClientContext context;
  v1::GetModelInfoResponse info;
  ASSERT_TRUE(stub_->GetModelInfo(&context, {}, &info).ok());
  EXPECT_EQ(info.model(), "demo");
  EXPECT_TRUE(info.ready());
  EXPECT_EQ(info.dtype(), "bfloat16");
  EXPECT_EQ(info.kv_cache_dtype(), "float8_e4m3fn");
  EXPECT_EQ(info.vocab_size(), 1024u);
  EXPECT_EQ(info.num_kv_blocks(), 100u);
  ASSERT_EQ(info.ranks_size(), 1);
  EXPECT_EQ(info.ranks(0).weight_bytes(), 1000u);
  EXPECT_EQ(info.ranks(0).shard(), "heads 0-3");
  EXPECT_EQ(info.ranks(0).load_phases(0).seconds(), 0.5);
  EXPECT_EQ(info.startup(0).name(), "read model");
}

TEST_F(GrpcDoorTest, HealthFollowsTheEngine) {
  const auto set = [&](EngineState state) {
    engine_.SetState(state);
    server_->OnEngineChange(engine_.Info());
  };
  for (const char* service : {"", "lockstep.v1.Inference"}) {
    EXPECT_EQ(Check(service), HealthResponse::SERVING);
    for (const EngineState state : {EngineState::kLoading, EngineState::kRecovering,
                                    EngineState::kDraining, EngineState::kFailed}) {
      set(state);
      EXPECT_EQ(Check(service), HealthResponse::NOT_SERVING);
    }
    set(EngineState::kReady);
  }
  EXPECT_EQ(Check("no.such.Service"), HealthResponse::UNKNOWN);  // NOT_FOUND
}

TEST_F(GrpcDoorTest, WatchSeesChanges) {
  auto health = Health::NewStub(channel_);
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(20));
  auto reader = health->Watch(&context, {});
  HealthResponse response;
  ASSERT_TRUE(reader->Read(&response));
  EXPECT_EQ(response.status(), HealthResponse::SERVING);
  engine_.SetState(EngineState::kRecovering);
  server_->OnEngineChange(engine_.Info());
  ASSERT_TRUE(reader->Read(&response));
  EXPECT_EQ(response.status(), HealthResponse::NOT_SERVING);
  context.TryCancel();
}

TEST_F(GrpcDoorTest, LoadingAndDrainingAreUnavailable) {
  v1::GenerateResponse response;
  engine_.SetState(EngineState::kLoading);
  EXPECT_EQ(Generate(Ask("x"), &response).error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_EQ(Get(http(), "/ready").status, 503);
  EXPECT_EQ(Get(http(), "/health").status, 200);
  engine_.SetState(EngineState::kReady);
  EXPECT_EQ(Generate(Ask("x", 2), &response).error_code(), grpc::StatusCode::OK);
  server_->BeginDrain();
  const grpc::Status status = Generate(Ask("x"), &response);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_EQ(status.error_message(), "the server is draining");
  EXPECT_EQ(Check(""), HealthResponse::NOT_SERVING);
}

TEST_F(GrpcDoorTest, MessagesStopAt8MiB) {
  v1::GenerateRequest request;
  request.set_text(std::string(9 * 1024 * 1024, 'x'));
  v1::GenerateResponse response;
  EXPECT_EQ(Generate(request, &response).error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_TRUE(engine_.submitted().empty());
}

// One after another they are more than may be held at once.
TEST_F(GrpcDoorTest, LargeMessagesGiveTheirPlacesBack) {
  const v1::GenerateRequest request = Ask(std::string(1024 * 1024, 'x'));
  for (int i = 0; i < 40; ++i) {
    v1::GenerateResponse response;
    const grpc::Status status = Generate(request, &response);
    ASSERT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT)
        << i << status.error_message();
  }
}

TEST_F(GrpcDoorTest, ReflectionIsOffUnlessAsked) {
  const auto unimplemented = [](int port) {
    grpc::GenericStub stub(grpc::CreateChannel("127.0.0.1:" + std::to_string(port),
                                               grpc::InsecureChannelCredentials()));
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(20));
    const grpc::ByteBuffer request(nullptr, 0);
    grpc::ByteBuffer response;
    std::promise<grpc::StatusCode> code;
    stub.UnaryCall(&context, "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", {},
                   &request, &response,
                   [&](grpc::Status status) { code.set_value(status.error_code()); });
    return code.get_future().get() == grpc::StatusCode::UNIMPLEMENTED;
  };
  EXPECT_TRUE(unimplemented(server_->grpc_port()));
  Open(/*reflection=*/true);
  EXPECT_FALSE(unimplemented(server_->grpc_port()));
}

}  // namespace
}  // namespace lockstep
