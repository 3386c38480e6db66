// Who may talk to the doors: TLS, client certificates, API keys, browsers.
#include <gmock/gmock.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <chrono>
#include <memory>
#include <string>
#include <thread>

#include "coordinator/api/api_keys.h"
#include "coordinator/api/trace.h"
#include "proto/health.grpc.pb.h"
#include "proto/inference.grpc.pb.h"
#include "tests/coordinator/api/api_fixture.h"
#include "tests/coordinator/api/tls_testing.h"

namespace lockstep {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;

// sha256 of "secret-a" and of "secret-b".
constexpr char kHashA[] = "8766b9cb08e6040b704f1e3ee1e186efccf2635b1d2634d6525333007e6aeae1";
constexpr char kHashB[] = "ff492ef788c89b555e6f738b33d2422f57dbb6656af2402155672c5f123a90af";
constexpr char kHealth[] = "GET /health HTTP/1.1\r\nConnection: close\r\n\r\n";

class Protection : public ApiFixture {
 protected:
  void SetUp() override { AnswerWith("hi"); }

  void UseTls(bool client_certificates) {
    files_.MakeAuthority("ca");
    files_.MakeCertificate("server", "ca");
    options_.tls.certificate = files_.Path("server.pem");
    options_.tls.key = files_.Path("server.key");
    if (client_certificates) options_.tls.client_ca = files_.Path("ca.pem");
  }
  void UseKeys(const std::string& text) {
    files_.Write("keys", text);
    options_.api_key_file = files_.Path("keys");
  }
  absl::Status StartError() {
    options_.http_port = options_.grpc_port = 0;
    return ApiServer(options_, model_).Start(&engine_);
  }
  RawResponse WithKey(const std::string& path, const std::string& authorization) {
    RawClient client(http());
    client.Send("GET " + path + " HTTP/1.1\r\nAuthorization: " + authorization + "\r\n\r\n");
    return client.Read();
  }
  std::unique_ptr<v1::Inference::Stub> Grpc(const std::string& certificate = "") {
    std::shared_ptr<grpc::ChannelCredentials> credentials = grpc::InsecureChannelCredentials();
    if (options_.tls.enabled()) {
      grpc::SslCredentialsOptions tls{
          .pem_root_certs = files_.Read("ca.pem"), .pem_private_key = {}, .pem_cert_chain = {}};
      if (!certificate.empty()) {
        tls.pem_private_key = files_.Read(certificate + ".key");
        tls.pem_cert_chain = files_.Read(certificate + ".pem");
      }
      credentials = grpc::SslCredentials(tls);
    }
    // A connection of its own.
    grpc::ChannelArguments arguments;
    arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
    channel_ = grpc::CreateCustomChannel("127.0.0.1:" + std::to_string(server_->grpc_port()),
                                         credentials, arguments);
    return v1::Inference::NewStub(channel_);
  }
  grpc::Status Ask(v1::Inference::Stub* stub, const std::string& authorization = "") {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(20));
    if (!authorization.empty()) context.AddMetadata("authorization", authorization);
    v1::GetModelInfoResponse response;
    return stub->GetModelInfo(&context, {}, &response);
  }

  CertificateFolder files_;
  std::shared_ptr<grpc::Channel> channel_;
};

TEST_F(Protection, HttpOverTls) {
  UseTls(false);
  Open();
  TlsClient client(http(), files_.Path("ca.pem"));
  ASSERT_TRUE(client.connected());
  client.Send(kHealth);
  bool orderly = false;
  const std::string reply = client.ReadToEnd(&orderly);
  EXPECT_THAT(reply, ::testing::StartsWith("HTTP/1.1 200 OK\r\n"));
  EXPECT_TRUE(orderly);
  // A client that does not know the authority, and one that does not speak TLS.
  files_.MakeAuthority("other");
  EXPECT_FALSE(TlsClient(http(), files_.Path("other.pem")).connected());
  EXPECT_EQ(Get(http(), "/health").status, 0);
}

