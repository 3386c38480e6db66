"""lm-eval's local-completions: log-likelihoods equal to those that transformers computed.

    lm_eval_test.py BUILD_DIR

The models are the tiny ones of tests/golden, whose golden.json has each prompt token's
log-probability as transformers gives it in float32. A task made of their prompts is scored by
lm-eval over /v1/completions, once as a program with the server's own tokenizer (/tokenize,
/tokenizer_info) and then as a library with the Hugging Face tokenizer of the model's folder.
"""

import contextlib
import io
import json
import logging
import os
import sys
import tempfile
from pathlib import Path

import harness

harness.need_python("lm_eval", "transformers", "tenacity", "aiohttp")
os.environ.update(
    HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1",
    TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false",
)  # fmt: skip

MODELS = ["llama", "qwen3", "gemma3", "opt"]
TOLERANCE = 1e-3
CUTS = [1, 2, 13, 39]  # tokens of the prompt that are context; the rest is scored
TASK = """\
task: golden
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{continuation}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
"""


def words(ids):
    """The golden tokenizers have a word for each id."""
    return " ".join(f"t{token}" for token in ids)


def documents(model):
    """What lm-eval is given, and the (log-likelihood, greedy) that it must find; None: not recorded."""
    cases = json.loads((harness.SOURCE / "tests/golden" / model / "golden.json").read_text())["cases"]
    (case,) = [case for case in cases if "prompt_logprobs" in case]
    prompt, logprobs, greedy = case["prompt"], case["prompt_logprobs"], case["greedy"]
    other = [(greedy[0] + 1) % 100, *greedy[1:4]]
    parts = [(prompt[:cut], prompt[cut:], sum(logprobs[cut:]), None) for cut in CUTS]
    parts += [(prompt, greedy[:16], None, True), (prompt, other, None, False)]
    return [
        ({"context": words(context), "continuation": " " + words(rest)}, likelihood, is_greedy)
        for context, rest, likelihood, is_greedy in parts
    ]


def check(model, samples, wanted):
    """Each sample against what is known; the largest difference."""
    assert len(samples) == len(wanted), (len(samples), len(wanted))
    worst = 0.0
    for document, likelihood, is_greedy in wanted:
        (sample,) = [s for s in samples if s["doc"] == document]
        ((got, got_greedy),) = sample["resps"][0]
        if likelihood is not None:
            worst = max(worst, abs(float(got) - likelihood))
        if is_greedy is not None:
            assert str(got_greedy) == str(is_greedy), (model, document, got_greedy)
    assert worst < TOLERANCE, f"{model}: log-likelihoods differ by up to {worst}"
    return worst


def arguments(server, model, **more):
    return dict(
        model=model, base_url=f"{server.url}/v1/completions", num_concurrent=2, max_length=255,
        tokenized_requests=True, **more,
    )  # fmt: skip


def as_program(server, model, folder, wanted):
    given = arguments(server, model, tokenizer_backend="remote")
    options = ",".join(f"{name}={value}" for name, value in given.items())
    out = Path(folder) / "out"
    told = harness.run(
        sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", options,
        "--tasks", "golden", "--include_path", folder, "--log_samples", "--output_path", out,
    )  # fmt: skip
    assert "golden" in told, told
    (samples,) = out.rglob("samples_golden_*.jsonl")
    (results,) = out.rglob("results_*.json")
    check(model, [json.loads(line) for line in samples.read_text().splitlines()], wanted)
    accuracy = json.loads(results.read_text())["results"]["golden"]["acc,none"]
    assert 0 < accuracy < 1, accuracy  # of the greedy and the changed one, at least one each


def as_library(server, model, folder, wanted):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    with contextlib.redirect_stderr(io.StringIO()):
        results = simple_evaluate(
            model="local-completions",
            model_args=arguments(
                server, model, tokenizer_backend="huggingface",
                tokenizer=str(harness.SOURCE / "tests/golden" / model),
            ),
            tasks=["golden"], task_manager=TaskManager(include_path=folder, include_defaults=False),
            bootstrap_iters=0, log_samples=True,
        )  # fmt: skip
    samples = results["samples"]["golden"]
    return check(model, samples, wanted)


def main():
    logging.disable(logging.WARNING)
    worst = {}
    for model in MODELS:
        wanted = documents(model)
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder) / "golden.jsonl"
            data.write_text("".join(json.dumps(document) + "\n" for document, *_ in wanted))
            (Path(folder) / "golden.yaml").write_text(TASK.format(data=data))
            os.environ["HF_HOME"] = f"{folder}/cache"
            with harness.Server(model=harness.SOURCE / "tests/golden" / model, name=model) as server:
                if model == MODELS[0]:
                    as_program(server, model, folder, wanted)
                worst[model] = as_library(server, model, folder, wanted)
                assert server.becomes_idle()
    figures = ", ".join(f"{model} {difference:.1e}" for model, difference in worst.items())
    print(f"lm-eval: log-likelihoods are transformers' to within {figures}")


if __name__ == "__main__":
    main()
