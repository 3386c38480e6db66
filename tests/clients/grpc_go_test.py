"""grpc-go against the real server; go/main.go is the client.

    grpc_go_test.py BUILD_DIR
"""

import harness


def main():
    client = harness.need_program("grpc_go")
    expected = harness.DEMO.parent / "expected.json"
    with harness.Server() as server:
        with harness.Server("--max-num-seqs", 1, "--max-queued-requests", 1) as one:
            print(harness.run(client, expected, server.target, one.target), end="")
            assert server.becomes_idle() and one.becomes_idle()


if __name__ == "__main__":
    main()
