"""grpcurl against the real server: through reflection, with proto/ in hand, and with API keys.

    grpcurl_test.py BUILD_DIR
"""

import json
import subprocess
import tempfile

import harness

EXPECTED = json.loads((harness.DEMO.parent / "expected.json").read_text())["cases"]
SERVICE = "lockstep.v1.Inference"


def main():
    grpcurl = harness.need_program("grpcurl")

    def ask(server, *arguments, data=None, options=()):
        given = () if data is None else ("-d", json.dumps(data))
        return harness.run(grpcurl, "-plaintext", *options, *given, server.target, *arguments)

    def refused(server, *arguments, data=None, options=()):
        given = () if data is None else ("-d", json.dumps(data))
        command = [grpcurl, "-plaintext", *options, *given, server.target, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode != 0, done.stdout
        return done.stderr

    def stream(text):
        decoder, at, found = json.JSONDecoder(), 0, []
        while text[at:].strip():
            at += len(text[at:]) - len(text[at:].lstrip())
            value, at = decoder.raw_decode(text, at)
            found.append(value)
        return found

    case = EXPECTED[0]
    chat = {"chat": {"messages": case["messages"]}, "sampling": {"temperature": 0}}
    with harness.Server("--reflection") as server:
        assert {SERVICE, "grpc.health.v1.Health"} <= set(ask(server, "list").split())
        assert f"{SERVICE}.GenerateStream" in ask(server, "list", SERVICE)
        described = ask(server, "describe", "lockstep.v1.SamplingParams")
        assert "optional float temperature" in described, described
        whole = json.loads(ask(server, f"{SERVICE}/Generate", data=chat))
        assert whole["completions"][0]["text"] == case["text"], whole
        events = stream(ask(server, f"{SERVICE}/GenerateStream", data=chat))
        assert "prompt" in events[0] and events[-1]["finish"]["reason"] == "FINISH_REASON_STOP"
        assert "".join(e.get("chunk", {}).get("text", "") for e in events) == case["text"], events
        assert json.loads(ask(server, "grpc.health.v1.Health/Check"))["status"] == "SERVING"
        assert json.loads(ask(server, f"{SERVICE}/GetModelInfo", data={}))["tp_size"] == 2
        bad = refused(server, f"{SERVICE}/Generate", data={"text": "x", "sampling": {"temperature": 3}})
        assert "InvalidArgument" in bad and "temperature" in bad, bad
        late = refused(
            server, f"{SERVICE}/Generate", options=("-max-time", "0.3"),
            data={"text": "x", "sampling": {"max_tokens": 2000, "ignore_eos": True}},
        )  # fmt: skip
        assert "DeadlineExceeded" in late, late
        assert server.becomes_idle()
    with tempfile.TemporaryDirectory() as folder:
        with harness.Server("--api-key-file", harness.key_file(folder)) as server:
            protos = ("-import-path", harness.SOURCE, "-proto", "proto/inference.proto")
            assert "reflection" in refused(server, "list").lower()
            nobody = refused(server, f"{SERVICE}/Generate", data=chat, options=protos)
            assert "Unauthenticated" in nobody, nobody
            keyed = (*protos, "-H", f"authorization: Bearer {harness.KEY}")
            whole = json.loads(ask(server, f"{SERVICE}/Generate", data=chat, options=keyed))
            assert whole["completions"][0]["text"] == case["text"], whole
    print("grpcurl: list, describe, calls, streams, refusals, deadlines, API keys")


if __name__ == "__main__":
    main()
