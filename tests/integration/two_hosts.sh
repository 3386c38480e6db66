#!/usr/bin/env bash
# Two hosts as two network namespaces joined by a veth pair: the coordinator and
# one worker on the first, the other worker on the second, which knows nothing
# but the coordinator's address. Then the second host's worker is killed and
# replaced under a running stream.
#
#   two_hosts.sh BIN_DIR MODEL_DIR
set -euo pipefail
bin=$1
model=$2

if [ "$(id -u)" != 0 ] || ! ip netns list >/dev/null 2>&1; then
  echo "SKIPPED two_hosts: needs root and iproute2 to make network namespaces"
  exit 77
fi
id=$$
a="lockstep-a-$id"
b="lockstep-b-$id"
work=$(mktemp -d)
pids=()
clean() {
  for pid in "${pids[@]}"; do kill -KILL "$pid" 2>/dev/null || true; done
  ip netns del "$a" 2>/dev/null || true
  ip netns del "$b" 2>/dev/null || true
  rm -rf "$work"
}
trap clean EXIT
fail() {
  echo "FAILED: $*"
  tail -n 40 "$work"/*.log
  exit 1
}
# await WHAT COMMAND...: at most 2 minutes, which a sanitizer build may need
await() {
  local what=$1 n=0
  shift
  until "$@" >/dev/null 2>&1; do
    n=$((n + 1))
    [ "$n" -lt 2400 ] || fail "$what"
    read -rt 0.05 <> <(:) || true
  done
}

if ! ip netns add "$a" 2>/dev/null; then
  echo "SKIPPED two_hosts: this kernel or container allows no network namespaces"
  exit 77
fi
ip netns add "$b"
ip link add "va$id" netns "$a" type veth peer name "vb$id" netns "$b"
nsenter --net="/run/netns/$a" ip addr add 10.77.0.1/24 dev "va$id"
nsenter --net="/run/netns/$b" ip addr add 10.77.0.2/24 dev "vb$id"
for ns in "$a" "$b"; do nsenter --net="/run/netns/$ns" ip link set lo up; done
nsenter --net="/run/netns/$a" ip link set "va$id" up
nsenter --net="/run/netns/$b" ip link set "vb$id" up

# Never through a function in the background: $! must be the program's own id.
start_worker() {  # start_worker NAMESPACE LOG
  nsenter --net="/run/netns/$1" "$bin/lockstep-worker" --coordinator 10.77.0.1:50052 --insecure >"$work/$2" 2>&1 &
  pids+=("$!")
}

nsenter --net="/run/netns/$a" "$bin/lockstep-coordinator" --model "$model" --dtype float32 --tensor-parallel-size 2 \
  --worker-address 10.77.0.1:50052 --insecure --http-port 0 --grpc-port 50051 \
  >"$work/stdout" 2>"$work/coordinator.log" &
coordinator=$!
pids+=("$coordinator")
start_worker "$a" worker-a.log
near=${pids[-1]}
start_worker "$b" worker-b1.log
remote=${pids[-1]}
await "the coordinator never said ready" grep -qx ready "$work/stdout"

ask() { nsenter --net="/run/netns/$a" "$bin/lockstep" generate --chat --temperature 0 "$@"; }
answer=$(ask "What is 35 + 28?")
[ "$answer" = "35 + 28 = 63" ] || fail "unexpected answer: $answer"
ask --verbose "What is 35 + 28?" 2>"$work/info.log" >/dev/null
grep -q "rank 0" "$work/info.log" && grep -q "rank 1" "$work/info.log" || fail "ranks not named"

long=(--max-tokens 600 --ignore-eos "Count from 1 to 60.")
expected=$(ask "${long[@]}")
ask "${long[@]}" >"$work/paused.txt" 2>"$work/paused.log" &
stream=$!
await "no text came" test -s "$work/paused.txt"
kill -KILL "$remote"
start_worker "$b" worker-b2.log
wait "$stream" || fail "the stream broke: $(cat "$work/paused.log")"
[ "$(cat "$work/paused.txt")" = "$expected" ] || fail "the paused stream differs"

kill -TERM "$coordinator"
wait "$coordinator" || fail "the coordinator did not drain cleanly"
# The workers end with it; in a sanitizer's build that is when leaks are reported.
for worker in "$near" "${pids[-1]}"; do
  wait "$worker" || fail "a worker ended with exit code $?"
done
if grep -qE "ERROR: (Address|Leak)Sanitizer|WARNING: ThreadSanitizer|runtime error:" "$work"/*; then
  fail "a sanitizer has a report"
fi
echo "PASSED two_hosts: one model over two hosts, a worker lost and replaced under a stream"
