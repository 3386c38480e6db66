#!/usr/bin/env python3
"""Answers are the model's, whatever the settings: each is compared with float32's.

    tests/gpu/settings_test.py PROGRAMS [--jobs N] [--only TEXT]

Small models in shapes that the fast kernels take, with dummy weights, through `lockstep compare`:
A serves in float32 and as by default, B with a setting. B's log-probabilities of A's answers may
be off by what its types round away, and in float32 the answers are the same. Where B's first
token is another, its score of A's mostly says so too (scores come of other steps than answers).
Blocks, chunks and batches of all sizes, families, heads, windows, long contexts, tensor parallelism.

PROGRAMS: the folder of lockstep and its daemons.
"""
import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

GOLDEN = pathlib.Path(__file__).resolve().parent.parent / "golden"
LIMIT_S = 120  # of one comparison: two servers and their answers
KV_TOKENS = 65_536  # room for all of LONG

# Of |log-probability - float32's|; about twice what was seen on an H200.
BOUNDS = {"float32": 1e-4, "float16": 0.03, "bfloat16": 0.2, "fp8 cache": 0.8, "fp8": 1.8}

LLAMA = {"num_hidden_layers": 4, "hidden_size": 1024, "num_attention_heads": 8,
         "num_key_value_heads": 2, "head_dim": 128, "intermediate_size": 2816}
MODELS = {  # what differs from LLAMA; "golden": a family's config, with what is made larger
    "llama": {},
    "heads of 64": {"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64},
    "multi-head, 3 layers": {"num_key_value_heads": 8, "head_dim": 96, "num_hidden_layers": 3},
    "multi-query": {"num_key_value_heads": 1},
    "8 kv heads": {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64},
    "window of 200": {"architectures": ["MistralForCausalLM"], "model_type": "mistral",
                      "sliding_window": 200},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3",
              "num_key_value_heads": 4},
    "gemma3": {"golden": "gemma3", "hidden_size": 512, "num_attention_heads": 4,
               "num_key_value_heads": 2, "head_dim": 256, "query_pre_attn_scalar": 256,
               "intermediate_size": 1408, "sliding_window": 300},
    "rows of 5,120": {"hidden_size": 5120, "num_attention_heads": 40, "num_key_value_heads": 8,
                      "num_hidden_layers": 2},
    "qwen2": {"golden": "qwen2", "hidden_size": 896, "num_attention_heads": 14,
              "num_key_value_heads": 2, "intermediate_size": 4864},
}
FP8 = ["--quantization", "fp8"]
FP8_CACHE = ["--kv-cache-dtype", "fp8"]
USUAL = {"prompts": 24, "tokens": 700, "answer": 24}
MANY = {"prompts": 200, "tokens": 30, "answer": 8}
FEW = {"prompts": 4, "tokens": 60, "answer": 8}
LONG = {"prompts": 3, "tokens": 20_000, "answer": 8}


def settings():
    """(model, dtype, flags, traffic)"""
    for model in MODELS:
        yield model, "bfloat16", [], USUAL
    for model in ("llama", "heads of 64", "8 kv heads", "multi-query", "window of 200"):
        yield model, "bfloat16", FP8_CACHE, USUAL
        yield model, "bfloat16", FP8, USUAL
    for model in ("llama", "gemma3"):
        yield model, "float16", [], USUAL
    for size in (1, 8, 24, 32, 64, 256):
        yield "heads of 64", "bfloat16", ["--block-size", size], USUAL
    for tokens in (64, 300, 1000):
        chunks = ["--max-num-batched-tokens", tokens, "--max-num-seqs", 24]
        yield "llama", "bfloat16", chunks, USUAL
        yield "gemma3", "float32", chunks, USUAL
    for tokens in (1, 2):
        least = ["--max-num-batched-tokens", tokens, "--max-num-seqs", tokens]
        yield "llama", "bfloat16", least, FEW
    for seqs in (1, 3, 33, 700):
        yield "heads of 64", "bfloat16", ["--max-num-seqs", seqs], USUAL
    yield "llama", "float32", ["--block-size", 32, "--no-enable-prefix-caching"], USUAL
    for flags in ([], FP8 + FP8_CACHE):
        yield "8 kv heads", "bfloat16", flags + ["--max-num-seqs", 200], MANY
        yield "llama", "bfloat16", flags, LONG
    yield "gemma3", "bfloat16", [], LONG
    for tp_size in (2, 4):
        split = ["--tensor-parallel-size", tp_size]
        for prompts in (1, 8, 40):  # one row, a few and many are exchanged in different ways
            traffic = {"prompts": prompts, "tokens": 300, "answer": 8}
            for model in ("8 kv heads", "llama"):
                yield model, "bfloat16", split, traffic
                yield model, "bfloat16", split + FP8, traffic
        # More rows than a launch of kernels/row_reduce.h takes, and than the ranks divide. (With one
        # sequence at a time every prompt would end in such a row; but then scores go by a row at
        # a time, which ranks that share a GPU do not finish before the step's deadline.)
        wide = {"prompts": 4, "tokens": 1_100, "answer": 4}
        yield "rows of 5,120", "bfloat16", split + ["--max-num-batched-tokens", 1_100], wide
        yield "8 kv heads", "float32", split, {"prompts": 3, "tokens": 3_000, "answer": 4}


