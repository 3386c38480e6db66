#!/usr/bin/env python3
"""Writes the Grafana dashboards beside itself: deploy/grafana/dashboards.py

The panels are listed here, one call each; what Grafana wants around them is the
same for all and is made by the functions. --check writes nothing and fails when
a committed file is not what this script makes.
"""

import argparse
import json
import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
SELECT = 'job=~"$job", instance=~"$instance"'


def over(expression):
    """Fills in the selection and the rate window, so that queries stay short."""
    return expression.replace("SELECT", SELECT).replace("[R]", "[$__rate_interval]")


class Dashboard:
    """Panels placed left to right in rows of 24 columns."""

    def __init__(self, uid, title, description):
        self.uid, self.title, self.description = uid, title, description
        self.panels, self.x, self.y, self.row_height = [], 0, 0, 0

    def place(self, width, height):
        if self.x + width > 24:
            self.x, self.y, self.row_height = 0, self.y + self.row_height, 0
        position = {"x": self.x, "y": self.y, "w": width, "h": height}
        self.x, self.row_height = self.x + width, max(self.row_height, height)
        return position

    def row(self, title):
        self.x, self.y, self.row_height = 0, self.y + self.row_height, 0
        self.add("row", title, "", [], None, 24, 1, collapsed=False, panels=[])

    def add(self, kind, title, description, queries, unit, width=8, height=8, options=None,
            custom=None, thresholds=None, query_format="time_series", now_alone=False, **more):
        defaults = {"custom": custom or {}}
        if unit:
            defaults["unit"] = unit
        if thresholds:
            defaults["thresholds"] = {"mode": "absolute", "steps": thresholds}
            defaults["color"] = {"mode": "thresholds"}
        panel = {
            "id": len(self.panels) + 1, "type": kind, "title": title,
            "description": description, "gridPos": self.place(width, height), **more,
        }
        if kind != "row":
            panel.update({
                "datasource": SOURCE,
                "fieldConfig": {"defaults": defaults, "overrides": []},
                "options": options or {},
                "targets": [{
                    "refId": chr(ord("A") + i), "datasource": SOURCE, "expr": over(expression),
                    "legendFormat": legend, "format": query_format, "instant": now_alone,
                    "range": not now_alone,
                } for i, (expression, legend) in enumerate(queries)],
            })
        self.panels.append(panel)

    def lines(self, title, description, unit, *queries, stack=False, width=8):
        custom = {"fillOpacity": 40 if stack else 8, "showPoints": "never",
                  "stacking": {"mode": "normal" if stack else "none"}}
        self.add("timeseries", title, description, queries, unit, width, custom=custom,
                 options={"legend": {"displayMode": "list", "placement": "bottom"},
                          "tooltip": {"mode": "multi", "sort": "desc"}})

    def number(self, title, description, unit, query, thresholds=None, width=4,
               legend="{{instance}}", **more):
        self.add("stat", title, description, [(query, legend)], unit, width, 4, **more,
                 thresholds=thresholds or [{"color": "blue", "value": None}],
                 options={"reduceOptions": {"calcs": ["lastNotNull"]}, "graphMode": "area",
                          "textMode": "value_and_name"})

    def heat_by_rank(self, title, description, unit, query, width=24):
        self.add("heatmap", title, description, [(query, "rank {{rank}}")], unit, width, 8,
                 options={"calculate": False, "cellGap": 1, "yAxis": {"reverse": True},
                          "rowsFrame": {"layout": "auto"}, "legend": {"show": True},
                          "color": {"mode": "scheme", "scheme": "RdYlGn", "reverse": True,
                                    "steps": 64}})

    def heat_of_histogram(self, title, description, unit, query, width=12):
        self.add("heatmap", title, description, [(query, "{{le}}")], unit, width, 8,
                 query_format="heatmap",
                 options={"calculate": False, "yAxis": {"unit": unit}, "legend": {"show": True},
                          "color": {"mode": "scheme", "scheme": "Blues", "steps": 64}})

    def table(self, title, description, query, width=12):
        self.add("table", title, description, [(query, "")], None, width, 8, query_format="table",
                 now_alone=True)

    def json(self):
        def chooser(name, label, of):
            return {"name": name, "label": label, "type": "query", "datasource": SOURCE,
                    "query": f"label_values({of}, {name})",
                    "refresh": 2, "multi": True, "includeAll": True, "allValue": ".*",
                    "current": {"text": "All", "value": "$__all"}}
        return {
            "uid": self.uid, "title": self.title, "description": self.description,
            "tags": ["lockstep"], "schemaVersion": 39, "version": 1, "editable": True,
            "graphTooltip": 1, "refresh": "10s", "time": {"from": "now-30m", "to": "now"},
            "timezone": "browser", "annotations": {"list": [{
                "name": "Group re-formed", "datasource": SOURCE, "enable": True,
                "iconColor": "red", "expr": over("changes(lockstep_epoch{SELECT}[1m]) > 0"),
                "titleFormat": "{{instance}}: a new epoch"}]},
            "templating": {"list": [
                {"name": "datasource", "label": "Prometheus", "type": "datasource",
                 "query": "prometheus", "current": {}},
                chooser("job", "Job", "lockstep_ready"),
                chooser("instance", "Server", 'lockstep_ready{job=~"$job"}')]},
            "links": [{"type": "dashboards", "tags": ["lockstep"], "title": "Lockstep",
                       "asDropdown": False, "includeVars": True, "keepTime": True}],
            "panels": self.panels,
        }


