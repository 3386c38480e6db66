#!/usr/bin/env python3
"""Measures the figures of docs/reliability.md on the real programs.

    tests/integration/reliability_figures.py BUILD/bin [MODEL] [--only NAME] [--scale 1.0]

Starts `lockstep serve` at tp 2 for each figure, with ports of the kernel's
choosing, and prints one line a figure. --scale makes the long ones shorter.
"""
import argparse
import http.client
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]


class Server:
    def __init__(self, programs, model, *flags):
        self.dir = tempfile.TemporaryDirectory()
        self.log_path = pathlib.Path(self.dir.name) / 'log'
        ports = pathlib.Path(self.dir.name) / 'ports'
        self.log_file = open(self.log_path, 'wb')
        self.process = subprocess.Popen(
            [str(programs / 'lockstep'), 'serve', '--model', str(model),
             '--tensor-parallel-size', '2', '--dtype', 'float32', '--http-port', '0',
             '--grpc-port', '0', '--port-file', str(ports), *flags],
            stdout=self.log_file, stderr=self.log_file)
        while not ports.exists():
            if self.process.poll() is not None:
                raise RuntimeError(self.log())
            time.sleep(0.01)
        self.port = json.loads(ports.read_text())['http_port']

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(40)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.log_file.close()
        self.dir.cleanup()

    def log(self):
        return self.log_path.read_text(errors='replace')

    def get(self, path):
        connection = http.client.HTTPConnection('127.0.0.1', self.port, timeout=60)
        connection.request('GET', path)
        answer = connection.getresponse()
        body = answer.read().decode()
        connection.close()
        return answer.status, body

    def metric(self, name):
        for line in self.get('/metrics')[1].splitlines():
            if line.startswith(name + ' '):
                return float(line.split()[1])
        return -1.0

    def epoch(self):
        return int(self.metric('lockstep_epoch'))

    def ready(self):
        return self.get('/ready')[0] == 200

    def children(self, name):
        out = subprocess.run(['pgrep', '-P', str(self.process.pid), '-f', name],
                             capture_output=True, text=True)
        return [int(pid) for pid in out.stdout.split()]

    def await_(self, condition, seconds=60):
        until = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > until:
                raise RuntimeError('waited in vain\n' + self.log())
            time.sleep(0.005)

    def whole_after(self, epoch):
        self.await_(lambda: self.ready() and self.epoch() > epoch)

    def blocks_back(self):
        return all(self.metric('lockstep_kv_blocks{state="%s"}' % s) == 0
                   for s in ('active', 'pending'))


class Stream(threading.Thread):
    """A streamed completion; remembers when each token came."""

    def __init__(self, server, prompt, tokens):
        super().__init__(daemon=True)
        self.server, self.prompt, self.tokens = server, prompt, tokens
        self.times, self.ids, self.error, self.done = [], [], None, False
        self.complete = False  # it said so itself
        self.ended_at = None
        self.start()

    def run(self):
        try:
            connection = http.client.HTTPConnection('127.0.0.1', self.server.port, timeout=120)
            connection.request('POST', '/v1/completions', json.dumps(
                {'prompt': self.prompt, 'max_tokens': self.tokens, 'stream': True,
                 'temperature': 0, 'ignore_eos': True, 'return_token_ids': True}),
                {'Content-Type': 'application/json'})
            answer = connection.getresponse()
            if answer.status != 200:
                self.error = answer.read().decode()
            for line in answer:
                self.complete = self.complete or line.startswith(b'data: [DONE]')
                if not line.startswith(b'data: {'):
                    continue
                event = json.loads(line[6:])
                if 'error' in event:
                    self.error = event['error']['message']
                    continue
                for choice in event['choices']:
                    self.ids += choice['token_ids']
                self.times.append(time.monotonic())
        except Exception as e:  # the connection broke
            self.error = self.error or repr(e)
        self.ended_at = time.monotonic()
        self.done = True

    def await_tokens(self, count):
        while len(self.ids) < count and not self.done:
            time.sleep(0.002)


def percentile(values, p):
    values = sorted(values)
    return values[min(len(values) - 1, int(p / 100 * len(values)))]


def summary(seconds):
    return 'p50 %.0f ms, p99 %.0f ms, worst %.0f ms of %d' % (
        1000 * percentile(seconds, 50), 1000 * percentile(seconds, 99), 1000 * max(seconds),
        len(seconds))


def kill(args):
    """2 and 4: SIGKILL of a worker until it is known, and until the next token."""
    known, again = [], []
    with Server(args.programs, args.model) as server:
        for i in range(max(4, int(40 * args.scale))):
            epoch = server.epoch()
            stream = Stream(server, 'Count from %d' % i, 400)
            stream.await_tokens(20)
            began, before = time.monotonic(), len(stream.ids)
            os.kill(server.children('lockstep-worker')[i % 2], signal.SIGKILL)
            while ('epoch %d ended' % epoch) not in server.log():
                time.sleep(0.001)
            known.append(time.monotonic() - began)
            stream.await_tokens(before + 4)  # what was on its way does not count
            again.append(time.monotonic() - began)
            stream.join()
            assert stream.error is None and len(stream.ids) == 400, stream.error
            server.whole_after(epoch)
    print('2  kill until the coordinator knows: ' + summary(known))
    print('4  kill until the next token:        ' + summary(again))


