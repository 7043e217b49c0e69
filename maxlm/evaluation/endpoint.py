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
    message = f"the package {error.name} is not installed"
    raise MaxlmError(message, fix="pip install 'maxlm[eval]'") from None


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

    def complete(self, messages: Sequence[Mapping[str, str]], **options: float) -> str:
        """Returns the answer to a conversation; options are temperature, max_tokens and
        others of the protocol. Raises RequestRefused or EndpointDown."""
        with _convert_errors(self.client):
            completion = self._create(messages, **options)
            return completion.choices[0].message.content or ""

    def stream(
        self, messages: Sequence[Mapping[str, str]], **options: float
    ) -> Iterator[str]:
        """Yields the answer's pieces as they come. Raises errors of many types."""
        finish_reason = None
        for event in self._create(messages, **options, stream=True):
            for choice in event.choices[:1]:
                finish_reason = choice.finish_reason
                yield choice.delta.content or ""
        if not finish_reason:
            raise OSError("the answer broke off")

    def _create(self, messages: Sequence[Mapping[str, str]], **options: float) -> Any:
        # Any: the client's overloads tell streams from answers by literals alone.
        create: Any = self.client.chat.completions.create
        return create(
            model=self.model, messages=messages, extra_body=self.extra_body, **options
        )


def open_endpoint(
    address: str, key_variable: str = "", max_retries: int = 10
) -> ChatEndpoint:
    """Returns the endpoint of ``URL[#MODEL]``, such as localhost:8000; without a model,
    of the first that it serves. Its key is in `key_variable`, or else in
    OPENAI_API_KEY, or it needs none. 10 retries take about a minute."""
    url, _, model = address.partition("#")
    if "://" not in url:
        url = f"http://{url}"
    url = url.rstrip("/")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        fix = "write http://HOST:PORT/v1#MODEL"
        raise MaxlmError("not a URL", where=address, fix=fix)
    # No proxy leads to this machine.
    is_local = parts.hostname in ("localhost", "127.0.0.1", "::1")
    api_key = os.environ.get(key_variable) or os.environ.get("OPENAI_API_KEY")
    client = OpenAI(
        base_url=url if parts.path else f"{url}/v1",
        api_key=api_key or "none",  # the client refuses an empty one
        max_retries=max_retries,
        http_client=DefaultHttpxClient(
            trust_env=not is_local, timeout=Timeout(900, connect=10)
        ),
    )
    with _convert_errors(client):
        if not model:
            model = client.models.list().data[0].id
    return ChatEndpoint(client, model)


@contextmanager
def _convert_errors(client: OpenAI) -> Iterator[None]:
    where = str(client.base_url)
    fix = "start it, and give the same command again: it goes on"
    try:
        yield
    except (OpenAIError, LookupError, TypeError, AttributeError, ValueError) as error:
        # The client does not check what a server sends: JSON of another form shows
        # where it is read, as any of these.
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        code = error.status_code if isinstance(error, APIStatusError) else 500
        if code in (400, 413, 422):
            raise RequestRefused(reason, where=where) from None
        if code < 500 and code not in (408, 409, 429):
            raise MaxlmError(reason, where=where) from None
        message = f"does not answer: {reason}"
        raise EndpointDown(message, where=where, fix=fix) from None