GOOD = {"color": "green", "value": None}


def quantiles(histogram, *percents):
    return [(f"histogram_quantile({p / 100}, sum by (instance, le) "
             f"(rate({histogram}_bucket{{SELECT}}[R])))", f"{{{{instance}}}} p{p}")
            for p in percents]


def mean(histogram, by):
    return (f"sum by (instance, {by}) (rate({histogram}_sum{{SELECT}}[R]))"
            f" / sum by (instance, {by}) (rate({histogram}_count{{SELECT}}[R]))")


def overview():
    d = Dashboard("lockstep-overview", "Lockstep: overview",
                  "Is it up, is it fast, is it full, and who is refused.")
    d.number("Ready", "1 while the group of workers is whole and stepping.", None,
             "lockstep_ready{SELECT}", [{"color": "red", "value": None},
                                        {"color": "green", "value": 1}])
    d.number("Running", "Requests that hold a slot.", "short", "vllm:num_requests_running{SELECT}")
    d.number("Waiting", "Requests in the queue.", "short", "vllm:num_requests_waiting{SELECT}",
             [GOOD, {"color": "orange", "value": 1}, {"color": "red", "value": 64}])
    d.number("KV cache in use", "Share of blocks that requests hold.", "percentunit",
             "vllm:kv_cache_usage_perc{SELECT}",
             [GOOD, {"color": "orange", "value": 0.8}, {"color": "red", "value": 0.95}])
    d.number("Tokens a second", "Of answers.", "short",
             "sum by (instance) (rate(vllm:generation_tokens_total{SELECT}[R]))")
    d.number("Epoch", "Rises by one whenever the group is formed again.", "short",
             "lockstep_epoch{SELECT}")

    d.row("What clients feel")
    d.lines("Time to first token", "From arrival to the first token.", "s",
            *quantiles("vllm:time_to_first_token_seconds", 50, 95, 99))
    d.lines("Between tokens", "Of a sequence.", "s",
            *quantiles("vllm:inter_token_latency_seconds", 50, 95, 99))
    d.lines("Whole requests", "From arrival to the last token.", "s",
            *quantiles("vllm:e2e_request_latency_seconds", 50, 95, 99))
    d.lines("Where a request's time goes", "Means: in the queue, in prefill, in decode.", "s",
            (mean("vllm:request_queue_time_seconds", "engine"), "{{instance}} queue"),
            (mean("vllm:request_prefill_time_seconds", "engine"), "{{instance}} prefill"),
            (mean("vllm:request_decode_time_seconds", "engine"), "{{instance}} decode"),
            stack=True)
    d.lines("Time per output token", "A sequence's mean; p95 over sequences.", "s",
            *quantiles("vllm:request_time_per_output_token_seconds", 50, 95))
    d.heat_of_histogram("First tokens, all of them", "How many requests saw which delay.", "s",
                        "sum by (le) (increase(vllm:time_to_first_token_seconds_bucket{SELECT}[R]))",
                        width=8)

    d.row("Load")
    d.lines("Requests", "Those that hold a slot and those that wait.", "short",
            ("lockstep_requests{SELECT}", "{{instance}} {{state}}"))
    d.lines("Tokens", "Prompt tokens that were computed or found, and tokens of answers.", "short",
            ("rate(vllm:prompt_tokens_total{SELECT}[R])", "{{instance}} prompt"),
            ("rate(vllm:generation_tokens_total{SELECT}[R])", "{{instance}} generated"))
    d.lines("Endings", "Sequences a second, by reason.", "reqps",
            ("rate(vllm:request_success_total{SELECT}[R])", "{{instance}} {{finished_reason}}"))
    d.lines("Refusals", "Requests refused a second, by reason.", "reqps",
            ("rate(lockstep_rejections_total{SELECT}[R])", "{{instance}} {{reason}}"))
    d.lines("HTTP answers", "By status code.", "reqps",
            ("rate(lockstep_http_responses_total{SELECT}[R])", "{{instance}} {{code}}"))
    d.lines("How requests left the engine", "Completed, failed, cancelled, rejected.", "reqps",
            ("rate(lockstep_requests_total{SELECT}[R])", "{{instance}} {{outcome}}"))

    d.row("Memory")
    d.lines("KV blocks", "Free and cached ones can be used again.", "short",
            ("lockstep_kv_blocks{SELECT}", "{{instance}} {{state}}"), stack=True)
    d.lines("Preemptions", "Sequences set back to make room, a second.", "short",
            ("rate(vllm:num_preemptions_total{SELECT}[R])", "{{instance}}"))
    d.lines("Prefix cache", "Share of looked-up prompt tokens that were found.", "percentunit",
            ("rate(vllm:prefix_cache_hits_total{SELECT}[R])"
             " / rate(vllm:prefix_cache_queries_total{SELECT}[R])", "{{instance}}"))
    d.lines("Memory of a rank", "Resident weights, weights as planned, KV cache.", "bytes",
            ("lockstep_weight_bytes{SELECT}", "{{instance}} rank {{rank}} weights"),
            ("lockstep_predicted_weight_bytes{SELECT}", "{{instance}} rank {{rank}} planned"),
            ("lockstep_kv_bytes{SELECT}", "{{instance}} rank {{rank}} KV"))
    d.lines("Memory against the plan", "Each part of a rank's memory as allocated, over what was "
            "planned; above 1 `lockstep plan` is too hopeful.", "percentunit",
            ("lockstep_memory_bytes{SELECT} / lockstep_predicted_memory_bytes{SELECT}",
             "{{instance}} rank {{rank}} {{part}}"))
    d.table("Start-up", "Where the last start spent its seconds.",
            "lockstep_startup_phase_seconds{SELECT}", width=8)
    d.table("Versions and cache", "Builds, and the KV cache's configuration.",
            "lockstep_build_info{SELECT} or vllm:cache_config_info{SELECT}", width=8)
    return d


