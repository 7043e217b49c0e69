"""A server as the model: the harness's own client, by the server's address alone."""

from types import SimpleNamespace

import pytest

from maxlm.config import MaxlmError
from maxlm.programs.evaluate import open_server
from tests.serving.running import run_in_thread, train_chat_tokenizer


def test_a_server_continues_texts_and_has_no_log_likelihoods_without_a_tokenizer():
    with run_in_thread(train_chat_tokenizer(), lambda text, request: "so 7\n") as running:
        url = str(running.client.base_url).rstrip("/")
        client = open_server(url)
        asked = [SimpleNamespace(args=("3+4 =", {"until": ["\n"], "max_gen_toks": 9}))]
        assert client.generate_until(asked) == ["so 7"]
        with pytest.raises(MaxlmError, match="need its tokenizer; tokenizer=FOLDER"):
            client.loglikelihood(asked)
    with pytest.raises(MaxlmError, match="this server cannot be used"):
        open_server("http://127.0.0.1:9/v1")
