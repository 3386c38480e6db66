"""Writes tests/text/data: tiny tokenizers of each kind, and what Hugging Face's
own code makes of them and of the chat templates beside them.

    python3 -m venv v && v/bin/pip install tokenizers==0.21.4 transformers==4.53.3 jinja2
    v/bin/python tests/text/make_fixtures.py

The outputs are committed: the tests compare against them and need no Python.
"""

import json
import math
import pathlib
import random

from tokenizers import (AddedToken, Regex, Tokenizer, decoders, models, normalizers,
                        pre_tokenizers, processors, trainers)
from transformers import PreTrainedTokenizerFast

DATA = pathlib.Path(__file__).parent / "data"

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "Hello world! Hello again, world. How are you today? I'm fine, you're fine, we've won.",
    "Counting 1 22 333 4444 and the number 2024 in the year of 1999; prices: $3.50, 20%.",
    "def main(args):\n    return [x for x in args if x != '']\n\n\nprint(main(['a', 'b']))",
    "Größe, naïve café, façade, Ελληνικά, русский язык, 日本語のテキスト, 中文字符, 한국어.",
    "Emoji: 😀 😃 😄 👍 and a family. The end of the text, the start of the next one.",
] * 3

TEXTS = [
    "", " ", "Hello", " Hello", "Hello world", "  two  spaces ", "\n\nlines\r\n\tand tabs\n",
    "The dog's 12345 bones, I'm sure!", "Größe naïve Ελληνικά", "日本語と中文 한국어",
    "😀👍 👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 \u200d", "a<|end|>b <|begin|> c</s>", "\u0000\u0001 odd \ufffd\uffff",
    "x" * 70, " " * 20 + "x", "ﬁ Å ① fullwidth ＡＢＣ", "<unk> [UNK] <0xE2> <|nothing|>",
]

LETTERS = sorted({c for t in CORPUS for c in t if c.isascii() or c in "éöß日本"})


def byte_level():
    """As Llama 3 and Qwen: digits in threes, ids framed by the post-processor."""
    t = Tokenizer(models.BPE())
    pattern = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
               r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    t.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    t.decoder = decoders.ByteLevel()
    t.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=460, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    t.add_special_tokens([AddedToken(x, special=True) for x in ("<|begin|>", "<|end|>")])
    t.add_tokens([AddedToken("<tool>", special=False), AddedToken("→", special=False)])
    t.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", pair="<|begin|> $A <|begin|> $B",
        special_tokens=[("<|begin|>", t.token_to_id("<|begin|>"))])
    return t, {"bos_token": "<|begin|>", "eos_token": {"__type": "AddedToken", "content": "<|end|>", "lstrip": False,
                                                     "rstrip": False, "normalized": False, "single_word": False}}


def byte_fallback(decoder_strips):
    """As Llama 2 (space put before the text and stripped again) or Gemma."""
    pieces = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for byte in range(256):
        pieces[f"<0x{byte:02X}>"] = len(pieces)
    for letter in ["▁"] + [c for c in LETTERS if c not in " \n\r\t"]:
        pieces.setdefault(letter, len(pieces))
    merges = []
    for left, right in [("▁", "t"), ("h", "e"), ("▁t", "he"), ("H", "e"), ("l", "l"), ("He", "ll"),
                        ("Hell", "o"), ("▁", "Hello"), ("▁", "▁"), ("▁▁", "▁▁"), ("日", "本")]:
        merges.append((left, right))
        pieces.setdefault(left + right, len(pieces))
    t = Tokenizer(models.BPE(pieces, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    replace = normalizers.Replace(" ", "▁")
    tail = [decoders.Strip(" ", 1, 0)] if decoder_strips else []
    t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if decoder_strips else replace
    t.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()] + tail)
    t.add_special_tokens([AddedToken(x, special=True, normalized=False) for x in ("<unk>", "<s>", "</s>")])
    t.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    return t, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def frequent_pieces(words, limit):
    """The most frequent substrings, in an order that is the same every time."""
    counts = {}
    for word in words:
        for start in range(len(word)):
            for end in range(start + 1, min(len(word), start + 6) + 1):
                counts[word[start:end]] = counts.get(word[start:end], 0) + 1
    ranked = sorted(counts.items(), key=lambda item: (len(item[0]) > 1, -item[1] * len(item[0]), item[0]))
    return ranked[:limit]


