#!/usr/bin/env python3
"""Images, compose file and systemd units: what they start runs, shut in as they say."""

import pathlib
import re
import shlex
import socket
import subprocess
import tempfile
import unittest

import yaml

import harness

CONTAINER = harness.ROOT / "deploy/container"
UNITS = sorted((harness.ROOT / "deploy/systemd").glob("*.service"))
NOBODY = "65532:65532"


def collect(root, *files):
    return subprocess.run([CONTAINER / "collect", root, *files], capture_output=True, text=True)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def shut_in(root):
    """Makes of a command what runs it as a container would: in the root, read-only, as nobody.

    None, said loudly, where this user may not.
    """
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode != 0:
        print("\n*** NOT CHECKED: no mount namespaces for this user: programs in a root of their "
              "own (run as root)\n", flush=True)
        return None
    at = shlex.quote(str(root))
    return lambda command: ["unshare", "-m", "sh", "-ec", (
        f"mount --bind {at} {at}; mount --bind {harness.DEMO_MODEL} {at}/models; "
        f"mount -t tmpfs -o mode=1777 tmpfs {at}/tmp; mount -t proc proc {at}/proc; "
        f"mount --rbind /dev {at}/dev; mount -o remount,bind,ro {at}; "
        f"exec chroot --userspec={NOBODY} {at} {command}")]


