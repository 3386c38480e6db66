#!/usr/bin/env python3
"""The programs are hardened as docs/deploying.md says: read from their ELF files."""

import functools
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import unittest

import harness
import image_test

ENDBR64 = b"\xf3\x0f\x1e\xfa"


def readelf(program, *flags):
    return subprocess.run(["readelf", "-W", *flags, program], capture_output=True,
                          text=True, check=True).stdout


@functools.cache
def worker_for_gpus():
    """What another compiler made: that of build/cuda where it is newer than its flags."""
    built = harness.ROOT / "build/cuda/bin/lockstep-worker"
    flags = harness.ROOT / "cmake/lockstep_cuda.cmake"
    if built.parent == harness.BIN.resolve():
        return []
    if built.exists() and built.stat().st_mtime > flags.stat().st_mtime:
        return [built]
    print("\n*** NOT CHECKED: no build/cuda newer than its flags: the worker for GPUs\n",
          file=sys.stderr, flush=True)
    return []


class HardeningTest(unittest.TestCase):
    def each(self):
        for program in harness.PROGRAMS:
            self.assertTrue((harness.BIN / program).exists(), f"{harness.BIN / program}: not built")
            yield harness.BIN / program
        yield from worker_for_gpus()

    def test_position_independent(self):
        for program in self.each():
            self.assertRegex(readelf(program, "-h"), r"Type:\s+DYN", program)
            self.assertRegex(readelf(program, "-d"), r"FLAGS_1.*\bPIE\b", program)

    def test_relocations_are_read_only_once_started(self):
        for program in self.each():
            self.assertIn("GNU_RELRO", readelf(program, "-l"), program)
            self.assertRegex(readelf(program, "-d"), r"FLAGS\).*BIND_NOW|FLAGS_1.*\bNOW\b", program)

    def test_no_memory_is_writable_and_executable(self):
        for program in self.each():
            segments = readelf(program, "-l")
            self.assertRegex(segments, r"GNU_STACK(\s+0x[0-9a-f]+){5}\s+RW\s", program)
            self.assertNotRegex(segments, r"LOAD(\s+0x[0-9a-f]+){5}\s+RWE", program)

    def test_stack_protector_and_checked_library_calls(self):
        for program in self.each():
            symbols = readelf(program, "--dyn-syms")
            self.assertIn("__stack_chk_fail@", symbols, program)
            self.assertRegex(symbols, r"__\w+_chk@GLIBC", f"{program}: no _FORTIFY_SOURCE")

    def test_no_library_is_looked_for_where_others_may_write(self):
        for program in self.each():
            for path in re.findall(r"(?:RUNPATH|RPATH).*\[(.*)\]", readelf(program, "-d")):
                self.assertNotRegex(path, r"(^|:)(|\.|/tmp.*)(:|$)", program)

    def test_indirect_branches_land_on_marks(self):
        """-fcf-protection, from the code itself: libraries without it keep the linker
        from saying so in the file's notes."""
        for program in self.each():
            data = program.read_bytes()
            text = re.search(r"\] \.text\s+PROGBITS\s+([0-9a-f]+) ([0-9a-f]+) ([0-9a-f]+)",
                             readelf(program, "-S"))
            address, offset, size = (int(word, 16) for word in text.groups())
            entries = []
            for line in readelf(program, "--syms").splitlines():
                words = line.split()
                # Our own functions that other files can call (linkers may bind them
                # locally): none of an unnamed namespace, no clone (with a dot), no lambda.
                if len(words) == 8 and words[3] == "FUNC" and (
                        re.match(r"_ZNK?8lockstep\d", words[7])) and not (
                        re.search(r"\.|_GLOBAL__N_|Ul", words[7])):
                    value = int(words[1], 16)
                    if address <= value < address + size:
                        entries.append(value - address + offset)
            self.assertGreater(len(entries), 50, f"{program}: has it been stripped?")
            unmarked = sum(data[entry:entry + 4] != ENDBR64 for entry in entries)
            self.assertEqual(unmarked, 0, f"{program}: {unmarked} of {len(entries)} functions")


class StaticTest(unittest.TestCase):
    """One file is enough, where the build is made for that (LOCKSTEP_STATIC)."""

    C_LIBRARY = {"libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1",
                 "ld-linux-x86-64.so.2"}

    def setUp(self):
        cache = (harness.BIN / "../CMakeCache.txt").resolve()
        self.static = cache.exists() and "LOCKSTEP_STATIC:BOOL=ON" in cache.read_text()
        if not self.static:
            print(f"\n*** NOT CHECKED: {harness.BIN} is no static build (deploy/setup --static; "
                  "deploy/build static): that one file is enough\n", file=sys.stderr, flush=True)

    def test_only_the_c_library_is_loaded(self):
        for program in harness.PROGRAMS if self.static else ():
            needed = set(re.findall(r"NEEDED.*\[(.*)\]", readelf(harness.BIN / program, "-d")))
            self.assertLessEqual(needed, self.C_LIBRARY, program)

    def test_several_ranks_without_gloos_plug_in_say_what_they_need(self):
        if not self.static:
            return
        with tempfile.TemporaryDirectory(prefix="lockstep-static-test.") as folder:
            for program in harness.PROGRAMS:
                shutil.copy(harness.BIN / program, folder)
            done = subprocess.run(
                [f"{folder}/lockstep", "serve", "--model", harness.DEMO_MODEL, "--http-port", "0",
                 "--tensor-parallel-size", "2", "--grpc-port", "0"], env={}, timeout=60,
                capture_output=True, text=True)
            self.assertEqual(done.returncode, 1, done.stderr)
            # A worker that ends meanwhile may be named after it.
            self.assertRegex(done.stderr, "\nlockstep-coordinator: .* cpu backend need "
                             "liblockstep-gloo.so beside lockstep-worker")

    def test_they_serve_where_nothing_else_is(self):
        if not self.static:
            return
        with tempfile.TemporaryDirectory(prefix="lockstep-static-test.") as folder:
            root = pathlib.Path(folder)
            root.chmod(0o755)
            for program in harness.PROGRAMS:
                shutil.copy(harness.BIN / program, root)
            libraries = subprocess.run(["ldd", *(harness.BIN / p for p in harness.PROGRAMS)],
                                       capture_output=True, text=True, check=True).stdout
            for path in set(re.findall(r"(/\S+\.so[.\d]*) \(", libraries)):
                target = root / path.lstrip("/")
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)
            for mounted in ("models", "tmp", "proc", "dev"):
                (root / mounted).mkdir()
            port = image_test.free_port()
            log = root / "log"
            shut_in = image_test.shut_in(root)
            if shut_in is None:
                return
            with open(log, "wb") as out:
                server = subprocess.Popen(shut_in(
                    "/lockstep serve --model /models --served-model-name demo "
                    f"--cpu-threads 1 --http-port {port} --grpc-port 0"), stdout=out, stderr=out)
            try:
                harness.wait_for("ready", lambda: harness.request(
                    port, "GET", "/ready")[0] == 200, server, 60, log)
            finally:
                code = harness.stop(server)
            self.assertEqual(code, 0, log.read_text())


if __name__ == "__main__":
    unittest.main()
