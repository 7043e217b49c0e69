"""A server as the model: the harness's own client, by the server's address alone."""

import json
from types import SimpleNamespace

import pytest

from maxlm.config import MaxlmError
from maxlm.evaluation.program import evaluate_model, open_server
from tests.evaluation.fake_endpoint import run_endpoint
from tests.serving.running import run_in_thread, train_chat_tokenizer

pytestmark = pytest.mark.heavy


def test_a_server_continues_texts_and_has_no_log_likelihoods_without_a_tokenizer():
    with run_in_thread(
        train_chat_tokenizer(), lambda text, request: "so 7\n"
    ) as running:
        url = str(running.client.base_url).rstrip("/")
        client = open_server(url)
        requests = [
            SimpleNamespace(args=("3+4 =", {"until": ["\n"], "max_gen_toks": 9}))
        ]
        assert client.generate_until(requests) == ["so 7"]
        with pytest.raises(MaxlmError, match="need its tokenizer; tokenizer=FOLDER"):
            client.loglikelihood(requests)
    with pytest.raises(MaxlmError, match="this server cannot be used"):
        open_server("http://127.0.0.1:9/v1")


@pytest.mark.more
def test_an_evaluation_that_is_cut_off_asks_for_the_rest(tmp_path):
    numbers = [14, 25, 36, 47, 58, 69, 70]
    rows = [{"question": f"What is {n}?", "answer": f"#### {n}"} for n in numbers]
    (tmp_path / "gsm8k_test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    answered = []
    room = 4

    def reply(body):
        if len(answered) == room:
            return None
        answered.append(
            next(n for n in numbers if f"{n}?" in json.dumps(body["messages"]))
        )
        return f"#### {answered[-1]}"

    settings = ["num_concurrent=2", "max_retries=1"]
    options = {"output": tmp_path / "out", "data": tmp_path, "shots": 0, "chat": True}
    with run_endpoint(reply) as fake:
        with pytest.raises(
            MaxlmError, match=r"does not answer .*; start it, and evaluate again"
        ):
            evaluate_model(fake.url, ["gsm8k"], settings, **options)
        room = 100
        results, folder = evaluate_model(fake.url, ["gsm8k"], settings, **options)
    assert sorted(set(answered)) == numbers
    assert len(answered) < len(numbers) + 2  # again only what was under way
    assert results["results"]["gsm8k"]["exact_match,strict-match"] == 1
    assert not (folder / "answers.jsonl").exists()
