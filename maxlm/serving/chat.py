"""/v1/chat/completions: conversations, by the model's chat template."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from starlette.requests import Request
from starlette.responses import Response

from maxlm.data.tokenizer.chat import (
    EscapedChat,
    get_chat_template,
    render_escaped_chat,
)
from maxlm.data.tokenizer.codec import Tokenizer
from maxlm.inference.requests import GenerationRequest, SequenceOutput, TokenLogprob
from maxlm.runtime.json_types import JsonMapping, JsonObject
from maxlm.serving.engine_loop import RequestGroupStream
from maxlm.serving.errors import ApiError
from maxlm.serving.generation import LOWEST_LOGPROB, Answer, decode_token
from maxlm.serving.reasoning import (
    ReasoningFormat,
    ReasoningParser,
    detect_reasoning_format,
)
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

# Variables of chat templates that the server sets itself.
_RESERVED_VARIABLES = {
    "messages",
    "tools",
    "add_generation_prompt",
    "tokenizer",
    "continues_last",
}


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
        names = [tool.function.name for tool in self.offered]
        return ToolCallParser(
            self.tool_format,
            names,
            forced=bool(self.required),
            max_calls=None if self.parallel else 1,
        )


def plan_tools(body: ChatBody, template: str) -> _ToolPlan:
    """Returns what a request's tools and tool_choice ask for."""
    choice = body.tool_choice
    tools = body.tools
    required = []
    if not tools and choice not in (None, "none", "auto"):
        raise ApiError(400, "tool_choice needs tools", param="tool_choice")
    if choice == "required":
        required = tools
    elif isinstance(choice, Tool):
        required = [
            tool for tool in tools if tool.function.name == choice.function.name
        ]
        if not required:
            message = (
                f"tool_choice names {choice.function.name!r}, which is not among the "
                "tools"
            )
            raise ApiError(400, message, param="tool_choice")
    offered = [] if choice == "none" else tools
    parallel = body.parallel_tool_calls and not isinstance(choice, Tool)
    return _ToolPlan(detect_tool_format(template), offered, required, parallel)


class EncodedConversation(NamedTuple):
    """A conversation as a prompt."""

    tokens: tuple[int, ...]
    begins_inside: bool
    """Whether the answer begins within thoughts."""


async def encode_conversation(
    state: ServerState,
    tokenizer: Tokenizer,
    messages: list[ChatMessage],
    plan: _ToolPlan | None = None,
    variables: JsonObject | None = None,
    kept_tokens: int | None = None,
    *,
    continues_last: bool = False,
    marks: ReasoningFormat | None = None,
    closes_thoughts: bool = False,
) -> EncodedConversation:
    """Encodes a conversation, up to where the assistant begins to answer. Raises
    MaxlmError: the model has no chat template, or it cannot write this conversation;
    ApiError: it can never fit the context.

    Args:
        marks: those around thoughts.
        closes_thoughts: end thoughts that are open, because a form or a forced call
            follows.
    """
    plan = plan or _ToolPlan("hermes")
    conversation = await asyncio.to_thread(
        _render_conversation, tokenizer, messages, plan, variables or {}, continues_last
    )

    whole_text = conversation.get_plain_text()
    begins_inside = False
    if marks is not None:
        last_text = messages[-1].to_template()["content"] if continues_last else ""
        last_opener = last_text.rfind(marks.opener)
        last_closer = last_text.rfind(marks.closer)
        is_opened_by_message = last_opener > last_closer
        is_opened_by_template = whole_text.rstrip().endswith(marks.opener)
        begins_inside = is_opened_by_message or is_opened_by_template
    suffix = ""
    if begins_inside and closes_thoughts and marks is not None:
        suffix = f"\n{marks.closer}\n\n"
        begins_inside = False
    if plan.required:
        suffix += get_forced_prefix(plan.tool_format)

    def encode(text: str) -> list[int]:
        # Of a text that is cut, its end: literals' escapes make it a little shorter, no
        # longer.
        is_cut = len(text) < len(whole_text)
        ending = conversation.text[-len(text) :] if is_cut else conversation.text
        ids = conversation._replace(text=ending).encode(tokenizer)
        if suffix:
            ids += tokenizer.encode(suffix, allow_special=True)
        return ids

    # A template may leave parts of messages out: what it wrote is what counts.
    tokens = await state.encode_text(
        whole_text, "messages", encode=encode, kept_tokens=kept_tokens
    )
    return EncodedConversation(tokens, begins_inside)


