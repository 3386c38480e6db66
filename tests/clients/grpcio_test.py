"""Python's grpcio against the real server, with stubs made from proto/ as any client makes them.

    grpcio_test.py BUILD_DIR
"""

import json
import subprocess
import sys
import tempfile

import harness

harness.need_python("grpc", "grpc_tools", "grpc_health", "grpc_reflection", "grpc_status")
import grpc  # noqa: E402
from google.protobuf import descriptor_pool  # noqa: E402
from google.rpc import error_details_pb2  # noqa: E402
from grpc_health.v1 import health_pb2, health_pb2_grpc  # noqa: E402
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (  # noqa: E402
    ProtoReflectionDescriptorDatabase,
)
from grpc_status import rpc_status  # noqa: E402

EXPECTED = json.loads((harness.DEMO.parent / "expected.json").read_text())["cases"]
SERVICE = "lockstep.v1.Inference"
GREEDY_LONG = dict(max_tokens=1500, temperature=0, ignore_eos=True)
pb = rpc = None  # the generated modules


def generate_stubs(folder):
    global pb, rpc
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", f"-I{harness.SOURCE}", f"--python_out={folder}",
         f"--grpc_python_out={folder}", "proto/inference.proto"],
        check=True,
    )  # fmt: skip
    sys.path.insert(0, folder)
    from proto import inference_pb2, inference_pb2_grpc

    pb, rpc = inference_pb2, inference_pb2_grpc


def request(case=None, text=None, **sampling):
    sampling = pb.SamplingParams(**sampling)
    if text is not None:
        return pb.GenerateRequest(text=text, sampling=sampling)
    ids = pb.TokenIds(ids=case["prompt_token_ids"])
    return pb.GenerateRequest(token_ids=ids, sampling=sampling)


def chat_request(case, **sampling):
    messages = [pb.ChatMessage(**message) for message in case["messages"]]
    return pb.GenerateRequest(
        chat=pb.ChatMessages(messages=messages), sampling=pb.SamplingParams(**sampling)
    )


def refused(call, code, mentions=""):
    error = harness.raises(grpc.RpcError, call)
    assert error.code() == code, (error.code(), error.details())
    assert mentions in error.details(), error.details()
    return error


def whole_answers(stub):
    for case in EXPECTED:
        answer = stub.Generate(chat_request(case, temperature=0))
        assert [c.text for c in answer.completions] == [case["text"]], (case, answer)
        assert list(answer.completions[0].token_ids) == case["greedy_token_ids"]
        assert list(answer.prompt.prompt_token_ids) == case["prompt_token_ids"]
    case = EXPECTED[0]
    answer = stub.Generate(request(case, temperature=0, n=2, logprobs=2, prompt_logprobs=1))
    assert answer.prompt.prompt_tokens == len(case["prompt_token_ids"])
    assert len(answer.prompt.prompt_logprobs) == answer.prompt.prompt_tokens
    assert not answer.prompt.prompt_logprobs[0].HasField("chosen")
    for index, completion in enumerate(answer.completions):
        assert completion.finish.index == index
        assert completion.finish.reason == pb.FINISH_REASON_STOP
        assert completion.finish.stop_token_id == case["greedy_token_ids"][-1]
        assert completion.finish.completion_tokens == len(completion.logprobs)
        for entry in completion.logprobs:
            assert entry.chosen.rank == 1 and len(entry.top) == 2 and entry.chosen == entry.top[0]
    stopped = stub.Generate(request(case, temperature=0, stop=[" = "])).completions[0]
    assert (stopped.text, stopped.finish.stop_string) == ("35 + 28", " = ")