TEST_F(Protection, StreamsAndKeptConnectionsOverTls) {
  UseTls(false);
  Open();
  TlsClient client(http(), files_.Path("ca.pem"));
  for (int i = 0; i < 3; ++i) {
    client.Send(PostBytes("/v1/completions", R"({"prompt":"x","stream":true})"));
    EXPECT_TRUE(client.Take("data: [DONE]\n\n\r\n0\r\n\r\n"));
    client.Send("GET /version HTTP/1.1\r\nx-request-id: v" + std::to_string(i) + "\r\n\r\n");
    EXPECT_TRUE(client.WaitFor("x-request-id: v" + std::to_string(i)));
  }
  // A body of many records.
  const std::string large = json({{"prompt", std::string(1 << 20, 'x')}}).dump();
  client.Send(PostBytes("/v1/completions", large));
  EXPECT_TRUE(client.WaitFor("HTTP/1.1 400"));
}

TEST_F(Protection, AClientThatLeavesATlsStreamIsCancelled) {
  UseTls(false);
  Open();
  engine_.script = [](const Request&) { return Script{.tokens = {{70}}}; };
  engine_.Hold();
  TlsClient client(http(), files_.Path("ca.pem"));
  client.Send(PostBytes("/v1/completions", R"({"prompt":"x","stream":true})"));
  ASSERT_TRUE(engine_.WaitSubmitted(1));
  engine_.Tick(1);
  ASSERT_TRUE(client.WaitFor("data: "));
  client.Close();
  EXPECT_TRUE(engine_.WaitCancelled(1));
}

TEST_F(Protection, OnlyCertificatesOfTheAuthorityPass) {
  UseTls(true);
  Open();
  files_.MakeAuthority("other");
  files_.MakeCertificate("friend", "ca");
  files_.MakeCertificate("stranger", "other");
  files_.MakeCertificate("late", "ca", -1);
  const auto http_passes = [&](const std::string& name) {
    TlsClient client(http(), files_.Path("ca.pem"), name.empty() ? "" : files_.Path(name + ".pem"),
                     name.empty() ? "" : files_.Path(name + ".key"));
    client.Send(kHealth);
    return client.ReadToEnd().starts_with("HTTP/1.1 200");
  };
  EXPECT_TRUE(http_passes("friend"));
  EXPECT_FALSE(http_passes(""));
  EXPECT_FALSE(http_passes("stranger"));
  EXPECT_FALSE(http_passes("late"));
  EXPECT_TRUE(Ask(Grpc("friend").get()).ok());
  for (const char* name : {"", "stranger", "late"}) {
    EXPECT_EQ(Ask(Grpc(name).get()).error_code(), grpc::StatusCode::UNAVAILABLE) << name;
  }
  EXPECT_TRUE(http_passes("friend"));
}

// The kubelet has no certificate to show: it asks in plain text, for this and no more.
TEST_F(Protection, ProbersHaveAPortWhereTheyNeedNoCertificate) {
  UseTls(true);
  UseKeys(std::string(kHashA) + " a\n");
  options_.health_port = 0;
  Open();
  const int health = server_->health_port();
  ASSERT_GT(health, 0);
  EXPECT_EQ(Get(health, "/health").status, 200);
  EXPECT_EQ(Get(health, "/ready").status, 200);
  for (const char* path : {"/metrics", "/v1/models", "/version", "/health/", "/"}) {
    const RawResponse refused = Get(health, path);
    EXPECT_EQ(refused.status, 404) << path;
    EXPECT_THAT(std::string(refused.error()["message"]), HasSubstr("GET /ready")) << path;
  }
  EXPECT_EQ(Post(health, "/v1/completions", R"({"prompt":"x"})").status, 404);
  EXPECT_EQ(Post(health, "/health", "{}").status, 404);
  EXPECT_TRUE(engine_.submitted().empty());
  // It tells the truth for as long as the doors do.
  engine_.SetState(EngineState::kRecovering);
  EXPECT_EQ(Get(health, "/ready").status, 503);
  EXPECT_EQ(Get(health, "/health").status, 200);
  engine_.SetState(EngineState::kReady);
  server_->BeginLeaving();
  EXPECT_EQ(Get(health, "/ready").status, 503);
  server_->Stop(0);
  EXPECT_EQ(server_->health_port(), -1);

  options_.health_port = -1;
  Open();
  EXPECT_EQ(server_->health_port(), -1);
  const RawClient taken(server_->http_port());
  options_.health_port = server_->http_port();
  EXPECT_THAT(std::string(StartError().message()), HasSubstr("--health-port"));
}

