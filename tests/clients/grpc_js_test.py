"""grpc-js against the real server.

    grpc_js_test.py BUILD_DIR
"""

import shutil
from pathlib import Path

import harness


def main():
    node = shutil.which("node") or harness.skip("program node")
    modules = harness.installs() / "node" / "node_modules"
    if not (modules / "@grpc" / "grpc-js").is_dir():
        harness.skip("package @grpc/grpc-js")
    script = Path(__file__).parent / "node" / "grpc_js.js"
    expected = harness.DEMO.parent / "expected.json"
    with harness.Server() as server:
        with harness.Server("--max-num-seqs", 1, "--max-queued-requests", 1) as one:
            print(harness.run(node, script, modules, harness.SOURCE, expected, server.target, one.target), end="")
            assert server.becomes_idle() and one.becomes_idle()


if __name__ == "__main__":
    main()
