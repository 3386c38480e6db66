#!/usr/bin/env python3
"""lockstep worker-group beside a real coordinator: the way a pod of GPUs runs."""

import json
import os
import pathlib
import signal
import stat
import subprocess
import tempfile
import unittest
import unittest.mock

import harness

GROUP = (harness.BIN / "lockstep", "worker-group")


def children(pid):
    """Descendants of a process, as {pid: command line}."""
    found, todo = {}, [pid]
    while todo:
        parent = todo.pop()
        try:
            pids = pathlib.Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        except OSError:
            continue
        for child in map(int, pids):
            try:
                command = pathlib.Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            found[child] = command
            todo.append(child)
    return found


def workers(pid):
    return [child for child, command in children(pid).items()
            if command[0].endswith(b"/lockstep-worker")]


class WorkerGroupTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory(prefix="lockstep-group-test.")
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)

    def start(self, name, *words, programs=harness.BIN):
        log = self.folder / f"{name}.log"
        environment = dict(os.environ, LOCKSTEP_PROGRAMS=str(programs))
        with open(log, "wb") as out:
            process = subprocess.Popen([str(word) for word in words], stdout=out, stderr=out,
                                       env=environment)
        self.addCleanup(harness.stop, process)
        return process, log

    def test_serves_outlives_a_killed_worker_and_ends_clean(self):
        ports, plane = self.folder / "ports.json", self.folder / "plane"
        coordinator, log = self.start(
            "coordinator", harness.BIN / "lockstep-coordinator", "--model", harness.DEMO_MODEL,
            "--served-model-name", "demo", "--tensor-parallel-size", "2", "--cpu-threads", "1",
            "--http-port", "0", "--grpc-port", "0", "--worker-address", f"unix:{plane}",
            "--port-file", ports)
        group, group_log = self.start("group", *GROUP, "--count", "2", "--", "--coordinator",
                                      f"unix:{plane}", "--backend", "cpu")
        # Either may be the one that ends: a group without workers is not waited for.
        harness.wait_for("a whole group", lambda: ports.exists() or coordinator.poll() is not None,
                         group, 60, group_log)
        harness.wait_for("the coordinator", ports.exists, coordinator, 1, log)
        port = json.loads(ports.read_text())["http_port"]
        self.assertEqual(self.answer(port), 200)

        before = sorted(workers(group.pid))
        self.assertEqual(len(before), 2)
        os.kill(before[0], signal.SIGKILL)
        harness.wait_for("another worker", lambda: len(workers(group.pid)) == 2 and sorted(
            workers(group.pid)) != before, group, 20, group_log)
        harness.wait_for("a whole group again", lambda: harness.request(
            port, "GET", "/ready")[0] == 200, group, 30, group_log)
        self.assertEqual(self.answer(port), 200)

        last = workers(group.pid)
        self.assertEqual(harness.stop(group, 10), 0)
        # The last of them may still be on its way out of the process table.
        harness.wait_for(f"the end of the workers {last}", lambda: not any(
            pathlib.Path(f"/proc/{pid}").exists() for pid in last), seconds=10)
        self.assertIn("ended with signal 9 (Killed); starting it again", group_log.read_text())

    def answer(self, port):
        return harness.request(port, "POST", "/v1/completions", {
            "model": "demo", "prompt": "A rope", "max_tokens": 4})[0]

    def test_a_worker_that_was_told_to_end_ends_the_group(self):
        fake = self.folder / "bin" / "lockstep-worker"
        fake.parent.mkdir()
        runs = self.folder / "runs"
        # As the coordinator tells all of them, worker 0 hears it first.
        fake.write_text(f'#!/bin/sh\necho run >>{runs}\n'
                        'case "$*" in *"--device=0"*) exit 0 ;; esac\nexec sleep 1000\n')
        fake.chmod(0o755)
        group, log = self.start("group", *GROUP, "--count", "3", "--", programs=fake.parent)
        self.assertEqual(group.wait(30), 0, log.read_text())
        self.assertLessEqual(len(runs.read_text().split()), 3)

    def test_a_bad_worker_flag_ends_the_group(self):
        group, log = self.start("group", *GROUP, "--count", "2", "--", "--no-such-flag")
        self.assertEqual(group.wait(20), 2)
        self.assertIn("--no-such-flag", log.read_text())

    def test_a_crash_loop_is_named_and_ends_the_group(self):
        fake = self.folder / "bin" / "lockstep-worker"
        fake.parent.mkdir()
        runs = self.folder / "runs"
        # Worker 1 is well; worker 0 dies at once.
        fake.write_text('#!/bin/sh\ncase "$*" in *"--device=1"*) exec sleep 1000 ;; esac\n'
                        f'echo run >>{runs}\nexit 7\n')
        fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
        group, log = self.start("group", *GROUP, "--count", "2", "--", programs=fake.parent)
        # More where one of the lives was slow.
        self.assertEqual(group.wait(300), 1)
        self.assertGreaterEqual(len(runs.read_text().split()), 6)
        self.assertIn("worker 0: crash loop: ended 6 times in a row within 2000 ms", log.read_text())

    def test_each_node_asks_for_its_own_ranks(self):
        fake = self.folder / "bin" / "lockstep-worker"
        fake.parent.mkdir()
        fake.write_text(f'#!/bin/sh\necho "$*" >>{self.folder}/flags\nexit 2\n')
        fake.chmod(0o755)
        group, _ = self.start("group", *GROUP, "--count", "1", "--node", "3", "--",
                              "--coordinator", "[::1]:1", "--", "", programs=fake.parent)
        self.assertEqual(group.wait(20), 2)
        # Nothing that would count above a file of theirs.
        self.assertEqual((self.folder / "flags").read_text(),
                         "--coordinator [::1]:1 --  --preferred-rank=2 --device=0\n")

    def test_its_own_flags_are_checked(self):
        for words, said in (
                (["--"], "--count is required"), (["--count", "0"], "--count: Value 0"),
                (["--count", "x"], "--count: Value x"), (["--count", "1", "--node"], "--node: exp"),
                (["--count", "1", "--gpus", "2"], "--gpus: unknown flag"),
                (["--count", "1", "--insecure"], "--insecure: unknown flag"),
                (["--count", "1", "two", "--", "--insecure"], "two: unknown word"),
                (["--count", "1", "--log-format", "xml"], "--log-format: xml")):
            group, log = self.start("group", *GROUP, *words)
            self.assertEqual(group.wait(20), 2, words)
            self.assertIn(f"lockstep worker-group: {said}", log.read_text())

    def test_with_a_json_log_every_line_is_an_object(self):
        fake = self.folder / "bin" / "lockstep-worker"
        fake.parent.mkdir()
        # It dies once, and then is told to end.
        fake.write_text(f'#!/bin/sh\nif [ -e {self.folder}/died ]; then exit 0; fi\n'
                        f'echo "$1" >{self.folder}/died; exit 7\n')
        fake.chmod(0o755)
        with unittest.mock.patch.dict(os.environ, LOCKSTEP_LOG_FORMAT="json",
                                      LOCKSTEP_MAX_NUM_SEQ="4"):
            group, log = self.start("group", *GROUP, "--count", "1", programs=fake.parent)
        self.assertEqual(group.wait(20), 0)
        self.assertEqual((self.folder / "died").read_text(), "--log-format=json\n")
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        self.assertEqual({line["source"] for line in lines}, {"worker-group"})
        self.assertIn("LOCKSTEP_MAX_NUM_SEQS?", lines[0]["message"])
        self.assertIn("worker 0 ended with exit code 7", lines[1]["message"])


if __name__ == "__main__":
    unittest.main()