TEST_F(Protection, RenewedCertificatesAreServedAndNoStreamEnds) {
  UseTls(false);
  Open();
  engine_.script = [](const Request&) { return Script{.tokens = {{70, 71, 2}}}; };
  engine_.Hold();
  const std::string authority = files_.Path("ca.pem");
  TlsClient stream(http(), authority);
  EXPECT_EQ(stream.server_name(), "server");
  stream.Send(PostBytes("/v1/completions", R"({"prompt":"x","stream":true})"));
  ASSERT_TRUE(engine_.WaitSubmitted(1));
  engine_.Tick(1);
  ASSERT_TRUE(stream.WaitFor("data: "));

  files_.MakeCertificate("renewed", "ca");
  files_.Replace("renewed", "server");
  EXPECT_EQ(TlsClient(http(), authority).server_name(), "renewed");
  // Half a renewal, or none at all: what was there stays.
  files_.Write("server.pem", "not a certificate");
  EXPECT_EQ(TlsClient(http(), authority).server_name(), "renewed");
  files_.MakeCertificate("third", "ca");
  files_.Write("server.pem", files_.Read("third.pem"));
  EXPECT_EQ(TlsClient(http(), authority).server_name(), "renewed");
  files_.Write("server.key", files_.Read("third.key"));
  EXPECT_EQ(TlsClient(http(), authority).server_name(), "third");

  engine_.Release();
  EXPECT_TRUE(stream.WaitFor("[DONE]"));
}

TEST_F(Protection, GrpcServesRenewedCertificates) {
  UseTls(false);
  Open();
  EXPECT_TRUE(Ask(Grpc().get()).ok());
  // One of another authority: clients of the old one must notice.
  files_.MakeAuthority("next");
  files_.MakeCertificate("renewed", "next");
  files_.Replace("renewed", "server");
  files_.Write("ca.pem", files_.Read("next.pem"));
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(30);
  bool served = false;
  while (!served && std::chrono::steady_clock::now() < deadline) served = Ask(Grpc().get()).ok();
  EXPECT_TRUE(served);
}

TEST_F(Protection, WhatCannotServeTlsIsNamed) {
  UseTls(true);
  files_.MakeCertificate("other", "ca");
  files_.MakeCertificate("late", "ca", -1);
  files_.Write("empty", "");
  const TlsFiles good = options_.tls;
  const auto error = [&](TlsFiles tls) {
    options_.tls = std::move(tls);
    std::string message(StartError().message());
    EXPECT_THAT(message, ::testing::Not(HasSubstr("\n")));
    return message;
  };
  const std::string key = files_.Path("server.key"), none = files_.Path("none");
  EXPECT_THAT(error({none, key, ""}), HasSubstr("--ssl-certfile " + none));
  EXPECT_THAT(error({files_.Path("empty"), key, ""}), HasSubstr("--ssl-certfile"));
  EXPECT_THAT(error({files_.Path("late.pem"), files_.Path("late.key"), ""}), HasSubstr("expired"));
  EXPECT_THAT(error({good.certificate, "", ""}), HasSubstr("--ssl-keyfile"));
  EXPECT_THAT(error({good.certificate, none, ""}), HasSubstr("--ssl-keyfile " + none));
  EXPECT_THAT(error({good.certificate, files_.Path("other.key"), ""}),
              HasSubstr("not the key of --ssl-certfile"));
  EXPECT_THAT(error({good.certificate, good.key, none}), HasSubstr("--ssl-ca-certs " + none));
  EXPECT_THAT(error({"", key, ""}), HasSubstr("--ssl-keyfile: needs --ssl-certfile"));
  EXPECT_THAT(error({"", "", key}), HasSubstr("--ssl-ca-certs: needs --ssl-certfile"));
}

TEST_F(Protection, BeyondLoopbackNeedsTls) {
  // A name that looks like loopback may lead anywhere.
  for (const char* far : {"127.example.invalid", "127.0.0.1.example.invalid", "0.0.0.0"}) {
    options_.host = far;
    EXPECT_THAT(std::string(StartError().message()), HasSubstr("--ssl-certfile")) << far;
  }
  UseTls(false);
  EXPECT_TRUE(StartError().ok());
}

