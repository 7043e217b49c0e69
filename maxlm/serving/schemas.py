"""Bodies of requests: the fields of OpenAI's API, and those that maxlm adds.

Types are checked here; ranges of sampling settings by ``SamplingConfig``. A field set
to null is as one left out. Unknown fields are let pass, and named in the answer's
header ``x-maxlm-ignored``.
"""

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from maxlm.config.sampling import SamplingConfig
from maxlm.data.tokenizer.codec import Tokenizer
from maxlm.inference.json_schema import make_compilable_schema
from maxlm.inference.requests import GenerationRequest, GrammarSpec
from maxlm.runtime.json_types import JsonObject
from maxlm.serving.errors import ApiError

_UNSUPPORTED = (
    "suffix",
    "audio",
    "modalities",
    "prediction",
    "web_search_options",
    "functions",
)
# max_tokens and min_tokens say the other two.
SAMPLING_FIELDS = SamplingConfig.model_fields.keys() - {
    "max_new_tokens",
    "min_new_tokens",
}
MAX_PROMPTS = 2048

TokenIds = list[Annotated[int, Field(ge=0, lt=2**31)]]
Texts = Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
Prompt = (
    str
    | Texts
    | Annotated[TokenIds, Field(min_length=1)]
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
)
TopLogprobs = Annotated[int, Field(ge=0, le=20)]
BadWord = Annotated[str, Field(min_length=1, max_length=256)]
StopString = Annotated[str, Field(min_length=1)]


class ApiModel(BaseModel):
    """Part of a body."""

    model_config = ConfigDict(
        strict=True, extra="allow", allow_inf_nan=False, protected_namespaces=()
    )

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value  # a mistake that pydantic names
        return {key: field for key, field in value.items() if field is not None}


class ApiBody(ApiModel):
    """A body; ``model`` is a name that /v1/models lists."""

    model: str | None = None

    def list_ignored_fields(self) -> list[str]:
        """Returns names of fields that nothing reads. Raises ApiError: one is not
        supported."""
        extra = self.model_extra or {}
        for name in _UNSUPPORTED:
            if extra.get(name):
                message = f"{name} is not supported"
                raise ApiError(400, message, param=name, code="unsupported")
        unknown = [name for name in extra if name not in SAMPLING_FIELDS]
        # They go into a header: few, short, and of plain characters.
        printable = [
            name for name in unknown if re.fullmatch(r"[\w.-]{1,64}", name, re.ASCII)
        ]
        return printable[:16]


class StreamOptions(ApiModel):
    """Settings of a streamed answer."""

    include_usage: bool = False
    """Whether it ends with the numbers of tokens."""


class JsonSchemaFormat(ApiModel):
    """A named JSON schema."""

    schema_: JsonObject | bool = Field(alias="schema")


