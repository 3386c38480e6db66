#!/usr/bin/env python3
"""The images as a container engine builds and runs them, all but their compilation.

The Containerfile's first stage installs a toolchain from the network. Its product, the
collected roots, is made here from the built programs; the other stages are built as
they stand, by buildah, which needs no daemon.
"""

import json
import os
import pathlib
import signal
import subprocess
import tempfile
import unittest

import harness
import image_test

CONTAINERFILE = image_test.CONTAINER / "Containerfile"
IMAGES = {  # what the first stage collects for each
    "lockstep-coordinator": ["lockstep-coordinator"],
    "lockstep-worker": ["lockstep-worker"],
    "lockstep": [path.name for path in harness.installed()],
}


class ContainerTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.program = harness.find_tool("buildah", "the images as a container engine builds them "
                                        "(Debian: apt-get install buildah crun)")
        if cls.program is None:
            return
        # A mount within it may outlive a build that is cut short: not a TemporaryDirectory.
        cls.folder = pathlib.Path(tempfile.mkdtemp(prefix="lockstep-container-test."))
        cls.addClassCleanup(lambda: subprocess.run(["rm", "-rf", "--one-file-system",
                                                    cls.folder]))
        cls.addClassCleanup(lambda: cls.buildah("rm", "--all"))
        context = cls.folder / "context"
        for image, files in IMAGES.items():
            root = context / f"root-{image.removeprefix('lockstep-')}"
            done = image_test.collect(root, *(harness.BIN / file for file in files))
            assert done.returncode == 0, done.stderr
        text = CONTAINERFILE.read_text()
        after_the_build = text[text.index("FROM scratch AS runtime"):]
        (cls.folder / "Containerfile").write_text(
            f"FROM scratch AS build\nCOPY . /\n{after_the_build}")
        for image in IMAGES:
            done = cls.buildah("bud", "--isolation", "chroot", "--target", image, "--tag", image,
                               "--file", cls.folder / "Containerfile", context)
            assert done.returncode == 0, done.stdout + done.stderr

    @classmethod
    def command(cls, *words):
        return [cls.program, "--storage-driver", "vfs", "--root", cls.folder / "store",
                "--runroot", cls.folder / "run", *words]

    @classmethod
    def buildah(cls, *words):
        return subprocess.run(cls.command(*words), capture_output=True, text=True, timeout=120)

    def container(self, image):
        done = self.buildah("from", "--pull-never", image)
        self.assertEqual(done.returncode, 0, done.stderr)
        return done.stdout.strip()

    def run_in(self, container, *words, mounts=()):
        return self.command("run", "--isolation", "chroot", *mounts, container, "--", *words)

    def test_each_image_starts_its_program_as_nobody(self):
        if self.program is None:
            return
        for image in IMAGES:
            config = json.loads(self.buildah("inspect", "--type", "image", image).stdout)[
                "OCIv1"]["config"]
            self.assertEqual(config["User"], image_test.NOBODY, image)
            self.assertEqual(config["Entrypoint"], [image])
            self.assertEqual(config["StopSignal"], "SIGTERM", image)
            said = subprocess.run(self.run_in(self.container(image), image, "--version"),
                                  capture_output=True, text=True, timeout=60)
            self.assertRegex(said.stdout, rf"^{image} \d+\.\d+", said.stderr)

    def test_no_image_has_a_shell(self):
        if self.program is None:
            return
        for image in IMAGES:
            done = subprocess.run(self.run_in(self.container(image), "/bin/sh", "-c", ":"),
                                  capture_output=True, text=True, timeout=60)
            self.assertNotEqual(done.returncode, 0)
            self.assertRegex(done.stderr, "no such file|not found")

    def test_the_image_serves(self):
        if self.program is None:
            return
        container = self.container("lockstep")
        port = image_test.free_port()
        log = self.folder / "serve.log"
        with open(log, "wb") as out:
            server = subprocess.Popen(self.run_in(
                container, "lockstep", "serve", "--model", "/models", "--served-model-name", "demo",
                "--tensor-parallel-size", "2", "--cpu-threads", "1", "--http-port", str(port),
                "--grpc-port", "0", mounts=("--volume", f"{harness.DEMO_MODEL}:/models:ro")),
                stdout=out, stderr=out)
        try:
            harness.wait_for("ready", lambda: harness.request(port, "GET", "/ready")[0] == 200,
                             server, 60, log)
            status, text = harness.request(port, "POST", "/v1/completions", {
                "model": "demo", "prompt": "A rope", "max_tokens": 4})
            self.assertEqual(status, 200, text)
        finally:
            # The engine hands no signal on to what it runs.
            inside = [pid for pid in self.descendants(server.pid)
                      if pathlib.Path(f"/proc/{pid}/comm").read_text() == "lockstep\n"]
            for pid in inside:
                os.kill(pid, signal.SIGTERM)
            code = server.wait(30) if inside else harness.stop(server)
        self.assertEqual(code, 0, log.read_text())

    @staticmethod
    def descendants(pid):
        """All processes under `pid`, deepest first."""
        found = []
        for child in subprocess.run(["pgrep", "-P", str(pid)], capture_output=True,
                                    text=True).stdout.split():
            found += [*ContainerTest.descendants(int(child)), int(child)]
        return found


if __name__ == "__main__":
    unittest.main()
