"""ghz against the real server: a small load of each kind of call, and every call of it well.

    ghz_test.py BUILD_DIR
"""

import json

import harness

EXPECTED = json.loads((harness.DEMO.parent / "expected.json").read_text())["cases"]
SERVICE = "lockstep.v1.Inference"


def main():
    ghz = harness.need_program("ghz")
    with harness.Server("--reflection") as server:

        def load(method, data, requests, *options):
            report = json.loads(harness.run(
                ghz, "--insecure", "--call", f"{SERVICE}.{method}", "-d", json.dumps(data), "-n", requests,
                "-c", 8, "--timeout", "60s", "--format", "json", *options, server.target,
            ))  # fmt: skip
            assert report["count"] == requests, report
            assert report["statusCodeDistribution"] == {"OK": requests}, report
            assert not report.get("errorDistribution"), report
            return report["rps"]

        # A list of messages is taken in turn.
        chats = [
            {"chat": {"messages": case["messages"]}, "sampling": {"temperature": 0, "max_tokens": 40}}
            for case in EXPECTED[:10]
        ]
        rates = {
            "Generate": load("Generate", chats, 40),
            "GenerateStream": load("GenerateStream", chats, 40),
            "Tokenize": load("Tokenize", {"text": "What is 17 + 25?"}, 200),
        }
        # Without reflection's help as well, as people do where it is off.
        protos = ("--import-paths", harness.SOURCE, "--proto", harness.SOURCE / "proto/inference.proto")
        load("GetModelInfo", {}, 20, *protos)
        assert server.metric("lockstep_requests_total", outcome="completed") == 80
        assert server.metric("lockstep_requests_total", outcome="failed") == 0
        assert server.becomes_idle()
    print("ghz: all calls OK; " + ", ".join(f"{name} {rate:.0f}/s" for name, rate in rates.items()))


if __name__ == "__main__":
    main()
