"""guidellm against the real server: a short benchmark of each door's form, every request of it well.

    guidellm_test.py BUILD_DIR
"""

import importlib.metadata
import json
import os
import sys
import tempfile
from pathlib import Path

import harness

harness.need_python("guidellm", "transformers")
PROMPT, OUTPUT, REQUESTS, CONCURRENT = 48, 12, 16, 4


def benchmark(server, folder, request_type, rate_type, *rate):
    report = Path(folder) / f"{request_type}-{rate_type}.json"
    harness.run(
        Path(sys.executable).parent / "guidellm", "benchmark", "run", "--target", server.url,
        "--model", "demo", "--processor", harness.DEMO, "--rate-type", rate_type, *rate,
        "--data", f"prompt_tokens={PROMPT},output_tokens={OUTPUT}", "--max-requests", REQUESTS,
        "--max-seconds", 60, "--disable-progress", "--disable-console-outputs", "--output-path", report,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": f"{folder}/cache",
             "GUIDELLM__LOGGING__DISABLED": "true", "GUIDELLM__MAX_CONCURRENCY": str(CONCURRENT),
             "GUIDELLM__PREFERRED_ROUTE": request_type, "GUIDELLM__MAX_WORKER_PROCESSES": "1",
             "GUIDELLM__SCHEDULER_START_DELAY": "1"},
    )  # fmt: skip
    (run,) = json.loads(report.read_text())["benchmarks"]
    done = run["requests"]
    assert not done["errored"] and not done["incomplete"], (done["errored"] + done["incomplete"])[:1]
    assert len(done["successful"]) == REQUESTS, len(done["successful"])
    for request in done["successful"]:
        assert request["output_tokens"] == OUTPUT, request
        assert request["time_to_first_token_ms"] > 0, request
    return run["metrics"]


def main():
    with harness.Server() as server, tempfile.TemporaryDirectory() as folder:
        figures = []
        for request_type, *rate in (
            ("text_completions", "concurrent", "--rate", CONCURRENT),
            ("chat_completions", "throughput"),
        ):
            metrics = benchmark(server, folder, request_type, *rate)
            first = metrics["time_to_first_token_ms"]["successful"]["median"]
            tokens = metrics["output_tokens_per_second"]["successful"]["mean"]
            figures.append(f"{request_type} {rate[0]}: TTFT {first:.0f} ms, {tokens:.0f} tokens/s")
        # Two benchmarks, and what guidellm asks beside them to see that the server is there.
        assert server.metric("lockstep_requests_total", outcome="completed") >= 2 * REQUESTS
        assert server.metric("lockstep_requests_total", outcome="failed") == 0
        assert server.becomes_idle()
    version = importlib.metadata.version("guidellm")
    print(f"guidellm {version}: {REQUESTS} requests each, none failed; " + "; ".join(figures))


if __name__ == "__main__":
    main()
