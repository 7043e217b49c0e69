"""Servers over fake engines."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial

import pytest

from maxlm.data.tokenizer.codec import Tokenizer
from tests.serving.running import RunningServer, run_in_thread, train_chat_tokenizer


@pytest.fixture(scope="session")
def chat_tokenizer() -> Tokenizer:
    return train_chat_tokenizer()


@pytest.fixture
def start_server(chat_tokenizer) -> Iterator[Callable[..., RunningServer]]:
    """``start_server(reply, ...)``: see ``run_in_thread``."""
    with ExitStack() as stack:
        start = partial(run_in_thread, chat_tokenizer)
        yield lambda *args, **kwargs: stack.enter_context(start(*args, **kwargs))
