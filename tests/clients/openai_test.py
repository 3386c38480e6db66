"""The openai package against the doors: every call it has for what we serve.

    openai_test.py SCRIPTED_SERVER

Exit 77, with a loud line, where the package is not installed.
"""

import hashlib
import json
import subprocess
import sys
import tempfile

try:
    import openai
except ImportError:
    print("SKIPPED openai_client: python3 has no openai package; `pip install openai`")
    sys.exit(77)

KEY = "sk-of-this-test"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather of a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]


def say(text):
    """Messages that are answered with `text`."""
    return [{"role": "system", "content": "s"}, {"role": "user", "content": f"ANSWER:{text}:END"}]


def completions(client):
    model = client.models.list().data[0].id
    assert client.models.retrieve(model).id == model
    whole = client.completions.create(
        model=model, prompt="ANSWER:The lamp is green.:END", max_tokens=50, logprobs=2, n=2, seed=7
    )
    assert [c.text for c in whole.choices] == ["The lamp is green."] * 2, whole
    assert whole.choices[0].finish_reason == "stop"
    assert len(whole.choices[0].logprobs.tokens) == whole.usage.completion_tokens / 2
    batch = client.completions.create(
        model=model, prompt=["ANSWER:a:END", "ANSWER:b:END"], max_tokens=9
    )
    assert [c.text for c in batch.choices] == ["a", "b"]
    ids = client.completions.create(model=model, prompt=[[5, 6], [7]], max_tokens=3)
    assert ids.usage.prompt_tokens == 3
    scored = client.completions.create(
        model=model, prompt=[5, 6, 7], max_tokens=0, echo=True, logprobs=1
    )
    assert scored.choices[0].logprobs.token_logprobs[0] is None
    stream = client.completions.create(
        model=model,
        prompt="ANSWER:One two three:END",
        max_tokens=50,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"return_token_ids": True, "ignore_eos": False},
    )
    chunks = list(stream)
    assert "".join(c.choices[0].text for c in chunks if c.choices) == "One two three"
    assert chunks[-1].usage.completion_tokens > 0 and not chunks[-1].choices


def chat(client):
    text = "Gr\u00fc\u00df dich \u2713 \U0001f404"
    whole = client.chat.completions.create(
        model="demo", messages=say(text), logprobs=True, top_logprobs=2, max_completion_tokens=90
    )
    assert whole.choices[0].message.content == text, whole
    assert whole.choices[0].message.role == "assistant"
    entries = whole.choices[0].logprobs.content
    assert len(entries) == whole.usage.completion_tokens
    assert b"".join(bytes(e.bytes) for e in entries).decode().startswith(text)
    assert len(entries[0].top_logprobs) == 2
    chunks = list(
        client.chat.completions.create(
            model="demo", messages=say(text), stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    assert chunks[-1].usage.total_tokens == chunks[-1].usage.prompt_tokens + whole.usage.completion_tokens
    with client.chat.completions.stream(model="demo", messages=say(text)) as events:
        assert events.get_final_completion().choices[0].message.content == text
    parts = [{"role": "user", "content": [{"type": "text", "text": "ANSWER:ok:END"}]}]
    assert client.chat.completions.create(model="demo", messages=parts).choices[0].message.content == "ok"


def tools(client):
    arguments = '{"city": "Graz"}'
    for text in (
        f'<tool_call>{{"name": "weather", "arguments": {arguments}}}</tool_call>',
        f'{{"name": "weather", "parameters": {arguments}}}',
    ):
        whole = client.chat.completions.create(model="demo", messages=say(text), tools=TOOLS)
        message = whole.choices[0].message
        assert whole.choices[0].finish_reason == "tool_calls", whole
        assert message.content is None and len(message.tool_calls) == 1
        assert json.loads(message.tool_calls[0].function.arguments) == {"city": "Graz"}
        with client.chat.completions.stream(
            model="demo", messages=say(text), tools=TOOLS
        ) as events:
            final = events.get_final_completion().choices[0]
        assert final.finish_reason == "tool_calls"
        assert final.message.tool_calls[0].function.arguments == arguments
        # The message goes back as it came; the demo's template knows no tools.
        again = say("x") + [message.model_dump(), *say("It rains.")[1:]]
        reply = client.chat.completions.create(model="demo", messages=again, tools=TOOLS)
        assert reply.choices[0].message.content == "It rains."


def errors(client, port):
    def refused(kind, param, call, **arguments):
        try:
            call(model=arguments.pop("model", "demo"), **arguments)
        except kind as error:
            assert error.param == param, (error.param, error.message)
            assert error.request_id
        else:
            raise AssertionError(f"{arguments} was not refused")

    create = client.chat.completions.create
    refused(openai.BadRequestError, "temperature", create, messages=say("x"), temperature=3)
    refused(openai.BadRequestError, "tool_choice", create, messages=say("x"), tools=TOOLS,
            tool_choice="required")
    refused(openai.BadRequestError, "response_format", create, messages=say("x"),
            response_format={"type": "json_object"})
    refused(openai.BadRequestError, "suffix", client.completions.create, prompt="x", suffix="y")
    refused(openai.BadRequestError, "best_of", client.completions.create, prompt="x", best_of=2)
    refused(openai.NotFoundError, "model", create, messages=say("x"), model="other")
    stranger = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="wrong", max_retries=0)
    try:
        stranger.models.list()
    except openai.AuthenticationError as error:
        assert error.code == "invalid_api_key"
    else:
        raise AssertionError("a wrong key was not refused")


def main():
    with tempfile.NamedTemporaryFile("w") as keys:
        keys.write(hashlib.sha256(KEY.encode()).hexdigest() + " test\n")
        keys.flush()
        server = subprocess.Popen(
            [sys.argv[1], "--api-key-file", keys.name],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        try:
            port = int(server.stdout.readline().split()[0])
            client = openai.OpenAI(
                base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=0, timeout=60
            )
            completions(client)
            chat(client)
            tools(client)
            errors(client, port)
        finally:
            server.stdin.close()
            server.wait(timeout=30)
    print(f"openai {openai.__version__}: completions, chat, tools, errors")


if __name__ == "__main__":
    main()
