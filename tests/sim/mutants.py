#!/usr/bin/env python3
"""Seeds bugs into the scheduler, one at a time, and asks whether the simulation notices.

Each mutant is a small textual change to a copy of the sources; the simulation
is built from that copy and run over the seeds 1..N. A mutant is caught when some
seed ends in a violation, a broken CHECK or a hang.

    tests/sim/mutants.py [--seeds 1000] [--jobs 2] [--only TEXT] [--markdown]

Needs the compiler and the absl development files, nothing that was built before.
Exits 1 when fewer than 19 in 20 are caught, 2 when a mutation no longer applies.
"""
import argparse
import concurrent.futures
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
SOURCES = [
    'common/check.cc', 'coordinator/retry_delay.cc', 'coordinator/kv/block_allocator.cc',
    'coordinator/kv/prefix_cache.cc', 'coordinator/admission.cc', 'coordinator/growth_forecast.cc',
    'coordinator/scheduler.cc', 'coordinator/scheduler_death.cc', 'coordinator/scheduler_plan.cc',
    'coordinator/scheduler_apply.cc', 'coordinator/scheduler_integrity.cc', 'worker/slot_book.cc',
    'tests/sim/client_mix.cc', 'tests/sim/ledger.cc', 'tests/sim/sim_worker.cc',
    'tests/sim/simulation.cc', 'tests/sim/main.cc',
]
FOLDERS = ['common', 'wire', 'coordinator', 'worker', 'tests/sim', 'tests/fakes', 'model']

ALLOCATOR = 'coordinator/kv/block_allocator.cc'
CACHE = 'coordinator/kv/prefix_cache.cc'
REQUESTS = 'coordinator/scheduler.cc'
DEATH = 'coordinator/scheduler_death.cc'
PLAN = 'coordinator/scheduler_plan.cc'
APPLY = 'coordinator/scheduler_apply.cc'