TEST_F(Protection, WithKeysOnlyTheyAsk) {
  UseKeys(std::string("# teams\n\n") + kHashA + "  team a\n" + kHashB + ", b\n");
  Open();
  for (const char* path : {"/v1/models", "/version", "/nowhere", "/tokenizer_info"}) {
    for (const char* wrong : {"", "Bearer", "Bearer ", "Bearer secret-", "Bearer secret-aa",
                              "Bearer Secret-a", "Basic secret-a", "secret-a", kHashA}) {
      const RawResponse response = WithKey(path, wrong);
      EXPECT_EQ(response.status, 401) << path << " " << wrong;
      EXPECT_EQ(response.headers.at("www-authenticate"), "Bearer");
      EXPECT_EQ(response.error()["code"], "invalid_api_key");
      EXPECT_THAT(response.body, ::testing::Not(HasSubstr("secret")));
    }
  }
  EXPECT_EQ(WithKey("/v1/models", "Bearer secret-a").status, 200);
  EXPECT_EQ(WithKey("/v1/models", "bearer  secret-b").status, 200);
  EXPECT_EQ(WithKey("/nowhere", "Bearer secret-a").status, 404);
  for (const char* open : {"/health", "/ready", "/metrics"}) {
    EXPECT_EQ(Get(http(), open).status, 200) << open;
  }
  EXPECT_EQ(Post(http(), "/health", "{}").status, 401);
  EXPECT_EQ(Complete({{"prompt", "x"}}).status, 401);
  EXPECT_EQ(Post(http(), "/v1/completions", R"({"prompt":"x"})",
                 "Content-Type: application/json\r\nAuthorization: Bearer secret-a\r\n")
                .status,
            200);
  EXPECT_THAT(Get(http(), "/metrics").body,
              HasSubstr("lockstep_http_responses_total{code=\"401\"} 38"));
}

TEST_F(Protection, WhoHasNoKeyIsRefusedBeforeTheBody) {
  UseKeys(std::string(kHashA) + " a\n");
  Open();
  RawClient client(http());
  client.Send("POST /v1/completions HTTP/1.1\r\nContent-Length: 8000000\r\n\r\n");
  EXPECT_EQ(client.Read().status, 401);
}

TEST_F(Protection, KeysAreReadAgain) {
  UseKeys(std::string(kHashA) + " a\n");
  Open();
  EXPECT_EQ(WithKey("/version", "Bearer secret-b").status, 401);
  files_.Write("next", std::string(kHashB) + " b\n");
  std::rename(files_.Path("next").c_str(), files_.Path("keys").c_str());
  EXPECT_EQ(WithKey("/version", "Bearer secret-b").status, 200);
  EXPECT_EQ(WithKey("/version", "Bearer secret-a").status, 401);
  files_.Write("keys", "nonsense\n");
  EXPECT_EQ(WithKey("/version", "Bearer secret-b").status, 200);
  std::remove(files_.Path("keys").c_str());
  EXPECT_EQ(WithKey("/version", "Bearer secret-b").status, 200);
  files_.Write("keys", "");
  EXPECT_EQ(WithKey("/version", "Bearer secret-b").status, 401);
}

TEST_F(Protection, GrpcCallsNeedAKeyAsWell) {
  UseKeys(std::string(kHashA) + " a\n");
  Open();
  const auto stub = Grpc();
  EXPECT_EQ(Ask(stub.get()).error_code(), grpc::StatusCode::UNAUTHENTICATED);
  EXPECT_EQ(Ask(stub.get(), "Bearer nope").error_code(), grpc::StatusCode::UNAUTHENTICATED);
  EXPECT_TRUE(Ask(stub.get(), "Bearer secret-a").ok());
  v1::GenerateRequest request;
  request.set_text("x");
  {
    grpc::ClientContext context;
    v1::GenerateResponse response;
    EXPECT_EQ(stub->Generate(&context, request, &response).error_code(),
              grpc::StatusCode::UNAUTHENTICATED);
  }
  {
    grpc::ClientContext context;
    v1::TokenizeResponse response;
    EXPECT_EQ(stub->Tokenize(&context, {}, &response).error_code(),
              grpc::StatusCode::UNAUTHENTICATED);
  }
  {
    grpc::ClientContext context;
    v1::GenerateEvent event;
    const auto stream = stub->GenerateStream(&context, request);
    EXPECT_FALSE(stream->Read(&event));
    EXPECT_EQ(stream->Finish().error_code(), grpc::StatusCode::UNAUTHENTICATED);
  }
  EXPECT_TRUE(engine_.submitted().empty());
  grpc::ClientContext context;
  context.AddMetadata("authorization", "Bearer secret-a");
  v1::GenerateResponse response;
  EXPECT_TRUE(stub->Generate(&context, request, &response).ok());
}