def bound_of(dtype, flags):
    kind = "fp8" if "--quantization" in flags else "fp8 cache" if flags == FP8_CACHE else dtype
    return BOUNDS[kind]


def write_model(programs, folder, changes):
    subprocess.run([programs / "lockstep", "bench", "shape", "tiny", folder],
                   check=True, stdout=subprocess.DEVNULL)
    path = folder / "config.json"
    tiny = json.loads(path.read_text())
    changes = dict(changes)
    family = changes.pop("golden", None)
    if family is None:
        config = {**tiny, **LLAMA}
    else:
        config = json.loads((GOLDEN / family / "config.json").read_text())
    config.update(changes, vocab_size=tiny["vocab_size"], max_position_embeddings=32_768)
    path.write_text(json.dumps(config))


def compare(programs, folder, dtype, flags, traffic):
    """(whether it is as it should be, what was seen)"""
    context = 24_000 if traffic is LONG else 4_096
    common = f"--backend cuda --load-format dummy --max-model-len {context}"
    block = flags[flags.index("--block-size") + 1] if "--block-size" in flags else 16
    of_b = " ".join(map(str, flags))
    command = [
        programs / "lockstep", "compare", "--json", "--model", folder,
        "--random-prompts", traffic["prompts"], "--random-tokens", traffic["tokens"],
        "--max-tokens", traffic["answer"], "--max-error", bound_of(dtype, flags),
        "--flags-a", f"{common} --dtype float32 --num-kv-blocks {KV_TOKENS // 16}",
        "--flags-b", f"{common} --dtype {dtype} --num-kv-blocks {KV_TOKENS // block} {of_b}"]
    try:
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True,
                              timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return False, f"not done after {LIMIT_S} s"
    if not done.stdout.startswith("{"):
        return False, f"exit {done.returncode}: {done.stderr.strip()[-500:]}"
    seen = json.loads(done.stdout)
    prompts, divergences = seen["prompts"], seen["divergences"]
    scored = {each["prompt"] for each in seen["disagreements"] if each["position"] == 0}
    others = sum(at >= 0 for at in divergences)
    alone = sum(at == 0 and f"random {i}" not in scored for i, at in enumerate(divergences))
    right = (done.returncode == 0 and alone <= max(1, prompts // 2)
             and not (dtype == "float32" and others))
    return right, (f"within {seen['max_logprob_error']:.2g}, {others} of {prompts} answers differ, "
                   f"{alone} from a first token that is not as scored")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("programs", type=pathlib.Path)
    parser.add_argument("--jobs", type=int, default=6, help="comparisons at a time")
    parser.add_argument("--only", default="", help="settings whose line has this text")
    args = parser.parse_args()
    os.environ["LOCKSTEP_PROGRAMS"] = str(args.programs)  # where lockstep looks for the daemons
    with tempfile.TemporaryDirectory() as temp:
        folders = {}
        for model, changes in MODELS.items():
            folders[model] = pathlib.Path(temp) / model.replace(" ", "-")
            write_model(args.programs, folders[model], changes)
        chosen = []
        for model, dtype, flags, traffic in settings():
            line = " ".join(map(str, [f"{model}:", dtype, *flags, *traffic.values()]))
            if args.only in line:
                chosen.append((line, folders[model], dtype, flags, traffic))
        with ThreadPoolExecutor(args.jobs) as pool:
            results = pool.map(lambda each: compare(args.programs, *each[1:]), chosen)
            wrong = 0
            for (line, *_), (right, seen) in zip(chosen, results):
                wrong += not right
                print(f"{'passed' if right else 'FAILED'}  {line}: {seen}", flush=True)
    print(f"{len(chosen)} settings, {wrong} wrong")
    sys.exit(wrong != 0 or not chosen)


if __name__ == "__main__":
    main()
