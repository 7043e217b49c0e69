"""The chat page works in a browser, at a desk's width and a phone's, by mouse and by
keyboard."""

import json
import re
import threading

import pytest

from tests.browser.conftest import record_complaints
from tests.serving.running import run_in_thread, train_chat_tokenizer

ANSWERS = {
    "code": "Look:\n```python\nprint('<b>&amp;</b>')\n```\nDone.",
    "cat": "猫が好き 🐈!",
    "markdown": "**bold**\n\n- one\n- two\n\n| a |\n|---|\n| 1 |\n\n```python\nx = "
    "1\n```\n",
    "long": "one two three " * 25,
}


def reply(text: str, request) -> str:
    _, _, last_turn = text.rpartition("user\n")
    question, _, _ = last_turn.partition("<|im_end|>")
    for word, answer in ANSWERS.items():
        if word in question:
            return answer
    return f"You said: {question}"


@pytest.fixture(scope="module")
def tokenizer():
    return train_chat_tokenizer()


@pytest.fixture
def server(tokenizer):
    with run_in_thread(tokenizer, reply) as running:
        yield running


@pytest.fixture(params=[1200, 390], ids=["desktop", "phone"])
def page(request, browser, server):
    context = browser.new_context(viewport={"width": request.param, "height": 780})
    page = context.new_page()
    complaints = []
    record_complaints(page, complaints)
    urls = []
    page.on("request", lambda request: urls.append(request.url))
    page.goto(server.url)
    yield page
    body_width, window_width = page.evaluate("[document.body.scrollWidth, innerWidth]")
    context.close()
    assert complaints == []
    # Nothing is fetched from elsewhere.
    assert [url for url in urls if not url.startswith(server.url)] == []
    assert body_width <= window_width


