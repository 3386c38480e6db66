#!/usr/bin/env python3
"""On a machine with GPUs: what NVML tells comes out of /metrics, true or not at all.

    LOCKSTEP_BIN=FOLDER tests/deploy/gpu_metrics.py [RANKS]

Not a test of ctest's: machines that build have no GPU. Needs python3 and the three
programs of a CUDA build alone.
"""

import concurrent.futures
import re
import sys
import threading

import harness

# Every rank's, in a range that a sane device keeps.
ALWAYS = {"memory_used_bytes": (2**20, 2**40), "sm_clock_hertz": (1e8, 1e10),
          "memory_clock_hertz": (1e8, 1e11), "power_watts": (1, 5000),
          "temperature_celsius": (1, 120), "throttle_reasons": (0, 2**32)}
# Where the chip has them: shares of 1, and rates.
PERHAPS = {"sm_active": (0, 1), "dram_active": (0, 1),
           "nvlink_tx_bytes_per_second": (0, 1e13), "nvlink_rx_bytes_per_second": (0, 1e13)}


def figures(port):
    """{name: {rank: value}} of lockstep_gpu_*."""
    found = {}
    _, text = harness.request(port, "GET", "/metrics")
    for name, rank, value in re.findall(
            r'^lockstep_gpu_(\w+)\{rank="(\d+)"\} (\S+)$', text, re.MULTILINE):
        found.setdefault(name, {})[int(rank)] = float(value)
    return found


def memory_parts(text, name):
    """{(rank, part): bytes} of lockstep_NAME, whose labels come in any order."""
    found = {}
    for labels, value in re.findall(rf"^lockstep_{name}\{{(.*)\}} (\S+)$", text, re.MULTILINE):
        of = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        found[int(of["rank"]), of["part"]] = float(value)
    return found


def main():
    ranks = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    busiest = {}
    with harness.served("--backend", "cuda", tensor_parallel_size=ranks) as port:
        done = threading.Event()

        def ask():
            while not done.is_set():
                status, text = harness.request(port, "POST", "/v1/completions", {
                    "model": "demo", "prompt": "A rope", "max_tokens": 512, "ignore_eos": True})
                assert status == 200, text

        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            asking = [pool.submit(ask) for _ in range(16)]
            try:
                harness.wait_for("every figure that NVML always gives", lambda: (
                    set(ALWAYS) <= set(figures(port))), seconds=20)

                def activity():
                    for name, of_ranks in figures(port).items():
                        for rank, value in of_ranks.items():
                            busiest.setdefault(name, {}).setdefault(rank, []).append(value)
                    # Several of the samples that a worker takes, once a second or so.
                    return any(len(set(values)) >= 4 for of_ranks in busiest.values()
                               for values in of_ranks.values())

                harness.wait_for("figures that move", activity, seconds=30)
            finally:
                done.set()
            for each in asking:
                each.result()
        _, whole = harness.request(port, "GET", "/metrics")
    for name, (low, high) in {**ALWAYS, **PERHAPS}.items():
        seen = busiest.get(name)
        if seen is None and name in PERHAPS:
            print(f"{name:28} absent: the driver does not tell")
            continue
        assert seen is not None and set(seen) == set(range(ranks)), f"{name}: ranks {seen}"
        for rank, values in sorted(seen.items()):
            assert all(low <= value <= high for value in values), f"{name}, rank {rank}: {values}"
            print(f"{name:28} rank {rank}   {min(values):.6g} to {max(values):.6g}")
    if "sm_active" in busiest:
        assert max(busiest["sm_active"][0]) > 0, "sm_active is 0 while it computes"
    assert re.search(r'^lockstep_device_idle_seconds_count\{rank="0"\} [1-9]', whole,
                     re.MULTILINE), "no lockstep_device_idle_seconds"
    actual, predicted = memory_parts(whole, "memory_bytes"), memory_parts(whole, "predicted_memory_bytes")
    for (rank, part), value in sorted(actual.items()):
        print(f"memory {part:14} rank {rank}   {value / 2**20:10.1f} MiB, "
              f"{predicted[rank, part] / 2**20:10.1f} predicted")
    # Known to the byte, or what the libraries took.
    for rank in range(ranks):
        assert actual[rank, "kv"] == predicted[rank, "kv"], f"KV of rank {rank}"
        assert 0 < actual[rank, "activations"] <= 1.05 * predicted[rank, "activations"], rank
        assert (rank, "communication") in actual, f"rank {rank} does not tell its communication"
    print("ok")


if __name__ == "__main__":
    main()
