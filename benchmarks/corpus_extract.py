"""Extraction of main text: ours against trafilatura and resiliparse, speed and F, side
by side.

    git clone https://github.com/scrapinghub/article-extraction-benchmark pip install
    psutil python benchmarks/corpus_extract.py article-extraction-benchmark [--manuals
    DOCS ...]

The first set are 181 news pages with the article's text labelled by hand. With
--manuals, folders of Sphinx or DocBook HTML (Debian's python3.13-doc, linux-doc-6.12,
postgresql-doc-17) make a second one, of pages with code and tables: the text of the
element that holds a page's content.

F is that of mean precision and mean recall over pages, of words as a bag and of word
4-grams (as that benchmark's own script). Speed is pages per second of processor time,
the child process's included; rounds alternate, and the medians are printed.
"""

import argparse
import gzip
import json
import random
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from maxlm.corpus.extraction import HtmlExtractorProcess

WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Labelled:
    html: bytes
    text: str


def articles(folder: Path) -> list[Labelled]:
    """The pages of scrapinghub's article-extraction-benchmark."""
    truth = json.loads((folder / "ground-truth.json").read_text())
    return [
        Labelled(
            gzip.decompress((folder / f"html/{key}.html.gz").read_bytes()),
            row["articleBody"],
        )
        for key, row in truth.items()
    ]


def manuals(folders: Sequence[Path], limit: int, seed: int = 0) -> list[Labelled]:
    """Pages of manuals, with the text of the element that holds their content."""
    import lxml.html

    pages: list[Labelled] = []
    for folder in folders:
        paths = sorted(folder.rglob("*.html"))
        random.Random(seed).shuffle(paths)
        folder_pages: list[Labelled] = []
        for path in paths:
            data = path.read_bytes()
            if len(folder_pages) == limit:
                break
            if len(data) > 300_000:
                continue
            tree = lxml.html.fromstring(data)
            for part in tree.xpath(
                '//div[@class="navheader" or @class="navfooter"]|//script|//style'
            ):
                part.drop_tree()
            main = tree.xpath('//div[@role="main"]') or tree.xpath(
                "//body[not(//div[@role])]"
            )
            text = " ".join(main[0].itertext()) if main else ""
            if len(WORD.findall(text)) > 50:
                folder_pages.append(Labelled(data, text))
        pages += folder_pages
    return pages


def f_score(pages: Sequence[Labelled], texts: Sequence[str | None], size: int) -> float:
    """F of mean precision and recall of word `size`-grams."""
    precisions, recalls = [], []
    for page, text in zip(pages, texts, strict=True):
        expected_grams, extracted_grams = (
            grams(page.text, size),
            grams(text or "", size),
        )
        both = (expected_grams & extracted_grams).total()
        precisions.append(both / extracted_grams.total() if extracted_grams else 0.0)
        recalls.append(both / expected_grams.total() if expected_grams else 1.0)
    return statistics.harmonic_mean(
        [statistics.mean(precisions), statistics.mean(recalls)]
    )


def grams(text: str, size: int) -> Counter:
    words = WORD.findall(text)
    return Counter(
        tuple(words[i : i + size])
        for i in range(max(1, len(words) - size + 1))
        if words
    )


class Ours:
    """The stage's extractor, with its child process's time."""

    def __init__(self, quality: bool, markdown: bool = False):
        import psutil

        self._extractor = HtmlExtractorProcess(quality, markdown, seconds=30)
        before = set(psutil.Process().children())
        self._extractor.read(b"<p>warm", None)
        [self._child] = set(psutil.Process().children()) - before

    def clock(self) -> float:
        times = self._child.cpu_times()
        return time.process_time() + times.user + times.system

    def __call__(self, pages: Sequence[bytes]) -> list[str | None]:
        return [self._extractor.read(page, None).text for page in pages]


class LibraryExtractor:
    """A library's own call, a page at a time."""

    clock = staticmethod(time.process_time)

    def __init__(self, extract: Callable[[bytes], str | None]):
        self._extract = extract

    def __call__(self, pages: Sequence[bytes]) -> list[str | None]:
        return [self._extract(page) for page in pages]


def compare(name: str, pages: Sequence[Labelled], rounds: int) -> None:
    import trafilatura
    from resiliparse.extract.html2text import extract_plain_text

    contenders = {
        "trafilatura": LibraryExtractor(trafilatura.extract),
        "trafilatura fast=True": LibraryExtractor(
            lambda page: trafilatura.extract(page, fast=True, include_comments=False)
        ),
        "resiliparse main_content": LibraryExtractor(
            lambda page: extract_plain_text(
                page.decode("utf-8", "replace"), main_content=True
            )
        ),
        "ours, quality": Ours(quality=True),
        "ours, quality, markdown": Ours(quality=True, markdown=True),
        "ours, bulk": Ours(quality=False),
    }
    data = [page.html for page in pages]
    speeds: dict[str, list[float]] = {key: [] for key in contenders}
    texts = {}
    for number in range(rounds):
        for key in list(contenders)[:: -1 if number % 2 else 1]:
            start = contenders[key].clock()
            texts[key] = contenders[key](data)
            speeds[key].append(len(data) / (contenders[key].clock() - start))
    print(
        f"\n{name}: {len(pages)} pages of {sum(map(len, data)) / len(data) / 1000:.0f} "
        f"kB"
    )
    print(f"{'':26} pages/s  to trafilatura  F words  F 4-grams")
    for key in contenders:
        pairs = zip(speeds[key], speeds["trafilatura"], strict=True)
        ratio = statistics.median(ours / theirs for ours, theirs in pairs)
        words, runs = (f_score(pages, texts[key], size) for size in (1, 4))
        speed = statistics.median(speeds[key])
        print(f"{key:26} {speed:7.1f} {ratio:13.2f}x {words:10.4f} {runs:10.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="article-extraction-benchmark")
    parser.add_argument("--manuals", type=Path, nargs="*", default=[])
    parser.add_argument("--each", type=int, default=40, help="pages of each manual")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    compare("articles", articles(arguments.folder), arguments.rounds)
    if arguments.manuals:
        compare("manuals", manuals(arguments.manuals, arguments.each), arguments.rounds)


if __name__ == "__main__":
    main()
