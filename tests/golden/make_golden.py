"""Makes tiny random models of every supported family and records what transformers computes from them.

    python3 make_golden.py --out .            # every model; names after the options choose some

Each folder gets config.json, generation_config.json, *.safetensors, a tokenizer.json with a word for each id,
and golden.json. The weights are drawn with numpy from a fixed seed and the reference is float32 on one CPU
thread, eager attention, no KV cache (the whole sequence anew at every step), so a run can be repeated.
golden.json, per case:
  prompt           token ids
  greedy           the 32 token ids that follow, whatever eos says
  smallest_gap     the smallest lead of a chosen token's logit over the next best
  last_logits      (some cases) logits at the last prompt position, one per vocabulary entry
  noise            (with last_logits) how far the same logits in float64 are away at most
  prompt_logprobs  (one case) log-probability of each prompt token given those before it; null first
Logits and log-probabilities are rounded to seven significant digits.
"""

import argparse
import copy
import json
import shutil
import tempfile
import traceback
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

PROMPT_LENGTHS = [1, 5, 17, 40, 70]
WITH_LOGITS = [17, 70]
WITH_LOGPROBS = 40
GENERATED = 32
SMALLEST_GAP = 2e-3
FEWEST_DISTINCT = 8
LARGEST_NOISE = 1e-4
ATTEMPTS = 60

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "bos_token_id": 1, "eos_token_id": 2,
         "hidden_act": "silu", "hidden_size": 32, "initializer_range": 0.02, "intermediate_size": 64,
         "max_position_embeddings": 256, "num_attention_heads": 8, "num_hidden_layers": 2, "num_key_value_heads": 4,
         "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0,
         "tie_word_embeddings": False, "torch_dtype": "float32", "transformers_version": "4.40.0", "use_cache": True,
         "attention_bias": False, "attention_dropout": 0.0}
QWEN = {"attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 32,
        "initializer_range": 0.02, "intermediate_size": 64, "max_position_embeddings": 256, "max_window_layers": 2,
        "num_attention_heads": 8, "num_hidden_layers": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
        "sliding_window": 128, "torch_dtype": "float32", "transformers_version": "4.43.1", "use_cache": True,
        "use_sliding_window": False}
GEMMA3 = {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "attention_bias": False,
          "attention_dropout": 0.0, "attn_logit_softcapping": None, "bos_token_id": 2, "cache_implementation": "hybrid",
          "eos_token_id": [1, 106], "final_logit_softcapping": None, "head_dim": 16,
          "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 32, "initializer_range": 0.02,
          "intermediate_size": 64, "max_position_embeddings": 256, "num_attention_heads": 8, "num_hidden_layers": 4,
          "num_key_value_heads": 2, "pad_token_id": 0, "query_pre_attn_scalar": 24, "rms_norm_eps": 1e-06,
          "rope_local_base_freq": 100.0, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "rope_theta": 10000.0,
          "sliding_window": 8, "sliding_window_pattern": 3, "torch_dtype": "float32", "transformers_version": "4.50.0.dev0",
          "use_cache": True, "vocab_size": 144}