# name, file, the text to find (once), what replaces it; or a list of each
MUTANTS = [
    ('skip a free: blocks of who leaves a slot are forgotten', REQUESTS,
     'allocator.Release(s->table.Take(), s->last_step);', 's->table.Take();'),
    ('free twice: a reclaimed block enters the free list two times', ALLOCATOR,
     '  free_.push_back(block);\n}', '  free_.push_back(block);\n  free_.push_back(block);\n}'),
    ('drop the fence: freed blocks are reusable at once', ALLOCATOR,
     'const bool fenced = fence > acknowledged_;', 'const bool fenced = fence > acknowledged_ + 9;'),
    ('fence one step early', ALLOCATOR,
     'if (release.fence > step) return false;', 'if (release.fence > step + 1) return false;'),
    ('fence by the step before the last one', REQUESTS,
     'allocator.Release(s->table.Take(), s->last_step);',
     'allocator.Release(s->table.Take(), s->last_step > 0 ? s->last_step - 1 : 0);'),
    ('wrong reference count: sharing a block does not hold it', ALLOCATOR,
     '  ++block.holds;\n}', '  if (cache_.IsIdle(id)) ++block.holds;\n}'),
    ('a released block is free while somebody else holds it', ALLOCATOR,
     'if (--block.holds > 0) continue;', '--block.holds;'),
    ('evict the newest: a parent before its children', CACHE,
     'const BlockId block(oldest_idle_);', 'const BlockId block(newest_idle_);'),
    ('the prefix cache believes a poor hash, without comparing tokens', CACHE,
     ['for (; i + 1 < tokens.size(); i += 2)',
      'entry.salt == salt &&\n         std::equal('],
     ['tokens = tokens.first((tokens.size() + 1) / 2);\n  for (; i + 1 < tokens.size(); i += 2)',
      'entry.salt == salt ||\n         std::equal(']),
    ('the salt does not part the prefix cache', PLAN,
     'parent = allocator.cache().Find(parent, Salt(s),',
     'parent = allocator.cache().Find(parent, 0,'),
    ('blocks enter the cache when planned, not when acknowledged', PLAN,
     '  s->num_in_flight += span.samples ? 1 : 0;\n',
     '  if (!span.samples && s->num_computed <= s->num_prompt()) {\n'
     '    std::swap(s->num_computed, s->num_acknowledged);\n    EnterCache(s);\n'
     '    std::swap(s->num_computed, s->num_acknowledged);\n  }\n'
     '  s->num_in_flight += span.samples ? 1 : 0;\n'),
    ('a hit may cover the whole prompt: nothing is left to compute', PLAN,
     '(s.num_known() - 1) / config.block_size', 's.num_known() / config.block_size'),
    ('prompt log-probabilities are asked for and a prefix is skipped', PLAN,
     'if (!MayShare(s) || WantsPromptLogprobs(s)) return found;', 'if (!MayShare(s)) return found;'),
    ('prompt log-probabilities are delivered again after a replay', APPLY,
     'r->next_prompt_logprob = end;', ''),
    ('a token is delivered twice', APPLY,
     '  events->push_back(std::move(event));\n',
     '  events->push_back(event);\n  if (s->generated.size() == 3) events->push_back(event);\n'),
    ('a late token of a preempted run is taken for the next', APPLY,
     's != nullptr && s->run == span.run ? s : nullptr', 's'),
    ('a replay loses the last generated token', DEATH,
     '    LeaveSlot(s);\n    s->resumed = true;\n    Enqueue(s);',
     '    LeaveSlot(s);\n    if (s->generated.size() > 1) s->generated.pop_back();\n'
     '    s->resumed = true;\n    Enqueue(s);'),
    ('one token too many', APPLY,
     'count >= request.sampling.max_tokens', 'count > request.sampling.max_tokens'),
    ('preempt the oldest', PLAN,
     '*std::find_if(running.rbegin(), running.rend(),', '*std::find_if(running.begin(), running.end(),'),
    ('no guarantee: a sequence is preempted again and again', PLAN,
     'if (!KeepsGuarantees(s)) return false;', ''),
    ('who was preempted goes to the back', REQUESTS,
     '  LeaveSlot(s);\n  s->resumed = true;\n  ++s->num_preemptions;',
     '  LeaveSlot(s);\n  s->request->arrival = next_arrival++;\n  ++s->num_preemptions;'),
    ('a deadline is looked at one step in ten', PLAN,
     'while (!deadlines.empty() && deadlines.begin()->first <= now_ms)',
     'while (last_step % 10 == 0 && !deadlines.empty() && deadlines.begin()->first <= now_ms)'),
    ('the second death is forgiven', DEATH,
     ['if (id == on_trial && IsPresent(*r)) guilty.push_back(r.get());', '++r->num_deaths >= 2'],
     ['', '++r->num_deaths >= 3']),
    ('suspects are replayed together', PLAN,
     '  if (num_suspects == 0 && trial_step <= acknowledged) return false;\n',
     '  if (num_suspects < 1000) return false;\n'),
    ('a trial begins while others are in flight', PLAN,
     'if (in_flight.empty() && TryStart(s, draft))', 'if (TryStart(s, draft))'),
    ('others are planned before the verdict', PLAN,
     'if (trial_step > acknowledged) return true;\n', ''),
    ('suspects are cleared by their first step', DEATH,
     's->num_acknowledged >= s->clear_at', 's->num_acknowledged > 0'),
    ('a death that a suspect explains counts against the others', DEATH,
     '      r->num_deaths = 0;\n',
     '      if (IsPresent(*r) && id != on_trial && ++r->num_deaths >= 2) guilty.push_back(r.get());\n'),
    ('siblings are forgotten when their leader ends early', REQUESTS,
     'if (--r->num_live > 0 && r->num_live == r->num_held_back)',
     'if (--r->num_live > 100 && r->num_live == r->num_held_back)'),
    ('a slot is not given back when it is finished', REQUESTS,
     '  finished_slots.push_back(s->slot);\n', ''),
    ('the queue is not bounded', 'coordinator/admission.cc',
     'if (waiting < uint64_t{config_.max_queued_requests} + idle_slots) return absl::OkStatus();',
     'if (waiting < 1000) return absl::OkStatus();'),
    ('a token beyond the vocabulary is believed', APPLY,
     'got.token >= config.vocab_size', 'got.token > config.vocab_size'),
    ('private blocks outlive their request with the cache off', APPLY,
     '/*keep=*/config.enable_prefix_caching', '/*keep=*/true'),
]


