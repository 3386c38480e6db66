"""What the tests of real clients share: the server under test, and the clients' folder.

Every test here runs as `python3 X_test.py BUILD_DIR`, starts the real programs of that build on
loopback, with ports of the kernel's choosing, and is gone with them. A client that is not installed
ends its test with exit code 77 and a line that says so; `deploy/setup --clients` installs them all.
"""

import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[2]
DEMO = SOURCE / "deploy" / "demo" / "model"
SKIPPED = 77
START_SECONDS = 60  # a busy machine's; an idle one needs two
KEY = "sk-of-this-test"


def build_folder():
    """The build whose programs are tested: the first argument."""
    if len(sys.argv) < 2 or not Path(sys.argv[1]).is_dir():
        sys.exit(f"usage: {Path(sys.argv[0]).name} BUILD_DIR, such as build/dev")
    return Path(sys.argv[1]).resolve()


def installs():
    """Where `deploy/setup --clients` puts clients."""
    return Path(os.environ.get("LOCKSTEP_CLIENTS", SOURCE / "build" / "clients"))


def skip(what):
    """Ends the test loudly: its client is not here."""
    print(f"SKIPPED {Path(sys.argv[0]).stem}: no {what}; `deploy/setup --clients` installs it")
    sys.exit(SKIPPED)


def need_python(*modules):
    """Goes on in the Python that has these modules: this one, or the installed environment."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if not missing:
        return
    python = installs() / "python" / "bin" / "python"
    if python.exists() and Path(sys.prefix) != (installs() / "python"):
        # Compiled once, large packages are imported in half the time.
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        os.execv(python, [str(python), *sys.argv])
    skip(f"Python package {missing[0]}")


def need_program(name):
    """A client that is a program of its own."""
    path = installs() / "bin" / name
    found = str(path) if path.exists() else shutil.which(name)
    return found or skip(f"program {name}")


def key_file(folder, key=KEY):
    """A file of API keys that knows this one."""
    path = Path(folder) / "keys"
    path.write_text(hashlib.sha256(key.encode()).hexdigest() + " test\n")
    return path


class Child:
    """A server process, ended with the `with` block, by force where asking does not help."""

    process = None
    asked = False

    def ask_to_end(self):
        """SIGTERM, once: a second one would cut short what it still serves."""
        if not self.asked and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        self.asked = True

    def stop(self):
        if self.process is None:
            return
        self.ask_to_end()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Server(Child):
    """`lockstep serve` as people start it; two workers and the demo model unless told otherwise."""

    def __init__(self, *flags, model=DEMO, workers=2, name=None):
        self.folder = Path(tempfile.mkdtemp(prefix="lockstep-client-"))
        self.log = self.folder / "serve.log"
        self.arguments = [
            build_folder() / "bin" / "lockstep", "serve",
            "--model", model, "--backend", "cpu", "--tensor-parallel-size", workers,
            "--served-model-name", name or "demo", "--cpu-threads", 1,
            "--http-port", 0, "--grpc-port", 0, "--port-file", self.folder / "ports.json",
            "--exit-with-parent", *flags,
        ]  # fmt: skip

    def __enter__(self):
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [str(argument) for argument in self.arguments],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log,
            )  # fmt: skip
        if self.process.stdout.readline() != b"ready\n":
            self.process.wait(timeout=START_SECONDS)
            sys.exit(f"serve did not start:\n{self.log.read_text()}")
        ports = json.loads((self.folder / "ports.json").read_text())
        self.http, self.grpc = ports["http_port"], ports["grpc_port"]
        self.url = f"http://127.0.0.1:{self.http}"
        self.target = f"127.0.0.1:{self.grpc}"
        return self

    def __exit__(self, kind, *rest):
        self.stop()
        if kind is not None:
            print(f"the server's log:\n{self.log.read_text()[-4000:]}", file=sys.stderr)
        shutil.rmtree(self.folder, ignore_errors=True)
        if kind is None and self.process.returncode != 0:
            raise AssertionError(f"serve ended with {self.process.returncode}")

    def get(self, path):
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return answer.read().decode()

    def metric(self, name, **labels):
        """The sum of a metric's samples that carry these labels."""
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        values = [
            float(line.rsplit(" ", 1)[1])
            for line in self.get("/metrics").splitlines()
            if line.split("{")[0].split(" ")[0] == name and all(w in line for w in wanted)
        ]
        assert values, f"/metrics has no {name} with {labels}"
        return sum(values)

    def becomes_idle(self):
        """Whether no request runs or waits any more, and no block is held, within a while."""

        def idle():
            active = self.metric("lockstep_kv_blocks", state="active")
            return self.metric("lockstep_requests") + active == 0

        return eventually(idle)


class ScriptedServer(Child):
    """Both doors over answers that the prompt itself dictates: ANSWER: ... :END."""

    def __init__(self, *flags):
        self.arguments = [str(build_folder() / "tests" / "scripted_server"), *map(str, flags)]

    def __enter__(self):
        self.process = subprocess.Popen(
            self.arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.http, self.grpc = map(int, self.process.stdout.readline().split())
        self.url = f"http://127.0.0.1:{self.http}"
        self.target = f"127.0.0.1:{self.grpc}"
        return self

    def __exit__(self, *_):
        self.process.stdin.close()  # it ends with its standard input
        try:
            self.process.wait(timeout=30)
        finally:
            self.stop()


def eventually(condition, seconds=20):
    """Whether the condition comes true within this time."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def raises(kind, call, *arguments, **named):
    """The exception of this kind that the call ends with."""
    try:
        call(*arguments, **named)
    except kind as error:
        return error
    raise AssertionError(f"not refused: {arguments} {named}")


def run(program, *arguments, seconds=120, **named):
    """A client's own program; its standard output. Its exit code must be 0."""
    command = [str(part) for part in (program, *arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, **named)
    if done.returncode != 0:
        raise AssertionError(
            f"{' '.join(command)} ended with {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        )
    return done.stdout
