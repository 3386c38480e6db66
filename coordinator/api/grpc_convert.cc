#include "coordinator/api/grpc_convert.h"

#include <string>
#include <utility>

#include "common/version.h"

namespace lockstep {
namespace {

ChatPrompt FromProto(const v1::ChatMessages& chat) {
  ChatPrompt prompt;
  for (const v1::ChatMessage& message : chat.messages()) {
    prompt.messages.push_back({message.role(), message.content()});
  }
  if (chat.has_add_generation_prompt()) {
    prompt.context.add_generation_prompt = chat.add_generation_prompt();
  }
  return prompt;
}

ClientSampling FromProto(const v1::SamplingParams& in) {
  ClientSampling out;
  if (in.has_max_tokens()) out.max_tokens = in.max_tokens();
  if (in.has_temperature()) out.temperature = in.temperature();
  if (in.has_top_p()) out.top_p = in.top_p();
  if (in.has_top_k()) out.top_k = in.top_k();
  if (in.has_min_p()) out.min_p = in.min_p();
  if (in.has_repetition_penalty()) out.repetition_penalty = in.repetition_penalty();
  if (in.has_presence_penalty()) out.presence_penalty = in.presence_penalty();
  if (in.has_frequency_penalty()) out.frequency_penalty = in.frequency_penalty();
  if (in.has_seed()) out.seed = in.seed();
  for (const auto& [id, bias] : in.logit_bias()) out.logit_bias.emplace_back(id, bias);
  out.stop.assign(in.stop().begin(), in.stop().end());
  out.stop_token_ids.assign(in.stop_token_ids().begin(), in.stop_token_ids().end());
  if (in.has_min_tokens()) out.min_tokens = in.min_tokens();
  if (in.has_n()) out.n = in.n();
  if (in.has_ignore_eos()) out.ignore_eos = in.ignore_eos();
  if (in.has_include_stop_str_in_output()) {
    out.include_stop_str_in_output = in.include_stop_str_in_output();
  }
  if (in.has_logprobs()) out.logprobs = in.logprobs();
  if (in.has_prompt_logprobs()) out.prompt_logprobs = in.prompt_logprobs();
  if (in.has_skip_special_tokens()) out.skip_special_tokens = in.skip_special_tokens();
  return out;
}

void Fill(const Tokenizer& tokenizer, TokenId id, float logprob, uint32_t rank, v1::Logprob* out) {
  out->set_token_id(id);
  out->set_logprob(logprob);
  out->set_rank(rank);
  out->set_token(tokenizer.TokenText(id));
}

void Fill(const Tokenizer& tokenizer, TokenId chosen, const TokenLogprobs& in,
          v1::TokenLogprobs* out) {
  Fill(tokenizer, chosen, in.logprob, in.rank, out->mutable_chosen());
  uint32_t rank = 0;
  for (const auto& [id, logprob] : in.top) Fill(tokenizer, id, logprob, ++rank, out->add_top());
}

void Fill(const Answer& answer, const ServedModel& model, const PromptInfo& in,
          v1::PromptInfo* out) {
  out->set_request_id(answer.external_id());
  out->set_prompt_tokens(static_cast<uint32_t>(answer.prompt().size()));
  out->set_cached_tokens(in.cached_tokens);
  out->mutable_prompt_token_ids()->Add(answer.prompt().begin(), answer.prompt().end());
  for (size_t i = 0; i < in.logprobs.size(); ++i) {
    v1::TokenLogprobs* const entry = out->add_prompt_logprobs();
    if (in.logprobs[i]) Fill(*model.tokenizer, answer.prompt()[i], *in.logprobs[i], entry);
  }
}

void Fill(SequenceEnd in, v1::Finish* out) {
  out->set_index(in.index);
  out->set_reason(in.reason == FinishReason::kStop ? v1::FINISH_REASON_STOP
                                                   : v1::FINISH_REASON_LENGTH);
  out->set_completion_tokens(in.completion_tokens);
  if (in.stop_string) {
    out->set_stop_string(*std::move(in.stop_string));
  } else if (in.ending_token) {
    out->set_stop_token_id(*in.ending_token);
  }
}

// A Chunk or a Completion: both have text, token_ids and logprobs.
template <typename Message>
void Append(const ServedModel& model, const TextDelta& delta, Message* out) {
  out->mutable_text()->append(delta.text);
  out->mutable_token_ids()->Add(delta.token_ids.begin(), delta.token_ids.end());
  for (size_t i = 0; i < delta.logprobs.size(); ++i) {
    Fill(*model.tokenizer, delta.token_ids[i], delta.logprobs[i], out->add_logprobs());
  }
}

}  // namespace

ClientRequest FromProto(const v1::GenerateRequest& request) {
  ClientRequest client;
  switch (request.prompt_case()) {
    case v1::GenerateRequest::kText:
      client.prompt = request.text();
      break;
    case v1::GenerateRequest::kTokenIds:
      client.prompt =
          std::vector<TokenId>(request.token_ids().ids().begin(), request.token_ids().ids().end());
      break;
    case v1::GenerateRequest::kChat:
      client.prompt = FromProto(request.chat());
      break;
    case v1::GenerateRequest::PROMPT_NOT_SET:
      break;
  }
  client.sampling = FromProto(request.sampling());
  client.request_id = request.request_id();
  client.priority = request.priority();
  client.model = request.model();
  return client;
}

ClientRequest FromProto(const v1::TokenizeRequest& request) {
  ClientRequest client;
  if (request.input_case() == v1::TokenizeRequest::kText) client.prompt = request.text();
  if (request.input_case() == v1::TokenizeRequest::kChat) client.prompt = FromProto(request.chat());
  if (request.has_add_special_tokens()) client.add_special_tokens = request.add_special_tokens();
  return client;
}

v1::GenerateEvent ToProto(const Answer& answer, const ServedModel& model, AnswerEvent event) {
  v1::GenerateEvent out;
  if (auto* info = std::get_if<PromptInfo>(&event)) {
    Fill(answer, model, *info, out.mutable_prompt());
  } else if (auto* delta = std::get_if<TextDelta>(&event)) {
    out.mutable_chunk()->set_index(delta->index);
    Append(model, *delta, out.mutable_chunk());
  } else {
    Fill(std::get<SequenceEnd>(std::move(event)), out.mutable_finish());
  }
  return out;
}

void AddToResponse(const Answer& answer, const ServedModel& model, AnswerEvent event,
                   v1::GenerateResponse* response) {
  while (response->completions_size() < static_cast<int>(answer.sampling().n)) {
    response->add_completions();
  }
  if (auto* info = std::get_if<PromptInfo>(&event)) {
    Fill(answer, model, *info, response->mutable_prompt());
  } else if (auto* delta = std::get_if<TextDelta>(&event)) {
    Append(model, *delta, response->mutable_completions(static_cast<int>(delta->index)));
  } else {
    SequenceEnd end = std::get<SequenceEnd>(std::move(event));
    const int index = static_cast<int>(end.index);
    Fill(std::move(end), response->mutable_completions(index)->mutable_finish());
  }
}

v1::GetModelInfoResponse DescribeModel(const RequestPath& path) {
  const ServedModel& model = path.model();
  const EngineInfo info = path.Info();
  v1::GetModelInfoResponse out;
  out.set_model(model.name);
  out.set_architecture(model.architecture);
  out.set_dtype(model.dtype);
  out.set_kv_cache_dtype(model.kv_dtype);
  out.set_vocab_size(model.vocab_size);
  out.set_max_model_len(model.max_model_len);
  out.set_tp_size(model.tp_size);
  out.set_block_size(model.block_size);
  out.set_num_kv_blocks(info.num_kv_blocks);
  out.set_max_num_seqs(info.max_num_seqs);
  out.set_epoch(info.epoch);
  out.set_ready(info.state == EngineState::kReady);
  out.set_version(kVersion);
  for (const RankReport& report : info.ranks) {
    v1::RankInfo* const rank = out.add_ranks();
    rank->set_rank(report.rank);
    rank->set_host(report.host);
    rank->set_pid(report.pid);
    rank->set_device(report.device);
    rank->set_weight_bytes(report.memory.weights);
    rank->set_checkpoint_bytes(report.checkpoint_bytes);
    rank->set_collective_library(report.collective_library);
    rank->set_shard(report.shard);
    for (const auto& [name, seconds] : report.phases) {
      v1::LoadPhase* const phase = rank->add_load_phases();
      phase->set_name(name);
      phase->set_seconds(seconds);
    }
  }
  for (const auto& [name, seconds] : path.startup()) {
    v1::LoadPhase* const phase = out.add_startup();
    phase->set_name(name);
    phase->set_seconds(seconds);
  }
  return out;
}

}  // namespace lockstep
