"""The arena: blind until the vote, one vote a battle, random sides, a leaderboard of
the votes."""

from collections import Counter

import pytest
from starlette.testclient import TestClient

from maxlm.evaluation.arena import Arena
from maxlm.evaluation.ratings import read_battles
from tests.errors import message
from tests.evaluation.fake_endpoint import run_endpoint

NAMES = ["secret-alpha", "secret-beta"]


@pytest.fixture
def fakes():
    with (
        run_endpoint(
            lambda body: f"long answer {len(body['messages'])}", NAMES[0]
        ) as first,
        run_endpoint(lambda body: f"brief {len(body['messages'])}", NAMES[1]) as second,
    ):
        yield [first, second]


@pytest.fixture
def client(fakes, tmp_path):
    arena = Arena([fake.open() for fake in fakes], tmp_path / "arena.db", max_tokens=99)
    with TestClient(arena.make_app()) as client:
        yield client


def go_on(client, talks, prompt="Hi", battle="x"):
    """Both texts, which are added to the talks; nothing that is sent names a model."""
    texts = []
    for side, talk in zip("ab", talks, strict=True):
        talk.append({"role": "user", "content": prompt})
        body = {"battle": battle, "side": side, "messages": talk}
        response = client.post("/answer", json=body)
        assert "secret" not in response.text + str(response.headers)
        texts.append(response.text.removesuffix("\0"))
        assert response.text.endswith("\0")
        talk.append({"role": "assistant", "content": texts[-1]})
    return texts


def vote(client, talks, winner="tie", battle="x"):
    body = {"battle": battle, "winner": winner, "conversation_a": talks[0]}
    return client.post("/vote", json=body | {"conversation_b": talks[1]})


def test_names_come_with_the_vote_alone(client, fakes, tmp_path):
    talks = [], []
    assert sorted(go_on(client, talks)) == ["brief 1 ", "long answer 1 "]
    texts = go_on(client, talks, "And?")
    assert sorted(texts) == ["brief 3 ", "long answer 3 "]
    assert "secret" not in client.get("/ratings").text + client.get("/").text
    names = vote(client, talks, "model_b").json()
    assert sorted(names) == NAMES
    assert names[0] == NAMES[texts[0].startswith("brief")]
    assert vote(client, talks).status_code == 409
    body = {"battle": "x", "side": "a", "messages": talks[0][:1]}
    assert client.post("/answer", json=body).status_code == 409
    (battle,) = read_battles(tmp_path / "arena.db")
    assert (battle["model_a"], battle["model_b"], battle["winner"]) == (
        *names,
        "model_b",
    )
    assert (battle["conversation_a"], battle["conversation_b"]) == talks
    assert fakes[0].bodies[0]["max_tokens"] == 99


@pytest.mark.heavy
def test_sides_are_random_and_votes_rate(client):
    sides = Counter()
    for n in range(24):
        talks = ([], [])
        battle = str(n)
        better = "ab"[go_on(client, talks, battle=battle)[1].startswith("long")]
        winner = (
            "tie (bothbad)"
            if n == 0
            else f"model_{better if n % 4 else 'ab'[better == 'a']}"
        )
        sides[vote(client, talks, winner, battle).json()[0]] += 1
    assert min(sides.values()) >= 3  # 24 fair coins: once in 20,000 runs it fails
    best, worst = client.get("/ratings").json()["rows"]
    assert [best["model"], worst["model"]] == NAMES
    assert best["low"] < best["rating"] < best["high"]


def test_what_no_battle_has_is_refused(client, fakes, tmp_path, capsys):
    talk = [{"role": "user", "content": "Hi"}]
    assert vote(client, (talk, talk), "tie").status_code == 409
    assert client.post("/vote", content=b"[").status_code == 400
    assert vote(client, (talk, talk), "both").status_code == 400
    body = {"battle": "of old", "side": "a", "messages": talk * 3}
    assert client.post("/answer", json=body).status_code == 409
    fakes[0].reply = fakes[1].reply = lambda body: 500
    response = client.post(
        "/answer", json={"battle": "x", "side": "a", "messages": talk}
    )
    assert response.text == ""
    assert "refuses" in capsys.readouterr().err  # the server alone is told why
    one = fakes[0].open()
    assert "two models" in message(Arena, [one], tmp_path / "x.db")
    assert "different names" in message(Arena, [one, one], tmp_path / "x.db")