def step():
    d = Dashboard("lockstep-step", "Lockstep: where did the step go",
                  "One step of the group, taken apart: plan, compute, wait for the slowest rank, "
                  "transfer, sampling, and the device's idle time between steps.")
    d.number("Step", "Mean, from plan sent to result.", "s",
             "sum by (instance) (rate(lockstep_step_seconds_sum{SELECT}[R]))"
             " / sum by (instance) (rate(lockstep_step_seconds_count{SELECT}[R]))", width=6)
    d.number("Steps a second", "Of all kinds.", "short",
             "sum by (instance) (rate(lockstep_step_seconds_count{SELECT}[R]))", width=6)
    d.number("Lost to skew", "What the most patient rank waits above the slowest, of the step.",
             "percentunit", "lockstep:collective_skew:ratio5m{SELECT}",
             [GOOD, {"color": "orange", "value": 0.1}, {"color": "red", "value": 0.2}], width=6)
    d.number("Straggler", "The wait of the rank that waits least: the others wait for it.", "s",
             "bottomk by (instance) (1, lockstep:collective_wait_seconds:mean5m{SELECT})", width=6,
             legend="{{instance}} rank {{rank}}", now_alone=True)  # not whoever was it before

    d.row("The group")
    d.lines("Steps by kind", "Prompts, single tokens, or both in one step.", "short",
            ("sum by (instance, kind) (rate(lockstep_step_seconds_count{SELECT}[R]))",
             "{{instance}} {{kind}}"), stack=True)
    d.lines("Mean step by kind", "From plan sent to result.", "s",
            (mean("lockstep_step_seconds", "kind"), "{{instance}} {{kind}}"))
    d.lines("Plan", "Deciding what the step computes; off the device's path while it is short.",
            "s", *quantiles("lockstep_plan_seconds", 50, 99))
    d.heat_of_histogram("Steps, all of them", "How many steps took how long.", "s",
                        "sum by (le) (increase(lockstep_step_seconds_bucket{SELECT}[R]))", width=24)

    d.row("The ranks: means per step")
    d.lines("Compute", "A rank's own work.", "s",
            (mean('lockstep_rank_step_seconds', "rank").replace(
                "{SELECT}", '{kind="compute", SELECT}'), "{{instance}} rank {{rank}}"))
    d.lines("Wait", "For slower ranks: low on the straggler, high on the others.", "s",
            (mean("lockstep_collective_wait_seconds", "rank"), "{{instance}} rank {{rank}}"))
    d.lines("Transfer", "Moving bytes once every rank is there.", "s",
            (mean("lockstep_collective_transfer_seconds", "rank"), "{{instance}} rank {{rank}}"))
    d.lines("Sampling", "Choosing the tokens.", "s",
            (mean('lockstep_rank_step_seconds', "rank").replace(
                "{SELECT}", '{kind="sampling", SELECT}'), "{{instance}} rank {{rank}}"))
    d.lines("Idle between steps", "The device had nothing to do though the next step was known. "
            "GPUs only.", "s",
            (mean("lockstep_device_idle_seconds", "rank"), "{{instance}} rank {{rank}}"))
    d.lines("Bytes in collectives", "What a rank puts in.", "Bps",
            ("rate(lockstep_collective_bytes_total{SELECT}[R])", "{{instance}} rank {{rank}}"))
    d.lines("One step, taken apart", "Mean over the ranks; what is left of the step is the way "
            "to the workers and back.", "s",
            ('avg by (instance) (rate(lockstep_rank_step_seconds_sum{kind="compute", SELECT}[R])'
             ' / rate(lockstep_rank_step_seconds_count{kind="compute", SELECT}[R]))',
             "{{instance}} compute"),
            ("avg by (instance) (rate(lockstep_collective_wait_seconds_sum{SELECT}[R])"
             " / rate(lockstep_collective_wait_seconds_count{SELECT}[R]))", "{{instance}} wait"),
            ("avg by (instance) (rate(lockstep_collective_transfer_seconds_sum{SELECT}[R])"
             " / rate(lockstep_collective_transfer_seconds_count{SELECT}[R]))",
             "{{instance}} transfer"),
            ('avg by (instance) (rate(lockstep_rank_step_seconds_sum{kind="sampling", SELECT}[R])'
             ' / rate(lockstep_rank_step_seconds_count{kind="sampling", SELECT}[R]))',
             "{{instance}} sampling"), stack=True, width=24)

    d.row("Skew")
    d.heat_by_rank("Who holds the others up",
                   "Per rank: how much less it waits than the most patient one. Dark is late.", "s",
                   "max by (instance) (lockstep:collective_wait_seconds:mean5m{SELECT})"
                   " - on (instance) group_right ()"
                   " sum by (instance, rank) (lockstep:collective_wait_seconds:mean5m{SELECT})")

    d.lines("Steps that waited for a rank", "By 5 % of the step or more.", "short",
            ("rate(lockstep_straggler_steps_total{SELECT}[R])", "{{instance}} rank {{rank}}"),
            width=24)

    d.row("The devices (NVML; absent where a driver does not tell)")
    d.lines("SM active", "Share of the multiprocessors that were busy.", "percentunit",
            ("lockstep_gpu_sm_active{SELECT}", "{{instance}} rank {{rank}}"))
    d.lines("Memory bandwidth in use", "Decoding should be near the top.", "percentunit",
            ("lockstep_gpu_dram_active{SELECT}", "{{instance}} rank {{rank}}"))
    d.lines("NVLink", "Over all links of a rank.", "Bps",
            ("lockstep_gpu_nvlink_tx_bytes_per_second{SELECT}", "{{instance}} rank {{rank}} sent"),
            ("lockstep_gpu_nvlink_rx_bytes_per_second{SELECT}",
             "{{instance}} rank {{rank}} received"))
    d.lines("Clocks", "A rank whose clock is lower makes the others wait.", "hertz",
            ("lockstep_gpu_sm_clock_hertz{SELECT}", "{{instance}} rank {{rank}}"))
    d.lines("Reasons of low clocks", "NVML's bits; 0: none.", "short",
            ("lockstep_gpu_throttle_reasons{SELECT}", "{{instance}} rank {{rank}}"))
    d.lines("Power", "Draw of each device.", "watt",
            ("lockstep_gpu_power_watts{SELECT}", "{{instance}} rank {{rank}}"))

    d.row("The last load")
    d.table("Load phases of each rank", "Seconds.", "lockstep_load_phase_seconds{SELECT}", width=24)
    return d


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []
    for name, dashboard in (("overview", overview()), ("step", step())):
        path = HERE / f"lockstep-{name}.json"
        text = json.dumps(dashboard.json(), indent=1) + "\n"
        if check and (not path.exists() or path.read_text() != text):
            stale.append(path.name)
        elif not check:
            path.write_text(text)
    if stale:
        sys.exit(f"deploy/grafana: {', '.join(stale)}: not what dashboards.py makes; run it")


if __name__ == "__main__":
    main()
