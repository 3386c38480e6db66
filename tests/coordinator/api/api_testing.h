// What the API tests share: the demo model as the doors see it, and its tokens.
#ifndef LOCKSTEP_TESTS_COORDINATOR_API_API_TESTING_H_
#define LOCKSTEP_TESTS_COORDINATOR_API_API_TESTING_H_

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "coordinator/api/served_model.h"
#include "coordinator/text/chat_template.h"
#include "coordinator/text/tokenizer.h"

namespace lockstep {

// The demo model's text files with sizes that tests can reach: 64 tokens of
// context. Token 2 ends an answer.
inline ServedModel DemoModel() {
  const std::string dir = std::string(LOCKSTEP_SOURCE_DIR) + "/deploy/demo/model";
  auto tokenizer = Tokenizer::Load(dir);
  EXPECT_TRUE(tokenizer.ok()) << tokenizer.status();
  auto chat_template = ChatTemplate::Load(dir);
  EXPECT_TRUE(chat_template.ok()) << chat_template.status();
  ServedModel model;
  model.name = "demo";
  model.architecture = "LlamaForCausalLM";
  model.dtype = "bfloat16";
  model.kv_dtype = "float8_e4m3fn";
  model.vocab_size = 1024;
  model.max_model_len = 64;
  model.tp_size = 2;
  model.eos_token_ids = {2};
  if (tokenizer.ok()) model.tokenizer = *tokenizer;
  if (chat_template.ok()) model.chat_template = *chat_template;
  return model;
}

inline std::vector<TokenId> Ids(const ServedModel& model, const std::string& text) {
  auto ids = model.tokenizer->Encode(text, /*add_special_tokens=*/false);
  EXPECT_TRUE(ids.ok()) << ids.status();
  return ids.ok() ? *ids : std::vector<TokenId>();
}

}  // namespace lockstep

#endif  // LOCKSTEP_TESTS_COORDINATOR_API_API_TESTING_H_
