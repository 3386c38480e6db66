// What text costs on the path of every token and every request.
//   bench_text [MODEL_DIR]    default: the byte-level fixture of the tests
#include <benchmark/benchmark.h>

#include <cstdio>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "coordinator/text/chat_template.h"
#include "coordinator/text/detokenizer.h"
#include "coordinator/text/stop_matcher.h"
#include "coordinator/text/tokenizer.h"

namespace lockstep {
namespace {

std::vector<TokenId> SomeIds(const Tokenizer& tokenizer) {
  std::vector<TokenId> ids;
  ids.reserve(4096);
  for (uint32_t i = 0; i < 4096; ++i) ids.push_back(i * 2654435761u % tokenizer.vocab_size());
  return ids;
}

void BM_DetokenizerPush(benchmark::State& state,
                        const std::shared_ptr<const Tokenizer>& tokenizer) {
  const std::vector<TokenId> ids = SomeIds(*tokenizer);
  Detokenizer detokenizer(tokenizer, /*skip_special_tokens=*/true);
  size_t i = 0;
  for (auto _ : state) benchmark::DoNotOptimize(detokenizer.Push(ids[i++ % ids.size()]));
}

void BM_StopMatcherPush(benchmark::State& state,
                        const std::shared_ptr<const Tokenizer>& tokenizer) {
  const std::vector<TokenId> ids = SomeIds(*tokenizer);
  std::vector<std::string> stops;
  stops.reserve(static_cast<size_t>(state.range(0)));
  for (int i = 0; i < state.range(0); ++i) stops.push_back("\n\nUser " + std::to_string(i) + ":");
  StopMatcher matcher(stops, /*include_stop_string=*/false);
  size_t i = 0;
  for (auto _ : state) {
    benchmark::DoNotOptimize(matcher.Push(tokenizer->TokenBytes(ids[i++ % ids.size()])));
  }
}

void BM_Encode(benchmark::State& state, const std::shared_ptr<const Tokenizer>& tokenizer) {
  std::string text;
  while (text.size() < static_cast<size_t>(state.range(0)))
    text += "the quick brown fox, jumping; ";
  for (auto _ : state) benchmark::DoNotOptimize(tokenizer->Encode(text, true));
  state.SetBytesProcessed(static_cast<int64_t>(state.iterations() * text.size()));
}

void BM_Load(benchmark::State& state, const std::string& model_dir) {
  for (auto _ : state) benchmark::DoNotOptimize(Tokenizer::Load(model_dir));
}

void BM_RenderChat(benchmark::State& state, const ChatTemplate& chat_template) {
  std::vector<ChatMessage> messages;
  messages.reserve(static_cast<size_t>(state.range(0)));
  for (int i = 0; i < state.range(0); ++i) {
    messages.push_back({i % 2 == 0 ? "user" : "assistant", "What is the capital of this place?"});
  }
  for (auto _ : state) benchmark::DoNotOptimize(chat_template.Render(messages, true));
}

int Main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  const std::string model_dir = argc > 1 ? argv[1] : "tests/text/data/byte_level";
  auto tokenizer = Tokenizer::Load(model_dir);
  if (!tokenizer.ok()) {
    std::fprintf(stderr, "%s\n", std::string(tokenizer.status().message()).c_str());
    return 1;
  }
  benchmark::RegisterBenchmark("DetokenizerPush", BM_DetokenizerPush, *tokenizer);
  benchmark::RegisterBenchmark("StopMatcherPush", BM_StopMatcherPush, *tokenizer)->Arg(1)->Arg(16);
  benchmark::RegisterBenchmark("Encode", BM_Encode, *tokenizer)->Arg(1000)->Arg(100'000);
  benchmark::RegisterBenchmark("Load", BM_Load, model_dir)->Unit(benchmark::kMillisecond);
  auto chat_template = ChatTemplate::Load(model_dir);
  if (chat_template.ok() && *chat_template) {
    benchmark::RegisterBenchmark("RenderChat", BM_RenderChat, **chat_template)->Arg(1)->Arg(100);
  }
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}

}  // namespace
}  // namespace lockstep

int main(int argc, char** argv) { return lockstep::Main(argc, argv); }