OPT = {"_remove_final_layer_norm": False, "activation_dropout": 0.0, "activation_function": "relu",
       "architectures": ["OPTForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 2, "do_layer_norm_before": True,
       "dropout": 0.1, "eos_token_id": 2, "ffn_dim": 64, "hidden_size": 32, "init_std": 0.02, "layerdrop": 0.0,
       "max_position_embeddings": 256, "model_type": "opt", "num_attention_heads": 8, "num_hidden_layers": 2,
       "pad_token_id": 1, "prefix": "</s>", "torch_dtype": "float32", "transformers_version": "4.21.0.dev0",
       "use_cache": True, "vocab_size": 101, "word_embed_proj_dim": 32}


def without(config, *keys):
    return {key: value for key, value in config.items() if key not in keys}


TALKATIVE_GEMMA = {"embedding": 0.15, "final_norm": 4.0, "even_rows": True}

# name: (config.json, how it is made). "spread": changes to SPREAD; "store": dtype of the file; "shards": largest
# file in bytes; "spelling": "v5" keeps config.json as transformers 5 writes it, otherwise it is as given here.
MODELS = {
    "llama": ({**LLAMA, "hidden_size": 64, "intermediate_size": 96, "num_key_value_heads": 2, "vocab_size": 131}, {}),
    "llama2_mha_sharded": ({**without(LLAMA, "num_key_value_heads", "attention_bias", "attention_dropout", "rope_theta"),
                            "vocab_size": 160, "num_hidden_layers": 3}, {"shards": 30000}),
    "llama3_tied": ({**LLAMA, "head_dim": 16, "num_key_value_heads": 2, "mlp_bias": False, "tie_word_embeddings": True,
                     "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                      "original_max_position_embeddings": 64, "rope_type": "llama3"},
                     "rope_theta": 1000.0, "vocab_size": 128}, {}),
    "llama_biased_linear_rope": ({**LLAMA, "attention_bias": True, "mlp_bias": True, "head_dim": 8,
                                  "rope_scaling": {"factor": 4.0, "type": "linear"}, "vocab_size": 134}, {}),
    "llama_mqa_bf16": ({**LLAMA, "num_key_value_heads": 1, "hidden_size": 64, "torch_dtype": "bfloat16",
                        "vocab_size": 128}, {"store": "bfloat16"}),
    "llama_v5_f16": ({**LLAMA, "torch_dtype": "float16", "vocab_size": 320,
                      "rope_scaling": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 2.0,
                                       "original_max_position_embeddings": 32, "rope_type": "llama3"}},
                     {"store": "float16", "spelling": "v5"}),
    "mistral_window": ({**without(LLAMA, "pretraining_tp", "rope_scaling", "attention_bias"),
                        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "num_key_value_heads": 2,
                        "sliding_window": 8, "head_dim": 8, "vocab_size": 160}, {}),
    "qwen2": ({**QWEN, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_key_value_heads": 4,
               "tie_word_embeddings": False, "vocab_size": 151}, {}),
    "qwen2_tied_mqa": ({**QWEN, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_key_value_heads": 1,
                        "tie_word_embeddings": True, "vocab_size": 160}, {}),
    "qwen3": ({**QWEN, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False,
               "head_dim": 16, "num_key_value_heads": 4, "rope_scaling": None, "sliding_window": None,
               "tie_word_embeddings": False, "vocab_size": 144}, {}),
    "qwen3_tied_f16": ({**QWEN, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False,
                        "head_dim": 16, "num_key_value_heads": 2, "rope_scaling": None, "sliding_window": None,
                        "tie_word_embeddings": True, "torch_dtype": "float16", "vocab_size": 160}, {"store": "float16"}),
    "gemma3": (GEMMA3, {"spread": TALKATIVE_GEMMA}),
    "gemma3_v5_bf16": ({**GEMMA3, "num_key_value_heads": 1, "rope_scaling": None, "sliding_window_pattern": 2,
                        "torch_dtype": "bfloat16", "vocab_size": 150},
                       {"store": "bfloat16", "spelling": "v5", "spread": TALKATIVE_GEMMA}),
    "opt": (OPT, {}),
    "opt_post_norm_projected": ({**OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 16, "vocab_size": 128},
                                {"spread": {"embedding": 1.0, "bias": 0.1, "even_rows": True}}),
}


# How far weights are spread. Tied embeddings and norms after each block pull a random model into saying one
# token for ever; embedding rows of one length, small biases and a final norm of mixed signs keep it talking.
SPREAD = {"embedding": 0.6, "bias": 0.3, "final_norm": None, "even_rows": False}


def fill(model, seed, gain, changed):
    """Random weights, larger than a training run would start from, so that logits are well apart."""
    import torch
    rng = np.random.default_rng(seed)
    spread = {**SPREAD, **changed}
    gemma = model.config.model_type.startswith("gemma3")
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            values = rng.standard_normal(tuple(parameter.shape)).astype(np.float32)
            if name.endswith("bias"):
                values *= spread["bias"]
            elif name == "model.norm.weight" and spread["final_norm"]:
                values = spread["final_norm"] * values - (1.0 if gemma else 0.0)
            elif parameter.ndim == 1:
                values = 0.2 * values + (0.0 if gemma else 1.0)
            elif "embed_positions" in name and spread["even_rows"]:
                pass
            elif "embed" in name:
                if spread["even_rows"]:
                    values /= np.sqrt((values * values).mean(axis=1, keepdims=True))
                values *= spread["embedding"]
            elif name.startswith("lm_head"):
                values *= 3 / np.sqrt(parameter.shape[1])
            else:
                values *= gain / np.sqrt(parameter.shape[1])
            parameter.copy_(torch.from_numpy(values))