def unigram():
    """As T5: the Metaspace decoder drops the first space itself. One special
    token is named by tokenizer_config.json alone."""
    words = ["▁" + word for line in CORPUS for word in line.split()]
    pieces = frequent_pieces(words, 220)
    total = sum(count for _, count in pieces)
    vocab = [("<unk>", 0.0), ("</s>", 0.0)] + [(p, round(math.log(n / total), 4)) for p, n in pieces]
    t = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=False))
    t.pre_tokenizer = pre_tokenizers.Metaspace()
    t.decoder = decoders.Metaspace()
    t.add_special_tokens([AddedToken(x, special=True) for x in ("<unk>", "</s>")])
    return t, {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>",
               "added_tokens_decoder": {"1": {"content": "</s>", "special": True},
                                        "230": {"content": "<late>", "special": False}}}


def word_level():
    """No decoder at all: words joined by spaces."""
    t = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    t.train_from_iterator(CORPUS, trainers.WordLevelTrainer(
        vocab_size=120, special_tokens=["[UNK]", "[END]"], show_progress=False))
    return t, {"eos_token": "[END]"}


def word_piece():
    words = [word for line in CORPUS for word in line.lower().split()]
    pieces = [p for p, _ in frequent_pieces(words, 120)]
    names = ["[UNK]", "[CLS]", "[SEP]", "the"] + pieces + ["##" + p for p in pieces]
    vocab = {name: i for i, name in enumerate(dict.fromkeys(names))}
    t = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    t.normalizer = normalizers.BertNormalizer()
    t.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    t.decoder = decoders.WordPiece()
    t.add_special_tokens([AddedToken(x, special=True) for x in ("[UNK]", "[CLS]", "[SEP]")])
    return t, {"cls_token": "[CLS]", "sep_token": "[SEP]"}


CHATS = [
    [("user", "Hi")],
    [("system", "  Be brief. "), ("user", "Hi\nthere "), ("assistant", " Hello! "), ("user", "Bye & <b>'x'</b>")],
    [("user", "1"), ("assistant", "<think>\nhm\n</think>\n\n2"), ("user", "日本語 😀")],
    [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "<think>\nq\n</think>\nd")],
    [("user", "run"), ("assistant", "ok"), ("tool", "one"), ("tool", "two"), ("user", "")],
    [("user", "a"), ("user", "b")],
    [("assistant", "first")],
]


def render(tokenizer, name, chat, add_generation_prompt):
    template = (DATA / "templates" / name).read_text()
    messages = [{"role": r, "content": c} for r, c in chat]
    try:
        return {"text": tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False,
            add_generation_prompt=add_generation_prompt)}
    except Exception as error:  # jinja2's TemplateError carries the template's own message
        return {"error": str(error)}


def main():
    rng = random.Random(3)
    golden = {}
    for name, (tokenizer, config) in {
            "byte_level": byte_level(), "byte_fallback": byte_fallback(True),
            "byte_fallback_plain": byte_fallback(False), "unigram": unigram(),
            "word_level": word_level(), "word_piece": word_piece()}.items():
        folder = DATA / name
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
        if name == "byte_level":
            config["chat_template"] = (DATA / "templates" / "im_blocks.jinja").read_text()
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        config["clean_up_tokenization_spaces"] = False
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n")
        hf = PreTrainedTokenizerFast.from_pretrained(str(folder))
        texts = [{"text": x, "ids": hf.encode(x, add_special_tokens=False),
                  "ids_special": hf.encode(x, add_special_tokens=True)} for x in TEXTS]
        answers = []
        for case in range(60):
            ids = [rng.randrange(len(hf)) for _ in range(rng.randrange(1, 10))]
            answers.append({"ids": ids, "text": hf.decode(ids, skip_special_tokens=False),
                            "text_skipped": hf.decode(ids, skip_special_tokens=True)})
        golden[name] = {"vocab_size": len(hf), "eos": hf.eos_token or "", "bos": hf.bos_token or "",
                        "texts": texts, "decodes": answers}
    hf = PreTrainedTokenizerFast.from_pretrained(str(DATA / "byte_level"))
    renders = [{"template": path.name, "chat": chat, "add_generation_prompt": add,
                **render(hf, path.name, chat, add)}
               for path in sorted((DATA / "templates").glob("*.jinja"))
               for chat in CHATS for add in (False, True)]
    (DATA / "golden.json").write_text(
        json.dumps({"tokenizers": golden, "renders": renders}, ensure_ascii=True, indent=None,
                   separators=(",", ":")).replace('{"ids"', '\n{"ids"').replace('{"t', '\n{"t') + "\n")


if __name__ == "__main__":
    main()
