"""The chat page reads Markdown as markdown-it-py does, and nothing in it runs or is
loaded."""

from html.parser import HTMLParser
from pathlib import Path

import pytest

import maxlm.serving

BLOCKS = {
    "paragraphs": "One line\nand the next.\n\nAnother paragraph.\r\nIts end.",
    "headings": "# First\n## Second ##\n####### seven\n#tag\n\n### *Third* `x`",
    "rule": "above\n\n---\n\nbelow\n\n* * *\n",
    "fence": "Look:\n```python\nprint('<b>&amp;</b>')\n\n  x = 1 * 2\n```\nDone.",
    "tilde fence": "~~~~ text\n```\n~~~\n~~~~\nafter",
    "open fence": "```js\nlet a = 1;",
    "quote": "> one\n> two\n>\n> > deeper\n\nout",
    "quoted list": "> - a\n> - b\n>\n> ```\n> code\n> ```",
    "tight list": "- a\n- b\n  c\n- d",
    "loose list": "- a\n\n- b\n\n- c",
    "nested": "1. one\n   - a\n   - b\n     1. deep\n2. two\n\n   still two\n3. three",
    "start": "7. seven\n8. eight",
    "marks": "- a\n* b\n+ c",
    "code in item": "- a\n  ```\n  x\n\n  y\n  ```\n- b",
    "text behind": "- a\nlazy\n\nno item",
    "year": "Born in\n1986. A year.",
    "table": "| a | b | c |\n|:--|:-:|--:|\n| 1 | `x` | **3** |\n| 4 |\n\nafter",
    "table without edges": "a | b\n--- | ---\n1 \\| 2 | 3",
    "html": "<b onclick='x'>bold</b> <script>alert(1)</script> & &amp;",
}
SPANS = {
    "emphasis": "*a* **b** ***c*** _d_ __e__ ~~f~~",
    "nested emphasis": "**bold *and italic* text** and *italic **bold** more*",
    "no emphasis": "2 * 3 * 4, snake_case_name, a_b, ** x ** and 5 * more",
    "code spans": "`a*b*` ``x ` y`` ` `` ` `unclosed",
    "code before marks": "*a `*` b* **c `**` d**",
    "escapes": "\\*no\\* \\`no\\` \\\\ \\a 1\\.",
    "links": "[a](https://a.example/x_y_z) [b *c*](http://b.example 'title') "
    "![i](https://c.example)",
    "brackets": "[1] [x](y z) [a[b]](https://a.example) (https)",
    "addresses": "<https://a.example/b?c=d&e=f>",
    "wide text": "猫が**好き**🐈 — “quotes” *ä*",
}


class _Tree(HTMLParser):
    """Nested lists of tags and texts, without what lays a page out."""

    def __init__(self, html: str):
        super().__init__()
        self.root: list = []
        self._open = [self.root]
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        attributes = dict(attrs)
        if tag == "div":
            return
        side = (attributes.get("style") or "").removeprefix("text-align:").strip(" ;")
        node = [tag, attributes.get("href"), attributes.get("start"), side]
        self._open[-1].append(node)
        if tag not in ("br", "hr"):
            self._open.append(node)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        if tag != "div":
            self._open.pop()

    def handle_data(self, data: str) -> None:
        inside_code = any(node[:1] == ["pre"] for node in self._open[1:])
        text = data.rstrip("\n") if inside_code else data.strip("\n")
        if not text:
            return
        siblings = self._open[-1]
        if siblings and isinstance(siblings[-1], str) and len(siblings) > 4:
            siblings[-1] += text
        else:
            siblings.append(text)


@pytest.fixture(scope="module")
def page(browser):
    page = browser.new_page()
    source = Path(maxlm.serving.__file__).with_name("markdown.js").read_text()
    page.set_content("<div id='answer'></div>")
    page.evaluate(f"() => {{ {source}; window.renderMarkdown = renderMarkdown; }}")
    yield page
    page.close()


def render(page, text: str) -> str:
    return page.evaluate(
        """text => {
            const node = document.getElementById("answer");
            node.replaceChildren(...renderMarkdown(text));
            return node.innerHTML;
        }""",
        text,
    )


@pytest.mark.parametrize("name", [*BLOCKS, *SPANS])
def test_nodes_are_those_of_markdown_it(page, name):
    from markdown_it import MarkdownIt

    text = {**BLOCKS, **SPANS}[name]
    reader = MarkdownIt("commonmark", {"breaks": True, "html": False})
    reader.enable(["table", "strikethrough"])
    if name == "links":  # an image is a link here, so that nothing is loaded
        text = text.replace("![", "[")
    expected = reader.render(text)
    assert _Tree(render(page, text)).root == _Tree(expected).root


def test_bare_addresses_are_links_and_end_before_a_sentence_does(page):
    html = render(
        page, "See https://a.example/b_c_d. (https://b.example/x) xhttps://no.example"
    )
    links = [node[1] for node in _Tree(html).root[0] if isinstance(node, list)]
    assert links == ["https://a.example/b_c_d", "https://b.example/x"]


@pytest.mark.parametrize(
    "address", ["javascript:alert(1)", "JaVaScRiPt:x", "data:text/html,x"]
)
def test_no_link_runs_anything(page, address):
    html = render(page, f"[a]({address}) ![b]({address}) <{address}>")
    assert "href" not in html
    assert "<img" not in html


@pytest.mark.parametrize("name", [*BLOCKS, *SPANS])
def test_every_beginning_of_a_text_is_shown(page, name):
    """As while it streams: no character of a word is lost, whatever its marks wait
    for."""
    text = {**BLOCKS, **SPANS}[name]
    for end in range(len(text) + 1):
        render(page, text[:end])
    shown = page.evaluate("document.getElementById('answer').textContent")
    words = [word for word in text.replace("\\", " ").split() if word.isalpha()]
    assert [
        word
        for word in words
        if word not in shown and word not in ("python", "js", "text")
    ] == []


def test_many_marks_take_little_time(page):
    """Texts of marks alone, which a model that repeats itself writes, end."""
    for mark in (
        "*",
        "_",
        "`",
        "[",
        "**a",
        "- ",
        "> ",
        "|",
        "~~a ",
        "<",
        "![a](",
        "1. ",
    ):
        render(page, mark * 3000)
