"""Makes the demo model: writes the corpus, trains the tokenizer, trains a small Llama, saves it.

    python3 train.py --out model                # one GPU, a few minutes
    python3 evaluate.py --model model           # accuracy on held-out questions, expected.json

The result is a Hugging Face folder with bfloat16 weights. Everything is drawn from fixed seeds; GPU
arithmetic is not bit-for-bit repeatable, so a second run gives an equally good model, not the same one.
"""

import argparse
import json
import math
import os
import random
import time
from multiprocessing import Pool
from pathlib import Path

import numpy as np

from corpus import training_document
from make_tokenizer import ASSISTANT, BEGIN, END, MAX_LENGTH, PAD, VOCAB_SIZE, save_tokenizer, train_tokenizer

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": BEGIN,
    "eos_token_id": END,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 256,
    "initializer_range": 0.02,
    "intermediate_size": 384,
    "max_position_embeddings": MAX_LENGTH,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 8,
    "num_hidden_layers": 6,
    "num_key_value_heads": 4,
    "pad_token_id": PAD,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "vocab_size": VOCAB_SIZE,
}
GENERATION_CONFIG = {"bos_token_id": BEGIN, "do_sample": False, "eos_token_id": [END], "pad_token_id": PAD,
                     "transformers_version": "4.51.0"}

DOCUMENTS_PER_SHARD = 12000
# Rows are cut from documents laid end to end: mostly short ones (many documents start at position 0),
# some of full length so that every position is trained.
ROW_LENGTHS = [512, 512, 512, MAX_LENGTH]
TOKENS_PER_STEP = 65536


def write_shard(arguments):
    """One shard of the corpus as token ids, and the offsets where its documents start."""
    folder, shard = arguments
    from tokenizers import Tokenizer
    tokenizer, rng = Tokenizer.from_file(f"{folder}/tokenizer.json"), random.Random(f"shard {shard}")
    ids, starts, length = [], [], 0
    for _ in range(DOCUMENTS_PER_SHARD):
        document = tokenizer.encode(training_document(rng), add_special_tokens=False).ids
        ids.append(np.array(document, dtype=np.int16))
        starts.append(length)
        length += len(document)
    return np.concatenate(ids), np.array(starts, dtype=np.int64)


def write_corpus(folder, shards):
    with Pool(max(1, (os.cpu_count() or 2) - 1)) as pool:
        parts = pool.map(write_shard, [(folder, shard) for shard in range(shards)], chunksize=1)
    offsets = np.cumsum([0] + [len(ids) for ids, _ in parts[:-1]])
    ids = np.concatenate([ids for ids, _ in parts])
    starts = np.concatenate([start + offset for (_, start), offset in zip(parts, offsets)])
    return ids, starts[starts < len(ids) - MAX_LENGTH - 1]


def mark_trained(ids):
    """True where a token is the model's to say: answers with their ending, and plain documents."""
    opens = (ids <= ASSISTANT) & (ids != PAD) & (ids != END)
    last = np.maximum.accumulate(np.where(opens, np.arange(len(ids)), 0))
    return (ids[last] == ASSISTANT) | (ids[last] == BEGIN)


def learning_rate(progress, peak):
    warm_up = min(1.0, progress / 0.03)
    return peak * warm_up * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(folder, ids, starts, options):
    import torch
    import torch.nn.functional as F
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(options.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    device = torch.device("cuda")
    config = LlamaConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").float().to(device)
    model.train()
    print(f"parameters: {sum(p.numel() for p in model.parameters()):,}", flush=True)

    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
                                  lr=options.learning_rate, betas=(0.9, 0.98), fused=True)

    stream = torch.from_numpy(ids).to(device)
    trained = torch.from_numpy(mark_trained(ids)).to(device)
    starts = torch.from_numpy(starts).to(device)
    draw = torch.Generator(device=device).manual_seed(options.seed)
    begun, step, losses = time.monotonic(), 0, []
    while True:
        elapsed = time.monotonic() - begun
        progress = max(step / options.steps, elapsed / (60 * options.minutes))
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress, options.learning_rate)
        length = ROW_LENGTHS[step % len(ROW_LENGTHS)]
        first = starts[torch.randint(len(starts), (TOKENS_PER_STEP // length,), generator=draw, device=device)]
        where = first[:, None] + torch.arange(length + 1, device=device)
        rows = stream[where].long()
        labels = rows[:, 1:].masked_fill(~trained[where[:, 1:]], -100)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        step += 1
        if step % 200 == 0 or step == 20:
            mean = torch.stack(losses[-100:]).mean().item()
            speed = step * TOKENS_PER_STEP / (time.monotonic() - begun) / 1e6
            print(f"step {step}  loss {mean:.4f}  {speed:.2f} M tokens/s  {100 * progress:.0f} %", flush=True)
    seconds = time.monotonic() - begun
    print(f"trained {step} steps, {step * TOKENS_PER_STEP / 1e6:.0f} M tokens, {seconds:.0f} s", flush=True)
    return model


def save_model(model, folder):
    import torch
    from safetensors.torch import save_file
    tensors = {name: tensor.detach().to("cpu", torch.bfloat16).contiguous()
               for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    save_file(tensors, str(Path(folder) / "model.safetensors"), metadata={"format": "pt"})


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default=str(Path(__file__).parent / "model"))
    parser.add_argument("--steps", type=int, default=7700)
    parser.add_argument("--minutes", type=float, default=10, help="stop earlier than --steps after so many minutes")
    parser.add_argument("--shards", type=int, default=90, help=f"of {DOCUMENTS_PER_SHARD} documents each")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()

    begun = time.monotonic()
    save_tokenizer(train_tokenizer(), options.out)
    for name, value in (("config.json", CONFIG), ("generation_config.json", GENERATION_CONFIG)):
        (Path(options.out) / name).write_text(json.dumps(value, indent=2) + "\n")
    ids, starts = write_corpus(options.out, options.shards)
    print(f"corpus: {len(starts):,} documents, {len(ids):,} tokens, {time.monotonic() - begun:.0f} s", flush=True)
    save_model(train(options.out, ids, starts, options), options.out)


if __name__ == "__main__":
    main()
