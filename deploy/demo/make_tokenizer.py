"""Trains the demo model's byte-level BPE tokenizer on a sample of its corpus."""

import json
import random
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from corpus import training_document

SPECIAL_TOKENS = ["<|pad|>", "<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
PAD, BEGIN, END, SYSTEM, USER, ASSISTANT = range(len(SPECIAL_TOKENS))
VOCAB_SIZE = 1024
MAX_LENGTH = 2048

# Words with their leading space; single digits and single symbols, so that sums line up and things can be
# counted; white space.
PATTERN = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]|\s+"

CHAT_TEMPLATE = """{{- bos_token -}}
{%- for message in messages -%}
  {%- if message['role'] not in ['system', 'user', 'assistant'] -%}
    {{- raise_exception('the demo model knows the roles system, user and assistant, not ' + message['role']) -}}
  {%- endif -%}
  {{- '<|' + message['role'] + '|>' + message['content'] | trim + '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|assistant|>' -}}
{%- endif -%}"""


def train_tokenizer(documents=20000, seed=7):
    rng = random.Random(seed)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=SPECIAL_TOKENS, show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))

    def text():
        for _ in range(documents):
            document = training_document(rng)
            for token in SPECIAL_TOKENS:
                document = document.replace(token, "\n")
            yield document
    tokenizer.train_from_iterator(text(), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", pair="<|begin|> $A <|begin|> $B", special_tokens=[("<|begin|>", BEGIN)])
    return tokenizer


def save_tokenizer(tokenizer, folder):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    added = {str(i): {"content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
                      "special": True} for i, token in enumerate(SPECIAL_TOKENS)}
    config = {"added_tokens_decoder": added, "bos_token": SPECIAL_TOKENS[BEGIN], "eos_token": SPECIAL_TOKENS[END],
              "pad_token": SPECIAL_TOKENS[PAD], "chat_template": CHAT_TEMPLATE, "clean_up_tokenization_spaces": False,
              "model_max_length": MAX_LENGTH, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    save_tokenizer(train_tokenizer(), Path(__file__).parent / "model")