def _render_conversation(
    tokenizer: Tokenizer,
    messages: list[ChatMessage],
    plan: _ToolPlan,
    variables: JsonObject,
    continues_last: bool,
) -> EscapedChat:
    template = get_chat_template(tokenizer)
    written = [message.to_template() for message in messages]
    tools = [tool.model_dump(exclude_none=True) for tool in plan.offered]
    settings: JsonObject = {"add_generation_prompt": True, **variables}
    if "tool" in template:
        settings["tools"] = tools or None
    elif tools or any(_mentions_tools(message) for message in written):
        written = describe_tools_in_text(written, tools)
    if continues_last:
        settings["add_generation_prompt"] = False
    return render_escaped_chat(
        tokenizer, written, continues_last=continues_last, **settings
    )


def _mentions_tools(message: JsonMapping) -> bool:
    return "tool_calls" in message or message["role"] == "tool"


class ParsedAnswer(NamedTuple):
    """Parts of an answer's text; calls by number, as :class:`ParsedText` has them."""

    reasoning: str
    content: str
    calls: dict[int, JsonObject]


@dataclass(eq=False)
class ChatAnswer(Answer):
    """The answer to /v1/chat/completions."""

    id_prefix = "chatcmpl"
    object_names = ("chat.completion", "chat.completion.chunk")
    body: ChatBody
    plan: _ToolPlan
    marks: ReasoningFormat | None = None
    """Those around thoughts that are told apart from the content; None: none are."""
    begins_inside: bool = False
    """Whether the prompt ends within thoughts."""
    parsers: dict[int, ToolCallParser] = field(default_factory=dict)
    """The parser of each sequence's calls, by its index."""
    reasoning_parsers: dict[int, ReasoningParser] = field(default_factory=dict)
    num_reasoning_tokens: int = 0
    """Tokens of thoughts, those that came in one step with a thought's end included."""

    def make_request(
        self, request_id: str, prompt: tuple[int, ...]
    ) -> GenerationRequest:
        body = self.body
        plan = self.plan
        max_new_tokens = self.state.resolve_max_tokens(
            len(prompt), body.requested_max_tokens, "messages"
        )
        tokenizer = self.state.get_tokenizer(body.model)
        request = body.make_request(
            request_id, prompt, max_new_tokens, tokenizer, self.state.sampling_defaults
        )
        # The engine ends where the model's own tokenizer says; an adapter may end
        # elsewhere too.
        adapter_stop_ids = set(tokenizer.stop_ids) - set(self.state.tokenizer.stop_ids)
        stop_ids = dict.fromkeys((*request.stop_token_ids, *sorted(adapter_stop_ids)))
        grammar = request.grammar
        if plan.required:
            if grammar:
                message = "tool_choice asks for a call: leave the other form out"
                raise ApiError(400, message)
            grammar = make_tool_grammar(
                plan.required, plan.tool_format, parallel=plan.parallel
            )
        return replace(
            request,
            stop_token_ids=tuple(stop_ids),
            grammar=grammar,
            top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        )

    def describe(self, index: int, output: SequenceOutput) -> JsonObject:
        is_first = index not in self.parsers
        parsed = self.parse(index, output)
        if self.body.stream:
            name = "delta"
            message: JsonObject = {"role": "assistant"} if is_first else {}
            if parsed.content or (is_first and not parsed.reasoning):
                message["content"] = parsed.content
            calls = [{"index": number, **call} for number, call in parsed.calls.items()]
        else:
            name = "message"
            calls = list(parsed.calls.values())
            content = parsed.content
            if calls and not content:
                content = None  # as OpenAI has it; "" without calls
            message = {"role": "assistant", "content": content}
        if parsed.reasoning:
            message["reasoning_content"] = parsed.reasoning
        if calls:
            message["tool_calls"] = calls
        logprobs = None
        if self.body.logprobs:
            entries = [self._describe_logprob(entry) for entry in output.logprobs]
            logprobs = {"content": entries}
        return {
            "index": index,
            name: message,
            "logprobs": logprobs,
            "finish_reason": self.get_finish_reason(index, output),
        }

    def parse(self, index: int, output: SequenceOutput) -> "ParsedAnswer":
        """Returns what an output adds to sequence ``index``, told apart."""
        is_last = output.finish_reason is not None
        if index not in self.parsers:
            self.parsers[index] = self.plan.make_parser()
            self.reasoning_parsers[index] = ReasoningParser(
                self.marks, self.begins_inside
            )
        reasoned = self.reasoning_parsers[index].push(output.text, final=is_last)
        parsed = self.parsers[index].push(reasoned.content, final=is_last)
        reasoning = reasoned.reasoning if self.body.include_reasoning else ""
        return ParsedAnswer(reasoning, parsed.content, parsed.calls)

    def get_finish_reason(self, index: int, output: SequenceOutput) -> str | None:
        """Returns why an output ended, in OpenAI's words; None: more will come."""
        has_called = self.parsers[index].num_calls > 0
        if output.finish_reason == "stop" and has_called:
            return "tool_calls"
        return output.finish_reason

    async def _read(
        self, stream: RequestGroupStream
    ) -> AsyncIterator[tuple[int, SequenceOutput]]:
        # Parsers of their own: those of parse() may not see an answer before its end.
        counters: dict[int, ReasoningParser] = {}
        async for index, output in super()._read(stream):
            if index not in counters:
                counters[index] = ReasoningParser(self.marks, self.begins_inside)
            reasoned = counters[index].push(output.text)
            if reasoned.reasoning or counters[index].is_inside:
                self.num_reasoning_tokens += len(output.token_ids)
            yield index, output

    def _describe_usage(self) -> JsonObject:
        usage = super()._describe_usage()
        if self.marks is not None:
            details = {"reasoning_tokens": self.num_reasoning_tokens}
            usage["completion_tokens_details"] = details
        return usage

    def _describe_logprob(self, entry: TokenLogprob) -> JsonObject:
        def describe(token_id: int, logprob: float) -> JsonObject:
            text, data = decode_token(self.state.tokenizer, token_id)
            return {
                "token": text,
                "logprob": max(logprob, LOWEST_LOGPROB),
                "bytes": list(data),
            }

        top = [describe(token_id, logprob) for token_id, logprob in entry.top]
        return {**describe(entry.token_id, entry.logprob), "top_logprobs": top}