class ResponseFormat(ApiModel):
    """The form that an answer must have."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class GenerationBody(ApiBody):
    """Fields that /v1/completions and /v1/chat/completions share."""

    n: int = Field(default=1, ge=1, le=128)
    use_beam_search: bool = False
    """Whether the ``n`` likeliest continuations of ``best_of`` beams are searched, not
    drawn."""
    length_penalty: Annotated[float, Field(ge=-16, le=16)] = 1.0
    early_stopping: bool | Literal["never"] = False
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] = []
    seed: int | None = None
    logit_bias: dict[
        Annotated[int, Field(strict=False, ge=0)],
        Annotated[float, Field(ge=-100, le=100)],
    ] = {}
    response_format: ResponseFormat | None = None
    # Further fields of maxlm's; ``SAMPLING_FIELDS`` are taken beside them, under their
    # names.
    min_tokens: int = Field(default=0, ge=0)
    stop_token_ids: TokenIds = []
    ignore_eos: bool = False
    regex: str | None = None
    lark: str | None = None
    bad_words: Annotated[list[BadWord], Field(max_length=128)] = []
    """Texts that the output may not have, as far as they are written in the tokens that
    the tokenizer writes them in, at a word's beginning or behind a space."""
    truncate_prompt_tokens: int | None = Field(default=None, ge=-1)
    """Keep so many last tokens of each prompt; -1: as many as the context has room
    for."""

    def list_ignored_fields(self) -> list[str]:
        """Returns names of fields that nothing reads, and of a schema's keywords that
        are not kept, as ``response_format.uniqueItems``. Raises ApiError: one is not
        supported."""
        ignored = super().list_ignored_fields()
        form = self.response_format
        if form and form.json_schema:
            dropped = make_compilable_schema(form.json_schema.schema_).dropped_keywords
            ignored += [f"response_format.{keyword}" for keyword in sorted(dropped)]
        return ignored

    def make_request(
        self,
        request_id: str,
        prompt: tuple[int, ...],
        max_new_tokens: int,
        tokenizer: Tokenizer,
        sampling_defaults: Mapping[str, float],
    ) -> GenerationRequest:
        """Returns the engine's request; without a seed its own is drawn anew each time.

        Args:
            sampling_defaults: settings of sampling where the body says nothing.
        """
        vocab_size = tokenizer.vocab_size
        if any(token >= vocab_size for token in self.logit_bias):
            message = (
                f"logit_bias has token ids above {vocab_size - 1}, the vocabulary's "
                "last"
            )
            raise ApiError(400, message, param="logit_bias")
        if self.min_tokens > max_new_tokens:
            message = (
                f"min_tokens is {self.min_tokens}, more than the {max_new_tokens} "
                "allowed"
            )
            raise ApiError(400, message, param="min_tokens")
        extra = self.model_extra or {}
        sampling: JsonObject = dict(sampling_defaults)
        sampling |= {
            name: value for name, value in extra.items() if name in SAMPLING_FIELDS
        }
        if sampling.get("top_k") == -1:  # as some servers write "all"
            sampling["top_k"] = 0
        if sampling.get("top_p") == 0:  # OpenAI takes it: the likeliest token alone
            sampling["top_p"] = 1e-9
        sampling |= {
            "max_new_tokens": max_new_tokens,
            "min_new_tokens": self.min_tokens,
            "logit_bias": self.logit_bias,
            "seed": secrets.randbits(32) if self.seed is None else self.seed % 2**32,
        }
        stop_strings = [self.stop] if isinstance(self.stop, str) else self.stop
        return GenerationRequest(
            request_id=request_id,
            prompt_tokens=prompt,
            sampling=SamplingConfig.model_validate(sampling, strict=True),
            num_sequences=self.n,
            stop_strings=tuple(stop_strings),
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            grammar=self._make_grammar(),
            banned_sequences=encode_bad_words(tokenizer, self.bad_words),
        )

    @property
    def has_form(self) -> bool:
        """Whether the output must have a form from its first token on."""
        form = self.response_format
        return bool(self.regex or self.lark or (form and form.type != "text"))

    def _make_grammar(self) -> GrammarSpec | None:
        grammars: list[GrammarSpec] = []
        if self.regex is not None:
            grammars.append(GrammarSpec("regex", self.regex, "regex"))
        if self.lark is not None:
            grammars.append(GrammarSpec("lark", self.lark, "lark"))
        form = self.response_format
        if form and form.type == "json_object":
            grammars.append(GrammarSpec("json_object"))
        if form and form.type == "json_schema":
            if form.json_schema is None:
                message = "json_schema has no schema"
                raise ApiError(400, message, param="response_format.json_schema")
            schema = json.dumps(form.json_schema.schema_)
            grammars.append(GrammarSpec("json_schema", schema))
        if len(grammars) > 1:
            message = "response_format, regex and lark: give one"
            raise ApiError(400, message, param="regex")
        return grammars[0] if grammars else None


class CompletionBody(GenerationBody):
    """A request to /v1/completions."""

    prompt: Prompt
    max_tokens: int = Field(default=16, ge=0)
    best_of: int | None = Field(default=None, ge=1, le=128)
    """Sequences to draw; the ``n`` with the highest log-probability a token are
    returned."""
    echo: bool = False
    logprobs: TopLogprobs | None = None
    parse_special: bool = False


class ToolFunction(ApiModel):
    """A function to call, or one that was called with arguments: JSON text."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")
    description: str | None = None
    parameters: JsonObject | None = None
    arguments: str | None = None


class Tool(ApiModel):
    """A tool, the choice of one, or an earlier call of one; only functions are
    known."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: ToolFunction


class ContentPart(ApiModel):
    """A part of a message; only text is known."""

    type: Literal["text"]
    text: str


class ChatMessage(ApiModel):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] = ""
    name: str | None = None
    tool_calls: list[Tool] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None

    def to_template(self) -> JsonObject:
        """Returns the message as chat templates read it: content as text, arguments as
        data."""
        message = self.model_dump(
            include=set(ChatMessage.model_fields), exclude_none=True
        )
        if self.role == "developer":
            message["role"] = "system"
        content = self.content
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        message["content"] = content
        for call in message.get("tool_calls", ()):
            function = call["function"]
            arguments = function.setdefault("arguments", "") or "{}"
            with suppress(ValueError, RecursionError):  # what is no JSON stays text
                function["arguments"] = json.loads(arguments)
        return message


