// lockstep plan: its flags. What it does is in cli/plan_command.h.
#include <iostream>
#include <memory>

#include "CLI/CLI.hpp"
#include "cli/commands.h"
#include "cli/plan_command.h"

namespace lockstep {

void AddPlanCommand(CLI::App* app, Command* chosen) {
  auto options = std::make_shared<PlanOptions>();
  CLI::App* command = app->add_subcommand("plan", "Say what fits where, from config.json alone");
  command->group("Look");
  command->add_option("model", options->model, "Model directory, or a config.json")->required();
  command->add_option("--gpu-memory", options->gpu_memory, "Memory of one GPU: 80GiB, 24GB")
      ->capture_default_str();
  command->add_option("--backend", options->backend, "cuda or cpu")->capture_default_str();
  command->add_option("--dtype", options->dtype, "auto, float32, bfloat16 or float16")
      ->capture_default_str();
  command->add_option("--quantization", options->quantization, "fp8");
  command->add_option("--kv-cache-dtype", options->kv_cache_dtype, "auto or fp8")
      ->capture_default_str();
  command->add_option("--max-model-len", options->max_model_len,
                      "Tokens; 0: the smaller of 8192 and the model's");
  command->add_option("--max-num-seqs", options->max_num_seqs, "Sequences at once")
      ->capture_default_str();
  command->add_option("--max-num-batched-tokens", options->max_num_batched_tokens,
                      "Tokens a step; 0: as serve has it");
  command->add_option("--block-size", options->block_size, "Tokens a KV block")
      ->capture_default_str();
  command
      ->add_option("--gpu-memory-utilization", options->gpu_memory_utilization,
                   "Share of the memory to use")
      ->capture_default_str();
  command->add_flag("--json", options->json, "The report as JSON");
  command->callback([=] { *chosen = [=] { return RunPlan(*options, std::cout, std::cerr); }; });
}

}  // namespace lockstep
