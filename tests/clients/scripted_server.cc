// Both doors over a scripted engine, for clients of other languages: the answer
// to a prompt is what stands in it between "ANSWER:" and ":END". Says its ports
// on stdout and ends with its standard input.
//
//   scripted_server [--api-key-file F] [--ssl-certfile F --ssl-keyfile F]
#include <cstdio>
#include <string>
#include <string_view>

#include "coordinator/api/server.h"
#include "tests/coordinator/api/api_testing.h"
#include "tests/coordinator/api/scripted_engine.h"

namespace lockstep {
namespace {

constexpr std::string_view kBegin = "ANSWER:", kEnd = ":END";
constexpr TokenId kEndingToken = 2;

std::vector<TokenId> Answer(const ServedModel& model, const Request& request) {
  const std::string prompt = model.tokenizer->Decode(request.prompt, false);
  std::vector<TokenId> tokens;
  // The last one: a conversation has earlier ones.
  const size_t begin = prompt.rfind(kBegin);
  if (begin != std::string::npos) {
    const size_t from = begin + kBegin.size();
    tokens = Ids(model, prompt.substr(from, prompt.find(kEnd, from) - from));
  }
  tokens.push_back(kEndingToken);
  return tokens;
}

int Main(int argc, char** argv) {
  ApiOptions options;
  options.http_port = options.grpc_port = 0;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string_view flag = argv[i];
    if (flag == "--api-key-file") options.api_key_file = argv[i + 1];
    if (flag == "--ssl-certfile") options.tls.certificate = argv[i + 1];
    if (flag == "--ssl-keyfile") options.tls.key = argv[i + 1];
  }
  ServedModel model = DemoModel();
  model.max_model_len = 2048;
  ScriptedEngine engine;
  engine.script = [&model](const Request& request) {
    return Script{.tokens = {Answer(model, request)}};
  };
  ApiServer server(options, model);
  if (const absl::Status started = server.Start(&engine); !started.ok()) {
    std::fprintf(stderr, "scripted_server: %s\n", std::string(started.message()).c_str());
    return 1;
  }
  std::printf("%d %d\n", server.http_port(), server.grpc_port());
  std::fflush(stdout);
  while (std::getchar() != EOF) {
  }
  server.Stop(0);
  return 0;
}

}  // namespace
}  // namespace lockstep

int main(int argc, char** argv) { return lockstep::Main(argc, argv); }
