#!/usr/bin/env python3
"""With --log-format json every line on stderr is an object that a collector can read."""

import http.client
import json
import os
import pathlib
import signal
import subprocess
import tempfile
import unittest

import harness

TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


class LogsTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory(prefix="lockstep-logs-test.")
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        self.log = self.folder / "log"

    def start(self, *flags):
        ports = self.folder / "ports.json"
        with open(self.log, "wb") as out:
            process = subprocess.Popen(
                [str(word) for word in (
                    harness.BIN / "lockstep", "serve", "--model", harness.DEMO_MODEL,
                    "--served-model-name", "demo", "--tensor-parallel-size", 2, "--cpu-threads", 1,
                    "--http-port", 0, "--grpc-port", 0, "--port-file", ports, *flags)],
                stdout=subprocess.DEVNULL, stderr=out)
        self.addCleanup(lambda: process.poll() is None and (process.kill(), process.wait()))
        harness.wait_for("lockstep serve", ports.exists, process, 60, self.log)
        return process, json.loads(ports.read_text())["http_port"]

    def ask(self, port, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        try:
            connection.request("POST", "/v1/completions", json.dumps(
                {"model": "demo", "prompt": "A rope", "max_tokens": 2}),
                {"Content-Type": "application/json",
                 **{name.replace("_", "-"): value for name, value in headers.items()}})
            answer = connection.getresponse()
            answer.read()
            return answer
        finally:
            connection.close()

    def lines(self):
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def test_every_line_of_every_process_is_an_object(self):
        process, port = self.start("--log-format", "json")
        worker = subprocess.run(["pgrep", "-P", str(process.pid), "lockstep-worker"],
                                capture_output=True, text=True, check=True).stdout.split()[0]
        os.kill(int(worker), signal.SIGKILL)  # so that the supervisor has something to say
        harness.wait_for("the group again", lambda: self.log.read_text().count("epoch 2: ready") == 2
                         or self.log.read_text().count(": ready after") >= 4, process, 60, self.log)
        self.assertEqual(harness.stop(process), 0)
        lines = self.lines()
        for line in lines:
            self.assertLessEqual({"time", "level", "source", "message"}, set(line), line)
            self.assertRegex(line["time"], r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d$")
            self.assertIn(line["level"], ("debug", "info", "warning", "error"))
        sources = {line["source"] for line in lines}
        self.assertLessEqual({"serve", "coordinator", "rank 0", "rank 1"}, sources)
        for rank in (0, 1):
            self.assertEqual({line["rank"] for line in lines if line["source"] == f"rank {rank}"},
                             {rank})
        self.assertEqual([line for line in lines if line["source"] == "coordinator"
                          and "rank" in line], [])

    def test_a_request_is_found_by_its_id_and_by_its_callers_trace(self):
        process, port = self.start("--log-format", "json")
        answer = self.ask(port, x_request_id="order-17", traceparent=TRACE)
        self.assertEqual((answer.status, answer.getheader("x-request-id")), (200, "order-17"))
        # Ours where the caller names none; a trace that is none is no error, and not logged.
        own = self.ask(port, traceparent=TRACE.replace("4bf9", "aaaa")).getheader("x-request-id")
        self.assertEqual(self.ask(port, traceparent="00-zz").status, 200)
        self.assertEqual(self.ask(port).status, 200)
        self.assertEqual(harness.stop(process), 0)
        said = {line["request_id"]: line["traceparent"] for line in self.lines()
                if "request_id" in line}
        self.assertEqual(said, {"order-17": TRACE, own: TRACE.replace("4bf9", "aaaa")})

    def test_the_debug_level_names_every_request(self):
        process, port = self.start("--log-format", "json", "--log-level", "debug")
        self.ask(port, x_request_id="plain")
        self.assertEqual(harness.stop(process), 0)
        found = [line for line in self.lines() if line.get("request_id") == "plain"]
        self.assertEqual([(line["level"], "traceparent" in line) for line in found],
                         [("debug", False)])

    def test_text_has_the_same_words(self):
        process, port = self.start()
        self.ask(port, x_request_id="order-17", traceparent=TRACE)
        self.assertEqual(harness.stop(process), 0)
        self.assertIn(f"request request_id=order-17 traceparent={TRACE}\n", self.log.read_text())

    def test_the_last_word_is_an_object_too(self):
        for program, flags in (("lockstep-coordinator", ["--model", "/no/such/model"]),
                               ("lockstep-worker", ["--backend", "cuda", "--device", "255"])):
            done = subprocess.run([harness.BIN / program, "--log-format", "json", *flags],
                                  capture_output=True, text=True, timeout=60)
            self.assertNotEqual(done.returncode, 0)
            last = json.loads(done.stderr.splitlines()[-1])
            self.assertEqual(last["level"], "error", last)


if __name__ == "__main__":
    unittest.main()
