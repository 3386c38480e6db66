#include "model/config_keys.h"

#include "absl/container/flat_hash_set.h"
#include "absl/strings/string_view.h"
#include "model/strings.h"

namespace lockstep {

bool IsHarmlessConfigKey(std::string_view key) {
  static const auto* const kKeys = new absl::flat_hash_set<absl::string_view>({
      // What the file is and who wrote it.
      "_commit_hash",
      "_from_model_config",
      "_name_or_path",
      "auto_map",
      "finetuning_task",
      "is_llama_config",
      "license",
      "model_name",
      "name_or_path",
      "tf_legacy_loss",
      "transformers.js_config",
      "transformers_version",
      "unsloth_fixed",
      "unsloth_version",
      // Tokens and text: the tokenizer's own files decide.
      "bos_token",
      "cls_token_id",
      "decoder_start_token_id",
      "eos_token",
      "mask_token_id",
      "model_max_length",
      "pad_token",
      "pad_token_id",
      "prefix",
      "sep_token_id",
      "tokenizer_class",
      "unk_token_id",
      // Classification heads, which a causal model has not.
      "classifier_dropout",
      "id2label",
      "label2id",
      "num_labels",
      "problem_type",
      "task_specific_params",
      // Training.
      "activation_dropout",
      "attention_dropout",
      "attention_probs_dropout_prob",
      "dropout",
      "embd_pdrop",
      "gradient_checkpointing",
      "hidden_dropout",
      "hidden_dropout_prob",
      "init_std",
      "initializer_factor",
      "initializer_range",
      "layerdrop",
      "neftune_noise_alpha",
      "resid_pdrop",
      // How an implementation runs, not what it computes.
      "_attn_implementation",
      "_attn_implementation_autoset",
      "_attn_implementation_internal",
      "_flash_attn_2_enabled",
      "attn_implementation",
      "cache_implementation",
      "chunk_size_feed_forward",
      "experts_implementation",
      "is_decoder",
      "max_sequence_length",
      "output_attentions",
      "output_hidden_states",
      "return_dict",
      "torchscript",
      "use_bfloat16",
      "use_cache",
      "use_flash_attention",
      // Defaults of generation: requests bring their own.
      "bad_words_ids",
      "begin_suppress_tokens",
      "diversity_penalty",
      "do_sample",
      "early_stopping",
      "encoder_no_repeat_ngram_size",
      "exponential_decay_length_penalty",
      "forced_bos_token_id",
      "forced_eos_token_id",
      "length_penalty",
      "max_length",
      "min_length",
      "no_repeat_ngram_size",
      "num_beam_groups",
      "num_beams",
      "num_return_sequences",
      "output_scores",
      "remove_invalid_values",
      "repetition_penalty",
      "return_dict_in_generate",
      "suppress_tokens",
      "temperature",
      "top_k",
      "top_p",
      "typical_p",
  });
  return kKeys->contains(AbslView(key));
}

}  // namespace lockstep
