"""Measures the demo model on held-out questions and records what transformers answers.

Accuracy: greedy answers that equal the right one to the letter, per task. expected.json: some of those
questions with the token ids that transformers makes in float32 on the CPU, for tests to compare with.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from corpus import TASKS, Example, held_out_examples, messages
from facts import FIXED

RECORDED = {"add": 4, "subtract": 3, "sort words": 4, "count": 4, "story": 4, "show": 3, "translate": 3, "recall": 3}
# A recorded answer is never a near tie, so that another order of float32 additions cannot change it.
SMALLEST_GAP = 0.02


def load(folder, device):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.to(device).eval()


def recitals():
    return [Example("fixed", None, question, answer) for questions, answer in FIXED for question in questions]


@torch.inference_mode()
def answers(model, tokenizer, examples):
    """Greedy answers to many questions at once (left-padded)."""
    prompts = [tokenizer.apply_chat_template(messages(e), tokenize=False, add_generation_prompt=True) for e in examples]
    longest = max(len(tokenizer.encode(e.answer, add_special_tokens=False)) for e in examples)
    batch = tokenizer(prompts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
    ids = batch["input_ids"].to(model.device)
    mask = batch["attention_mask"].to(model.device)
    out = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=longest + 8)
    return [tokenizer.decode(row, skip_special_tokens=True) for row in out[:, ids.shape[1]:]]


def measure(model, tokenizer, number):
    accuracy = {}
    for task in TASKS:
        examples = recitals() if task == "fixed" else held_out_examples(task, number)
        texts = answers(model, tokenizer, examples)
        wrong = [(e.question, e.answer, text) for e, text in zip(examples, texts) if text != e.answer]
        accuracy[task] = {"questions": len(examples), "right": round(1 - len(wrong) / len(examples), 4)}
        print(f"{task:14} {100 * accuracy[task]['right']:6.2f} % of {len(examples)}", flush=True)
        for question, answer, text in wrong[:3]:
            print(f"    {question!r}: {text!r} is not {answer!r}", flush=True)
    return accuracy


@torch.inference_mode()
def greedy(model, prompt, end, limit):
    """Greedy token ids, one at a time, and the smallest lead of a chosen token over the next best."""
    ids, past, gap = [], None, float("inf")
    feed = torch.tensor([prompt])
    while len(ids) < limit:
        out = model(input_ids=feed, past_key_values=past, use_cache=True)
        best = torch.topk(out.logits[0, -1], 2)
        gap = min(gap, (best.values[0] - best.values[1]).item())
        past, token = out.past_key_values, best.indices[0].item()
        ids.append(token)
        if token == end:
            break
        feed = torch.tensor([[token]])
    return ids, gap


def record(model, tokenizer):
    cases = []
    for task in TASKS:
        examples = recitals()[::8] if task == "fixed" else held_out_examples(task, 40, seed=2)
        kept = 0
        for example in examples:
            chat = messages(example)
            prompt_text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            prompt = tokenizer.encode(prompt_text, add_special_tokens=False)
            ids, gap = greedy(model, prompt, tokenizer.eos_token_id, 320)
            if gap < SMALLEST_GAP:
                continue
            cases.append({"kind": task, "messages": chat, "prompt_text": prompt_text, "prompt_token_ids": prompt,
                          "greedy_token_ids": ids, "text": tokenizer.decode(ids, skip_special_tokens=True),
                          "right_answer": example.answer, "smallest_gap": round(gap, 4)})
            kept += 1
            if kept == RECORDED.get(task, 2):
                break
    return cases


def write_expected(path, accuracy, cases):
    lines = ",\n".join("    " + json.dumps(case, ensure_ascii=False) for case in cases)
    shares = ",\n".join(f"    {json.dumps(task)}: {json.dumps(figures)}" for task, figures in accuracy.items())
    path.write_text(f'{{\n  "accuracy": {{\n{shares}\n  }},\n  "cases": [\n{lines}\n  ]\n}}\n')


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(Path(__file__).parent / "model"))
    parser.add_argument("--expected", default=str(Path(__file__).parent / "expected.json"))
    parser.add_argument("--questions", type=int, default=250, help="held-out questions per task")
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    torch.backends.cuda.matmul.allow_tf32 = False
    device = "cuda" if torch.cuda.is_available() else "cpu"
    accuracy = measure(load(options.model, device), tokenizer, options.questions)
    cases = record(load(options.model, "cpu"), tokenizer)
    write_expected(Path(options.expected), accuracy, cases)
    right = sum(case["text"] == case["right_answer"] for case in cases)
    longest = max(len(case["greedy_token_ids"]) for case in cases)
    print(f"recorded {len(cases)} answers, {right} of them right; longest {longest} tokens")


if __name__ == "__main__":
    main()
