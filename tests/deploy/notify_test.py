#!/usr/bin/env python3
"""The daemons tell a service manager when they are ready, alive and ending."""

import contextlib
import os
import pathlib
import re
import select
import signal
import socket
import subprocess
import tempfile
import unittest

import harness


class Manager:
    """systemd's side: a datagram socket that the daemons send to."""

    def __init__(self, name):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind("\0" + name[1:] if name.startswith("@") else name)
        self.name = name
        self.heard = []

    def listen(self):
        self.socket.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                self.heard.append(self.socket.recv(4096).decode())

    def count(self, word):
        self.listen()
        return sum(word in message.splitlines() for message in self.heard)

    def close(self):
        self.socket.close()


class NotifyTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory(prefix="lockstep-notify-test.")
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)

    def manager(self, name):
        manager = Manager(name)
        self.addCleanup(manager.close)
        return manager

    def start(self, manager, watchdog_seconds, program, *words):
        """Run as systemd would: WATCHDOG_PID is the process itself."""
        log = self.folder / f"{program}.{len(list(self.folder.iterdir()))}.log"
        run = (f'NOTIFY_SOCKET="{manager.name}" WATCHDOG_USEC={int(watchdog_seconds * 1e6)} '
               'WATCHDOG_PID=$$ exec "$@"')
        with open(log, "wb") as out:
            process = subprocess.Popen(
                ["sh", "-c", run, "sh", harness.BIN / program, *map(str, words)], stdout=out,
                stderr=out, env={**os.environ})
        self.addCleanup(lambda: process.poll() is None and (process.kill(), process.wait()))
        return process, log

    def serve_flags(self):
        return ("--model", harness.DEMO_MODEL, "--tensor-parallel-size", 2, "--cpu-threads", 1,
                "--http-port", 0, "--grpc-port", 0)

    def test_serve_says_ready_once_it_is_beats_and_says_stopping(self):
        manager = self.manager(f"@lockstep-notify-test.{os.getpid()}")
        ports = self.folder / "ports.json"
        process, log = self.start(manager, 0.3, "lockstep", "serve", "--port-file", ports,
                                  *self.serve_flags())
        harness.wait_for("READY", lambda: manager.count("READY=1"), process, 60, log)
        self.assertTrue(ports.exists(), "said before it was so")
        before = manager.count("WATCHDOG=1")
        harness.wait_for("beats", lambda: manager.count("WATCHDOG=1") > before + 5, process)
        # A child that dies and comes back is no second start, and its own word is not heard.
        worker = subprocess.run(["pgrep", "-P", str(process.pid), "lockstep-worker"],
                                capture_output=True, text=True, check=True).stdout.split()[0]
        os.kill(int(worker), signal.SIGKILL)
        harness.wait_for("the worker's return", lambda: re.search(
            r"starting it again", log.read_text()), process)
        self.assertEqual(manager.count("STOPPING=1"), 0)
        self.assertEqual(harness.stop(process), 0)
        self.assertEqual((manager.count("READY=1"), manager.count("STOPPING=1")), (1, 1))
        stopping = next(i for i, m in enumerate(manager.heard) if "STOPPING=1" in m)
        ready = next(i for i, m in enumerate(manager.heard) if "READY=1" in m)
        self.assertLess(ready, stopping)

    def test_the_daemons_each_for_themselves(self):
        coordinator_side = self.manager(str(self.folder / "coordinator.socket"))
        worker_side = self.manager(str(self.folder / "worker.socket"))
        address = f"unix:{self.folder}/plane"
        # The worker first: it waits, and is not ready while nobody is there.
        worker, worker_log = self.start(worker_side, 0.3, "lockstep-worker", "--coordinator",
                                        address)
        harness.wait_for("a status", lambda: worker_side.count(
            f"STATUS=waiting for the coordinator at {address}"), worker, 30, worker_log)
        harness.wait_for("beats", lambda: worker_side.count("WATCHDOG=1") > 2, worker)
        self.assertEqual(worker_side.count("READY=1"), 0)
        flags = [str(flag) for flag in self.serve_flags()]
        flags[flags.index("--tensor-parallel-size") + 1] = "1"
        coordinator, log = self.start(coordinator_side, 0.3, "lockstep-coordinator",
                                      "--worker-address", address, *flags)
        harness.wait_for("both ready", lambda: coordinator_side.count("READY=1") and
                         worker_side.count("READY=1"), coordinator, 60, log)
        harness.wait_for("the coordinator's beats",
                         lambda: coordinator_side.count("WATCHDOG=1") > 2, coordinator, 30, log)
        self.assertEqual(harness.stop(coordinator), 0)
        harness.stop(worker)
        for side in (coordinator_side, worker_side):
            self.assertEqual((side.count("READY=1"), side.count("STOPPING=1")), (1, 1))

    def test_a_stopped_daemon_beats_no_more(self):
        """Which is what the watchdog is for."""
        manager = self.manager(str(self.folder / "socket"))
        process, log = self.start(manager, 0.1, "lockstep-worker", "--coordinator",
                                  f"unix:{self.folder}/nobody")
        harness.wait_for("beats", lambda: manager.count("WATCHDOG=1") > 2, process, 30, log)
        process.send_signal(signal.SIGSTOP)
        harness.wait_for("the stop", lambda: re.search(r"State:\s+T", pathlib.Path(
            f"/proc/{process.pid}/status").read_text()))
        before = manager.count("WATCHDOG=1")
        several_beats = 0.3
        self.assertEqual(select.select([manager.socket], [], [], several_beats)[0], [])
        process.send_signal(signal.SIGCONT)
        harness.wait_for("beats again", lambda: manager.count("WATCHDOG=1") > before, process)
        harness.stop(process)


if __name__ == "__main__":
    unittest.main()
