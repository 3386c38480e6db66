#!/usr/bin/env python3
"""The Helm chart as helm and kubeconform see it, where they are installed.

What helm renders is what is committed, which chart_test checks.
"""

import json
import pathlib
import subprocess
import tempfile
import unittest

import yaml

import chart
import harness
from chart_test import SCHEMAS, EveryValueSet, of_kind, templates, validate


class HelmTest(EveryValueSet):
    def setUp(self):
        self.helm = harness.find_tool("helm", "the chart as helm itself sees it", harness.KUBE_BIN)

    def test_renders_what_is_committed(self):
        if self.helm:
            for value_set, documents in self.sets():
                self.assertEqual(chart.outline(chart.render(self.helm, value_set)), documents)

    def test_lints(self):
        if self.helm:
            for value_set, _ in self.sets():
                done = chart.helm(self.helm, "lint", "--strict", chart.CHART, "--values",
                                  chart.CHART / f"ci/{value_set}-values.yaml")
                self.assertEqual(done.returncode, 0, done.stdout + done.stderr)

    def test_carries_the_dashboards_and_rules_unchanged(self):
        if self.helm:
            documents = chart.render(self.helm, "host")
            carried = {name: text for document in of_kind(documents, "ConfigMap")
                       for name, text in document["data"].items()}
            for path in (harness.ROOT / "deploy/grafana").glob("*.json"):
                self.assertEqual(json.loads(carried.pop(path.name)), json.loads(path.read_text()))
            self.assertEqual(carried, {})
            rules = yaml.safe_load(
                (harness.ROOT / "deploy/prometheus/lockstep.rules.yaml").read_text())
            rule = of_kind(documents, "PrometheusRule")[0]
            self.assertEqual(rule["spec"]["groups"], rules["groups"])
            validate(rule)

    def test_words_that_yaml_would_read_as_something_else_stay_what_they_are(self):
        if not self.helm:
            return
        documents = chart.render(self.helm, "single", "--set-string", "model.servedName=a # b: c",
                                 "--set-string", "apiKeys.existingSecret=0123",
                                 "--set-string", "apiKeys.key=a #b",
                                 "--set-string", "persistence.existingClaim=1e5")
        for document in documents:
            validate(document)
        spec = dict(templates(documents))["Deployment/demo-lockstep"]["spec"]
        args = spec["containers"][0]["args"]
        self.assertIn("--served-model-name=a # b: c", args)
        self.assertIn("--api-key-file=/etc/lockstep/api-keys/a #b", args)
        for name in ("0123", "1e5"):
            self.assertIn(name, [volume.get("secret", {}).get("secretName") or volume.get(
                "persistentVolumeClaim", {}).get("claimName") for volume in spec["volumes"]])

    def test_a_long_name_leaves_room_for_what_is_added(self):
        if not self.helm:
            return
        for value_set, _ in self.sets():
            documents = chart.render(self.helm, value_set, "--set",
                                     f"fullnameOverride={'name-' * 12}")
            for document in documents:
                # Of a set of groups: its pods' revision is a label of 63 characters at most.
                most = {"LeaderWorkerSet": 49, "ConfigMap": 253}.get(document["kind"], 63)
                self.assertLessEqual(len(document["metadata"]["name"]), most, document["kind"])

    def test_refuses_what_cannot_work_and_says_why(self):
        if not self.helm:
            return
        for value_set, setting, said in (
                ("single", "nodes=2", "only multinode spreads"),
                ("multinode", "tensorParallelSize=15", "does not divide"),
                ("split", "privatePlane.allowPlaintext=false", "plain text"),
                ("split", "privatePlane.tls.workerSecret=only", "needed together"),
                ("split", "replicaCount=2", "one coordinator and one group"),
                ("single", "tls.clientCaSecret=only", "tls.existingSecret"),
                ("host", "tls.clientCaSecret=clients", "serviceMonitor.tlsConfig"),
                ("single", "fetch.enabled=true", "image and command"),
                ("cpu", "replicaCount=2", "ReadWriteMany"),
                ("single", "ingress.enabled=true", "ingress.hosts"),
                ("host", "serviceMonitor.enabled=false", "serviceMonitor.enabled"),
                ("single", "engine.maxNumSeq=2", "maxNumSeq"),
                ("single", "topology=host", "topology")):
            with self.assertRaises(RuntimeError, msg=setting) as raised:
                chart.render(self.helm, value_set, "--set", setting)
            self.assertIn(said, str(raised.exception))


class KubeconformTest(EveryValueSet):
    def test_finds_every_manifest_valid(self):
        program = harness.find_tool("kubeconform", "the manifests as kubeconform sees them",
                                    harness.KUBE_BIN)
        if program is None:
            return
        with tempfile.TemporaryDirectory(prefix="lockstep-kubeconform.") as folder:
            for full, schema in SCHEMAS["kinds"].items():
                kind = full.rsplit("/", 1)[1].lower()
                pathlib.Path(folder, f"{kind}.json").write_text(json.dumps(
                    {"allOf": [schema], "definitions": SCHEMAS["definitions"]}))
            where = f"{folder}/{{{{.ResourceKind}}}}.json"
            for value_set, documents in self.sets():
                done = self.run_on(program, where, documents)
                self.assertEqual(done["summary"], {
                    "valid": len(documents), "invalid": 0, "errors": 0, "skipped": 0}, done)
            documents[0]["spec"] = {"strange": 1}
            self.assertEqual(self.run_on(program, where, documents)["summary"]["invalid"], 1)

    @staticmethod
    def run_on(program, where, documents):
        done = subprocess.run([program, "-strict", "-summary", "-output=json", "-n=1",
                               f"-schema-location={where}"], capture_output=True, text=True,
                              input=yaml.safe_dump_all(documents))
        return json.loads(done.stdout)


if __name__ == "__main__":
    unittest.main()