def say(page, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Send").wait_for()


def answers(page) -> list[str]:
    return page.locator("article.assistant .body").all_inner_texts()


def last_prompt(server) -> str:
    return server.engine.tokenizer.decode(server.engine.requests[-1].prompt_tokens)


def test_a_conversation_streams_and_is_sent_whole(page, server):
    assert page.inner_text("h1") == "fake"
    say(page, "hi")
    say(page, "the cat")
    assert (
        server.engine.requests[-1].sampling.temperature == 0.7
    )  # as its field's hint says
    assert answers(page) == ["You said: hi", ANSWERS["cat"]]
    assert last_prompt(server).count("You said: hi") == 1
    note = page.locator("article.assistant .foot").last.inner_text()
    assert "tokens/s" in note
    assert "first after" in note
    page.reload()  # the tab keeps it
    assert answers(page) == ["You said: hi", ANSWERS["cat"]]
    show_chats(page)
    page.get_by_role("button", name="New chat").click()
    assert answers(page) == []


def show_chats(page) -> None:
    """A phone's page has the list of conversations behind a button."""
    if page.is_visible("#show"):
        page.get_by_role("button", name="Chats").click()


def list_chats(page) -> list[str]:
    return page.locator("#list .open").all_text_contents()


def test_conversations_are_kept_apart_and_can_be_deleted(page, server):
    say(page, "first talk")
    show_chats(page)
    page.get_by_role("button", name="New chat").click()
    say(page, "second talk")
    assert list_chats(page) == ["second talk", "first talk"]
    assert "first talk" not in last_prompt(server)
    show_chats(page)
    page.get_by_role("button", name="first talk", exact=True).click()
    assert answers(page) == ["You said: first talk"]
    say(page, "and more")
    assert "first talk" in last_prompt(server)
    assert "second talk" not in last_prompt(server)
    other = page.context.new_page()  # another tab of the same browser
    other.goto(server.url)
    assert list_chats(other) == ["first talk", "second talk"]
    page.once("dialog", lambda dialog: dialog.accept())
    show_chats(page)
    page.get_by_role("button", name="Delete first talk").click()
    assert answers(page) == []
    assert list_chats(page) == ["second talk"]
    other.get_by_role("button", name="first talk", exact=True).wait_for(
        state="detached"
    )
    other.close()


def test_a_conversation_left_while_it_is_answered_keeps_what_there_was(page, server):
    started, go_on = threading.Event(), threading.Event()

    def pause():
        if server.engine.num_generated == 20:
            started.set()
            go_on.wait(20)

    server.engine.before_step = pause
    page.get_by_label("Message", exact=True).fill("long")
    page.keyboard.press("Enter")
    assert started.wait(20)
    page.locator("article.waiting .body", has_text=re.compile(r".{10}")).wait_for()
    show_chats(page)
    page.get_by_role("button", name="New chat").click()
    go_on.set()
    say(page, "hi")
    assert answers(page) == ["You said: hi"]
    show_chats(page)
    page.get_by_role("button", name="long", exact=True).click()
    assert 0 < len(answers(page)[0]) < len(ANSWERS["long"])


def test_answers_are_shown_as_markdown_and_code_can_be_copied(page, server):
    say(page, "markdown")
    assert page.locator("article.assistant li").all_inner_texts() == ["one", "two"]
    assert page.inner_text("article.assistant strong") == "bold"
    assert page.inner_text("article.assistant td") == "1"
    page.context.grant_permissions(
        ["clipboard-read", "clipboard-write"], origin=server.url
    )
    page.locator(".code").get_by_role("button", name="Copy").click()
    page.get_by_role("button", name="Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == "x = 1\n"


def test_shift_enter_breaks_the_line_and_code_stays_text(page, server):
    box = page.get_by_label("Message", exact=True)
    box.fill("code")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("please")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Send").wait_for()
    assert "code\nplease" in last_prompt(server)
    assert page.inner_text("pre") == "print('<b>&amp;</b>')\n"
    assert page.locator("article b").count() == 0


def test_escape_stops_and_the_engine_is_freed(page, server):
    started, go_on = threading.Event(), threading.Event()

    def pause():
        if server.engine.num_generated == 20:
            started.set()
            go_on.wait(20)

    server.engine.before_step = pause
    page.get_by_label("Message", exact=True).fill("long")
    page.keyboard.press("Enter")
    assert started.wait(20)
    # By locators: functions are polled by eval, which the page's policy forbids.
    page.locator("article.waiting .body", has_text=re.compile(r".{10}")).wait_for()
    page.keyboard.press("Escape")
    page.get_by_text("stopped").wait_for()
    go_on.set()
    page.locator(".waiting").wait_for(state="detached")
    for _ in range(500):
        if not server.engine.sequences:
            break
        page.wait_for_timeout(10)
    assert not server.engine.sequences
    assert 0 < len(answers(page)[0]) < len(ANSWERS["long"])


def test_edit_and_regenerate(page, server):
    say(page, "first")
    say(page, "second")
    page.get_by_role("button", name="Edit").first.click()
    page.get_by_label("Edit message").fill("other")
    page.keyboard.press("Enter")
    page.get_by_text("You said: other").wait_for()
    page.get_by_role("button", name="Send").wait_for()
    assert answers(page) == ["You said: other"]
    count = len(server.engine.requests)
    page.get_by_role("button", name="Regenerate").click()
    page.get_by_role("button", name="Send").wait_for()
    assert len(server.engine.requests) == count + 1
    assert answers(page) == ["You said: other"]


def test_settings_reach_the_request(page, server):
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Temperature").fill("0.25")
    page.get_by_label("Top-k").fill("7")
    page.get_by_label("Most tokens").fill("5")
    page.keyboard.press("Escape")
    say(page, "the settings")
    request = server.engine.requests[-1]
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.max_new_tokens) == (
        0.25,
        7,
        5,
    )
    assert "system\nBe brief." in last_prompt(server)
    assert "cut at the limit" in page.locator("article.assistant .foot").inner_text()


def test_tokens_are_coloured_and_show_alternatives(page, server):
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Colour tokens").check()
    page.get_by_role("button", name="Close").click()
    say(page, "the cat")
    assert answers(page) == [ANSWERS["cat"]]
    hues = page.locator(".token").evaluate_all(
        "s => s.map(t => +t.style.getPropertyValue('--hue'))"
    )
    assert hues == sorted(hues, reverse=True)  # the fake engine grows unsure
    page.locator(".token").first.hover()
    assert "%" in page.inner_text("#tip")
    assert "a" in page.inner_text("#tip")
    page.get_by_label("Message", exact=True).hover()
    assert not page.is_visible("#tip")


def test_errors_are_shown_and_a_key_is_asked_for(browser, tokenizer):
    with run_in_thread(tokenizer, reply, api_key="secret") as server:
        page = browser.new_page()
        page.goto(server.url)
        page.get_by_text("Needs an API key").wait_for()
        say(page, "hi")
        assert "authorization" in page.get_by_role("alert").inner_text()
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("API key").fill("secret")
        page.get_by_role("button", name="Close").click()
        page.get_by_role("button", name="Regenerate").click()
        page.get_by_text("You said: hi").wait_for()
        assert json.loads(page.evaluate("sessionStorage['maxlm-chat']"))["settings"][
            "key"
        ]
        page.close()
