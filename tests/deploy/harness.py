"""What the deployment tests share: the tree, the built programs, a live server."""

import contextlib
import http.client
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
BIN = pathlib.Path(os.environ.get("LOCKSTEP_BIN", ROOT / "build/dev/bin")).absolute()
# What deploy/setup --kube builds: helm, kubeconform, etcd, kube-apiserver.
KUBE_BIN = os.environ.get("LOCKSTEP_KUBE_BIN", str(ROOT / "build/kube/bin"))
DEMO_MODEL = ROOT / "deploy/demo/model"
PROGRAMS = ("lockstep", "lockstep-coordinator", "lockstep-worker")


def installed():
    """The files that a host or an image gets: a static build has a plug-in beside the programs."""
    plugin = BIN / "liblockstep-gloo.so"
    return [BIN / program for program in PROGRAMS] + ([plugin] if plugin.exists() else [])


def find_tool(name, what_is_lost, *more_folders):
    """A program's path. None, said loudly, where there is none."""
    found = shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *more_folders]))
    if found is None:
        print(f"\n*** NOT CHECKED: no {name} on this machine: {what_is_lost}\n", file=sys.stderr,
              flush=True)
    return found


def wait_for(what, done, process=None, seconds=30, log=None):
    """Polls `done` until it returns something true, and returns that."""
    deadline = time.monotonic() + seconds
    while True:
        result = done()
        if result:
            return result
        ended = process is not None and process.poll() is not None
        if ended or time.monotonic() > deadline:
            said = pathlib.Path(log).read_text(errors="replace")[-2000:] if log else ""
            how = f"exited {process.returncode}" if ended else f"not within {seconds} s"
            raise AssertionError(f"{what}: {how}\n{said}")
        time.sleep(0.02)


def request(port, method, path, body=None):
    """(status, text) of an HTTP request to loopback; (None, reason) without an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        headers = {"Content-Type": "application/json"} if body is not None else {}
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    except OSError as error:
        return None, str(error)
    finally:
        connection.close()


def stop(process, seconds=20):
    """SIGTERM, then SIGKILL; the exit code."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise AssertionError(f"{process.args[0]} did not end within {seconds} s of SIGTERM")


@contextlib.contextmanager
def served(*flags, tensor_parallel_size=2):
    """A `lockstep serve` of the demo model that answers; yields its HTTP port."""
    with tempfile.TemporaryDirectory(prefix="lockstep-deploy-test.") as folder:
        ports, log = pathlib.Path(folder, "ports.json"), pathlib.Path(folder, "log")
        command = [BIN / "lockstep", "serve", "--model", DEMO_MODEL, "--served-model-name", "demo",
                   "--tensor-parallel-size", str(tensor_parallel_size), "--cpu-threads", "1",
                   "--http-port", "0", "--grpc-port", "0", "--port-file", ports, *flags]
        with open(log, "wb") as out:
            server = subprocess.Popen([str(word) for word in command], stdout=out, stderr=out)
        try:
            wait_for("lockstep serve", ports.exists, server, 60, log)
            yield json.loads(ports.read_text())["http_port"]
        finally:
            stop(server)


def known_flags(program, *words):
    """The long flags of a program's --help."""
    text = subprocess.run([BIN / program, *words, "--help"], capture_output=True, text=True,
                          check=True).stdout
    return {word.strip(",").split("=")[0].split("{")[0]
            for part in text.split() for word in part.split(",") if word.startswith("--")}
