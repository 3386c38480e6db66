#!/usr/bin/env python3
"""The Helm chart: what it renders is valid, restricted, and knows our flags.

The checks read the committed manifests of five value sets, so they need no helm.
"""

import copy
import json
import unittest

import jsonschema
import yaml

import chart
import harness
import promql

SCHEMAS = json.loads((chart.RENDERED.parent / "kube_schemas.json").read_text())
SERVICE_LABELS = {"namespace", "service"}  # put on a scrape by prometheus-operator


def templates(documents):
    """(name, pod template) of everything that makes pods."""
    for document in documents:
        name = f"{document['kind']}/{document['metadata']['name']}"
        if document["kind"] == "Deployment":
            yield name, document["spec"]["template"]
        elif document["kind"] == "LeaderWorkerSet":
            group = document["spec"]["leaderWorkerTemplate"]
            yield f"{name} leader", group["leaderTemplate"]
            yield f"{name} worker", group["workerTemplate"]


def of_kind(documents, kind):
    return [document for document in documents if document["kind"] == kind]


def selects(selector, labels):
    return all(labels.get(key) == value for key, value in selector.items())


def validate(document):
    """Raises where a manifest has a field that its kind has not, or lacks one."""
    kind = f"{document['apiVersion']}/{document['kind']}"
    schema = {"definitions": SCHEMAS["definitions"], **SCHEMAS["kinds"][kind]}
    if "$ref" in schema:  # draft 7 ignores what stands beside a reference
        schema = {"definitions": SCHEMAS["definitions"], "allOf": [SCHEMAS["kinds"][kind]]}
    jsonschema.Draft7Validator(schema).validate(document)


class EveryValueSet(unittest.TestCase):
    """Runs each test over the five rendered sets."""

    def sets(self):
        for value_set in chart.VALUE_SETS:
            yield value_set, chart.committed(value_set)