def build(folder, obj_dir, sources):
    compiler = shutil.which('ccache')
    cxx = ([compiler] if compiler else []) + ['c++', '-std=c++20', '-O1', '-I', str(folder)]
    objects = []
    for source in sources:
        out = obj_dir / (source.replace('/', '_') + '.o')
        done = subprocess.run(cxx + ['-c', str(folder / source), '-o', str(out)],
                              capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(done.stderr[-2000:])
        objects.append(out)
    return objects


def absl_libs():
    flags = subprocess.run(['pkg-config', '--libs', 'absl_status', 'absl_statusor', 'absl_strings',
                            'absl_raw_hash_set', 'absl_hash', 'absl_cord'],
                           capture_output=True, text=True, check=True)
    return flags.stdout.split()


def run_mutant(index, seeds, base, base_objects, libs, timeout):
    name, file, old, new = MUTANTS[index]
    text = (ROOT / file).read_text()
    edits = zip(old, new) if isinstance(old, list) else [(old, new)]
    for before, after in edits:
        if text.count(before) != 1:
            return index, 'STALE', f'{file}: the text to change occurs {text.count(before)} times'
        text = text.replace(before, after)
    with tempfile.TemporaryDirectory() as temp:
        temp = pathlib.Path(temp)
        # Only the mutated file is compiled anew; headers come from the copy.
        mutated = base / 'mutants' / f'm{index}.cc'
        mutated.write_text(text)
        out = temp / 'mutant.o'
        done = subprocess.run(['c++', '-std=c++20', '-O1', '-I', str(base), '-c', str(mutated),
                               '-o', str(out)], capture_output=True, text=True)
        if done.returncode != 0:
            return index, 'STALE', 'does not compile: ' + done.stderr.strip().splitlines()[0]
        objects = [o for s, o in base_objects.items() if s != file] + [out]
        binary = temp / 'sim'
        subprocess.run(['c++', '-o', str(binary)] + [str(o) for o in objects] + libs, check=True)
        try:
            done = subprocess.run([str(binary), '--start', '1', '--count', str(seeds)],
                                  capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            return index, 'caught', f'a run did not end within {timeout} s'
        if done.returncode == 0:
            return index, 'MISSED', ''
        first = (done.stdout + done.stderr).strip().splitlines()
        return index, 'caught', re.sub(r'^\S*/(?=coordinator/|mutants/)', '', first[0]) if first else 'crash'


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seeds', type=int, default=1000)
    parser.add_argument('--jobs', type=int, default=os.cpu_count())
    parser.add_argument('--timeout', type=int, default=300, help='seconds a mutant may run')
    parser.add_argument('--only', action='append', metavar='TEXT',
                        help='mutants whose name contains this; may be given again')
    parser.add_argument('--markdown', action='store_true', help='print a table')
    args = parser.parse_args()

    libs = ['-lpthread'] + absl_libs()
    with tempfile.TemporaryDirectory() as base:
        base = pathlib.Path(base)
        for folder in FOLDERS:
            if (ROOT / folder).is_dir():
                shutil.copytree(ROOT / folder, base / folder,
                                ignore=lambda d, names: [n for n in names
                                                         if pathlib.Path(n).suffix not in
                                                         ('', '.h', '.cc')])
        (base / 'mutants').mkdir()
        (base / 'objects').mkdir()
        built = build(base, base / 'objects', SOURCES)
        base_objects = dict(zip(SOURCES, built))
        chosen = [i for i, m in enumerate(MUTANTS)
                  if not args.only or any(text in m[0] for text in args.only)]
        results = []
        with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
            for result in pool.map(lambda i: run_mutant(i, args.seeds, base, base_objects, libs,
                                                        args.timeout), chosen):
                index, verdict, how = result
                results.append(result)
                if not args.markdown:
                    print(f'{verdict:7} {MUTANTS[index][0]}\n        {how}', flush=True)
    if args.markdown:
        print('| seeded bug | verdict | by |\n|---|---|---|')
        for index, verdict, how in results:
            print(f'| {MUTANTS[index][0]} | {verdict} | {how} |')
    caught = sum(verdict == 'caught' for _, verdict, _ in results)
    print(f'{caught} of {len(results)} caught within {args.seeds} seeds')
    if any(verdict == 'STALE' for _, verdict, _ in results):
        return 2
    return 0 if caught * 20 >= len(results) * 19 else 1


if __name__ == '__main__':
    sys.exit(main())
