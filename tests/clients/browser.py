"""A browser without a window, driven over its own pipe: pages, what they draw, what they ask for."""

import json
import os
import select
import shutil
import subprocess
import tempfile
import time

import harness

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-extensions",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
)  # fmt: skip


class Browser:
    """One page. `asked` are the addresses that it asked for, `complaints` what it had to say of
    errors, in order."""

    def __init__(self, seconds=60):
        program = next(filter(None, map(shutil.which, PROGRAMS)), None) or harness.skip("Chromium")
        self.until = time.monotonic() + seconds
        self.profile = tempfile.mkdtemp(prefix="lockstep-browser-")
        # The protocol is fixed: the browser reads commands from 3 and writes answers to 4.
        commands, self.commands = os.pipe()
        self.answers, answers = os.pipe()
        script = f'exec 3<&{commands} 4>&{answers} && exec "$@"'
        self.process = subprocess.Popen(
            ["bash", "-c", script, "browser", program, *QUIET, "--remote-debugging-pipe",
             f"--user-data-dir={self.profile}", "about:blank"],
            pass_fds=(commands, answers), stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(commands)
        os.close(answers)
        self.session, self.number, self.unread = None, 0, b""
        self.asked, self.complaints, self.events = [], [], []

    def __enter__(self):
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_):
        os.close(self.commands)
        os.close(self.answers)
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.profile, ignore_errors=True)

    def _message(self):
        while b"\0" not in self.unread:
            patience = max(0, self.until - time.monotonic())
            assert select.select([self.answers], [], [], patience)[0], "the browser does not answer"
            more = os.read(self.answers, 1 << 20)
            assert more, f"the browser ended with {self.process.poll()}"
            self.unread += more
        line, self.unread = self.unread.split(b"\0", 1)
        return json.loads(line)

    def _note(self, message):
        method, said = message.get("method"), message.get("params", {})
        self.events.append(method)
        if method == "Network.requestWillBeSent":
            self.asked.append(said["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(said["exceptionDetails"]["text"])
        elif method == "Log.entryAdded":
            self.complaints.append(said["entry"]["text"])
        elif method == "Runtime.consoleAPICalled":
            self.complaints.append(json.dumps(said["args"]))

    def call(self, method, **params):
        self.number += 1
        command = {"id": self.number, "method": method, "params": params}
        if self.session:
            command["sessionId"] = self.session
        os.write(self.commands, json.dumps(command).encode() + b"\0")
        while (message := self._message()).get("id") != self.number:
            self._note(message)
        assert "error" not in message, (method, message["error"])
        return message["result"]

    def open(self, url):
        self.events.clear()
        self.call("Page.navigate", url=url)
        while "Page.loadEventFired" not in self.events:
            self._note(self._message())

    def shape(self, width, scheme="light"):
        self.call("Emulation.setDeviceMetricsOverride",
                  width=width, height=900, deviceScaleFactor=1, mobile=False)  # fmt: skip
        self.call("Emulation.setEmulatedMedia",
                  features=[{"name": "prefers-color-scheme", "value": scheme}])  # fmt: skip

    def value(self, script):
        """What a function body returns in the page, as JSON."""
        done = self.call("Runtime.evaluate", expression=f"(() => {{ {script} }})()", returnByValue=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")
