"""Text comes out of pages of every sort, and no page stops or crashes a run."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress

import psutil
import pyarrow as pa
import pytest
import trafilatura
from hypothesis import given, settings
from hypothesis import strategies as st

from maxlm.corpus import extraction
from maxlm.corpus.encoding import decode_page
from maxlm.corpus.extraction import HtmlExtractorProcess, extract_page
from maxlm.corpus.stages.extract import ExtractStage

STORY = (
    "The harbour was quiet when the first boats came back, and nobody had expected "
    "them so soon. "
    "They brought news of a storm beyond the cape, and of two ships that had lost "
    "their masts. "
)
PAGE = f"""<!DOCTYPE html><html lang="pt-BR"><head><title>Boats &amp;
 storms</title><meta content="2024-02-30" name="date">
<meta property="article:published_time" content="2024-03-05T10:00:00Z"></head>
<body><nav><ul><li><a href="/">Home page link</a></li><li><a href="/b">About us</a></li></ul></nav>
<main><article><h1>Boats come back</h1><p>{STORY}</p>
<pre><code>def sail(wind):
    if wind:
        return wind * 2</code></pre>
<p>{STORY.upper()}</p>
<table><tr><th>Ship</th><th>Masts</th></tr><tr><td>Petrel</td><td>317</td></tr></table>
<p>{STORY.lower()}</p></article></main>
<footer><p>Copyright by nobody in particular</p></footer></body></html>"""
# Takes trafilatura and resiliparse minutes.
SLOW = b"<select>" + b"<option>x" * 400_000


@pytest.mark.parametrize("quality", [True, False])
def test_main_text_code_tables_and_what_the_page_says_of_itself(quality):
    page = extract_page(PAGE.encode(), None, quality, markdown=False)
    encoded = ("\ufeff" + PAGE).encode("utf-16-le")
    assert extract_page(encoded, "utf-8", quality, markdown=False).text == page.text
    if quality:
        marked_up = extract_page(PAGE.encode(), None, quality, markdown=True)
        assert "```\ndef sail(wind):" in (marked_up.text or "")
    assert page.status == "ok"
    assert page.mode == ("trafilatura" if quality else "fast")
    assert (page.title, page.date) == ("Boats & storms", "2024-03-05")
    assert (page.language_hint, page.encoding) == ("pt-br", "utf-8")
    assert page.text is not None
    for part in (
        STORY.strip(),
        "def sail(wind):\n    if wind:\n        return",
        "Petrel",
        "317",
    ):
        assert part in page.text
    for part in ("About us", "Copyright", "<", "datePublished"):
        assert part not in page.text


TEXTS = {
    "cp1252": "Größe, naïveté, “quoted” – €5",
    "cp1251": "Гавань была тиха, когда первые лодки вернулись",
    "koi8-r": "Гавань была тиха, когда первые лодки вернулись",
    "cp932": "最初の船が戻ってきたとき、港はまだ静かだった。",
    "iso2022_jp": "最初の船が戻ってきたとき、港はまだ静かだった。",
    "gb18030": "第一批船回来的时候，港口还很安静。",
    "big5hkscs": "第一批船回來的時候，港口還很安靜。",
    "cp949": "첫 배들이 돌아왔을 때 항구는 아직 조용했다.",
}
NAMES = {
    "cp1252": "ISO-8859-1",
    "gb18030": "gb2312",
    "cp932": "Shift_JIS",
    "cp949": "euc-kr",
}
NAMES |= {"cp1251": "windows-1251", "big5hkscs": "big5", "iso2022_jp": "iso-2022-jp"}


@pytest.mark.parametrize("encoding", TEXTS)
def test_declared_encodings(encoding):
    text = TEXTS[encoding]
    name = NAMES.get(encoding, encoding)
    data = text.encode(encoding)
    assert decode_page(data, name)[0] == text
    for meta in (
        f'<meta charset="{name}">',
        f"<META http-equiv=a content='a; charset={name}'>",
    ):
        page = f"<html>{meta}<p>"
        # A server's default of Latin-1 says nothing.
        for charset in (None, "iso-8859-1"):
            assert decode_page(page.encode() + data, charset)[0] == page + text


@pytest.mark.parametrize(
    "charset", [None, "iso-8859-1", "shift_jis", "utf-16", "koi8-r"]
)
def test_utf8_is_told_whatever_is_declared(charset):
    text = "".join(TEXTS.values()) + "😀"
    assert decode_page(text.encode(), charset) == (text, "utf-8")
    assert decode_page(text.encode("utf-8-sig"), charset)[0] == text
    # A cut character, and a foreign byte, are no reason to read all the rest as
    # something else.
    decoded, name = decode_page(text.encode()[:-2] + b"\xe9", charset)
    assert name == "utf-8"
    assert decoded.startswith(text[:-1])


@settings(deadline=None, max_examples=150)
@given(st.binary(max_size=400) | st.text(max_size=200).map(str.encode), st.booleans())
def test_text_is_unicode_without_nul(data, quality):
    data = b"<html><body><p>" + data + b"&#0;&#xD800;&#1;" + STORY.encode()
    page = extract_page(data, None, quality, markdown=False)
    for text in (page.text or "", page.title or "", decode_page(data)[0]):
        text.encode()
        assert "\0" not in text


NASTY = {
    "deep": (b"<div>" * 100_000 + b"</div>" * 100_000, "empty"),
    "too deep for libxml2": (
        b"<p>"
        + STORY.upper().encode() * 5
        + b"</p>"
        + b"<div>" * 400
        + STORY.encode() * 3,
        "ok",
    ),
    "angles": (b"<" * 1_000_000, "not_html"),
    "open tags": (
        b"<title" * 10_000 + b"<meta " * 10_000 + b"<html " * 10_000,
        "empty",
    ),
    "long line": (b"<p>" + b"word " * 200_000, "ok"),
    "comment": (b"<!--" + b"x" * 1_000_000, "empty"),
    "nul": (PAGE.replace("<p>", "<p>\0").encode(), "ok"),
    "random": (b"<p>" + bytes(os.urandom(99_999)), "not_html"),
    "references": (b"<p>" + b"&#99999999999;&#xD800;&#0; &amp;" * 9999, "ok"),
}


def test_nasty_pages_have_a_status():
    extractor = HtmlExtractorProcess(use_trafilatura=True, markdown=False, seconds=10)
    pages = {name: extractor.read(data, None) for name, (data, _) in NASTY.items()}
    expected = {name: status for name, (_, status) in NASTY.items()}
    assert {name: page.status for name, page in pages.items()} == expected
    assert STORY.strip() in (pages["too deep for libxml2"].text or "")


UNCLOSED = {
    "p": "{}",
    "b": "{}",
    "section": "<b>{}",
    "p><font": "{}</p>",
    "div class='a > b'": "<p>{}</p>",
}


@pytest.mark.parametrize("quality", [True, False])
@pytest.mark.parametrize("tag", UNCLOSED)
def test_thousands_of_unclosed_tags_cost_no_text(tag, quality):
    """libxml2, below trafilatura, would drop what lies deeper than 256 elements."""
    sentence = "When boat {} came back, the harbour was quiet, and nobody on the quay expected it."
    lines = [sentence.format(i) for i in range(3500)]
    body = "".join(f"<{tag}>{UNCLOSED[tag].format(line)} " for line in lines)
    # The kinds of elements in which the parsers themselves would look for no text.
    body += "<script>if (1 < 2) { a = '<b>'; }</script><style>p { color: red }</style>"
    html = f"<html><body>{body}</body></html>"
    page = extract_page(html.encode(), None, quality, markdown=False)
    assert page.status == "ok"
    words = (page.text or "").replace("•", "").split()
    assert words == " ".join(lines).split()
    alone = trafilatura.extract(html, fast=True, include_comments=False) or ""
    assert len(alone.split()) <= len(words)


@pytest.mark.parametrize("depth", [10, 150, 1000])
def test_deep_pages_keep_what_their_outer_elements_say(depth):
    """Menus around the text stay out of it, also if tags within the text are not
    closed."""
    story = "".join(f"<p>{'<i>' * (depth // 10)}{STORY} {i}</p>" for i in range(12))
    html = (
        "<html><body><nav><ul><li><a href='/'>Home page of all</a></li></ul></nav>"
        f"<main><article>{story}</article></main>"
        "<footer><div>Imprint and privacy of the site</div></footer></body></html>"
    )
    page = extract_page(html.encode(), None, True, markdown=False)
    text = page.text or ""
    assert text.count(STORY.strip()) == 12
    assert "Imprint" not in text
    assert "Home page" not in text


def test_a_page_that_takes_too_long_costs_only_itself():
    extractor = HtmlExtractorProcess(use_trafilatura=False, markdown=False, seconds=0.5)
    good = PAGE.encode()
    pages = [extractor.read(data, None) for data in (good, SLOW, good, SLOW, good)]
    assert [page.status for page in pages] == ["ok", "timeout", "ok", "timeout", "ok"]
    assert pages[0] == pages[2] == pages[4]


def children() -> list[psutil.Process]:
    extractors = []
    for process in psutil.Process().children():
        with suppress(psutil.Error):  # It has just ended.
            if "serve_extractor(" in " ".join(process.cmdline()):
                extractors.append(process)
    return extractors


@pytest.mark.parametrize("quality", [True, False])
@pytest.mark.parametrize(
    ("fault", "status"), [("SIGSEGV", "broken"), ("SIGSTOP", "timeout")]
)
def test_a_crash_or_hang_costs_one_page_at_most(quality, fault, status, monkeypatch):
    monkeypatch.setattr(extraction, "_GRACE", -398)  # A hang is told after 2 seconds.
    extractor = HtmlExtractorProcess(quality, markdown=False, seconds=20)
    before = {child.pid for child in children()}
    extractor.read(PAGE.encode(), None)
    [child] = [child for child in children() if child.pid not in before]
    child.send_signal(signal.Signals[fault])
    pages = [extractor.read(PAGE.encode(), None) for _ in range(2)]
    # Where there is a second way, the page is not lost.
    assert [page.status for page in pages] == ["ok" if quality else status, "ok"]
    extractor.close()
    assert {child.pid for child in children()} <= before


PARENT = """
import sys
from maxlm.corpus.extraction import HtmlExtractorProcess
extractor = HtmlExtractorProcess(use_trafilatura=False, markdown=False, seconds=1)
extractor.read(b"<p>hello", None)
print(extractor._child[0].pid, flush=True)
while True:
    extractor.read(b"<select>" + b"<option>x" * 400_000, None)
"""


def test_the_child_does_not_outlive_its_parent():
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    child.wait(timeout=300)


def test_stage():
    stage = ExtractStage(mode="bulk", max_bytes=100_000)
    html = [PAGE.encode(), None, b"<p>" + b"x" * 200_000, STORY.encode("cp1252")]
    html.append(f"<p>{TEXTS['koi8-r']}".encode("koi8-r"))
    meta = [None, "{}", None, "{}", json.dumps({"charset": "koi8-r"})]
    batch = pa.RecordBatch.from_arrays(
        [pa.array(html, pa.large_binary()), pa.array(meta)], list(stage.input_columns)
    )
    label = stage.make_batch_label_fn()
    labels = label(batch)
    assert labels.schema == stage.schema()
    statuses = ["ok", None, "too_large", "not_html", "ok"]
    assert labels.column("status").to_pylist() == statuses
    has_text = labels.column("text").is_valid().to_pylist()
    assert has_text == [True, False, False, False, True]
    assert labels.column("text")[4].as_py() == TEXTS["koi8-r"]
    assert label(batch.slice(1, 1)).column("status").to_pylist() == [None]
