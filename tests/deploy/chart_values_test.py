#!/usr/bin/env python3
"""The Helm chart's values: their schema, and a value for every flag of the daemons."""

import json
import re
import unittest

import jsonschema
import yaml

import chart
import harness


class ValuesTest(unittest.TestCase):
    schema = json.loads((chart.CHART / "values.schema.json").read_text())
    defaults = yaml.safe_load((chart.CHART / "values.yaml").read_text())

    def check(self, values):
        jsonschema.Draft7Validator(self.schema).validate(values)

    def test_the_defaults_and_every_set_fit_the_schema(self):
        self.check(self.defaults)
        for value_set in chart.VALUE_SETS:
            self.check(yaml.safe_load((chart.CHART / f"ci/{value_set}-values.yaml").read_text()))

    def test_the_schema_names_every_default_and_nothing_else(self):
        def compare(values, schema, path):
            if not isinstance(values, dict) or "properties" not in schema or (
                    path.endswith(".resources")):
                return
            self.assertEqual(set(schema["properties"]) - {"global"}, set(values), path)
            for key, value in values.items():
                compare(value, schema["properties"][key], f"{path}.{key}")
        compare(self.defaults, self.schema, "values")

    def test_mistakes_are_refused(self):
        for mistake in ({"topologie": "pod"}, {"topology": "host"}, {"tensorParallelSize": 0},
                        {"model": {"subPath": "../other"}}, {"model": {"subPath": "/abs"}},
                        {"model": {"subPath": "a/../b"}}, {"engine": {"maxNumSeq": 4}},
                        {"gpu": {"memoryUtilization": 1.5}}, {"drain": {"preStopSeconds": 0}},
                        {"engine": {"extraArgs": ["reflection"]}},
                        {"cors": {"allowedOrigins": ["a.example,b.example"]}},
                        {"image": {"digest": "sha256:12"}}):
            with self.assertRaises(jsonschema.ValidationError, msg=mistake):
                self.check(mistake)

    # Flags that the chart has no value for, and why.
    LEFT_OUT = {
        "--help": "not for servers", "--version": "not for servers",
        "--print-config": "not for servers",
        "--config": "the chart is the configuration",
        "--no-enable-prefix-caching": "the other half of one that it has",
        "--drain-grace": "preStop is the grace: the Service stops sending meanwhile",
        "--admin-address": "stays on the pod's loopback",
        "--port-file": "ports are fixed", "--exit-with-parent": "for whoever starts one by hand",
        "--device": "`lockstep worker-group`'s", "--preferred-rank": "`lockstep worker-group`'s",
        "--comm-address": "a pod has one address",
    }

    def test_every_flag_of_the_daemons_has_a_value_or_a_reason(self):
        text = (chart.CHART / "templates/_helpers.tpl").read_text()
        carried = set(re.findall(r"--[a-z][a-z-]+", text))
        known = harness.known_flags("lockstep-coordinator") | harness.known_flags("lockstep-worker")
        self.assertEqual(sorted(known - carried - set(self.LEFT_OUT)), [])
        self.assertEqual(sorted(set(self.LEFT_OUT) - known), [], "no such flag any more")

    def test_every_default_is_read_by_a_template(self):
        text = "".join(path.read_text() for path in (chart.CHART / "templates").iterdir())
        for key in self.defaults:
            self.assertTrue(re.search(rf"(Values|\$v|\$placed)\.{key}\b", text), key)


if __name__ == "__main__":
    unittest.main()