async def create_chat_completion(state: ServerState, request: Request) -> Response:
    """Answers /v1/chat/completions."""
    body = await state.read_body(request, ChatBody)
    answer = await prepare_chat_answer(state, body)
    return await answer.respond(request)


async def prepare_chat_answer(
    state: ServerState, body: ChatBody, answer_class: type["ChatAnswer"] = ChatAnswer
) -> "ChatAnswer":
    """Returns the answer to a conversation, before anything of it is generated. Raises
    ApiError and MaxlmError: fields that do not go together, no chat template, a prompt
    that cannot fit."""
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    reserved = _RESERVED_VARIABLES & body.chat_template_kwargs.keys()
    if reserved:
        message = f"{', '.join(sorted(reserved))}: not a variable to set"
        raise ApiError(400, message, param="chat_template_kwargs")
    tokenizer = state.get_tokenizer(body.model)
    template = get_chat_template(tokenizer, with_tools=bool(body.tools))
    plan = plan_tools(body, template)
    _check_continuation(body, plan)
    marks = detect_reasoning_format(template) if body.separate_reasoning else None
    variables = {
        "add_generation_prompt": body.add_generation_prompt,
        **body.chat_template_kwargs,
    }
    kept_tokens = state.resolve_truncation(
        body.truncate_prompt_tokens, body.requested_max_tokens
    )
    conversation = await encode_conversation(
        state,
        tokenizer,
        body.messages,
        plan,
        variables,
        kept_tokens,
        continues_last=body.continue_final_message,
        marks=marks,
        closes_thoughts=body.has_form or bool(plan.required),
    )
    prompts = [conversation.tokens]
    return answer_class(state, body, prompts, plan, marks, conversation.begins_inside)


def _check_continuation(body: ChatBody, plan: _ToolPlan) -> None:
    """Checks that a message that is to be continued can be. Raises ApiError."""
    if not body.continue_final_message:
        return
    last = body.messages[-1]
    message = ""
    if last.role != "assistant" or last.tool_calls:
        message = "the last message must be the assistant's, and call nothing"
    elif plan.required:
        message = "a call that is forced begins a message: leave tool_choice out"
    if message:
        raise ApiError(400, message, param="continue_final_message")