// A request that is fast, or says that tokens were cached, would tell one key what
// another one had asked.
TEST_F(Protection, EachKeySharesThePrefixCacheWithItselfAlone) {
  UseKeys(std::string(kHashA) + " a\n" + kHashB + " b\n");
  Open();
  const auto salt_of_http = [&](const std::string& key, const std::string& path) {
    const char* const body = path == "/v1/completions"
                                 ? R"({"prompt":"x"})"
                                 : R"({"messages":[{"role":"user","content":"x"}]})";
    EXPECT_EQ(Post(http(), path, body,
                   "Content-Type: application/json\r\nAuthorization: Bearer " + key + "\r\n")
                  .status,
              200);
    return engine_.submitted().back().cache_salt;
  };
  const auto stub = Grpc();
  const auto salt_of_grpc = [&](const std::string& key) {
    grpc::ClientContext context;
    context.AddMetadata("authorization", "Bearer " + key);
    v1::GenerateRequest request;
    request.set_text("x");
    v1::GenerateResponse response;
    EXPECT_TRUE(stub->Generate(&context, request, &response).ok());
    return engine_.submitted().back().cache_salt;
  };
  const uint64_t a = salt_of_http("secret-a", "/v1/completions");
  const uint64_t b = salt_of_http("secret-b", "/v1/completions");
  EXPECT_NE(a, b);
  EXPECT_NE(a, 0u);
  EXPECT_NE(b, 0u);
  EXPECT_EQ(salt_of_http("secret-a", "/v1/chat/completions"), a);
  EXPECT_EQ(salt_of_grpc("secret-a"), a);
  EXPECT_EQ(salt_of_grpc("secret-b"), b);
}

TEST_F(Protection, WithoutKeysAllShareThePrefixCache) {
  Open();
  EXPECT_EQ(Complete({{"prompt", "x"}}).status, 200);
  EXPECT_EQ(engine_.submitted().back().cache_salt, 0u);
}

TEST_F(Protection, ABadKeyFileIsNamed) {
  const auto error = [&](const std::string& text) {
    UseKeys(text);
    return std::string(StartError().message());
  };
  EXPECT_THAT(error(""), HasSubstr("no key in it"));
  EXPECT_THAT(error("# only words\n"), HasSubstr("no key in it"));
  EXPECT_THAT(error("\nsecret-a team\n"), HasSubstr("line 2"));
  EXPECT_THAT(error("\nsecret-a team\n"), ::testing::Not(HasSubstr("secret-a")));
  EXPECT_THAT(error(std::string(kHashA) + "\n"), HasSubstr("line 1"));
  EXPECT_THAT(error("g" + std::string(kHashA).substr(1) + " a\n"), HasSubstr("line 1"));
  options_.api_key_file = files_.Path("none");
  EXPECT_THAT(std::string(StartError().message()), HasSubstr("--api-key-file"));
}

TEST_F(Protection, BrowsersMaySendTheHeadersOfTheirLibraries) {
  options_.allowed_origins = {"http://a"};
  UseKeys(std::string(kHashA) + " a\n");
  Open();
  const auto allowed = [&](const std::string& wanted, const std::string& origin) {
    RawClient client(http());
    client.Send("OPTIONS /v1/chat/completions HTTP/1.1\r\nOrigin: " + origin +
                "\r\nAccess-Control-Request-Method: POST\r\nAccess-Control-Request-Headers: " +
                wanted + "\r\n\r\n");
    const RawResponse response = client.Read();
    const auto found = response.headers.find("access-control-allow-headers");
    return found == response.headers.end() ? "" : found->second;
  };
  const std::string usual = "authorization, content-type, traceparent, x-request-id";
  const std::string javascript =
      "authorization,content-type,x-stainless-arch,x-stainless-lang,x-stainless-os,"
      "x-stainless-package-version,x-stainless-retry-count,x-stainless-runtime,"
      "x-stainless-runtime-version,x-stainless-timeout";
  EXPECT_EQ(allowed(javascript, "http://a"), javascript);
  EXPECT_EQ(allowed("x-a, x-b", "http://a"), "x-a, x-b");
  EXPECT_EQ(allowed(std::string(1024, 'x'), "http://a"), std::string(1024, 'x'));
  for (const std::string& other : {std::string(), std::string(1025, 'x'), std::string("x-a;x-b"),
                                   std::string("x a"), std::string("x-a,,x-b"), std::string("x\""),
                                   std::string("caf\xc3\xa9"), std::string("x-a,")}) {
    EXPECT_EQ(allowed(other, "http://a"), usual) << other;
  }
  EXPECT_EQ(allowed(javascript, "http://b"), "");
}

