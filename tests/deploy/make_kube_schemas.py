#!/usr/bin/env python3
"""Writes kube_schemas.json: what the chart's kinds may contain, strictly.

  make_kube_schemas.py SWAGGER_JSON CRD_YAML...

SWAGGER_JSON is api/openapi-spec/swagger.json of the Kubernetes sources, CRD_YAML
are the definitions of ServiceMonitor, PrometheusRule and ScaledObject. Only the
definitions that the kinds below reach are kept, without their descriptions.
LeaderWorkerSet and InferencePool are written down here, with the fields the chart
uses. The result is a JSON schema for each "apiVersion/kind".
"""

import json
import pathlib
import sys

import yaml

KINDS = ["v1/Service", "v1/ServiceAccount", "v1/PersistentVolumeClaim", "v1/ConfigMap",
         "apps/v1/Deployment", "policy/v1/PodDisruptionBudget",
         "networking.k8s.io/v1/NetworkPolicy", "networking.k8s.io/v1/Ingress",
         "autoscaling/v2/HorizontalPodAutoscaler"]
TEXT_OR_NUMBER = {"type": ["string", "integer", "number"]}
SPECIAL = {
    "io.k8s.apimachinery.pkg.api.resource.Quantity": TEXT_OR_NUMBER,
    "io.k8s.apimachinery.pkg.util.intstr.IntOrString": {"type": ["string", "integer"]},
}


def strict(node):
    """A schema without prose that allows no key it does not name."""
    if isinstance(node, list):
        return [strict(item) for item in node]
    if not isinstance(node, dict):
        return node
    if node.get("x-kubernetes-int-or-string"):
        return {"type": ["string", "integer"]}
    kept = {key: {name: strict(value) for name, value in child.items()}
            if key == "properties" else strict(child)
            for key, child in node.items()
            if key in ("properties", "items", "type", "enum", "required", "$ref", "minimum",
                       "maximum", "maxItems", "minItems", "pattern", "additionalProperties")}
    if "properties" in kept and "additionalProperties" not in kept and not node.get(
            "x-kubernetes-preserve-unknown-fields"):
        kept["additionalProperties"] = False
    if kept.get("type") == "string" and node.get("format") == "int-or-string":
        kept["type"] = ["string", "integer"]
    return kept


def reached(names, definitions, found):
    for name in names:
        if name not in found:
            found[name] = SPECIAL.get(name) or strict(definitions[name])
            text = json.dumps(found[name])
            reached([part.split('"')[0] for part in text.split('"#/definitions/')[1:]],
                    definitions, found)


def own(properties, required):
    """Of a kind whose definition is not at hand: the fields as its documentation has them."""
    meta = {"$ref": "#/definitions/io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"}
    return {"type": "object", "additionalProperties": False, "required": ["spec"], "properties": {
        "apiVersion": {"type": "string"}, "kind": {"type": "string"}, "metadata": meta,
        "spec": {"type": "object", "additionalProperties": False, "properties": properties,
                 "required": required}}}


def main():
    swagger = json.loads(pathlib.Path(sys.argv[1]).read_text())["definitions"]
    schemas, found = {}, {}
    for name, definition in swagger.items():
        for kind in definition.get("x-kubernetes-group-version-kind", []):
            full = "/".join(p for p in (kind["group"], kind["version"], kind["kind"]) if p)
            if full in KINDS:
                reached([name], swagger, found)
                schemas[full] = {"$ref": f"#/definitions/{name}"}
    for path in sys.argv[2:]:
        crd = yaml.safe_load(pathlib.Path(path).read_text())["spec"]
        for version in crd["versions"]:
            schema = strict(version["schema"]["openAPIV3Schema"])
            schema["properties"]["metadata"] = {
                "$ref": "#/definitions/io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"}
            schemas[f"{crd['group']}/{version['name']}/{crd['names']['kind']}"] = schema
    template = {"$ref": "#/definitions/io.k8s.api.core.v1.PodTemplateSpec"}
    whole = {"type": "integer", "minimum": 0}
    schemas["leaderworkerset.x-k8s.io/v1/LeaderWorkerSet"] = own({
        "replicas": whole,
        "startupPolicy": {"type": "string", "enum": ["LeaderCreated", "LeaderReady"]},
        "rolloutStrategy": {"type": "object", "additionalProperties": False, "properties": {
            "type": {"type": "string", "enum": ["RollingUpdate"]},
            "rollingUpdateConfiguration": {
                "type": "object", "additionalProperties": False, "properties": {
                    "maxUnavailable": TEXT_OR_NUMBER, "maxSurge": TEXT_OR_NUMBER,
                    "partition": whole}}}},
        "leaderWorkerTemplate": {
            "type": "object", "additionalProperties": False, "required": ["workerTemplate"],
            "properties": {
                "leaderTemplate": template, "workerTemplate": template, "size": whole,
                "restartPolicy": {"type": "string", "enum": [
                    "RecreateGroupOnPodRestart", "None"]}}},
    }, ["leaderWorkerTemplate"])
    schemas["inference.networking.k8s.io/v1/InferencePool"] = own({
        "selector": {"type": "object", "additionalProperties": False, "properties": {
            "matchLabels": {"type": "object", "additionalProperties": {"type": "string"}}}},
        "targetPorts": {"type": "array", "minItems": 1, "items": {
            "type": "object", "additionalProperties": False, "required": ["number"],
            "properties": {"number": {"type": "integer"}}}},
        "endpointPickerRef": {"type": "object", "additionalProperties": False,
                              "required": ["name"], "properties": {
                                  "group": {"type": "string"}, "kind": {"type": "string"},
                                  "name": {"type": "string"},
                                  "failureMode": {"type": "string"},
                                  "port": {"type": "object", "properties": {
                                      "number": {"type": "integer"}}}}},
    }, ["selector", "targetPorts", "endpointPickerRef"])
    missing = [kind for kind in KINDS if kind not in schemas]
    if missing:
        sys.exit(f"{sys.argv[1]} lacks {', '.join(missing)}")
    out = pathlib.Path(__file__).with_name("kube_schemas.json")
    out.write_text(json.dumps({"source": "derived from Kubernetes, KEDA and prometheus-operator "
                               "(Apache License 2.0)", "kinds": dict(sorted(schemas.items())),
                               "definitions": dict(sorted(found.items()))},
                              separators=(",", ":")).replace('"io.k8s', '\n"io.k8s') + "\n")
    print(f"{out}: {len(schemas)} kinds, {out.stat().st_size >> 10} KiB")


if __name__ == "__main__":
    main()
