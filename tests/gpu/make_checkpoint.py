#!/usr/bin/env python3
"""Writes a Llama-shaped checkpoint with random bfloat16 weights beside a config.json.

For measuring how fast a real checkpoint loads, where none can be had: the bytes lie in
the page cache afterwards.

    tests/gpu/make_checkpoint.py MODEL_DIR OUT_DIR [SHARDS]

MODEL_DIR has config.json (and a tokenizer, which is copied); OUT_DIR gets SHARDS
(default 4) safetensors files and their index. One block of values drawn from
N(0, 0.02) is repeated, so that writing costs no more than the disk does.
"""
import array
import json
import math
import pathlib
import random
import shutil
import struct
import sys


def tensors(config):
    """(name, shape) of every tensor, in the order of the forward pass."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        yield name + "input_layernorm.weight", (hidden,)
        yield name + "self_attn.q_proj.weight", (heads * head_dim, hidden)
        yield name + "self_attn.k_proj.weight", (kv * head_dim, hidden)
        yield name + "self_attn.v_proj.weight", (kv * head_dim, hidden)
        yield name + "self_attn.o_proj.weight", (hidden, heads * head_dim)
        yield name + "post_attention_layernorm.weight", (hidden,)
        yield name + "mlp.gate_proj.weight", (inner, hidden)
        yield name + "mlp.up_proj.weight", (inner, hidden)
        yield name + "mlp.down_proj.weight", (hidden, inner)
    yield "model.norm.weight", (hidden,)
    if not config.get("tie_word_embeddings"):
        yield "lm_head.weight", (config["vocab_size"], hidden)


def main():
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    source, target = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
    shards = int(sys.argv[3]) if len(sys.argv) == 4 else 4
    config = json.loads((source / "config.json").read_text())
    target.mkdir(parents=True, exist_ok=True)
    for file in source.glob("*.json"):
        shutil.copy(file, target)
    every = [(name, shape, 2 * math.prod(shape)) for name, shape in tensors(config)]
    total = sum(size for _, _, size in every)
    draw = random.Random(0)
    values = array.array("f", (draw.gauss(0, 0.02) for _ in range(1 << 20)))
    # bfloat16 is the upper half of float32; little-endian, as the format is.
    block = memoryview(memoryview(values).cast("B").cast("H")[1::2].tobytes())
    index, begin = {}, 0
    for shard in range(shards):
        end, size = begin, 0
        while end < len(every) and (size < total / shards or shard == shards - 1):
            size += every[end][2]
            end += 1
        file, header, offset = f"model-{shard + 1:05}-of-{shards:05}.safetensors", {}, 0
        for name, shape, nbytes in every[begin:end]:
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + nbytes]}
            index[name] = file
            offset += nbytes
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(target / file, "wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            left = offset
            while left > 0:
                left -= out.write(block[: min(left, len(block))])
        begin = end
    (target / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index}))
    print(f"{target}: {total / 2**30:.2f} GiB in {shards} files")


main()