TEST_F(Protection, PagesOfOtherOriginsAskOnlyWhereAllowed) {
  const auto ask = [&](const std::string& method, const std::string& origin) {
    RawClient client(http());
    client.Send(method + " /version HTTP/1.1\r\nOrigin: " + origin +
                "\r\nAccess-Control-Request-Method: POST\r\n\r\n");
    return client.Read();
  };
  Open();
  EXPECT_FALSE(ask("GET", "http://a").headers.contains("access-control-allow-origin"));
  EXPECT_EQ(ask("OPTIONS", "http://a").status, 405);

  options_.allowed_origins = {"http://a"};
  UseKeys(std::string(kHashA) + " a\n");
  Open();
  const RawResponse preflight = ask("OPTIONS", "http://a");
  EXPECT_EQ(preflight.status, 200);
  EXPECT_EQ(preflight.headers.at("access-control-allow-origin"), "http://a");
  EXPECT_THAT(preflight.headers.at("access-control-allow-headers"), HasSubstr("authorization"));
  EXPECT_EQ(preflight.headers.at("vary"), "Origin");
  EXPECT_EQ(ask("GET", "http://a").status, 401);
  EXPECT_EQ(ask("GET", "http://a").headers.at("access-control-allow-origin"), "http://a");
  EXPECT_EQ(ask("OPTIONS", "http://b").status, 401);
  EXPECT_FALSE(ask("GET", "http://b").headers.contains("access-control-allow-origin"));

  options_.allowed_origins = {"*"};
  options_.api_key_file.clear();
  Open();
  EXPECT_EQ(ask("GET", "http://b").headers.at("access-control-allow-origin"), "*");
}

TEST_F(Protection, AnIdleStreamShowsThatItLives) {
  options_.ping_interval_ms = 20;
  Open();
  engine_.script = [](const Request&) { return Script{.tokens = {{70, 2}}}; };
  engine_.Hold();
  for (const char* path : {"/v1/completions", "/v1/chat/completions"}) {
    const bool chat = std::string(path) != "/v1/completions";
    RawClient client(http());
    client.Send(
        PostBytes(path, chat ? R"({"messages":[{"role":"user","content":"x"}],"stream":true})"
                             : R"({"prompt":"x","stream":true})"));
    ASSERT_TRUE(engine_.WaitSubmitted(chat ? 2 : 1));
    // Before the first byte there is nothing that a ping could keep.
    EXPECT_FALSE(client.Readable(100));
    engine_.Tick(1);
    ASSERT_TRUE(client.WaitFor("\n\n"));
    ASSERT_TRUE(client.WaitFor(": ping\n\n"));
    engine_.Tick(1);
    const RawResponse response = client.Read();
    EXPECT_EQ(response.status, 200);
    EXPECT_THAT(response.body, ::testing::EndsWith("data: [DONE]\n\n"));
  }
}

TEST(Trace, OnlyWhatTheStandardSays) {
  const std::string good = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
  EXPECT_TRUE(IsTraceparent(good));
  EXPECT_TRUE(IsTraceparent("01" + good.substr(2) + "-more"));
  for (const std::string& bad :
       {std::string(), good.substr(1), good + "-more", good + "0", "ff" + good.substr(2),
        "0G" + good.substr(2), "00-" + std::string(32, '0') + good.substr(35),
        good.substr(0, 36) + std::string(16, '0') + "-01", good.substr(0, 53) + "0A",
        std::string(55, '-'), good + "-" + std::string(200, 'a')}) {
    EXPECT_FALSE(IsTraceparent(bad)) << bad;
  }
}

}  // namespace
}  // namespace lockstep
