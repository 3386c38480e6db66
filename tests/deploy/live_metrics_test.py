#!/usr/bin/env python3
"""Whatever a rule or a dashboard names must come out of a running server."""

import json
import pathlib
import re
import subprocess
import sys
import tempfile
import unittest

import yaml

import harness
import promql

RULES = harness.ROOT / "deploy/prometheus/lockstep.rules.yaml"
DASHBOARDS = sorted((harness.ROOT / "deploy/grafana").glob("*.json"))

# Labels that Prometheus, not the server, puts on what it scrapes.
SCRAPE_LABELS = {"job", "instance", "namespace", "pod", "service"}
# Metrics of Prometheus itself.
PROMETHEUS_METRICS = {"up": SCRAPE_LABELS}
# Metrics that a server on the cpu backend rightly lacks, with their labels.
GPU_METRICS = {
    # A worker reports idle time from its device's clock; the cpu backend has none.
    "lockstep_device_idle_seconds_sum": {"rank"},
    "lockstep_device_idle_seconds_count": {"rank"},
    # What NVML tells of a GPU.
    **{f"lockstep_gpu_{figure}": {"rank"} for figure in (
        "sm_active", "dram_active", "nvlink_tx_bytes_per_second", "nvlink_rx_bytes_per_second",
        "sm_clock_hertz", "throttle_reasons", "power_watts")},
}


# What routers, autoscalers and dashboards of others read.
PROMISED_VLLM = [
    "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "cache_config_info",
    "num_preemptions_total", "prompt_tokens_total", "generation_tokens_total",
    "prefix_cache_queries_total", "prefix_cache_hits_total", "request_success_total",
    *(f"{histogram}_{part}" for part in ("bucket", "sum", "count") for histogram in (
        "time_to_first_token_seconds", "inter_token_latency_seconds",
        "request_time_per_output_token_seconds", "e2e_request_latency_seconds",
        "request_queue_time_seconds", "request_prefill_time_seconds",
        "request_decode_time_seconds"))]
# Our own, with the values of labels that two ranks on the cpu backend must show.
RANKS = {"rank": {"0", "1"}}
PROMISED = {
    "step_seconds_count": {"kind": {"decode", "prefill"}},
    "rank_step_seconds_count": {**RANKS, "kind": {"compute", "sampling", "total"}},
    "collective_wait_seconds_count": RANKS, "collective_transfer_seconds_count": RANKS,
    "collective_bytes_total": RANKS, "straggler_steps_total": RANKS, "plan_seconds_count": {},
    "kv_blocks": {"state": {"free", "cached", "active", "pending"}},
    "rejections_total": {"reason": {"invalid", "full", "unavailable", "not_found"}},
    "load_phase_seconds": {**RANKS, "phase": {"load", "communicator"}},
    "startup_phase_seconds": {"phase": {"read config"}},
    "weight_bytes": RANKS, "predicted_weight_bytes": RANKS, "kv_bytes": RANKS,
    **dict.fromkeys(("memory_bytes", "predicted_memory_bytes"), {**RANKS, "part": {
        "weights", "kv", "activations", "communication", "runtime", "total"}}),
    "worker_up": RANKS, "ready": {}, "epoch": {}, "build_info": {},
    "requests_total": {"outcome": {"completed"}}, "http_responses_total": {"code": {"200", "400"}},
}


def plain(expression):
    """A panel's query without Grafana's variables."""
    expression = expression.replace("$__rate_interval", "1m")
    return re.sub(r"\$\{?\w+\}?", ".*", expression)


def expressions():
    """(where, expression) of every rule, panel, annotation and chooser."""
    for group in yaml.safe_load(RULES.read_text())["groups"]:
        for rule in group["rules"]:
            yield f"rule {rule.get('record') or rule['alert']}", rule["expr"]
    for path in DASHBOARDS:
        board = json.loads(path.read_text())
        for panel in board["panels"]:
            for target in panel.get("targets", []):
                yield f"{path.name}, panel '{panel['title']}'", plain(target["expr"])
        for note in board["annotations"]["list"]:
            yield f"{path.name}, annotation '{note['name']}'", plain(note["expr"])
        for variable in board["templating"]["list"]:
            match = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"])
            if match:
                yield f"{path.name}, variable {variable['name']}", plain(match.group(1))


