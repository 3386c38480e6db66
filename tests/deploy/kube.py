"""A kube-apiserver and its etcd on loopback, for as long as a test needs them.

Nothing else of a cluster is there: what is put is validated, defaulted and stored,
and no controller acts on it.
"""

import http.client
import json
import pathlib
import secrets
import socket
import ssl
import subprocess
import tempfile

import harness

STRICT = "fieldValidation=Strict"


def programs():
    """Paths of etcd and kube-apiserver; None, said loudly, where one is missing."""
    lost = "the chart as a Kubernetes API server sees it (deploy/setup --kube builds one)"
    found = [harness.find_tool(name, lost, harness.KUBE_BIN) for name in ("etcd", "kube-apiserver")]
    return None if None in found else found


def free_ports(count):
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


class Answer:
    def __init__(self, status, body, warnings):
        self.status, self.body, self.warnings = status, body, warnings

    @property
    def message(self):
        return self.body.get("message", "") if isinstance(self.body, dict) else str(self.body)


class Cluster:
    """Use as a context: starts both programs, ends both."""

    def __init__(self, etcd, apiserver):
        self._programs = etcd, apiserver
        self._processes = []
        self._plurals = {}

    def __enter__(self):
        self._folder = tempfile.TemporaryDirectory(prefix="lockstep-kube-test.")
        try:
            self._start(pathlib.Path(self._folder.name))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for process in reversed(self._processes):
            process.kill()  # nothing of it is kept
            process.wait()
        self._folder.cleanup()

    def _run(self, folder, name, *command):
        log = folder / f"{name}.log"
        with open(log, "wb") as out:
            process = subprocess.Popen([str(word) for word in command], stdout=out, stderr=out,
                                       cwd=folder)
        self._processes.append(process)
        return process, log

    def _start(self, folder):
        client, peer, self._port = free_ports(3)
        etcd = f"http://127.0.0.1:{client}"
        peers = f"http://127.0.0.1:{peer}"
        self._run(folder, "etcd", self._programs[0], "--data-dir", folder / "etcd",
                  "--listen-client-urls", etcd, "--advertise-client-urls", etcd,
                  "--listen-peer-urls", peers, "--initial-advertise-peer-urls", peers,
                  "--initial-cluster", f"default={peers}", "--unsafe-no-fsync")
        key = folder / "service-account.key"
        subprocess.run(["openssl", "genrsa", "-out", key, "2048"], check=True,
                       capture_output=True)
        self._token = secrets.token_hex(16)
        (folder / "tokens.csv").write_text(f"{self._token},admin,admin,system:masters\n")
        process, log = self._run(
            folder, "kube-apiserver", self._programs[1], f"--etcd-servers={etcd}",
            "--bind-address=127.0.0.1", "--advertise-address=127.0.0.1",
            f"--secure-port={self._port}", f"--cert-dir={folder}/certificates",
            "--service-cluster-ip-range=10.0.0.0/24", "--endpoint-reconciler-type=none",
            "--service-account-issuer=https://localhost", f"--service-account-key-file={key}",
            f"--service-account-signing-key-file={key}", "--authorization-mode=RBAC",
            f"--token-auth-file={folder}/tokens.csv")
        self._trust = ssl.create_default_context()
        self._trust.check_hostname = False  # the certificate is for the machine's name
        certificate = folder / "certificates/apiserver.crt"

        def ready():
            if not certificate.exists():
                return False
            try:
                self._trust.load_verify_locations(certificate)
                return self.call("GET", "/readyz").status == 200
            except (OSError, ssl.SSLError, http.client.HTTPException):
                return False
        harness.wait_for("kube-apiserver", ready, process, 120, log)

    def call(self, method, path, body=None, kind="application/json"):
        connection = http.client.HTTPSConnection("127.0.0.1", self._port, timeout=60,
                                                 context=self._trust)
        try:
            headers = {"Authorization": f"Bearer {self._token}", "Content-Type": kind}
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            text = answer.read().decode()
            try:
                parsed = json.loads(text)
            except ValueError:
                parsed = text
            return Answer(answer.status, parsed, answer.headers.get_all("Warning") or [])
        finally:
            connection.close()

    def _collection(self, document, namespace):
        """The path that a kind's objects are created under, from the server's own list."""
        version, kind = document["apiVersion"], document["kind"]
        base = f"/apis/{version}" if "/" in version else f"/api/{version}"
        if (version, kind) not in self._plurals:
            for each in self.call("GET", base).body.get("resources", []):
                if "/" not in each["name"]:
                    self._plurals[version, each["kind"]] = each["name"], each["namespaced"]
        if (version, kind) not in self._plurals:
            raise AssertionError(f"the server knows no {version} {kind}")
        plural, namespaced = self._plurals[version, kind]
        return f"{base}/namespaces/{namespace}/{plural}" if namespaced else f"{base}/{plural}"

    def create(self, document, namespace="default"):
        """Puts an object as it is; what the server does not know is an error."""
        return self.call("POST", f"{self._collection(document, namespace)}?{STRICT}", document)

    def define(self, definition):
        """Installs a CustomResourceDefinition, and waits until it is served."""
        made = self.create(definition)
        if made.status != 201:
            raise AssertionError(f"{definition['metadata']['name']}: {made.message}")
        spec = definition["spec"]
        served = f"/apis/{spec['group']}/{spec['versions'][0]['name']}"
        path = f"{served}/{spec['names']['plural']}"
        harness.wait_for(path, lambda: self.call("GET", path).status == 200, self._processes[-1])
