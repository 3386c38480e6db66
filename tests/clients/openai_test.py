"""The openai package against the real server; tool calls against a scripted one.

    openai_test.py BUILD_DIR
"""

import asyncio
import json
import tempfile
import threading

import harness

harness.need_python("openai")
import openai  # noqa: E402

EXPECTED = json.loads((harness.DEMO.parent / "expected.json").read_text())["cases"]
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


def connect(server, key=harness.KEY):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=60)


def models(client):
    listed = client.models.list().data
    assert [model.id for model in listed] == ["demo"] and listed[0].owned_by == "lockstep"
    assert client.models.retrieve("demo").id == "demo"
    assert harness.raises(openai.NotFoundError, client.models.retrieve, "gpt").param == "model"


def prompt_forms(client):
    """A string, token ids and lists of both are the same request."""
    chosen = [EXPECTED[0], EXPECTED[7], EXPECTED[20]]
    texts = [case["prompt_text"] for case in chosen]
    ids = [case["prompt_token_ids"] for case in chosen]
    answers = [case["text"] for case in chosen]
    create = client.completions.create

    def said(prompt):
        whole = create(
            model="demo", prompt=prompt, temperature=0, max_tokens=64,
            extra_body={"add_special_tokens": False},
        )  # fmt: skip
        assert [choice.index for choice in whole.choices] == list(range(len(whole.choices)))
        assert all(choice.finish_reason == "stop" for choice in whole.choices)
        return [choice.text for choice in whole.choices], whole.usage

    for prompt, case in zip(texts + ids, chosen * 2):
        got, usage = said(prompt)
        assert got == [case["text"]], (prompt, got)
        assert usage.prompt_tokens == len(case["prompt_token_ids"])
        assert usage.completion_tokens == len(case["greedy_token_ids"])
    for prompt in (texts, ids):
        got, usage = said(prompt)
        assert got == answers, got
        assert usage.prompt_tokens == sum(map(len, ids))


def sampling(client):
    case = EXPECTED[0]
    ids, first = case["prompt_token_ids"], case["greedy_token_ids"][0]
    create = client.completions.create

    def drawn(seed, n=4):
        return create(model="demo", prompt=[1, 4], n=n, seed=seed, temperature=2, max_tokens=12)

    once = drawn(7)
    assert [choice.index for choice in once.choices] == [0, 1, 2, 3]
    texts = [choice.text for choice in once.choices]
    assert len(set(texts)) > 1, texts
    assert texts == [choice.text for choice in drawn(7).choices]
    assert texts != [choice.text for choice in drawn(8).choices]

    def greedy(**options):
        extra = {"return_token_ids": True, **options.pop("extra_body", {})}
        return create(model="demo", prompt=ids, temperature=0, extra_body=extra, **options).choices[0]

    assert greedy(max_tokens=1).token_ids == [first]
    assert greedy(max_tokens=1).finish_reason == "length"
    assert greedy(max_tokens=1, logit_bias={str(first): -100}).token_ids != [first]
    assert greedy(max_tokens=3, logit_bias={"42": 100}).token_ids == [42, 42, 42]
    # "35 + 28 = 63"
    stopped = greedy(max_tokens=32, stop=[" = ", "never"])
    assert stopped.text == "35 + 28" and stopped.finish_reason == "stop", stopped
    assert stopped.stop_reason == " = "
    past = greedy(max_tokens=40, extra_body={"ignore_eos": True, "min_tokens": 40})
    assert len(past.token_ids) == 40 and past.finish_reason == "length"


def scored(client):
    case = EXPECTED[0]
    ids, continuation = case["prompt_token_ids"], case["greedy_token_ids"]
    create = client.completions.create
    answered = create(model="demo", prompt=ids, temperature=0, max_tokens=64, logprobs=3).choices[0]
    tokens = answered.logprobs.tokens
    assert len(tokens) == len(answered.logprobs.token_logprobs) == len(continuation)
    # Greedy: each token is the likeliest of its alternatives, and the logprobs are a distribution's.
    for chosen, top in zip(answered.logprobs.token_logprobs, answered.logprobs.top_logprobs):
        assert len(top) == 3 and chosen == max(top.values()) <= 0, (chosen, top)
    # The same tokens, scored as a prompt: what was said when they were chosen.
    echoed = create(
        model="demo", prompt=ids + continuation, max_tokens=0, echo=True, logprobs=1
    ).choices[0]
    assert echoed.text.endswith(case["text"]) or case["text"] in echoed.text, echoed.text
    again = echoed.logprobs.token_logprobs
    assert again[0] is None and len(again) == len(ids) + len(continuation)
    differences = [abs(a - b) for a, b in zip(again[len(ids) :], answered.logprobs.token_logprobs)]
    assert max(differences) < 1e-3, differences


