"""/v1/chat/completions: conversations, by the model's chat template."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from maxlm.data.tokenizer import Tokenizer, render_escaped_chat
from maxlm.data.tokenizer.chat import EscapedChat, get_chat_template
from maxlm.inference.requests import GenerationRequest, SequenceOutput, TokenLogprob
from maxlm.serving.errors import ApiError
from maxlm.serving.generation import LOWEST_LOGPROB, Answer, decode_token
from maxlm.serving.schemas import ChatBody, ChatMessage, Tool
from maxlm.serving.server_state import ServerState
from maxlm.serving.tools import (
    ToolCallParser,
    ToolFormat,
    describe_tools_in_text,
    detect_tool_format,
    get_forced_prefix,
    make_tool_grammar,
)

_OWN_VARIABLES = {"messages", "tools", "add_generation_prompt", "tokenizer"}


@dataclass(frozen=True)
class _ToolPlan:
    """The tools of a request, and how they are called."""

    tool_format: ToolFormat
    offered: Sequence[Tool] = ()
    """The tools that the prompt names."""
    required: Sequence[Tool] = ()
    """Those of which the model has to call one; none: it may answer in words."""
    parallel: bool = True

    def make_parser(self) -> ToolCallParser:
        """Returns a parser of one answer; without tools all is content."""
        names, most = [tool.function.name for tool in self.offered], None if self.parallel else 1
        return ToolCallParser(self.tool_format, names, forced=bool(self.required), max_calls=most)


def plan_tools(body: ChatBody, template: str) -> _ToolPlan:
    """Returns what a request's tools and tool_choice ask for."""
    choice, tools, required = body.tool_choice, body.tools, []
    if not tools and choice not in (None, "none", "auto"):
        raise ApiError(400, "tool_choice needs tools", param="tool_choice")
    if choice == "required":
        required = tools
    elif isinstance(choice, Tool):
        required = [tool for tool in tools if tool.function.name == choice.function.name]
        if not required:
            what = f"tool_choice names {choice.function.name!r}, which is not among the tools"
            raise ApiError(400, what, param="tool_choice")
    offered = [] if choice == "none" else tools
    parallel = body.parallel_tool_calls and not isinstance(choice, Tool)
    return _ToolPlan(detect_tool_format(template), offered, required, parallel)


async def encode_conversation(
    state: ServerState,
    messages: list[ChatMessage],
    plan: _ToolPlan | None = None,
    variables: dict[str, Any] | None = None,
) -> tuple[int, ...]:
    """Returns a conversation's ids, up to where the assistant begins to answer. Raises MaxlmError:
    the model has no chat template, or it cannot write this conversation; ApiError: it can never fit
    the context."""
    plan = plan or _ToolPlan("hermes")
    conversation = await asyncio.to_thread(
        _render_conversation, state.tokenizer, messages, plan, variables or {}
    )

    def encode(_: str) -> list[int]:
        ids = conversation.encode(state.tokenizer)
        if plan.required:
            opener = get_forced_prefix(plan.tool_format)
            ids += state.tokenizer.encode(opener, allow_special=True)
        return ids

    # A template may leave parts of messages out: what it wrote is what counts.
    return await state.encode_text(conversation.get_plain_text(), "messages", encode=encode)


def _render_conversation(
    tokenizer: Tokenizer, messages: list[ChatMessage], plan: _ToolPlan, variables: dict[str, Any]
) -> EscapedChat:
    template = get_chat_template(tokenizer)
    written = [message.to_template() for message in messages]
    tools = [tool.model_dump(exclude_none=True) for tool in plan.offered]
    settings: dict[str, Any] = {"add_generation_prompt": True, **variables}
    if "tool" in template:
        settings["tools"] = tools or None
    elif tools or any(_mentions_tools(message) for message in written):
        written = describe_tools_in_text(written, tools)
    return render_escaped_chat(tokenizer, written, **settings)


def _mentions_tools(message: Mapping[str, Any]) -> bool:
    return "tool_calls" in message or message["role"] == "tool"


@dataclass(eq=False)
class _ChatAnswer(Answer):
    """The answer to /v1/chat/completions."""

    id_prefix, object_names = "chatcmpl", ("chat.completion", "chat.completion.chunk")
    body: ChatBody
    plan: _ToolPlan
    parsers: dict[int, ToolCallParser] = field(default_factory=dict)
    """The parser of each sequence, by its index."""

    def make_request(self, request_id: str, prompt: tuple[int, ...]) -> GenerationRequest:
        body, plan, vocab_size = self.body, self.plan, self.state.tokenizer.vocab_size
        asked = body.max_completion_tokens or body.max_tokens
        most = self.state.resolve_max_tokens(len(prompt), asked, "messages")
        request = body.make_request(request_id, prompt, most, vocab_size)
        if plan.required:
            if request.grammar:
                raise ApiError(400, "tool_choice asks for a call: leave the other form out")
            call = make_tool_grammar(plan.required, plan.tool_format, parallel=plan.parallel)
            request = replace(request, grammar=call)
        return replace(request, top_logprobs=(body.top_logprobs or 0) if body.logprobs else None)

    def describe(self, index: int, output: SequenceOutput) -> dict[str, Any]:
        is_first, reason = index not in self.parsers, output.finish_reason
        parser = self.parsers.setdefault(index, self.plan.make_parser())
        found = parser.push(output.text, final=reason is not None)
        if self.body.stream:
            name, message = "delta", {"role": "assistant"} if is_first else {}
            message |= {"content": found.content} if is_first or found.content else {}
            calls = [{"index": number, **call} for number, call in found.calls.items()]
        else:
            name, calls = "message", [*found.calls.values()]
            message = {"role": "assistant", "content": found.content or (None if calls else "")}
        message |= {"tool_calls": calls} if calls else {}
        logprobs = None
        if self.body.logprobs:
            logprobs = {"content": [self._describe_logprob(entry) for entry in output.logprobs]}
        reason = "tool_calls" if reason == "stop" and parser.num_calls else reason
        return {"index": index, name: message, "logprobs": logprobs, "finish_reason": reason}

    def _describe_logprob(self, entry: TokenLogprob) -> dict[str, Any]:
        def describe(token_id: int, logprob: float) -> dict[str, Any]:
            text, data = decode_token(self.state.tokenizer, token_id)
            return {"token": text, "logprob": max(logprob, LOWEST_LOGPROB), "bytes": list(data)}

        top = [describe(*other) for other in entry.top]
        return {**describe(entry.token_id, entry.logprob), "top_logprobs": top}


async def create_chat_completion(state: ServerState, request: Request) -> Response:
    """Answers /v1/chat/completions."""
    body = await state.read_body(request, ChatBody)
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    if taken := _OWN_VARIABLES & body.chat_template_kwargs.keys():
        what = f"{', '.join(sorted(taken))}: not a variable to set"
        raise ApiError(400, what, param="chat_template_kwargs")
    plan = plan_tools(body, get_chat_template(state.tokenizer, with_tools=bool(body.tools)))
    prompt = await encode_conversation(state, body.messages, plan, body.chat_template_kwargs)
    return await _ChatAnswer(state, body, [prompt], plan).respond(request)