class ManifestTest(EveryValueSet):
    def test_there_are_five_sets(self):
        self.assertEqual(chart.VALUE_SETS, ["cpu", "host", "multinode", "single", "split"])

    def test_the_committed_manifests_are_of_this_chart(self):
        self.assertEqual(chart.STAMP.read_text().strip(), chart.inputs_digest(),
                         "helm/lockstep changed: run tests/deploy/chart.py where there is a helm")

    def test_each_is_what_kubernetes_accepts(self):
        for _, documents in self.sets():
            for document in documents:
                validate(document)

    def test_the_schemas_refuse_strangers_and_wrong_types(self):
        deployment = of_kind(chart.committed("single"), "Deployment")[0]
        for path, value in (("spec.replica", 1), ("spec.replicas", "one"),
                            ("spec.template.spec.hostNetwrok", True),
                            ("spec.template.spec.containers", {})):
            broken = copy.deepcopy(deployment)
            *parents, last = path.split(".")
            node = broken
            for parent in parents:
                node = node[parent]
            node[last] = value
            with self.assertRaises(jsonschema.ValidationError, msg=path):
                validate(broken)

    def test_names_are_unique_and_short_enough(self):
        for _, documents in self.sets():
            names = [(document["kind"], document["metadata"]["name"]) for document in documents]
            self.assertEqual(len(names), len(set(names)))
            self.assertLessEqual(max(len(name) for _, name in names), 63)

    def test_pods_are_restricted(self):
        for _, documents in self.sets():
            for name, template in templates(documents):
                spec, where = template["spec"], name
                self.assertIs(spec["automountServiceAccountToken"], False, where)
                self.assertIs(spec["enableServiceLinks"], False, where)
                self.assertIs(spec["securityContext"]["runAsNonRoot"], True, where)
                self.assertGreater(spec["securityContext"]["runAsUser"], 0, where)
                self.assertEqual(spec["securityContext"]["seccompProfile"]["type"],
                                 "RuntimeDefault", where)
                for field in ("hostNetwork", "hostPID", "hostIPC"):
                    self.assertNotIn(field, spec, where)
                for volume in spec["volumes"]:
                    self.assertNotIn("hostPath", volume, where)
                for container in spec["containers"] + spec.get("initContainers", []):
                    context = container["securityContext"]
                    self.assertIs(context["allowPrivilegeEscalation"], False, where)
                    self.assertIs(context["readOnlyRootFilesystem"], True, where)
                    self.assertEqual(context["capabilities"], {"drop": ["ALL"]}, where)
                    self.assertNotIn("privileged", context, where)

    def test_volumes_and_mounts_belong_together(self):
        for _, documents in self.sets():
            for name, template in templates(documents):
                volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
                used = set()
                for container in template["spec"]["containers"]:
                    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
                    used |= {mount["name"] for mount in mounts.values()}
                    self.assertIs(mounts["/models"]["readOnly"], True, name)
                    self.assertIn("/tmp", mounts, f"{name}: the root is read-only")
                    if container["name"] != "coordinator":
                        shm = volumes[mounts["/dev/shm"]["name"]]["emptyDir"]
                        self.assertEqual(shm["medium"], "Memory", name)
                self.assertEqual(used, set(volumes), name)

    def test_claims_exist_or_are_the_users(self):
        for value_set, documents in self.sets():
            values = yaml.safe_load((chart.CHART / f"ci/{value_set}-values.yaml").read_text())
            made = {claim["metadata"]["name"] for claim in of_kind(documents,
                                                                   "PersistentVolumeClaim")}
            named = values["persistence"].get("existingClaim")
            for _, template in templates(documents):
                for volume in template["spec"]["volumes"]:
                    claim = volume.get("persistentVolumeClaim", {}).get("claimName")
                    self.assertTrue(claim is None or claim == named or claim in made, claim)

    def test_the_grace_period_covers_the_drain(self):
        for _, documents in self.sets():
            for name, template in templates(documents):
                grace = template["spec"]["terminationGracePeriodSeconds"]
                drain = self.flag(documents, "--drain-timeout")
                for container in template["spec"]["containers"]:
                    pause = container["lifecycle"]["preStop"]["sleep"]["seconds"]
                    if container["name"] == "workers":
                        self.assertEqual(grace, pause + 5, name)
                    else:
                        self.assertEqual(grace, pause + float(drain) + 5, name)

    def flag(self, documents, flag):
        for _, template in templates(documents):
            for word in template["spec"]["containers"][0]["args"]:
                if word.startswith(flag + "="):
                    return word.split("=", 1)[1]
        raise AssertionError(f"no {flag}")

    def test_probes_have_a_port_that_clients_do_not_fill(self):
        for _, documents in self.sets():
            for name, template in templates(documents):
                for container in template["spec"]["containers"]:
                    if container["name"] == "workers":
                        self.assertNotIn("livenessProbe", container, "workers have no door")
                        continue
                    paths = {kind: container[f"{kind}Probe"]["httpGet"]["path"]
                             for kind in ("startup", "liveness", "readiness")}
                    first = "/ready" if container["name"] == "serve" else "/health"
                    asked = [container[f"{kind}Probe"]["httpGet"]
                             for kind in ("startup", "liveness", "readiness")]
                    # In plain text: the kubelet has no certificate to show.
                    self.assertEqual([(each["port"], each.get("scheme", "HTTP")) for each in asked],
                                     [("health", "HTTP")] * 3, name)
                    port = {port["name"]: port["containerPort"]
                            for port in container["ports"]}["health"]
                    self.assertIn(f"--health-port={port}", container["args"], name)
                    self.assertEqual(paths, {"startup": first, "liveness": "/health",
                                             "readiness": "/ready"}, name)
                    startup = container["startupProbe"]
                    self.assertGreaterEqual(
                        startup["failureThreshold"] * startup["periodSeconds"], 1800, name)

    def test_the_authority_of_clients_is_mounted_without_its_key(self):
        seen = 0
        for value_set, documents in self.sets():
            for name, template in templates(documents):
                container = template["spec"]["containers"][0]
                ca = [v["secret"] for v in template["spec"]["volumes"] if v["name"] == "client-ca"]
                mutual = "--ssl-ca-certs=/etc/lockstep/client-ca/ca.crt" in container["args"]
                self.assertEqual(len(ca), mutual, name)
                for secret in ca:
                    seen += 1
                    self.assertEqual([item["key"] for item in secret["items"]], ["ca.crt"], name)
        self.assertEqual(seen, 1)

    def test_nobody_but_the_kubelet_is_let_to_the_probers_port(self):
        for value_set, documents in self.sets():
            text = yaml.safe_dump_all(of_kind(documents, "Service") + of_kind(
                documents, "NetworkPolicy") + of_kind(documents, "ServiceMonitor"))
            self.assertNotIn("health", text, value_set)
            self.assertNotIn("8001", text, value_set)

    def test_an_upgrade_of_several_servers_leaves_some(self):
        for value_set, expected in (("host", "RollingUpdate"), ("single", "Recreate"),
                                    ("split", "Recreate"), ("cpu", "Recreate")):
            server = of_kind(chart.committed(value_set), "Deployment")[0]
            self.assertEqual(server["spec"]["strategy"]["type"], expected, value_set)

    def test_what_fetches_may_ask_for_names(self):
        policy = of_kind(chart.committed("host"), "NetworkPolicy")[0]
        ports = [port["port"] for rule in policy["spec"]["egress"] for port in rule["ports"]]
        self.assertEqual(ports, [53, 53, 443])

    def test_what_is_scraped_has_the_name_that_alerts_look_for(self):
        rules = (harness.ROOT / "deploy/prometheus/lockstep.rules.yaml").read_text()
        self.assertIn('up{job=~".*lockstep.*"}', rules)
        for value_set in ("host", "multinode"):
            relabelings = of_kind(chart.committed(value_set), "ServiceMonitor")[0]["spec"][
                "endpoints"][0]["relabelings"]
            self.assertIn({"targetLabel": "job", "replacement": "lockstep"}, relabelings)

    def test_prometheus_shows_a_certificate_where_one_is_asked_for(self):
        for value_set, expected in (("host", {"insecureSkipVerify"}),
                                    ("multinode", {"insecureSkipVerify", "cert", "keySecret"})):
            monitor = of_kind(chart.committed(value_set), "ServiceMonitor")[0]
            endpoint = monitor["spec"]["endpoints"][0]
            self.assertEqual(endpoint["scheme"], "https")
            self.assertEqual(set(endpoint["tlsConfig"]), expected, value_set)

    def test_gpus_add_up_to_the_ranks(self):
        for value_set, documents in self.sets():
            gpus = ranks = 0
            for name, template in templates(documents):
                copies = 1
                if name.startswith("LeaderWorkerSet") and name.endswith("worker"):
                    size = of_kind(documents, "LeaderWorkerSet")[0]["spec"][
                        "leaderWorkerTemplate"]["size"]
                    copies = size - 1
                for container in template["spec"]["containers"]:
                    resources = container["resources"]
                    gpu = resources["limits"].get("nvidia.com/gpu", 0)
                    self.assertEqual(gpu, resources["requests"].get("nvidia.com/gpu", 0))
                    gpus += gpu * copies
                    if container["name"] == "workers":
                        args = container["args"]
                        ranks += int(args[args.index("--count") + 1]) * copies
                    self.assertIn("memory", resources["limits"], name)
            size = int(self.flag(documents, "--tensor-parallel-size"))
            self.assertEqual(gpus, 0 if value_set == "cpu" else size)
            if value_set in ("split", "multinode"):
                self.assertEqual(ranks, size)

    def test_services_reach_pods_and_ports(self):
        for _, documents in self.sets():
            pods = dict(templates(documents))
            sets = {document["metadata"]["name"] for document in of_kind(documents,
                                                                         "LeaderWorkerSet")}
            for service in of_kind(documents, "Service"):
                # A LeaderWorkerSet needs the headless Service of its name for itself.
                self.assertNotIn(service["metadata"]["name"], sets)
                chosen = [pod for pod in pods.values() if selects(
                    service["spec"]["selector"], pod["metadata"]["labels"])]
                self.assertEqual(len(chosen), 1, service["metadata"]["name"])
                ports = {port["name"] for container in chosen[0]["spec"]["containers"]
                         for port in container["ports"]}
                for port in service["spec"]["ports"]:
                    self.assertIn(port["targetPort"], ports)

    def test_workers_find_a_coordinator_that_is_not_ready_yet(self):
        documents = chart.committed("split")
        args = dict(templates(documents))["Deployment/demo-lockstep-workers"]["spec"][
            "containers"][0]["args"]
        self.assertIn("--coordinator=demo-lockstep-plane:50052", args)
        plane = [service for service in of_kind(documents, "Service")
                 if service["metadata"]["name"] == "demo-lockstep-plane"][0]["spec"]
        self.assertIs(plane["publishNotReadyAddresses"], True)
        self.assertEqual(plane["clusterIP"], "None")
        group = of_kind(chart.committed("multinode"), "LeaderWorkerSet")[0]["spec"]
        self.assertEqual(group["startupPolicy"], "LeaderCreated")

    def test_every_pod_is_closed_but_for_what_is_listed(self):
        for value_set, documents in self.sets():
            policies = of_kind(documents, "NetworkPolicy")
            if value_set == "cpu":
                self.assertEqual(policies, [])
                continue
            for name, pod in templates(documents):
                over = [policy for policy in policies if selects(
                    policy["spec"]["podSelector"]["matchLabels"], pod["metadata"]["labels"])]
                self.assertEqual(len(over), 1, name)
                self.assertEqual(sorted(over[0]["spec"]["policyTypes"]), ["Egress", "Ingress"])
                for rule in over[0]["spec"].get("ingress") or []:
                    self.assertTrue(rule.get("from"), f"{name}: open to everybody")
            if value_set == "single":
                self.assertEqual(policies[0]["spec"]["egress"], [], "one pod calls nobody")

    def test_disruption_budgets_select_the_pods(self):
        for _, documents in self.sets():
            for budget in of_kind(documents, "PodDisruptionBudget"):
                for name, pod in templates(documents):
                    self.assertTrue(selects(budget["spec"]["selector"]["matchLabels"],
                                            pod["metadata"]["labels"]), name)

    def test_autoscalers_scale_what_there_is_by_what_is_emitted(self):
        source = (harness.ROOT / "coordinator/api/metrics.cc").read_text()
        seen = 0
        for _, documents in self.sets():
            there = {(document["apiVersion"], document["kind"], document["metadata"]["name"])
                     for document in documents}
            for scaler in of_kind(documents, "HorizontalPodAutoscaler") + of_kind(
                    documents, "ScaledObject"):
                seen += 1
                target = scaler["spec"]["scaleTargetRef"]
                self.assertIn((target["apiVersion"], target["kind"], target["name"]), there)
                for trigger in scaler["spec"].get("triggers", []):
                    for metric, matchers in promql.parse(
                            trigger["metadata"]["query"]).selectors:
                        self.assertIn(f'"{metric}"', source)
                        self.assertLessEqual({label for label, _, _ in matchers}, SERVICE_LABELS)
                for metric in scaler["spec"].get("metrics", []):
                    name = metric["pods"]["metric"]["name"].replace("vllm_", "vllm:", 1)
                    self.assertIn(f'"{name}"', source)
                # The scaler decides how many: a rendered count would undo it.
                for document in documents:
                    if document["metadata"]["name"] == target["name"] and (
                            document["kind"] == target["kind"]):
                        self.assertNotIn("replicas", document["spec"])
        self.assertEqual(seen, 2)

    def test_secrets_are_referred_to_and_never_written(self):
        for value_set, documents in self.sets():
            self.assertEqual(of_kind(documents, "Secret"), [])
            if value_set == "host":
                text = yaml.safe_dump_all(documents)
                self.assertIn("secretKeyRef", text)

    def test_files_that_flags_name_are_mounted(self):
        found = 0
        for _, documents in self.sets():
            for name, template in templates(documents):
                for container in template["spec"]["containers"]:
                    paths = [mount["mountPath"] for mount in container["volumeMounts"]]
                    for word in container["args"]:
                        if word.startswith(("--ssl-", "--worker-ssl-", "--api-key-file")):
                            found += 1
                            path = word.split("=")[1]
                            self.assertIn(path.rsplit("/", 1)[0], paths, name)
        self.assertEqual(found, 12)

    def test_plain_text_is_asked_for_only_where_it_is_spoken(self):
        for value_set, documents in self.sets():
            containers = [template["spec"]["containers"][0] for _, template in templates(
                documents)]
            insecure = {each["name"]: "--insecure" in each["args"] for each in containers}
            self.assertEqual(insecure, {
                "single": {"serve": True}, "cpu": {"serve": True}, "host": {"serve": False},
                "split": {"coordinator": True, "workers": True},
                "multinode": {"coordinator": False, "workers": False}}[value_set], value_set)

    def test_each_side_of_the_plane_has_a_certificate_of_its_own(self):
        secrets = {}
        for name, template in templates(chart.committed("multinode")):
            volume = [v for v in template["spec"]["volumes"] if v["name"] == "plane"][0]
            container = template["spec"]["containers"][0]
            secrets[container["name"]] = volume["secret"]["secretName"]
            for flag, file in (("certfile", "tls.crt"), ("keyfile", "tls.key"),
                               ("ca-certs", "ca.crt")):
                self.assertIn(f"--worker-ssl-{flag}=/etc/lockstep/plane/{file}",
                              container["args"], name)
        self.assertEqual(secrets, {"coordinator": "plane-coordinator", "workers": "plane-worker"})

    def test_flags_exist(self):
        known = {"serve": harness.known_flags("lockstep", "serve"),
                 "coordinator": harness.known_flags("lockstep-coordinator"),
                 "workers": harness.known_flags("lockstep-worker")}
        group = harness.known_flags("lockstep", "worker-group")
        for _, documents in self.sets():
            for name, template in templates(documents):
                for container in template["spec"]["containers"]:
                    args = container["args"]
                    if "--" in args:
                        for word in args[:args.index("--")]:
                            if word.startswith("--"):
                                self.assertIn(word.split("=")[0], group, name)
                        args = args[args.index("--") + 1:]
                    for word in args:
                        self.assertIn(word.split("=")[0], known[container["name"]], name)


if __name__ == "__main__":
    unittest.main()