class ChatBody(GenerationBody):
    """A request to /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: TopLogprobs | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] = []
    tool_choice: Literal["none", "auto", "required"] | Tool | None = None
    parallel_tool_calls: bool = True
    chat_template_kwargs: JsonObject = {}
    continue_final_message: bool = False
    """Whether the last message, the assistant's, is to be continued."""
    add_generation_prompt: bool = True
    """Whether the prompt ends with what opens the assistant's turn."""
    separate_reasoning: bool = True
    """Whether thoughts are told apart, as ``reasoning_content``; false: they are
    content."""
    include_reasoning: bool = True
    """Whether thoughts that are told apart are sent."""

    @property
    def requested_max_tokens(self) -> int | None:
        """Tokens that an answer may have, by either name; None: not given."""
        return self.max_completion_tokens or self.max_tokens

    def list_ignored_fields(self) -> list[str]:
        """As of other bodies, with keywords of the schemas of tools of which one must
        be called."""
        ignored = super().list_ignored_fields()
        if self.tool_choice in (None, "none", "auto"):
            return ignored
        dropped: set[str] = set()
        for tool in self.tools:
            dropped |= make_compilable_schema(tool.function.parameters).dropped_keywords
        return [*ignored, *(f"tools.{keyword}" for keyword in sorted(dropped))]


class EmbeddingBody(ApiBody):
    """A request to /v1/embeddings."""

    input: Prompt
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(default=None, ge=1)
    pooling: Literal["mean", "last", "first"] | None = None


class PairBody(ApiBody):
    """A request that scores pairs of texts."""

    method: Literal["loglikelihood", "cosine"] | None = None

    def resolve_method(self, generates: bool) -> Literal["loglikelihood", "cosine"]:
        """Returns how pairs are scored; by default as the model can: ``generates``: it
        continues text."""
        if self.method is not None:
            return self.method
        return "loglikelihood" if generates else "cosine"


class ScoreBody(PairBody):
    """A request to /v1/score: one text beside one or many, or pairs of as many."""

    text_1: str | Texts
    text_2: str | Texts


class RerankDocument(ApiModel):
    """A document to rank."""

    text: str


class RerankBody(PairBody):
    """A request to /v1/rerank, as Jina's and Cohere's."""

    query: Annotated[str, Field(min_length=1)]
    documents: Annotated[
        list[str] | list[RerankDocument], Field(min_length=1, max_length=MAX_PROMPTS)
    ]
    top_n: int | None = Field(default=None, ge=1)
    return_documents: bool = True

    def list_texts(self) -> list[str]:
        """Returns the documents' texts."""
        return [
            document if isinstance(document, str) else document.text
            for document in self.documents
        ]


class UnloadAdapterBody(ApiBody):
    """A request to /v1/unload_lora_adapter."""

    lora_name: str = Field(pattern=r"^[\w./-]{1,128}$")


class LoadAdapterBody(UnloadAdapterBody):
    """A request to /v1/load_lora_adapter."""

    lora_path: str = Field(min_length=1)


class TokenizeBody(ApiBody):
    """A request to /tokenize: of a prompt, or of a conversation."""

    prompt: str | None = None
    messages: list[ChatMessage] = []
    add_special_tokens: bool = True
    parse_special: bool = False


class DetokenizeBody(ApiBody):
    """A request to /detokenize."""

    tokens: TokenIds


def encode_bad_words(
    tokenizer: Tokenizer, words: Sequence[str]
) -> tuple[tuple[int, ...], ...]:
    """Returns the token sequences of words, each at a text's beginning and behind a
    space."""
    sequences: dict[tuple[int, ...], None] = {}
    for word in words:
        stem = word.lstrip()
        for text in (stem, f" {stem}") if stem else (word,):
            tokens = tuple(tokenizer.encode(text))
            if tokens:
                sequences[tokens] = None
    return tuple(sequences)


def list_prompts(prompt: Prompt) -> Sequence[str | TokenIds]:
    """Returns the prompts of a field that may hold one or many."""
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [prompt]  # pyright: ignore[reportReturnType]
    return prompt  # pyright: ignore[reportReturnType]
