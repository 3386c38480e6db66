#!/usr/bin/env python3
"""A real Kubernetes API server takes every object that the chart makes.

Strictly: an unknown field is refused, admission is as a cluster has it, and pods are
created under the restricted Pod Security Standard. The kinds that operators bring
are defined first, with the schemas of kube_schemas.json.
"""

import copy
import json
import sys
import unittest

import chart
import chart_test
import harness
import kube

SCHEMAS = chart_test.SCHEMAS
PLURALS = {"ServiceMonitor": "servicemonitors", "PrometheusRule": "prometheusrules",
           "ScaledObject": "scaledobjects", "LeaderWorkerSet": "leaderworkersets",
           "InferencePool": "inferencepools"}
APPROVED = {"api-approved.kubernetes.io": "unapproved, for a test"}  # groups of *.k8s.io ask for it


def structural(node):
    """A JSON schema as a CustomResourceDefinition may have it: no reference, no union."""
    if isinstance(node, list):
        return [structural(item) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        name = node["$ref"].removeprefix("#/definitions/")
        if name.endswith("ObjectMeta"):
            return {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
        return structural(SCHEMAS["definitions"][name])
    if isinstance(node.get("type"), list):
        return {"x-kubernetes-int-or-string": True}
    result = {key: {name: structural(child) for name, child in value.items()}
              if key == "properties" else structural(value)
              for key, value in node.items()
              # What a definition does not name is refused by the request's strictness.
              if not (key == "additionalProperties" and isinstance(value, bool))}
    if "type" not in result:
        result["type"] = "object"
    if result["type"] == "object" and not {"properties", "additionalProperties"} & set(result):
        result["x-kubernetes-preserve-unknown-fields"] = True
    return result


def definition(full):
    """The CustomResourceDefinition of "group/version/kind"."""
    group, version, kind = full.split("/")
    schema = structural(SCHEMAS["kinds"][full])
    schema["properties"]["metadata"] = {"type": "object"}
    plural = PLURALS[kind]
    return {"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
            "metadata": {"name": f"{plural}.{group}", "annotations": APPROVED},
            "spec": {"group": group, "scope": "Namespaced",
                     "names": {"plural": plural, "singular": kind.lower(), "kind": kind,
                               "listKind": f"{kind}List"},
                     "versions": [{"name": version, "served": True, "storage": True,
                                   "schema": {"openAPIV3Schema": schema}}]}}


def lost(sent, stored, path=""):
    """Where something that was sent is not in what is stored."""
    if isinstance(sent, dict) and isinstance(stored, dict):
        return [found for key, value in sent.items()
                # The server leaves out what is empty.
                if value not in (None, {}, [], "", False, 0) or key in stored
                for found in (lost(value, stored[key], f"{path}.{key}") if key in stored
                              else [f"{path}.{key}"])]
    if isinstance(sent, list) and isinstance(stored, list) and len(sent) == len(stored):
        return [found for index, (one, other) in enumerate(zip(sent, stored))
                for found in lost(one, other, f"{path}[{index}]")]
    # A quantity is a string, however it was written.
    return [] if sent == stored or str(sent) == stored else [f"{path}: {sent!r} became {stored!r}"]


class KubeTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        found = kube.programs()
        cls.cluster = None
        if found is None:
            return
        cls.cluster = cls.enterClassContext(kube.Cluster(*found)) if hasattr(
            cls, "enterClassContext") else cls._enter(kube.Cluster(*found))
        for full in SCHEMAS["kinds"]:
            if full.split("/")[-1] in PLURALS:
                cls.cluster.define(definition(full))
        for there in ({"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass",
                       "metadata": {"name": "inference"}, "value": 1000},
                      {"apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass",
                       "metadata": {"name": "nvidia"}, "handler": "nvidia"}):
            made = cls.cluster.create(there)
            assert made.status == 201, made.message

    @classmethod
    def _enter(cls, context):
        cls.addClassCleanup(context.__exit__)
        return context.__enter__()

    def namespace(self, name):
        """Enforces the strictest standard, and warns of controllers that break it."""
        labels = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn")}
        made = self.cluster.create({"apiVersion": "v1", "kind": "Namespace",
                                    "metadata": {"name": name, "labels": labels}})
        self.assertEqual(made.status, 201, made.message)
        account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default"}}
        self.cluster.create(account, name)  # a controller's work
        return name

    def documents(self, value_set):
        """As helm renders them here, dashboards and rules included; else as committed."""
        helm = harness.find_tool("helm", "dashboards and rules as the API server sees them",
                                 harness.KUBE_BIN)
        return chart.render(helm, value_set) if helm else chart.committed(value_set)

    def test_takes_every_object_of_every_value_set(self):
        if self.cluster is None:
            return
        taken = {}
        for value_set in chart.VALUE_SETS:
            namespace = self.namespace(f"serving-{value_set}")
            for document in self.documents(value_set):
                document = copy.deepcopy(document)
                document["metadata"]["namespace"] = namespace
                name = f"{value_set}: {document['kind']}/{document['metadata']['name']}"
                made = self.cluster.create(document, namespace)
                self.assertEqual(made.status, 201, f"{name}: {made.message}")
                self.assertEqual(made.warnings, [], name)
                self.assertEqual(lost(document, made.body), [], name)
                taken.setdefault(value_set, []).append(document["kind"])
        self.assertEqual(sorted(taken), chart.VALUE_SETS)
        for value_set, kinds in taken.items():
            self.assertGreater(len(kinds), 2, value_set)
        self.assertLessEqual(set(PLURALS), {kind for kinds in taken.values() for kind in kinds})
        print("; ".join(f"{value_set}: {len(kinds)} objects" for value_set, kinds in taken.items()),
              file=sys.stderr)

    def test_takes_every_pod_under_the_restricted_standard(self):
        if self.cluster is None:
            return
        pods = 0
        for value_set in chart.VALUE_SETS:
            namespace = self.namespace(f"pods-{value_set}")
            documents = self.documents(value_set)
            for account in chart_test.of_kind(documents, "ServiceAccount"):
                account["metadata"]["namespace"] = namespace
                self.assertEqual(self.cluster.create(account, namespace).status, 201)
            for index, (name, template) in enumerate(chart_test.templates(documents)):
                pod = {"apiVersion": "v1", "kind": "Pod", "spec": template["spec"], "metadata": {
                    **template["metadata"], "name": f"pod-{index}", "namespace": namespace}}
                made = self.cluster.create(pod, namespace)
                self.assertEqual(made.status, 201, f"{value_set}: {name}: {made.message}")
                self.assertEqual(made.warnings, [], name)
                mounted = json.dumps(made.body["spec"].get("volumes", []))
                self.assertNotIn("serviceAccountToken", mounted, f"{name}: a token is mounted")
                pods += 1
        self.assertEqual(pods, 7)

    def test_refuses_what_it_should(self):
        """So that the others mean something."""
        if self.cluster is None:
            return
        namespace = self.namespace("refused")
        documents = chart.committed("host") + chart.committed("multinode")

        def refusal(kind, path, value):
            document = copy.deepcopy(chart_test.of_kind(documents, kind)[0])
            *parents, last = path.split(".")
            node = document
            for parent in parents:
                node = node[int(parent) if parent.isdigit() else parent]
            node[last] = value
            document["metadata"]["namespace"] = namespace
            made = self.cluster.create(document, namespace)
            return made.status, made.message
        template = "spec.template.spec"
        for kind, path, value, status, said in (
                ("Deployment", "spec.replica", 1, 400, "replica"),
                ("Deployment", f"{template}.containers.0.imagePullPolice", "Never", 400, "Police"),
                ("Deployment", f"{template}.restartPolicy", "Never", 422, "restartPolicy"),
                ("Service", "spec.ports", [{"port": 70000}], 422, "port"),
                ("NetworkPolicy", "spec.policyTypes", ["Inwards"], 422, "policyTypes"),
                ("PodDisruptionBudget", "spec.maxUnavailable", -1, 422, "maxUnavailable"),
                ("ScaledObject", "spec.maxReplicas", 2, 400, "maxReplicas"),
                ("ServiceMonitor", "spec.endpoints", "all", 422, "endpoints"),
                ("PrometheusRule", "spec.groups", [{"rules": []}], 422, "name"),
                ("LeaderWorkerSet", "spec.leaderWorkerTemplate.sizes", 2, 400, "sizes"),
                ("LeaderWorkerSet", "spec.startupPolicy", "Whenever", 422, "startupPolicy")):
            got, message = refusal(kind, path, value)
            self.assertEqual(got, status, f"{kind} {path}: {message}")
            self.assertIn(said, message)
        made = self.cluster.create({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "root"},
            "spec": {"containers": [{"name": "c", "image": "i"}]}}, namespace)
        self.assertEqual(made.status, 403, made.message)
        self.assertIn("PodSecurity", made.message)


if __name__ == "__main__":
    unittest.main()
