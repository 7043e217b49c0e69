"""The arena's page works in a browser: two answers stream, names come with the vote."""

import asyncio
import threading

import pytest
import uvicorn

from maxlm.evaluation.arena import Arena
from maxlm.evaluation.ratings import read_battles
from maxlm.serving.server import bind_socket
from tests.evaluation.fake_endpoint import run_endpoint

HOSTILE = "<img src=x onerror=alert(1)> **bold** and " + "words " * 60


@pytest.fixture
def arena(tmp_path):
    """The URL of an arena of two fake endpoints, and its database."""
    with (
        run_endpoint(lambda body: HOSTILE, "secret-alpha") as first,
        run_endpoint(
            lambda body: f"turn {len(body['messages'])}", "secret-beta"
        ) as second,
    ):
        app = Arena([first.open(), second.open()], tmp_path / "arena.db").make_app()
        bound = bind_socket("127.0.0.1", 0)
        server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_config=None))
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([bound])))
        thread.start()
        yield (
            f"http://127.0.0.1:{bound.getsockname()[1]}/",
            tmp_path / "arena.db",
            second,
        )
        server.should_exit = True
        thread.join()


@pytest.mark.parametrize("width", [1200, 390])
def test_a_battle_is_blind_until_the_vote(browser, arena, width):
    url, database, second = arena
    page = browser.new_page(viewport={"width": width, "height": 800})
    complaints = []
    page.on(
        "console",
        lambda m: m.type in ("error", "warning") and complaints.append(m.text),
    )
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(url)
    vote = page.get_by_role("button", name="B is better")
    assert vote.is_disabled()
    for n, prompt in enumerate(("What is it?", "And more?")):
        page.get_by_label("Prompt", exact=True).fill(prompt)
        page.keyboard.press("Enter")
        page.get_by_text("Which answer is better?").wait_for()
        page.get_by_text(f"turn {2 * n + 1}").wait_for()
    assert page.locator("section img").count() == 0
    assert page.get_by_text("<img src=x").count() == 2
    assert "secret" not in page.content()
    second.reply = lambda body: 500  # a turn that fails leaves the battle as it was
    page.get_by_label("Prompt", exact=True).fill("Again")
    page.get_by_role("button", name="Send").click()
    page.get_by_text("A model did not answer").wait_for()
    assert page.get_by_label("Prompt", exact=True).input_value() == "Again"
    assert page.locator("section p").count() == 8
    vote.click()
    page.get_by_text("Thank you.").wait_for()
    assert vote.is_disabled()
    (battle,) = read_battles(database)
    assert battle["winner"] == "model_b"
    assert page.inner_text("#b h2") == f"Model B: {battle['model_b']}"
    top = page.evaluate(
        "main.scrollTop = 0, main.firstElementChild.getBoundingClientRect().top"
    )
    assert top > page.locator("header").bounding_box()["height"]
    wide, there = page.evaluate(
        "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    assert wide <= there
    page.get_by_role("link", name="Leaderboard").click()
    page.get_by_role("cell", name=battle["model_b"]).wait_for()
    assert "no finite ratings" in page.inner_text("main")
    assert page.locator("tr").count() == 3
    page.get_by_role("link", name="New battle").click()
    page.get_by_label("Prompt", exact=True).wait_for()
    page.close()
    assert complaints == []