def second_death(args):
    """3: the second SIGKILL until the client has its end."""
    ends = []
    with Server(args.programs, args.model) as server:
        for i in range(max(3, int(15 * args.scale))):
            epoch = server.epoch()
            stream = Stream(server, 'Count from %d' % i, 1800)
            stream.await_tokens(10)
            os.kill(server.children('lockstep-worker')[1], signal.SIGKILL)
            server.whole_after(epoch)
            stream.await_tokens(len(stream.ids) + 10)
            began = time.monotonic()
            os.kill(server.children('lockstep-worker')[1], signal.SIGKILL)
            stream.join()
            ends.append(stream.ended_at - began)
            assert stream.error and 'rank' in stream.error, stream.error
            server.whole_after(epoch + 1)
    print('3  second kill until the client\'s end: ' + summary(ends))


def stop(args):
    """6 and 7: SIGSTOP for ever, and for half a second."""
    noticed = []
    with Server(args.programs, args.model) as server:
        for i in range(max(2, int(8 * args.scale))):
            epoch = server.epoch()
            stream = Stream(server, 'Count from %d' % i, 200)
            stream.await_tokens(10)
            began = time.monotonic()
            os.kill(server.children('lockstep-worker')[i % 2], signal.SIGSTOP)
            while ('epoch %d ended' % epoch) not in server.log():
                time.sleep(0.002)
            noticed.append(time.monotonic() - began)
            stream.join()
            assert stream.error is None and len(stream.ids) == 200, stream.error
            server.whole_after(epoch)
    print('6  SIGSTOP for ever until noticed: ' + summary(noticed))
    with Server(args.programs, args.model) as server:
        rounds = max(5, int(100 * args.scale))
        streams = [Stream(server, 'Count %d' % i, 1900) for i in range(2)]
        for i in range(rounds):
            if all(s.done for s in streams):
                streams = [Stream(server, 'Count %d' % i, 1900)]
            pid = server.children('lockstep-worker')[i % 2]
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.5)
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.1)
        print('7  SIGSTOP of 500 ms x %d: %d false kills' % (rounds, server.epoch() - 1))


def coordinator(args):
    """11: SIGKILL of the coordinator."""
    ends = []
    for i in range(max(2, int(5 * args.scale))):
        with Server(args.programs, args.model) as server:
            stream = Stream(server, 'Count from %d' % i, 1500)
            stream.await_tokens(10)
            began = time.monotonic()
            os.kill(server.children('lockstep-coordinator')[0], signal.SIGKILL)
            stream.join()
            ends.append(stream.ended_at - began)
            assert not stream.complete, 'an answer without a coordinator'
    print('11 coordinator killed until the client\'s end: ' + summary(ends))


def cancel(args):
    """19: clients that leave after a random number of chunks."""
    total = max(200, int(10_000 * args.scale))
    with Server(args.programs, args.model) as server:
        def leave(k):
            for i in range(total // 8):
                connection = http.client.HTTPConnection('127.0.0.1', server.port, timeout=60)
                connection.request('POST', '/v1/completions', json.dumps(
                    {'prompt': 'Count %d' % i, 'max_tokens': 1500, 'stream': True}),
                    {'Content-Type': 'application/json'})
                answer = connection.getresponse()
                for _ in range((i * 7 + k) % 11):
                    answer.readline()
                connection.close()
        threads = [threading.Thread(target=leave, args=(k,)) for k in range(8)]
        began = time.monotonic()
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        seconds = time.monotonic() - began
        server.await_(server.blocks_back)
        free = sum(server.metric('lockstep_kv_blocks{state="%s"}' % s) for s in ('free', 'cached'))
        print('19 %d cancelled streams in %.0f s: all blocks back (%d), epoch %d' %
              (total, seconds, free, server.epoch()))


def drain(args):
    """20: SIGTERM under 64 streams."""
    with Server(args.programs, args.model, '--max-num-seqs', '64') as server:
        streams = [Stream(server, 'Count from %d' % i, 150) for i in range(64)]
        for stream in streams:
            stream.await_tokens(1)
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        for stream in streams:
            stream.join()
        failed = sum(s.error is not None or len(s.ids) != 150 for s in streams)
        code = server.process.wait(40)
        print('20 SIGTERM under 64 streams: %d failed, gone after %.1f s with code %d' %
              (failed, time.monotonic() - began, code))


def memory(args):
    """22: resident memory over many requests."""
    total = max(1000, int(20_000 * args.scale))
    with Server(args.programs, args.model) as server:
        pid = server.children('lockstep-coordinator')[0]

        def resident():
            text = pathlib.Path('/proc/%d/status' % pid).read_text()
            return int(re.search(r'VmRSS:\s+(\d+)', text).group(1)) / 1024

        def ask(k, count):
            connection = http.client.HTTPConnection('127.0.0.1', server.port, timeout=60)
            for i in range(count):
                connection.request('POST', '/v1/completions', json.dumps(
                    {'prompt': 'Say %d %d' % (k, i), 'max_tokens': 1 + i % 5,
                     'stream': i % 3 == 0}), {'Content-Type': 'application/json'})
                answer = connection.getresponse()
                assert answer.status == 200
                answer.read()

        def all_ask(count):
            threads = [threading.Thread(target=ask, args=(k, count // 8)) for k in range(8)]
            for t in threads:
                t.start()
            for t in threads:
                t.join()
        all_ask(total // 20)
        warm = resident()
        all_ask(total)
        print('22 resident memory over %d requests: %.1f MiB, then %.1f MiB' %
              (total, warm, resident()))


FIGURES = {f.__name__: f for f in (kill, second_death, stop, coordinator, cancel, drain, memory)}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('programs', type=pathlib.Path)
    parser.add_argument('model', type=pathlib.Path, nargs='?', default=ROOT / 'deploy/demo/model')
    parser.add_argument('--only', choices=sorted(FIGURES))
    parser.add_argument('--scale', type=float, default=1.0)
    args = parser.parse_args()
    for name, figure in FIGURES.items():
        if args.only in (None, name):
            figure(args)
            sys.stdout.flush()


if __name__ == '__main__':
    main()
