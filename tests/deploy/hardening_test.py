#!/usr/bin/env python3
"""The programs are hardened as docs/deploying.md says: read from their ELF files."""

import re
import subprocess
import unittest

import harness

ENDBR64 = b"\xf3\x0f\x1e\xfa"


def readelf(program, *flags):
    return subprocess.run(["readelf", "-W", *flags, harness.BIN / program], capture_output=True,
                          text=True, check=True).stdout


class HardeningTest(unittest.TestCase):
    def each(self):
        for program in harness.PROGRAMS:
            self.assertTrue((harness.BIN / program).exists(), f"{harness.BIN / program}: not built")
            yield program

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
            data = (harness.BIN / program).read_bytes()
            text = re.search(r"\] \.text\s+PROGBITS\s+([0-9a-f]+) ([0-9a-f]+) ([0-9a-f]+)",
                             readelf(program, "-S"))
            address, offset, size = (int(word, 16) for word in text.groups())
            entries = []
            for line in readelf(program, "--syms").splitlines():
                words = line.split()
                # Our own functions that other files can call (linkers may bind them
                # locally): none of an unnamed namespace, no clone (with a dot), no lambda,
                # and no host half of a kernel, which nvcc compiles with its own flags.
                if len(words) == 8 and words[3] == "FUNC" and (
                        re.match(r"_ZNK?8lockstep\d", words[7])) and not (
                        re.search(r"\.|_GLOBAL__N_|Ul|8lockstep7kernels", words[7])):
                    value = int(words[1], 16)
                    if address <= value < address + size:
                        entries.append(value - address + offset)
            self.assertGreater(len(entries), 50, f"{program}: has it been stripped?")
            unmarked = sum(data[entry:entry + 4] != ENDBR64 for entry in entries)
            self.assertEqual(unmarked, 0, f"{program}: {unmarked} of {len(entries)} functions")


if __name__ == "__main__":
    unittest.main()