def store(model, config, options, folder):
    """Writes the checkpoint as published ones look, and config.json in the spelling asked for."""
    import torch
    from transformers import GenerationConfig
    if folder.exists():
        shutil.rmtree(folder)
    dtype = getattr(torch, options.get("store", "float32"))
    model.generation_config = GenerationConfig()
    model.to(dtype).save_pretrained(folder, max_shard_size=options.get("shards", "1GB"))
    if options.get("spelling") != "v5":
        (folder / "config.json").write_text(json.dumps(dict(sorted(config.items())), indent=2) + "\n")
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}
    generation["transformers_version"] = config["transformers_version"]
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def write_tokenizer(size, folder):
    """A word for each id ("t17"), so that the programs can serve the folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(size)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    config = {"clean_up_tokenization_spaces": False, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config) + "\n")


def rounded(values):
    return [float(f"{value:.7g}") for value in values]


def logits_of(model, ids):
    import torch
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def run_case(model, exact, prompt):
    import torch
    ids, gap = list(prompt), float("inf")
    first = logits_of(model, ids)
    logits = first
    for _ in range(GENERATED):
        best = torch.topk(logits[-1], 2)
        gap = min(gap, (best.values[0] - best.values[1]).item())
        ids.append(best.indices[0].item())
        logits = logits_of(model, ids)
    case = {"prompt": prompt, "greedy": ids[len(prompt):], "smallest_gap": float(f"{gap:.4g}")}
    if len(prompt) in WITH_LOGITS:
        case["noise"] = float(f"{(first[-1] - logits_of(exact, prompt)[-1]).abs().max().item():.2g}")
        case["last_logits"] = rounded(first[-1].tolist())
    if len(prompt) == WITH_LOGPROBS:
        logprobs = torch.log_softmax(first, dim=-1)
        case["prompt_logprobs"] = [None] + rounded(logprobs[i - 1, prompt[i]].item() for i in range(1, len(prompt)))
    return case


def good(cases):
    outputs = {tuple(case["greedy"]) for case in cases}
    return len(outputs) == len(cases) and all(
        case["smallest_gap"] > SMALLEST_GAP and len(set(case["greedy"])) >= FEWEST_DISTINCT
        and case.get("noise", 0.0) < LARGEST_NOISE for case in cases)


def make(name, out):
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    config, options = MODELS[name]
    folder = Path(out) / name
    with tempfile.TemporaryDirectory() as given:
        (Path(given) / "config.json").write_text(json.dumps(config))
        read = AutoConfig.from_pretrained(given)
    for attempt in range(ATTEMPTS):
        gain = [2.0, 3.0, 1.5, 4.0][attempt % 4]
        model = AutoModelForCausalLM.from_config(read, dtype=torch.float32).float()
        fill(model, attempt, gain, options.get("spread", {}))
        store(model, config, options, folder)
        model, loading = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager",
                                                              output_loading_info=True)
        assert not loading["missing_keys"] and not loading["unexpected_keys"], loading
        rng = np.random.default_rng(1000 + attempt)
        exact = copy.deepcopy(model).double()
        prompts = [rng.integers(3, config["vocab_size"], length).tolist() for length in PROMPT_LENGTHS]
        cases = []
        for prompt in prompts:
            cases.append(run_case(model.eval(), exact.eval(), prompt))
            if not good(cases):
                break
        else:
            break
    else:
        raise RuntimeError(f"{name}: no seed of {ATTEMPTS} gives clear and varied tokens")
    write_tokenizer(config["vocab_size"], folder)
    head = {"name": name, "seed": attempt, "gain": gain, "transformers": transformers.__version__,
            "torch": torch.__version__, "computed_in": "float32"}
    lines = ",\n".join("    " + json.dumps(case) for case in cases)
    text = json.dumps(head)[:-1] + ',\n  "cases": [\n' + lines + "\n  ]}\n"
    (folder / "golden.json").write_text(text)
    size = sum(path.stat().st_size for path in folder.iterdir())
    gap, distinct = min(c["smallest_gap"] for c in cases), [len(set(c["greedy"])) for c in cases]
    noise = max(case.get("noise", 0.0) for case in cases)
    return (f"{name}: seed {attempt}, gain {gain}, {size / 1024:.0f} KiB, smallest gap {gap}, noise {noise}, "
            f"distinct tokens {distinct}")


def attempt_make(name, out):
    try:
        return make(name, out), True
    except Exception:  # reported by main, after the other models
        return f"{name} FAILED\n{traceback.format_exc()}", False


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default=str(Path(__file__).parent))
    parser.add_argument("names", nargs="*")
    options = parser.parse_args()
    names = options.names or list(MODELS)
    with ProcessPoolExecutor(max_workers=min(len(names), 15)) as pool:
        results = list(pool.map(attempt_make, names, [options.out] * len(names)))
    for text, _ in results:
        print(text, flush=True)
    raise SystemExit(0 if all(done for _, done in results) else 1)


if __name__ == "__main__":
    main()
