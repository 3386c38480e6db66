#!/usr/bin/env python3
"""A server that the chart asks client certificates of, probed as the kubelet probes it: with the
chart's own flags and probes, and no certificate to show."""

import http.client
import pathlib
import socket
import ssl
import subprocess
import tempfile
import unittest

import chart
import harness


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answering_container(value_set):
    """The container with the doors: the one that has probes."""
    found = []

    def walk(node):
        if isinstance(node, dict):
            if "readinessProbe" in node:
                found.append(node)
            node = list(node.values())
        if isinstance(node, list):
            for each in node:
                walk(each)

    walk(chart.committed(value_set))
    assert len(found) == 1, found
    return found[0]


class ProbesTest(unittest.TestCase):
    def setUp(self):
        if not harness.find_tool("openssl", "probes of a server that asks for certificates"):
            self.certificates = None
            return
        folder = tempfile.TemporaryDirectory(prefix="lockstep-probes-test.")
        self.addCleanup(folder.cleanup)
        self.certificates = pathlib.Path(folder.name)
        self.openssl("ca", "-addext", "basicConstraints=critical,CA:TRUE")
        for name in ("tls", "client"):
            self.openssl(name, "-CA", "ca.crt", "-CAkey", "ca.key",
                         "-addext", "subjectAltName=IP:127.0.0.1")

    def openssl(self, name, *more):
        subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt",
                        "ec_paramgen_curve:P-256", "-nodes", "-days", "1", "-subj", f"/CN={name}",
                        "-keyout", f"{name}.key", "-out", f"{name}.crt", *more],
                       cwd=self.certificates, check=True, capture_output=True)

    def status_with_certificate(self, port, name):
        """Of a question at the TLS door; None where it is not answered."""
        context = ssl.create_default_context(cafile=self.certificates / "ca.crt")
        if name:
            context.load_cert_chain(self.certificates / f"{name}.crt",
                                    self.certificates / f"{name}.key")
        connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=30, context=context)
        try:
            connection.request("GET", "/v1/models")
            return connection.getresponse().status
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()

    def test_the_kubelet_needs_no_certificate_and_everybody_else_does(self):
        if self.certificates is None:
            return
        container = answering_container("multinode")
        declared = {port["name"]: port["containerPort"] for port in container["ports"]}
        here = {declared["health"]: free_port()}
        flags = []
        for word in container["args"]:
            name, _, value = word.partition("=")
            if name == "--health-port":
                flags += [name, here[int(value)]]
            elif name.startswith("--ssl-"):
                flags += [name, self.certificates / pathlib.Path(value).name]
        self.assertEqual(len(flags), 8, flags)

        def probe(kind):
            asked = container[f"{kind}Probe"]["httpGet"]
            self.assertEqual(asked.get("scheme", "HTTP"), "HTTP")
            port = here[declared[asked["port"]]]
            return harness.request(port, "GET", asked["path"])[0]

        with harness.served(*flags, tensor_parallel_size=1) as http_port:
            self.assertEqual([probe(kind) for kind in ("startup", "liveness", "readiness")],
                             [200, 200, 200])
            self.assertEqual(self.status_with_certificate(http_port, "client"), 200)
            self.assertIsNone(self.status_with_certificate(http_port, None))
            port = next(iter(here.values()))
            self.assertEqual(harness.request(port, "GET", "/v1/models")[0], 404)
            self.assertEqual(harness.request(port, "POST", "/v1/completions", {"prompt": "x"})[0],
                             404)


if __name__ == "__main__":
    unittest.main()
