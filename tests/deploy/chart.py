#!/usr/bin/env python3
"""The chart's rendered manifests: chart.py writes those that the tests check.

Run it with helm in PATH after a change to helm/lockstep. What it writes is what
helm renders, normalised, with dashboards and rules (checked as files of their own)
left out, so that a change to those needs no helm.
"""

import hashlib
import pathlib
import subprocess

import yaml

ROOT = pathlib.Path(__file__).resolve().parents[2]
CHART = ROOT / "helm/lockstep"
RENDERED = pathlib.Path(__file__).resolve().parent / "rendered"
STAMP = RENDERED / "chart.sha256"
VALUE_SETS = sorted(path.name.removesuffix("-values.yaml") for path in CHART.glob("ci/*-values.yaml"))


def inputs_digest():
    """Of every file of the chart but what it links to."""
    digest = hashlib.sha256()
    for path in sorted(CHART.rglob("*")):
        # README.md and NOTES.txt are for people.
        if path.is_file() and "files" not in path.relative_to(CHART).parts and path.name not in (
                "README.md", "NOTES.txt"):
            digest.update(f"{path.relative_to(CHART)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def helm(program, *words):
    return subprocess.run([program, *map(str, words)], capture_output=True, text=True)


def render(program, value_set, *more):
    """What helm makes of a value set: a list of manifests."""
    done = helm(program, "template", "demo", CHART, "--namespace", "serving", "--kube-version",
                "1.34.0", "--values", CHART / f"ci/{value_set}-values.yaml", *more)
    if done.returncode:
        raise RuntimeError(f"helm template, {value_set}: {done.stderr}")
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def outline(documents):
    """Without the files that the chart only carries."""
    for document in documents:
        if document["kind"] == "ConfigMap":
            document["data"] = {name: "" for name in document["data"]}
        if document["kind"] == "PrometheusRule":
            document["spec"] = {"groups": []}
    return documents


def committed(value_set):
    return list(yaml.safe_load_all((RENDERED / f"{value_set}.yaml").read_text()))


def main():
    RENDERED.mkdir(exist_ok=True)
    for path in RENDERED.glob("*.yaml"):
        path.unlink()
    for value_set in VALUE_SETS:
        documents = outline(render("helm", value_set))
        (RENDERED / f"{value_set}.yaml").write_text(yaml.safe_dump_all(documents, width=100))
    STAMP.write_text(inputs_digest() + "\n")


if __name__ == "__main__":
    main()