def streams(stub):
    for case in EXPECTED[:8]:
        events = list(stub.GenerateStream(chat_request(case, temperature=0)))
        kinds = [event.WhichOneof("event") for event in events]
        assert kinds[0] == "prompt" and kinds[-1] == "finish", kinds
        assert set(kinds[1:-1]) == {"chunk"}, kinds
        assert "".join(e.chunk.text for e in events) == case["text"]
        assert [t for e in events for t in e.chunk.token_ids] == case["greedy_token_ids"]
    # Many at once over one connection: each gets its own answer.
    calls = [(case, stub.GenerateStream(chat_request(case, temperature=0))) for case in EXPECTED]
    for case, call in calls:
        assert "".join(e.chunk.text for e in call) == case["text"]


def tokens(stub):
    for case in EXPECTED[:8]:
        told = stub.Tokenize(pb.TokenizeRequest(text=case["prompt_text"], add_special_tokens=False))
        assert list(told.token_ids) == case["prompt_token_ids"]
        assert told.max_model_len == 2048
        chat = chat_request(case).chat
        assert list(stub.Tokenize(pb.TokenizeRequest(chat=chat)).token_ids) == case["prompt_token_ids"]
        back = stub.Detokenize(pb.DetokenizeRequest(token_ids=case["prompt_token_ids"]))
        assert back.text == case["prompt_text"]


def model_info(stub):
    info = stub.GetModelInfo(pb.GetModelInfoRequest())
    assert (info.model, info.architecture) == ("demo", "LlamaForCausalLM"), info
    assert info.tp_size == 2 and info.ready and info.epoch >= 1
    assert [rank.rank for rank in info.ranks] == [0, 1]
    assert len({rank.pid for rank in info.ranks}) == 2
    assert all(rank.weight_bytes > 0 for rank in info.ranks)


def health(channel):
    stub = health_pb2_grpc.HealthStub(channel)
    for service in ("", SERVICE):
        answer = stub.Check(health_pb2.HealthCheckRequest(service=service))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    nobody = health_pb2.HealthCheckRequest(service="nobody")
    refused(lambda: stub.Check(nobody), grpc.StatusCode.NOT_FOUND)
    unknown = stub.Watch(nobody)
    assert next(unknown).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    unknown.cancel()


def health_while_draining(channel, server):
    """A watcher hears that the server drains while a stream still runs, and the stream ends well."""
    watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE))
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    stub = rpc.InferenceStub(channel)
    sampling = {**GREEDY_LONG, "max_tokens": 500}
    stream = stub.GenerateStream(request(text="Tell me", **sampling))
    for _ in range(3):
        next(stream)
    server.ask_to_end()
    assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
    refused(lambda: stub.Generate(request(text="late", max_tokens=1)), grpc.StatusCode.UNAVAILABLE)
    *_, last = stream
    assert last.finish.completion_tokens == sampling["max_tokens"], last


def reflection(channel):
    database = ProtoReflectionDescriptorDatabase(channel)
    assert {SERVICE, "grpc.health.v1.Health"} <= set(database.get_services())
    described = descriptor_pool.DescriptorPool(database)
    assert {m.name for m in described.FindServiceByName("grpc.health.v1.Health").methods} >= {"Check", "Watch"}
    service = described.FindServiceByName(SERVICE)
    assert {m.name for m in service.methods} == {
        "Generate", "GenerateStream", "Tokenize", "Detokenize", "GetModelInfo",
    }  # fmt: skip


def deadlines_and_cancels(stub, server):
    long = request(text="Tell me", **GREEDY_LONG)
    late = stub.GenerateStream(long, timeout=0.3)
    refused(lambda: list(late), grpc.StatusCode.DEADLINE_EXCEEDED)
    refused(lambda: stub.Generate(long, timeout=0.3), grpc.StatusCode.DEADLINE_EXCEEDED)
    assert server.becomes_idle()
    stream = stub.GenerateStream(long)
    for _ in range(3):
        next(stream)
    assert server.metric("lockstep_requests", state="running") == 1
    stream.cancel()
    refused(lambda: list(stream), grpc.StatusCode.CANCELLED)
    unary = stub.Generate.future(long)
    unary.cancel()
    assert unary.cancelled() and server.becomes_idle()


