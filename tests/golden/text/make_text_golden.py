"""Makes tokenizers with trained merges and records what transformers encodes, decodes and renders with them.

    pip install tokenizers transformers jinja2
    python3 make_text_golden.py

They are trained on the demo model's corpus: `byte_level` in the manner of Llama 3 (whole words before merges),
`byte_fallback` of Llama 2 (a space put before the text), `turns` of Gemma. The demo model's own tokenizer is
recorded beside them. golden.json has, per tokenizer: texts with their ids (`ids` without, `ids_special` with
the special tokens it adds), ids with their text, and conversations with the text of its chat template.
"""

import json
import random
import sys
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
sys.path.insert(0, str(ROOT / "deploy" / "demo"))
from corpus import training_document  # noqa: E402

TEXTS = [
    "", " ", "a", " Paris", "The capital of Norway is Oslo.", "the  capital   of\tFrance\n", "\n\n\r\n  Once upon a time",
    "17 + 25 = 42, 1000000 and 3.14", "b-e-s-d-i-n", "don't, WON'T; it'll", "こんにちは 世界、水", "спасибо, друг!", "γεια σου φίλε",
    "🐱🐱🐶 👩‍👩‍👧 🏳️‍🌈🇳🇴", "naïve café e\u0301 Å \u212b", "x\u00a0y\u2003z\u200bw", "<|begin|><|end|> <s></s> <bos><eos>",
    "<0x41><0xE2> ▁under▁score ▁", "{\"name\": \"Ana\", \"age\": 31}", "\ufffd \u0000 \u0007", "zzzzzzzzzzzzzzzzzzzzzzzzzzzzzzz",
    " leading and trailing ", "한국어 중문 中文", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \U0010ffff",
]

CHATS = [
    [("user", "What is 17 + 25?")],
    [("system", " Be brief. "), ("user", "Hello\n")],
    [("user", "My name is Ana."), ("assistant", " Nice to meet you, Ana. "), ("user", "What is my name?")],
    [("system", "日本語で"), ("user", "🐱 & <b>"), ("assistant", ""), ("user", "  ")],
    [("user", "a"), ("user", "b")],
    [("tool", "x")],
]

LLAMA3 = """{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

LLAMA2 = """{%- if messages[0]['role'] == 'system' -%}
    {%- set system = '<<SYS>>\\n' + messages[0]['content'].strip() + '\\n<</SYS>>\\n\\n' -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set system = '' -%}
    {%- set turns = messages -%}
{%- endif -%}
{%- for message in turns -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{- raise_exception('roles must alternate between user and assistant') -}}
    {%- endif -%}
    {%- set content = system + message['content'].strip() if loop.first else message['content'].strip() -%}
    {%- if message['role'] == 'user' -%}
        {{- bos_token + '[INST] ' + content + ' [/INST]' -}}
    {%- else -%}
        {{- ' ' + content + ' ' + eos_token -}}
    {%- endif -%}
{%- endfor -%}"""

GEMMA = """{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('there is no system role') }}{% endif %}
{%- for message in messages %}{% set role = 'model' if message.role == 'assistant' else message.role %}
{{- '<start_of_turn>' ~ role ~ '\\n' ~ (message.content | trim) ~ '<end_of_turn>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""


def corpus(documents=4000):
    rng = random.Random(11)
    for _ in range(documents):
        text = training_document(rng)
        for special in ("<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"):
            text = text.replace(special, "\n")
        yield text


def special(names):
    return [AddedToken(name, special=True, normalized=False) for name in names]


def begin_with(tokenizer, token):
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, tokenizer.token_to_id(token))])


def byte_level():
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    pattern = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
               r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(corpus(), trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False))
    tokenizer.add_special_tokens(special(["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]))
    begin_with(tokenizer, "<|begin_of_text|>")
    return tokenizer, {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "chat_template": LLAMA3}


def with_byte_pieces(first, begin, extra=()):
    """BPE over characters with a piece for each byte, trained on words with a ▁ for the space before them."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    learner.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=330, limit_alphabet=80, show_progress=False))
    learned = json.loads(learner.to_str())["model"]
    names = list(first) + [f"<0x{byte:02X}>" for byte in range(256)]
    names += sorted(learned["vocab"], key=learned["vocab"].get)
    vocab = {name: i for i, name in enumerate(names)}
    merges = [tuple(merge) for merge in learned["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.add_special_tokens(special([*first, *extra]))
    begin_with(tokenizer, begin)
    return tokenizer


def byte_fallback():
    tokenizer = with_byte_pieces(["<unk>", "<s>", "</s>"], "<s>")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
    return tokenizer, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": LLAMA2}


def turns():
    tokenizer = with_byte_pieces(["<pad>", "<eos>", "<bos>", "<unk>"], "<bos>", ["<start_of_turn>", "<end_of_turn>"])
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer, {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>",
                       "chat_template": GEMMA}


def record(folder, seed):
    tokenizer, rng = AutoTokenizer.from_pretrained(folder), random.Random(seed)
    plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts, decodes, renders = [], [], []
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == plain.encode(text, add_special_tokens=False).ids, text
        texts.append({"text": text, "ids": ids, "ids_special": tokenizer.encode(text, add_special_tokens=True)})
        decodes += [ids[:len(ids) // 2], ids[len(ids) // 3:]]  # cut within characters too
    decodes += [[rng.randrange(len(tokenizer)) for _ in range(rng.randrange(1, 12))] for _ in range(30)]
    decodes = [{"ids": ids, "text": plain.decode(ids, skip_special_tokens=False),
                "text_skipped": plain.decode(ids, skip_special_tokens=True)} for ids in decodes if ids]
    for entry in decodes:
        assert entry["text_skipped"] == tokenizer.decode(entry["ids"], skip_special_tokens=True)
    for chat in CHATS:
        for add in (False, True):
            entry = {"chat": chat, "add_generation_prompt": add}
            try:
                entry["text"] = tokenizer.apply_chat_template([{"role": r, "content": c} for r, c in chat],
                                                              tokenize=False, add_generation_prompt=add)
            except Exception as error:  # jinja2's TemplateError: the template's own message
                entry["error"] = str(error)
            renders.append(entry)
    return {"vocab_size": len(tokenizer), "bos": tokenizer.bos_token, "eos": tokenizer.eos_token,
            "texts": texts, "decodes": decodes, "renders": renders}


def main():
    golden = {}
    for name, make in (("byte_level", byte_level), ("byte_fallback", byte_fallback), ("turns", turns)):
        tokenizer, config = make()
        folder = HERE / name
        folder.mkdir(exist_ok=True)
        tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
        config = {**config, "clean_up_tokenization_spaces": False, "tokenizer_class": "PreTrainedTokenizerFast"}
        if name == "turns":  # newer checkpoints keep the template in a file of its own
            (folder / "chat_template.jinja").write_text(config.pop("chat_template"))
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
        golden[f"tests/golden/text/{name}"] = record(folder, name)
    golden["deploy/demo/model"] = record(ROOT / "deploy" / "demo" / "model", "demo")
    text = json.dumps(golden, ensure_ascii=True, separators=(",", ":"))
    for start in ('{"text"', '{"ids"', '{"chat"', '"tests/', '"deploy/'):
        text = text.replace(start, "\n" + start)
    (HERE / "golden.json").write_text(text + "\n")
    for folder, entry in golden.items():
        print(f"{folder}: {entry['vocab_size']} tokens, {len(entry['texts'])} texts, {len(entry['decodes'])} decodes, "
              f"{sum('error' in render for render in entry['renders'])} of {len(entry['renders'])} renders refused")


if __name__ == "__main__":
    main()