class RootTest(unittest.TestCase):
    """The root that an image is made of, without a container engine."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory(prefix="lockstep-image-test.")
        self.addCleanup(folder.cleanup)
        self.root = pathlib.Path(folder.name)
        self.root.chmod(0o755)

    environment = {"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "HOME": "/tmp"}

    def test_serves_from_a_read_only_root_as_nobody(self):
        done = collect(self.root, *harness.installed())
        self.assertEqual(done.returncode, 0, done.stderr)
        inside = shut_in(self.root)
        if inside is None:
            return
        port = free_port()
        serve = inside(
            f"/usr/local/bin/lockstep serve --model /models --served-model-name demo "
            f"--tensor-parallel-size 2 --cpu-threads 1 --http-port {port} --grpc-port 0")
        log = self.root / "log"
        with open(log, "wb") as out:
            server = subprocess.Popen(serve, stdout=out, stderr=out, env=self.environment)
        try:
            harness.wait_for("ready", lambda: harness.request(port, "GET", "/ready")[0] == 200,
                             server, 60, log)
            status, text = harness.request(port, "POST", "/v1/completions", {
                "model": "demo", "prompt": "A rope", "max_tokens": 4})
            self.assertEqual(status, 200, text)
            owner = re.search(r"^Uid:\s+(\d+)", pathlib.Path(
                f"/proc/{server.pid}/status").read_text(), re.MULTILINE)
            self.assertEqual(owner.group(1), NOBODY.split(":")[0])
        finally:
            code = harness.stop(server)
        self.assertEqual(code, 0, log.read_text())

    def test_holds_nothing_that_was_not_asked_for(self):
        self.assertEqual(collect(self.root, harness.BIN / "lockstep-worker").returncode, 0)
        programs = [path for folder in ("usr/bin", "usr/local/bin")
                    for path in (self.root / folder).iterdir()]
        self.assertEqual([path.name for path in programs], ["lockstep-worker"])

    def test_a_worker_group_needs_nothing_else(self):
        done = collect(self.root, *harness.installed())
        self.assertEqual(done.returncode, 0, done.stderr)
        inside = shut_in(self.root)
        if inside is None:
            return
        ran = subprocess.run(inside(
            "/usr/local/bin/lockstep worker-group --count 1 -- --backend none"),
            capture_output=True, text=True, env=self.environment, timeout=60)
        self.assertEqual(ran.returncode, 2, ran.stderr)
        self.assertIn("--backend none", ran.stderr)

    def test_a_missing_file_is_named(self):
        done = collect(self.root, "/no/such/program")
        self.assertEqual(done.returncode, 1)
        self.assertIn("/no/such/program", done.stderr)


class ContainerfileTest(unittest.TestCase):
    text = (CONTAINER / "Containerfile").read_text()

    def test_every_image_starts_from_nothing_as_nobody(self):
        parents = dict((name, parent) for parent, name in re.findall(
            r"^FROM (\S+) AS (\S+)$", self.text, re.MULTILINE))
        self.assertEqual(parents["runtime"], "scratch")
        for image in ("lockstep", "lockstep-coordinator", "lockstep-worker"):
            self.assertEqual(parents[image], "runtime")
        runtime = self.text.split("AS runtime")[1].split("FROM")[0]
        self.assertIn(f"USER {NOBODY}", runtime)
        self.assertEqual(self.text.count("USER "), 1)

    def test_what_it_copies_and_builds_exists(self):
        for line in re.findall(r"^COPY (deploy.*) \S+$", self.text, re.MULTILINE):
            for path in line.split():
                self.assertTrue((harness.ROOT / path).exists(), path)
        lists = "".join((harness.ROOT / folder / "CMakeLists.txt").read_text()
                        for folder in ("cli", "coordinator", "worker"))
        for target in re.findall(r"lockstep_(\w+)(?= |$)", self.text.split("build release")[1]
                                 .split("\n# ")[0], re.MULTILINE):
            self.assertRegex(lists, rf"NAME {target}\b")

    def test_libraries_opened_by_name_are_carried(self):
        opened = set()
        for path in (harness.ROOT / "worker").rglob("*.cc"):
            opened |= set(re.findall(r'dlopen\("(lib[\w-]+\.so[.\d]*)"', path.read_text()))
        driver = {"libnvidia-ml.so.1", "libcuda.so.1"}  # the host's, mounted by the runtime
        for library in opened - driver:
            self.assertIn(library, self.text)


class ComposeTest(unittest.TestCase):
    services = yaml.safe_load((harness.ROOT / "deploy/compose/compose.yaml").read_text())["services"]
    tls = yaml.safe_load((harness.ROOT / "deploy/compose/tls.yaml").read_text())["services"]["lockstep"]

    def test_flags_exist(self):
        command = self.services["lockstep"]["command"]
        self.assertEqual(command[0], "serve")
        known = harness.known_flags("lockstep", "serve")
        for word in command[1:]:
            self.assertIn(word.split("=")[0], known)

    def test_variables_are_flags(self):
        known = harness.known_flags("lockstep", "serve")
        for word in self.services["lockstep"]["environment"] + self.tls["environment"]:
            name = word.split("=")[0].removeprefix("LOCKSTEP_")
            self.assertIn("--" + name.lower().replace("_", "-"), known)

    def test_with_tls_every_secret_is_in_the_folder_that_is_mounted(self):
        (mount,) = self.tls["volumes"]
        self.assertIs(mount["read_only"], True)
        for word in self.tls["environment"]:
            if "=" in word:
                self.assertTrue(word.split("=")[1].startswith(mount["target"] + "/"), word)

    def test_services_are_shut_in(self):
        for name, service in self.services.items():
            self.assertIs(service["read_only"], True, name)
            self.assertEqual(service["cap_drop"], ["ALL"], name)
            self.assertIn("no-new-privileges:true", service["security_opt"], name)
            for port in service["ports"]:
                self.assertTrue(port.startswith("127.0.0.1:"), f"{name}: {port}")
        self.assertEqual(self.services["lockstep"]["user"], NOBODY)

    def test_stopping_leaves_time_to_drain(self):
        service = self.services["lockstep"]
        drain = [word for word in service["command"] if word.startswith("--drain-timeout=")][0]
        self.assertEqual(int(service["stop_grace_period"].removesuffix("s")),
                         int(drain.split("=")[1]) + 10)


class UnitTest(unittest.TestCase):
    def settings(self, unit):
        pairs = [line.split("=", 1) for line in unit.read_text().splitlines()
                 if "=" in line and not line.startswith("#")]
        return {key: [value for other, value in pairs if other == key] for key, _ in pairs}

    def test_flags_exist(self):
        for unit in UNITS:
            words = self.settings(unit)["ExecStart"][0].split()
            program = [pathlib.Path(words[0]).name] + [w for w in words[1:2] if w == "serve"]
            known = harness.known_flags(*program)
            for word in words:
                if word.startswith("--"):
                    self.assertIn(word, known, unit.name)

    def test_they_drop_what_they_do_not_need(self):
        for unit in UNITS:
            settings = self.settings(unit)
            for key, value in (("DynamicUser", "yes"), ("NoNewPrivileges", "yes"),
                               ("CapabilityBoundingSet", ""), ("ProtectSystem", "strict"),
                               ("ProtectHome", "yes"), ("PrivateTmp", "yes"),
                               ("RestrictNamespaces", "yes"), ("LockPersonality", "yes"),
                               ("SystemCallFilter", "@system-service")):
                self.assertEqual(settings.get(key), [value], f"{unit.name}: {key}")

    def test_systemd_waits_for_their_word_and_not_for_each_other(self):
        for unit in UNITS:
            settings = self.settings(unit)
            self.assertEqual(settings["Type"], ["notify"], unit.name)
            self.assertGreaterEqual(int(settings["WatchdogSec"][0]), 10, unit.name)
            self.assertIn(settings["TimeoutStartSec"][0], ("30min", "infinity"), unit.name)
            # The coordinator is ready once its workers are: either after the other is never.
            for order in settings["After"]:
                self.assertNotIn("lockstep", order, unit.name)

    def test_the_workers_settings_are_variables_it_reads(self):
        done = subprocess.run(
            [harness.BIN / "lockstep-worker", "--print-config"], capture_output=True, text=True,
            env={"LOCKSTEP_COORDINATOR": "head:50052", "LOCKSTEP_INSECURE": "true",
                 "LOCKSTEP_WORKER_SSL_CERTFILE": "/c.pem", "LOCKSTEP_WORKER_SSL_KEYFILE": "/k.pem",
                 "LOCKSTEP_WORKER_SSL_CA_CERTS": "/ca.pem"})
        for line in ("coordinator = head:50052", "insecure = true", "worker-ssl-certfile = /c.pem",
                     "worker-ssl-keyfile = /k.pem", "worker-ssl-ca-certs = /ca.pem"):
            self.assertIn(line, done.stdout, done.stderr)

    def test_systemd_accepts_them(self):
        program = harness.find_tool("systemd-analyze", "the units as systemd reads them")
        if program is None:
            return
        with tempfile.TemporaryDirectory(prefix="lockstep-units.") as folder:
            copies = []
            for unit in UNITS:
                copy = pathlib.Path(folder, unit.name)
                copy.write_text(unit.read_text().replace("/usr/local/bin", str(harness.BIN)))
                copies.append(copy)
            done = subprocess.run([program, "verify", "--man=no", *copies], capture_output=True,
                                  text=True)
            ours = [line for line in done.stderr.splitlines() if folder in line or
                    re.search(r"lockstep[\w@-]*\.service", line)]
            self.assertEqual(ours, [])
            for copy in copies:
                rated = subprocess.run([program, "security", "--offline=yes", "--threshold=25",
                                        "--no-pager", copy], capture_output=True, text=True)
                self.assertEqual(rated.returncode, 0, (rated.stdout + rated.stderr)[-400:])


if __name__ == "__main__":
    unittest.main()
