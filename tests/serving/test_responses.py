"""The openai client reads /v1/responses, whole and streamed, as OpenAI's own."""

import json

import openai
import pytest

from maxlm.serving.chat import ParsedAnswer
from maxlm.serving.responses import OutputItems
from maxlm.serving.tools import ToolCallParser
from tests.serving.running import run_in_thread

CALL = (
    '<tool_call>\n{"name": "get_weather", "arguments": {"place": "Köln"}}\n</tool_call>'
)
PLACE = {
    "type": "object",
    "properties": {"place": {"type": "string"}},
    "required": ["place"],
}
WEATHER = {
    "type": "function",
    "name": "get_weather",
    "parameters": PLACE,
    "strict": False,
}


def test_a_text_is_answered_and_settings_reach_the_engine(start_server):
    server = start_server()
    response = server.client.responses.create(
        model="fake",
        input="hi",
        instructions="Be kind.",
        temperature=0.25,
        top_p=0.75,
        max_output_tokens=100,
        extra_body={"top_k": 5},
    )
    assert (response.status, response.output_text) == ("completed", "Hello there!")
    (request,) = server.engine.requests
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.25, 0.75, 5)
    assert sampling.max_new_tokens == 100
    prompt = server.engine.tokenizer.decode(request.prompt_tokens)
    assert "system\nBe kind.<|im_end|>" in prompt
    assert response.usage.input_tokens == len(request.prompt_tokens)
    assert (
        response.usage.total_tokens
        == response.usage.input_tokens + response.usage.output_tokens
    )


def test_a_stream_adds_up_to_the_whole_answer(start_server):
    client = start_server(lambda text, request: "Let me see.\n" + CALL).client
    body = {"model": "fake", "input": "weather?", "tools": [WEATHER]}
    whole = client.responses.create(**body)
    kinds: list[str] = []
    text = arguments = ""
    with client.responses.stream(**body) as stream:  # which checks the order of events
        for event in stream:
            kinds.append(event.type)
            if event.type == "response.output_text.delta":
                text += event.delta
            if event.type == "response.function_call_arguments.delta":
                arguments += event.delta
        final = stream.get_final_response()
    assert kinds[:3] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
    ]
    assert kinds[-1] == "response.completed"
    assert text == whole.output_text == "Let me see."
    assert json.loads(arguments) == {"place": "Köln"}
    assert [item.type for item in final.output] == ["message", "function_call"]
    for streamed, item in zip(final.output, whole.output, strict=True):
        assert (streamed.type, streamed.status) == (item.type, "completed")
    assert final.output[0].content[0].text == whole.output[0].content[0].text
    assert final.output[1].arguments == whole.output[1].arguments
    assert final.output[1].name == "get_weather"


def test_events_are_numbered_and_framed(start_server):
    server = start_server()
    body = {"input": "hi", "stream": True}
    with server.http.stream("POST", "/v1/responses", json=body) as response:
        raw = b"".join(response.iter_raw()).decode()
    events = [event.split("\n") for event in raw.strip().split("\n\n")]
    for number, (kind, data) in enumerate(events):
        event = json.loads(data.removeprefix("data: "))
        assert kind == f"event: {event['type']}"
        assert event["sequence_number"] == number


def test_a_conversation_of_items_is_the_chat_of_its_messages(start_server):
    server = start_server()
    items = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "input_text", "text": "weather?"}]},
        {
            "type": "reasoning",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "hm"}],
        },
        {
            "type": "function_call",
            "call_id": "c1",
            "name": "get_weather",
            "arguments": '{"place": "Köln"}',
        },
        {"type": "function_call_output", "call_id": "c1", "output": "rain"},
        {
            "type": "message",
            "role": "assistant",
            "content": [
                {"type": "output_text", "text": "It rains.", "annotations": []}
            ],
        },
        {"role": "user", "content": "thanks"},
    ]
    server.client.responses.create(model="fake", input=items)
    function = {"name": "get_weather", "arguments": '{"place": "Köln"}'}
    call = {"id": "c1", "type": "function", "function": function}
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "weather?"},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "hm",
            "tool_calls": [call],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
        {"role": "assistant", "content": "It rains."},
        {"role": "user", "content": "thanks"},
    ]
    server.client.chat.completions.create(model="fake", messages=messages)
    first, second = server.engine.requests
    assert first.prompt_tokens == second.prompt_tokens


def test_forms_and_choices_are_those_of_chat(start_server):
    server = start_server(lambda text, request: '{"a": 1}')
    form = {"type": "json_schema", "name": "it", "schema": {"type": "object"}}
    response = server.client.responses.create(
        model="fake", input="x", text={"format": form}
    )
    assert json.loads(response.output_text) == {"a": 1}
    assert server.engine.requests[-1].grammar.kind == "json_schema"
    forced = {"type": "function", "name": "get_weather"}
    server.client.responses.create(
        model="fake", input="x", tools=[WEATHER], tool_choice=forced
    )
    assert "get_weather" in server.engine.requests[-1].grammar.text


def test_a_cut_answer_is_incomplete(start_server):
    client = start_server().client
    response = client.responses.create(model="fake", input="hi", max_output_tokens=2)
    assert response.status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input"),
        (
            {"text": {"format": {"type": "json_schema", "name": "a"}}},
            "text.format.schema",
        ),
    ],
)
def test_what_cannot_be_is_a_400_that_names_the_field(start_server, extra, param):
    body = {"model": "fake", "input": "hi", **extra}
    with pytest.raises(openai.BadRequestError) as refused:
        start_server().client.responses.create(**body)
    assert refused.value.body["param"].startswith(param)


def test_what_follows_a_call_within_one_output_comes_behind_it():
    items = OutputItems()
    parser = ToolCallParser("hermes", ["f"])
    kinds: list[str] = []
    pieces = [
        '<tool_call>\n{"name": "f", "arguments": {"a": ',
        "1}}\n</tool_call>\nAll done",
    ]
    for piece in pieces:
        parsed = parser.push(piece, final=piece is pieces[-1])
        kinds += [
            kind
            for kind, _ in items.add(ParsedAnswer("", parsed.content, parsed.calls))
        ]
    items.finish()
    assert [item["type"] for item in items.items] == ["function_call", "message"]
    assert json.loads(items.items[0]["arguments"]) == {"a": 1}
    assert kinds.index("response.function_call_arguments.done") < kinds.index(
        "response.output_text.delta"
    )


def test_a_call_that_is_cut_is_incomplete(start_server):
    client = start_server(lambda text, request: CALL).client
    ask = {"model": "fake", "input": "x", "tools": [WEATHER]}
    size = client.responses.create(**ask).usage.output_tokens
    response = client.responses.create(**ask, max_output_tokens=size - 12)
    assert [item.status for item in response.output] == ["incomplete"]


def test_sampling_that_is_left_out_is_the_models_own(chat_tokenizer):
    defaults = {"temperature": 0.5, "top_p": 0.25}
    with run_in_thread(chat_tokenizer, sampling_defaults=defaults) as server:
        response = server.client.responses.create(model="fake", input="hi", top_p=0.75)
        sampling = server.engine.requests[-1].sampling
    assert (sampling.temperature, sampling.top_p) == (0.5, 0.75)
    assert (response.temperature, response.top_p) == (0.5, 0.75)
