"""Chat models behind OpenAI's protocol."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from maxlm.config import MaxlmError

try:
    from openai import APIStatusError, DefaultHttpxClient, OpenAI, OpenAIError, Timeout
except ModuleNotFoundError as error:
    what = f"the package {error.name} is not installed"
    fix = "pip install 'maxlm[eval]'"
    raise MaxlmError(what, fix=fix) from None


class EndpointDown(MaxlmError):
    """An endpoint that does not answer, also when asked again; no mistake of the
    user's."""

    exit_code = 1


class RequestRefused(MaxlmError):
    """An endpoint refuses one request for its content, as one too long for its
    context."""


@dataclass(frozen=True)
class ChatEndpoint:
    """A model, and the client that asks its server."""

    client: OpenAI
    model: str
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    """Fields beyond the protocol that each request has, such as our server's
    ``regex``."""

    def complete(self, messages: Sequence[Any], **options: float) -> str:
        """Returns the answer to a conversation; options are temperature, max_tokens and
        others of the protocol. Raises RequestRefused or EndpointDown."""
        with _convert_errors(self.client):
            return self._create(messages, **options).choices[0].message.content or ""

    def stream(self, messages: Sequence[Any], **options: float) -> Iterator[str]:
        """Yields the answer's pieces as they come. Raises errors of many types."""
        finished = None
        for event in self._create(messages, **options, stream=True):
            for choice in event.choices[:1]:
                finished = choice.finish_reason
                yield choice.delta.content or ""
        if not finished:
            raise OSError("the answer broke off")

    def _create(self, messages: Sequence[Any], **options: Any) -> Any:
        options |= {"model": self.model, "extra_body": self.extra_body}
        return self.client.chat.completions.create(messages=messages, **options)


def open_endpoint(
    address: str, key_variable: str = "", max_retries: int = 10
) -> ChatEndpoint:
    """Returns the endpoint of ``URL[#MODEL]``, such as localhost:8000; without a model,
    of the first that it serves. Its key is in `key_variable`, or else in
    OPENAI_API_KEY, or it needs none. 10 retries take about a minute."""
    url, _, model = address.partition("#")
    url = (url if "://" in url else f"http://{url}").rstrip("/")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise MaxlmError(
            "not a URL", where=address, fix="write http://HOST:PORT/v1#MODEL"
        )
    near = parts.hostname in ("localhost", "127.0.0.1", "::1")  # no proxy leads there
    client = OpenAI(
        base_url=url if parts.path else f"{url}/v1",
        api_key=os.environ.get(key_variable)
        or os.environ.get("OPENAI_API_KEY")
        or "none",
        max_retries=max_retries,
        http_client=DefaultHttpxClient(
            trust_env=not near, timeout=Timeout(900, connect=10)
        ),
    )
    with _convert_errors(client):
        return ChatEndpoint(client, model or client.models.list().data[0].id)


@contextmanager
def _convert_errors(client: OpenAI) -> Iterator[None]:
    where = str(client.base_url)
    fix = "start it, and give the same command again: it goes on"
    try:
        yield
    except (OpenAIError, LookupError, TypeError, AttributeError, ValueError) as error:
        what = " ".join(str(error.__cause__ or error).split())[:300]
        code = error.status_code if isinstance(error, APIStatusError) else 500
        if code < 500 and code not in (408, 409, 429):
            kind = RequestRefused if code in (400, 413, 422) else MaxlmError
            raise kind(what, where=where) from None
        raise EndpointDown(f"does not answer: {what}", where=where, fix=fix) from None
