#include "cli/plan_command.h"

#include <sstream>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/fakes/temp_dir.h"
#include "tests/model/model_testing.h"

namespace lockstep {
namespace {

using nlohmann::json;
using testing::AllOf;
using testing::HasSubstr;

struct Outcome {
  int code = 0;
  std::string out, err;
};

Outcome RunPlanWith(const PlanOptions& options) {
  std::ostringstream out, err;
  const int code = RunPlan(options, out, err);
  return {code, out.str(), err.str()};
}

PlanOptions Ask(const std::string& model) {
  PlanOptions options;
  options.model = model;
  return options;
}

json JsonAnswer(PlanOptions options) {
  options.json = true;
  const Outcome outcome = RunPlanWith(options);
  EXPECT_EQ(outcome.code, 0) << outcome.err;
  return json::parse(outcome.out);
}

TEST(PlanCommandTest, JsonHasTheMinimumAndTheRows) {
  const json answer = JsonAnswer(Ask(PublishedPath("llama-3.1-70b")));
  EXPECT_EQ(answer["minimum_tensor_parallel_size"], 4);
  EXPECT_EQ(answer["max_num_seqs"], 24);
  EXPECT_EQ(answer["max_model_len"], 8192);
  EXPECT_EQ(answer["memory_bytes"], int64_t{80} << 30);
  EXPECT_EQ(answer["dtype"], "bfloat16");
  ASSERT_EQ(answer["rows"].size(), 4u);
  int64_t tp_size = 1;
  for (const json& row : answer["rows"]) {
    EXPECT_EQ(row["tensor_parallel_size"], tp_size);
    EXPECT_EQ(row["headroom"].get<bool>(), tp_size >= 4);
    EXPECT_EQ(row["fits"].get<bool>(), tp_size >= 2);
    EXPECT_GT(row["weight_bytes"].get<int64_t>(), int64_t{141'000'000'000} / tp_size);
    for (const char* key : {"kv_bytes_per_token", "activation_bytes", "communication_bytes",
                            "runtime_bytes", "peak_kv_bytes", "kv_tokens", "max_model_len"}) {
      EXPECT_TRUE(row[key].is_number_integer()) << key;
    }
    EXPECT_FALSE(row["reason"].get<std::string>().empty());
    tp_size *= 2;
  }
}

TEST(PlanCommandTest, NoneThatFitsIsNullAndStillAnAnswer) {
  const json answer = JsonAnswer(Ask(PublishedPath("llama-3.1-405b")));
  EXPECT_TRUE(answer["minimum_tensor_parallel_size"].is_null());
  const Outcome text = RunPlanWith(Ask(PublishedPath("llama-3.1-405b")));
  EXPECT_EQ(text.code, 0);
  EXPECT_THAT(text.out, HasSubstr("none up to 8"));
}

TEST(PlanCommandTest, FlagsChangeTheAnswer) {
  PlanOptions options = Ask(PublishedPath("llama-3.1-405b"));
  options.quantization = "fp8";
  EXPECT_EQ(JsonAnswer(options)["minimum_tensor_parallel_size"], 8);

  options = Ask(PublishedPath("llama-2-7b"));
  const json sixteen = JsonAnswer(options);
  EXPECT_EQ(sixteen["kv_cache_dtype"], sixteen["dtype"]);
  options.kv_cache_dtype = "fp8";
  const json eight = JsonAnswer(options);
  EXPECT_EQ(eight["kv_cache_dtype"], "float8_e4m3fn");
  EXPECT_EQ(2 * eight["rows"][0]["kv_bytes_per_token"].get<int64_t>(),
            sixteen["rows"][0]["kv_bytes_per_token"].get<int64_t>());
  EXPECT_THAT(RunPlanWith(options).out, HasSubstr("float16 and KV of float8_e4m3fn"));

  options = Ask(PublishedPath("llama-3.1-70b"));
  options.max_num_seqs = 1;
  options.max_model_len = 1024;
  options.gpu_memory = "141GiB";
  EXPECT_EQ(JsonAnswer(options)["minimum_tensor_parallel_size"], 2);

  options = Ask(PublishedPath("llama-2-7b"));
  options.dtype = "float32";
  EXPECT_EQ(JsonAnswer(options)["dtype"], "float32");
  EXPECT_EQ(JsonAnswer(options)["minimum_tensor_parallel_size"], 2);
  options.backend = "cpu";
  EXPECT_EQ(JsonAnswer(options)["rows"][0]["runtime_bytes"], 0);
  EXPECT_EQ(JsonAnswer(options)["max_num_batched_tokens"], 2048);
}

TEST(PlanCommandTest, TheTableSaysEachSizeAndTheMinimum) {
  const Outcome outcome = RunPlanWith(Ask(PublishedPath("llama-2-13b")));
  EXPECT_EQ(outcome.code, 0);
  EXPECT_TRUE(outcome.err.empty());
  EXPECT_THAT(outcome.out,
              AllOf(HasSubstr("LlamaForCausalLM"), HasSubstr("config.json alone"),
                    HasSubstr("24 sequences of 4096 tokens"), HasSubstr("tp 1: "),
                    HasSubstr("tp 8: "), HasSubstr("minimum tensor parallel size: 2\n")));
}

TEST(PlanCommandTest, HeadersBesideTheConfigAreChecked) {
  const TempDir dir;
  WriteFileOrDie(dir.File("config.json"), TinyLlamaJson().dump());
  EXPECT_THAT(RunPlanWith(Ask(dir.path())).out, HasSubstr("config.json alone"));

  std::map<std::string, std::vector<int64_t>> tensors = StoredTensors(*Parse(TinyLlamaJson()));
  SafetensorsWriter good;
  AddTensors(tensors, &good);
  good.WriteTo(dir.File("model.safetensors"));
  EXPECT_THAT(RunPlanWith(Ask(dir.path())).out, HasSubstr("headers of 1 file checked"));
  EXPECT_EQ(JsonAnswer(Ask(dir.path()))["checked_files"], 1);
  // The path of the file asks about the file alone.
  EXPECT_EQ(JsonAnswer(Ask(dir.File("config.json")))["checked_files"], 0);

  tensors["model.layers.1.mlp.up_proj.weight"] = {47, 32};
  SafetensorsWriter wrong;
  AddTensors(tensors, &wrong);
  wrong.WriteTo(dir.File("model.safetensors"));
  const Outcome outcome = RunPlanWith(Ask(dir.path()));
  EXPECT_EQ(outcome.code, 1);
  EXPECT_TRUE(outcome.out.empty());
  EXPECT_THAT(outcome.err, AllOf(HasSubstr("model.layers.1.mlp.up_proj.weight"),
                                 HasSubstr("model.safetensors"), HasSubstr("[48, 32]")));
}

TEST(PlanCommandTest, BadInputIsOneLineThatNamesIt) {
  const auto error = [](auto change) {
    PlanOptions options = Ask(PublishedPath("llama-2-7b"));
    change(options);
    const Outcome outcome = RunPlanWith(options);
    EXPECT_EQ(outcome.code, 1);
    EXPECT_TRUE(outcome.out.empty());
    EXPECT_EQ(outcome.err.find('\n'), outcome.err.size() - 1);
    return outcome.err;
  };
  EXPECT_THAT(error([](PlanOptions& o) { o.gpu_memory = "80G"; }), HasSubstr("--gpu-memory"));
  EXPECT_THAT(error([](PlanOptions& o) { o.gpu_memory = "80"; }), HasSubstr("as in 80GiB"));
  EXPECT_THAT(error([](PlanOptions& o) { o.backend = "tpu"; }), HasSubstr("--backend"));
  EXPECT_THAT(error([](PlanOptions& o) { o.dtype = "int8"; }), HasSubstr("--dtype"));
  EXPECT_THAT(error([](PlanOptions& o) { o.quantization = "int4"; }), HasSubstr("int4"));
  EXPECT_THAT(error([](PlanOptions& o) { o.kv_cache_dtype = "fp8_e5m2"; }),
              AllOf(HasSubstr("--kv-cache-dtype"), HasSubstr("fp8_e4m3")));
  EXPECT_THAT(error([](PlanOptions& o) {
                o.kv_cache_dtype = "fp8";
                o.backend = "cpu";
              }),
              AllOf(HasSubstr("--kv-cache-dtype"), HasSubstr("--backend cuda")));
  EXPECT_THAT(error([](PlanOptions& o) { o.max_model_len = 99'999; }),
              AllOf(HasSubstr("max-model-len"), HasSubstr("4096")));
  EXPECT_THAT(error([](PlanOptions& o) { o.max_num_seqs = 0; }), HasSubstr("max-num-seqs"));
  EXPECT_THAT(error([](PlanOptions& o) { o.gpu_memory_utilization = 0; }),
              HasSubstr("--gpu-memory-utilization"));
  EXPECT_THAT(error([](PlanOptions& o) { o.model = "/nowhere/at/all"; }),
              HasSubstr("/nowhere/at/all"));
}

}  // namespace
}  // namespace lockstep