def refusals(stub):
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    for mentions, bad in (
        ("temperature", request(text="x", temperature=3)),
        ("top_p", request(text="x", top_p=0)),
        ("max_tokens", request(text="x", max_tokens=5000)),
        ("logprobs", request(text="x", logprobs=21)),
        ("stop", request(text="x", stop=["a"] * 17)),
        ("logit_bias", request(text="x", logit_bias={5: 101})),
        ("prompt", pb.GenerateRequest()),
        ("1000000", pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1_000_000]))),
        ("request_id", pb.GenerateRequest(text="x", request_id="\u00e4")),
    ):
        refused(lambda: stub.Generate(bad), invalid, mentions)
        refused(lambda: list(stub.GenerateStream(bad)), invalid, mentions)
    other = pb.GenerateRequest(text="x", model="other")
    refused(lambda: stub.Generate(other), grpc.StatusCode.NOT_FOUND, "model")
    refused(lambda: stub.Detokenize(pb.DetokenizeRequest(token_ids=[1_000_000])), invalid, "token_ids")
    given = stub.Generate(pb.GenerateRequest(text="x", request_id="of-the-client"))
    assert given.prompt.request_id == "of-the-client"


def api_keys(server):
    """Without the key nothing but health; with it, as metadata of the call, everything."""
    with grpc.insecure_channel(server.target) as channel:
        stub = rpc.InferenceStub(channel)
        info = pb.GetModelInfoRequest()
        refused(lambda: stub.GetModelInfo(info), grpc.StatusCode.UNAUTHENTICATED)
        metadata = (("authorization", f"Bearer {harness.KEY}"),)
        assert stub.GetModelInfo(info, metadata=metadata).ready
        check = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert check.status == health_pb2.HealthCheckResponse.SERVING


def crowd(stub, server):
    """The refusal of a full queue carries google.rpc.RetryInfo, as retrying clients read it."""
    long = request(text="Tell me", **GREEDY_LONG)
    running = stub.GenerateStream(long)
    next(running), next(running)
    waiting = stub.GenerateStream(long)
    assert harness.eventually(lambda: server.metric("lockstep_requests", state="waiting") == 1)
    error = refused(lambda: stub.Generate(long), grpc.StatusCode.RESOURCE_EXHAUSTED)
    (detail,) = rpc_status.from_call(error).details
    info = error_details_pb2.RetryInfo()
    assert detail.Unpack(info) and info.retry_delay.seconds >= 1, detail
    trailers = dict(error.trailing_metadata())
    assert int(trailers["grpc-retry-pushback-ms"]) == info.retry_delay.seconds * 1000
    running.cancel()
    assert next(waiting).prompt.prompt_tokens > 0
    waiting.cancel()
    assert server.becomes_idle()


def main():
    with tempfile.TemporaryDirectory() as folder:
        generate_stubs(folder)
        with harness.Server("--reflection") as server:
            with grpc.insecure_channel(server.target) as channel:
                stub = rpc.InferenceStub(channel)
                for check in (model_info, tokens, whole_answers, streams, refusals):
                    check(stub)
                health(channel)
                reflection(channel)
                deadlines_and_cancels(stub, server)
                health_while_draining(channel, server)
        flags = ("--max-num-seqs", 1, "--max-queued-requests", 1)
        with harness.Server(*flags, "--api-key-file", harness.key_file(folder)) as server:
            api_keys(server)
        with harness.Server(*flags) as server:
            with grpc.insecure_channel(server.target) as channel:
                crowd(rpc.InferenceStub(channel), server)
                # Reflection is off unless asked for.
                database = ProtoReflectionDescriptorDatabase(channel)
                refused(database.get_services, grpc.StatusCode.UNIMPLEMENTED)
    print(f"grpcio {grpc.__version__}: calls, streams, health, reflection, deadlines, refusals")


if __name__ == "__main__":
    main()