def streams(client):
    case = EXPECTED[20]
    options = {"stream": True, "stream_options": {"include_usage": True}, "temperature": 0}
    chunks = list(
        client.completions.create(
            model="demo", prompt=case["prompt_token_ids"], max_tokens=64, logprobs=0, **options,
            extra_body={"return_token_ids": True},
        )
    )  # fmt: skip
    assert "".join(c.choices[0].text for c in chunks if c.choices) == case["text"]
    ids = [token for c in chunks if c.choices for token in c.choices[0].token_ids]
    assert ids == case["greedy_token_ids"]
    assert chunks[-1].usage.completion_tokens == len(ids) and not chunks[-1].choices
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert len({c.id for c in chunks}) == 1
    # Several choices of several prompts share one stream; each is whole.
    prompts = [EXPECTED[0], EXPECTED[7]]
    texts = {}
    for chunk in client.completions.create(
        model="demo", prompt=[p["prompt_token_ids"] for p in prompts], n=2, max_tokens=64, **options
    ):
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
    assert [texts[i] for i in range(4)] == [p["text"] for p in prompts for _ in range(2)], texts


def chat(client):
    for case in EXPECTED:
        whole = client.chat.completions.create(
            model="demo", messages=case["messages"], temperature=0, max_completion_tokens=400
        )
        message = whole.choices[0].message
        assert (message.role, message.content) == ("assistant", case["text"]), (case, whole)
        assert whole.usage.prompt_tokens == len(case["prompt_token_ids"])
        assert message.tool_calls is None
    case = EXPECTED[0]
    messages = case["messages"]
    whole = client.chat.completions.create(
        model="demo", messages=messages, temperature=0, logprobs=True, top_logprobs=2, n=2
    )
    for choice in whole.choices:
        entries = choice.logprobs.content
        assert len(entries) == len(case["greedy_token_ids"])
        assert b"".join(bytes(e.bytes) for e in entries).decode().startswith(case["text"])
        assert all(len(e.top_logprobs) == 2 and e.top_logprobs[0].token == e.token for e in entries)
    chunks = list(
        client.chat.completions.create(
            model="demo", messages=messages, temperature=0, stream=True, logprobs=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == case["text"]
    assert chunks[-1].usage.total_tokens == whole.usage.prompt_tokens + len(case["greedy_token_ids"])
    streamed = [e.logprob for c in chunks if c.choices and c.choices[0].logprobs
                for e in c.choices[0].logprobs.content]  # fmt: skip
    assert len(streamed) == len(case["greedy_token_ids"])
    with client.chat.completions.stream(model="demo", messages=messages, temperature=0) as events:
        assert events.get_final_completion().choices[0].message.content == case["text"]
    parts = [{"role": "user", "content": [{"type": "text", "text": messages[0]["content"]}]}]
    told = client.chat.completions.create(model="demo", messages=parts, temperature=0)
    assert told.choices[0].message.content == case["text"]


def at_once(server):
    """Every known chat at the same time, streamed by the asynchronous client: none is mixed up."""

    async def one(client, case):
        stream = await client.chat.completions.create(
            model="demo", messages=case["messages"], temperature=0, stream=True
        )
        text = [c.choices[0].delta.content or "" async for c in stream if c.choices]
        assert "".join(text) == case["text"], (case, text)

    async def all_of_them():
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key=harness.KEY, max_retries=0, timeout=60
        ) as client:
            await asyncio.gather(*(one(client, case) for case in EXPECTED))

    asyncio.run(all_of_them())


def tools(client):
    """The demo model knows no tools: what it would have said is scripted."""

    def say(text):
        return [{"role": "user", "content": f"ANSWER:{text}:END"}]

    create = client.chat.completions.create
    arguments = '{"city": "Graz"}'
    for text in (
        f'<tool_call>{{"name": "weather", "arguments": {arguments}}}</tool_call>',
        f'{{"name": "weather", "parameters": {arguments}}}',
    ):
        whole = create(model="demo", messages=say(text), tools=TOOLS)
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
        again = say("x") + [message.model_dump(), *say("It rains.")]
        reply = create(model="demo", messages=again, tools=TOOLS).choices[0].message
        assert reply.content == "It rains."
        # Without tools, or with tool_choice none, the same text is just text.
        plain = create(model="demo", messages=say(text), tools=TOOLS, tool_choice="none")
        assert plain.choices[0].message.content == text and plain.choices[0].finish_reason == "stop"
    unicode = "Gr\u00fc\u00df dich \u2713 \U0001f404"
    stream = create(model="demo", messages=say(unicode), stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in stream) == unicode


def refusals(client, server):
    chat_create, create = client.chat.completions.create, client.completions.create
    messages = [{"role": "user", "content": "x"}]
    for param, call, arguments in (
        ("temperature", chat_create, {"messages": messages, "temperature": 3}),
        ("tool_choice", chat_create, {"messages": messages, "tools": TOOLS, "tool_choice": "required"}),
        ("response_format", chat_create, {"messages": messages, "response_format": {"type": "json_object"}}),
        ("top_logprobs", chat_create, {"messages": messages, "logprobs": True, "top_logprobs": 21}),
        ("suffix", create, {"prompt": "x", "suffix": "y"}),
        ("best_of", create, {"prompt": "x", "best_of": 2}),
        ("logprobs", create, {"prompt": "x", "logprobs": 21}),
        ("n", create, {"prompt": "x", "n": 17}),
        ("prompt", create, {"prompt": [5, 1_000_000]}),
        ("max_tokens", create, {"prompt": "x", "max_tokens": 5000}),
        ("stop", create, {"prompt": "x", "stop": [str(i) for i in range(17)]}),
        ("logit_bias", create, {"prompt": "x", "logit_bias": {"5": 101}}),
        ("guided_regex", create, {"prompt": "x", "extra_body": {"guided_regex": "a"}}),
    ):  # fmt: skip
        error = harness.raises(openai.BadRequestError, call, model="demo", **arguments)
        assert error.param and error.param.split("[")[0].split(".")[0] == param, (param, error.param, error.message)
        assert error.request_id and error.type == "invalid_request_error", (error.type, error.body)
    # A stream is refused before it begins, as an exception of the call itself.
    harness.raises(
        openai.BadRequestError, create, model="demo", prompt="x", stream=True, temperature=-1
    )
    assert harness.raises(openai.NotFoundError, create, model="other", prompt="x").param == "model"
    stranger = harness.raises(openai.AuthenticationError, connect(server, "wrong").models.list)
    assert stranger.code == "invalid_api_key"


def leave(client, server):
    """A client that goes away in the middle frees what its request held."""
    before = server.metric("lockstep_requests_total", outcome="cancelled")
    stream = client.completions.create(
        model="demo", prompt="Tell me a story", max_tokens=2000, stream=True,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    for _ in range(3):
        next(stream)
    assert server.metric("lockstep_requests", state="running") == 1
    stream.close()
    assert server.becomes_idle()
    assert server.metric("lockstep_requests_total", outcome="cancelled") == before + 1


def crowd(client, server):
    """More than fits: one runs, one waits, the next is told when to come back."""
    arguments = dict(
        model="demo", prompt="Tell me a story", max_tokens=1500, stream=True,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    running = client.completions.create(**arguments)
    next(running)
    waiting = []
    thread = threading.Thread(target=lambda: waiting.append(client.completions.create(**arguments)))
    thread.start()
    assert harness.eventually(lambda: server.metric("lockstep_requests", state="waiting") == 1)
    full = harness.raises(openai.RateLimitError, client.completions.create, **arguments)
    assert int(full.response.headers["retry-after"]) >= 1, full.response.headers
    assert full.status_code == 429
    # The package itself comes back after the delay that it was told, and then finds room.
    patient = client.with_options(max_retries=5)

    def make_room_after_a_refusal():
        harness.eventually(lambda: server.metric("lockstep_requests_total", outcome="rejected") >= 2)
        running.close()

    making_room = threading.Thread(target=make_room_after_a_refusal)
    making_room.start()
    answer = patient.completions.create(model="demo", prompt="x", max_tokens=1)
    assert answer.usage.completion_tokens == 1
    making_room.join()
    thread.join()
    assert server.metric("lockstep_requests_total", outcome="rejected") >= 2
    waiting[0].close()
    assert server.becomes_idle()


def main():
    with tempfile.TemporaryDirectory() as folder:
        with harness.Server("--api-key-file", harness.key_file(folder)) as server:
            client = connect(server)
            for check in (models, prompt_forms, sampling, scored, streams, chat):
                check(client)
            at_once(server)
            refusals(client, server)
            leave(client, server)
    with harness.Server("--max-num-seqs", 1, "--max-queued-requests", 1) as server:
        crowd(connect(server), server)
    with harness.ScriptedServer() as server:
        tools(connect(server))
    print(f"openai {openai.__version__}: models, completions, chat, streams, tools, refusals")


if __name__ == "__main__":
    main()