def recorded():
    return {rule["record"]: rule for group in yaml.safe_load(RULES.read_text())["groups"]
            for rule in group["rules"] if "record" in rule}


def complaints(where, expression, emitted, rules):
    """What an expression names that the server did not emit."""
    named = promql.parse(expression)
    labels_seen = set(SCRAPE_LABELS)
    for metric, matchers in named.selectors:
        if metric in emitted:
            labels = SCRAPE_LABELS.union(*emitted[metric])
        elif metric in GPU_METRICS or metric in PROMETHEUS_METRICS:
            labels = SCRAPE_LABELS | {**GPU_METRICS, **PROMETHEUS_METRICS}[metric]
        elif metric in rules:
            labels = SCRAPE_LABELS | labels_of_rule(rules[metric]["expr"], emitted, rules)
        else:
            yield f"{where}: no such metric: {metric}"
            continue
        labels_seen |= labels
        for label, operator, value in matchers:
            if label not in labels:
                yield f"{where}: {metric} has no label {label}"
            elif operator == "=" and label not in SCRAPE_LABELS and metric in emitted and not any(
                    sample.get(label) == value for sample in emitted[metric]):
                yield f"{where}: {metric} was not emitted with {label}=\"{value}\""
    for label in named.grouping - labels_seen:
        yield f"{where}: groups by {label}, which nothing in it has"


def labels_of_rule(expression, emitted, rules):
    """Labels that may be on what a rule records: those of all it reads."""
    labels = set()
    for metric, _ in promql.parse(expression).selectors:
        if metric in rules:
            labels |= labels_of_rule(rules[metric]["expr"], emitted, rules)
        else:
            labels |= GPU_METRICS.get(metric, set()).union(*emitted.get(metric, [{}]))
    return labels


def exercise(port):
    """Requests that make every family of metrics appear."""
    for prompt in ("Tell me of a parrot", "Tell me of a parrot", "A rope"):
        status, text = harness.request(port, "POST", "/v1/completions", {
            "model": "demo", "prompt": prompt * 8, "max_tokens": 24, "temperature": 0})
        assert status == 200, text
    status, _ = harness.request(port, "POST", "/v1/completions", {
        "model": "demo", "prompt": "x", "max_tokens": -1})
    assert status == 400, status


class PromqlTest(unittest.TestCase):
    def test_finds_what_an_expression_names(self):
        named = promql.parse('sum by (rank, le) (rate(a:b_total{kind="x", y=~"z.*"}[5m])) '
                             "/ on (job) group_left () c > bool 1e-3 and d offset 5m")
        self.assertEqual(named.selectors, [("a:b_total", [("kind", "=", "x"), ("y", "=~", "z.*")]),
                                           ("c", []), ("d", [])])
        self.assertEqual(named.grouping, {"rank", "le", "job"})

    def test_complains_about_strangers(self):
        emitted = {"a": [{"kind": "x"}]}
        said = lambda text: list(complaints("here", text, emitted, {}))
        self.assertEqual(said('sum by (kind) (a{kind="x"})'), [])
        self.assertEqual(said("a + b"), ["here: no such metric: b"])
        self.assertEqual(said('a{rank="0"}'), ["here: a has no label rank"])
        self.assertEqual(said('a{kind="y"}'), ['here: a was not emitted with kind="y"'])
        self.assertEqual(said("sum by (le) (a)"), ["here: groups by le, which nothing in it has"])


class LiveMetricsTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.server = harness.served()
        cls.port = cls.server.__enter__()
        cls.addClassCleanup(cls.server.__exit__, None, None, None)
        exercise(cls.port)

    def test_rules_and_panels_name_what_is_emitted(self):
        status, text = harness.request(self.port, "GET", "/metrics")
        self.assertEqual(status, 200)
        emitted, rules = promql.read_exposition(text), recorded()
        found = [line for where, expression in expressions()
                 for line in complaints(where, expression, emitted, rules)]
        self.assertEqual(found, [], "\n".join(["", *found]))
        present = [name for name in GPU_METRICS if name in emitted]
        self.assertEqual(present, [], "emitted without a GPU: take it off GPU_METRICS")

    def test_what_is_promised_is_emitted_and_carries_its_labels(self):
        emitted = promql.read_exposition(harness.request(self.port, "GET", "/metrics")[1])
        for name in PROMISED_VLLM:
            self.assertIn(f"vllm:{name}", emitted)
            for sample in emitted[f"vllm:{name}"]:
                self.assertEqual((sample["model_name"], sample["engine"]), ("demo", "0"), name)
        for name, labels in PROMISED.items():
            self.assertIn(f"lockstep_{name}", emitted)
            for label, values in labels.items():
                seen = {sample[label] for sample in emitted[f"lockstep_{name}"]}
                self.assertLessEqual(values, seen, f"{name}: {label}")

    def test_memory_is_what_was_predicted(self):
        _, text = harness.request(self.port, "GET", "/metrics")
        figures = {(name, rank, part): float(value) for name, part, rank, value in re.findall(
            r'^lockstep_(\w*memory_bytes)\{part="(\w+)",rank="(\d)"\} (\S+)$', text, re.M)}
        for rank in ("0", "1"):
            for part in ("weights", "kv", "communication", "runtime"):
                self.assertEqual(figures["memory_bytes", rank, part],
                                 figures["predicted_memory_bytes", rank, part], part)
            for part in ("activations", "total"):  # predicted for more threads than there are
                self.assertLessEqual(figures["memory_bytes", rank, part],
                                     figures["predicted_memory_bytes", rank, part], part)
                self.assertGreater(figures["memory_bytes", rank, part], 0, part)

    def test_metrics_of_gpus_are_in_the_source(self):
        source = "".join(path.read_text() for path in (
            harness.ROOT / "coordinator/api").glob("*metrics.cc"))
        for name in GPU_METRICS:
            stem = re.sub("_(sum|count)$", "", name).removeprefix("lockstep_gpu_")
            self.assertIn(f'"{stem}"', source, name)

    def test_a_real_prometheus_evaluates_everything(self):
        program = harness.find_tool("prometheus", "rules and panels over a real scrape "
                                    "(Debian: apt-get install prometheus)")
        if program is None:
            return
        with tempfile.TemporaryDirectory(prefix="lockstep-prometheus.") as folder:
            self.check_with_prometheus(program, pathlib.Path(folder))

    def check_with_prometheus(self, program, folder):
        rules = yaml.safe_load(RULES.read_text())
        for group in rules["groups"]:
            group["interval"] = "500ms"
        (folder / "rules.yaml").write_text(yaml.safe_dump(rules))
        (folder / "prometheus.yaml").write_text(yaml.safe_dump({
            "global": {"scrape_interval": "250ms", "scrape_timeout": "250ms"},
            "rule_files": [str(folder / "rules.yaml")],
            "scrape_configs": [{"job_name": "lockstep", "static_configs": [
                {"targets": [f"127.0.0.1:{self.port}"]}]}]}))
        port_file, log = folder / "port", folder / "log"
        port = self.free_port()
        with open(log, "wb") as out:
            prometheus = subprocess.Popen(
                [program, f"--config.file={folder / 'prometheus.yaml'}",
                 f"--storage.tsdb.path={folder / 'data'}",
                 f"--web.listen-address=127.0.0.1:{port}"], stdout=out, stderr=out)
        try:
            harness.wait_for("a scrape", lambda: self.value(port, "lockstep_ready") == 1.0,
                             prometheus, 20, log)
            exercise(self.port)
            groups = harness.wait_for("every rule evaluated", lambda: self.evaluated(port),
                                      prometheus, 20, log)
            bad = [f"{rule['name']}: {rule.get('lastError', '')}" for group in groups
                   for rule in group["rules"] if rule["health"] != "ok"]
            self.assertEqual(bad, [])
            # A rate needs two scrapes that differ.
            harness.wait_for("a recorded step time", lambda: (
                self.value(port, "lockstep:step_seconds:mean5m") or 0) > 0, prometheus, 20, log)
            firing = [rule["name"] for group in groups for rule in group["rules"]
                      if rule.get("state") == "firing"]
            self.assertEqual(firing, [], "alerts on a healthy server")
            for where, expression in expressions():
                answer = self.query(port, expression)
                self.assertEqual(answer.get("status"), "success", f"{where}: {answer}")
        finally:
            harness.stop(prometheus)

    @staticmethod
    def free_port():
        import socket
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return probe.getsockname()[1]

    @staticmethod
    def query(port, expression):
        from urllib.parse import quote
        _, text = harness.request(port, "GET", f"/api/v1/query?query={quote(expression)}")
        return json.loads(text) if text.startswith("{") else {"error": text}

    def value(self, port, expression):
        result = self.query(port, expression).get("data", {}).get("result", [])
        return float(result[0]["value"][1]) if result else None

    @staticmethod
    def evaluated(port):
        _, text = harness.request(port, "GET", "/api/v1/rules")
        if not text.startswith("{"):
            return None
        groups = json.loads(text)["data"]["groups"]
        done = all(rule["health"] != "unknown" for group in groups for rule in group["rules"])
        return groups if groups and done else None


class PromtoolTest(unittest.TestCase):
    def run_promtool(self, *words):
        program = harness.find_tool("promtool", "the alerts' unit tests (Debian: apt-get install "
                                    "prometheus)")
        if program is None:
            return
        done = subprocess.run([program, *words], capture_output=True, text=True,
                              cwd=RULES.parent)
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)

    def test_rules_are_well_formed(self):
        self.run_promtool("check", "rules", "--lint=all", "--lint-fatal", RULES.name)

    def test_every_alert_fires_once(self):
        self.run_promtool("test", "rules", "lockstep.rules.test.yaml")


class RuleFilesTest(unittest.TestCase):
    def test_every_alert_has_a_runbook_and_a_test_that_fires_it(self):
        tests = yaml.safe_load((RULES.parent / "lockstep.rules.test.yaml").read_text())["tests"]
        fired = {case["alertname"] for test in tests for case in test["alert_rule_test"]
                 if case.get("exp_alerts")}
        quiet = {case["alertname"] for case in tests[0]["alert_rule_test"]
                 if not case.get("exp_alerts")}
        for group in yaml.safe_load(RULES.read_text())["groups"]:
            for rule in group["rules"]:
                if "alert" in rule:
                    self.assertIn(rule["alert"], fired)
                    self.assertIn(rule["alert"], quiet)
                    self.assertLessEqual({"summary", "description", "runbook"},
                                         set(rule["annotations"]), rule["alert"])
                    self.assertIn(rule["labels"]["severity"], ("critical", "warning"))

    def test_the_dashboards_are_what_their_script_makes(self):
        done = subprocess.run([sys.executable, harness.ROOT / "deploy/grafana/dashboards.py", "--check"],
                              capture_output=True, text=True)
        self.assertEqual(done.returncode, 0, done.stderr)

    def test_no_two_panels_overlap(self):
        for path in DASHBOARDS:
            taken = {}
            for panel in json.loads(path.read_text())["panels"]:
                at = panel["gridPos"]
                self.assertLessEqual(at["x"] + at["w"], 24)
                for cell in [(x, y) for x in range(at["x"], at["x"] + at["w"])
                             for y in range(at["y"], at["y"] + at["h"])]:
                    self.assertNotIn(cell, taken, f"{path.name}: {panel['title']}")
                    taken[cell] = panel["title"]


if __name__ == "__main__":
    unittest.main()
