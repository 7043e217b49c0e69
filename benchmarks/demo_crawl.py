"""A small crawl in Common Crawl's layout, made of real pages, with planted cases.

    python benchmarks/demo_crawl.py OUT [--folders DOCS ...] [--pages 3000] [--files 8]
    [--seed 0] python benchmarks/demo_crawl.py OUT --fetch FOLDER

Without folders the pages are the HTML and text on this machine; with --fetch they are
Debian's documentation packages, downloaded to FOLDER by apt-get where its archive can
be reached. Needs warcio.

Beside real pages the crawl holds what a pipeline must find: exact copies, copies edited
to a known Jaccard similarity, boilerplate, personal data, junk, odd encodings, records
that are no documents and records that are broken. OUT/truth.jsonl, one object a record,
says which is which:

    kind        page, article, exact_copy, edited_copy, boilerplate, pii, junk, edge, none, broken
    id, url     of the record (none for broken ones)
    of          the record it is a copy of
    jaccard     of the word 5-grams of the two texts
    text        the repeated paragraph
    spans       [[type, value], ...], the personal data
    reason      the sort of junk, edge case or record that is none

The same folders and seed give the same records.
"""

import argparse
import ast
import gzip
import html
import json
import random
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from demo_warc import Capture, write

PACKAGES = (
    "python3.13-doc",
    "php-doc",
    "postgresql-doc-17",
    "libreoffice-help-en-us",
    "libreoffice-help-fr",
    "libreoffice-help-de",
)
COOKIES = (
    "We and our partners store and access information on your device, such as cookies, "
    "to show "
    "you content and advertisements that suit you, to measure how well they do, and to "
    "learn who "
    "reads these pages. You may change your choice at any time in the settings at the "
    "foot of "
    "each page; some of our partners do not ask for your consent but rely on their "
    "legitimate "
    "interest, to which you may object there as well. Your choice holds for this site "
    "only."
)
LOREM = (
    "Lorem ipsum dolor sit amet, consectetur adipiscing elit, sed do eiusmod tempor "
    "incididunt "
    "ut labore et dolore magna aliqua. Ut enim ad minim veniam, quis nostrud "
    "exercitation. "
)
SUFFIXES = (".html", ".txt", ".rst", ".md", ".py")
WORD = re.compile(r"\w+")
MAIN = re.compile(
    r"<(script|style|nav|header|footer|head)\b.*?</\1>|<[^>]*>", re.S | re.I
)


def fetch_packages(folder: Path, packages: Sequence[str] = PACKAGES) -> list[Path]:
    """Folders with the files of Debian packages, downloaded unless they are there.

    What cannot be downloaded is left out; with nothing at all: the machine's own
    documentation.
    """
    folder.mkdir(parents=True, exist_ok=True)
    downloaded = []
    for package in packages:
        target = folder / package
        if not target.is_dir():
            try:
                command = ["apt-get", "download", package]
                subprocess.run(
                    command, cwd=folder, check=True, capture_output=True, timeout=120
                )
                [archive] = folder.glob(f"{package}_*.deb")
                subprocess.run(["dpkg", "-x", archive, target], check=True, timeout=120)
            except (OSError, subprocess.SubprocessError, ValueError) as error:
                print(
                    f"{package}: not to be had ({type(error).__name__})",
                    file=sys.stderr,
                )
                continue
        downloaded.append(target)
    return downloaded or local_folders()


def local_folders() -> list[Path]:
    """Folders with documentation on any machine: Python's own sources, and what is
    installed."""
    paths = sysconfig.get_paths()
    folders = [Path("/usr/share/doc"), Path(paths["stdlib"]), Path(paths["purelib"])]
    return [folder for folder in folders if folder.is_dir()]


def read_pages(
    folders: Sequence[Path], count: int, rng: random.Random
) -> list[Capture]:
    """As many real pages from each folder, `count` in all where there are enough."""
    pages = []
    left = count
    for number, folder in enumerate(folders):
        share = left // (len(folders) - number)
        first_page = len(pages)
        paths = sorted(
            p for p in folder.rglob("*") if p.suffix in SUFFIXES and p.is_file()
        )
        pure = [path for path in paths if path.suffix == ".html"]
        paths = pure if len(pure) >= share else paths
        rng.shuffle(paths)
        for path in paths:
            if len(pages) - first_page == share:
                break
            data = path.read_bytes()
            if not 1000 < len(data) < 300_000 or b"\0" in data:
                continue
            if path.suffix != ".html":
                text = as_text(path, data.decode("utf-8", "replace"))
                data = article(path.stem, text).encode()
                if len(text) < 1000:
                    continue
            relative = path.relative_to(folder).with_suffix(".html").as_posix()
            url = f"https://{host(folder.name)}.example.org/{relative}"
            pages.append(Capture(url, data, {"kind": "page", "reason": folder.name}))
        left -= len(pages) - first_page
    return pages


def host(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def as_text(path: Path, text: str) -> str:
    """A text file's text; of Python source its documentation."""
    if path.suffix != ".py":
        return text
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return ""
    nodes = [
        n
        for n in ast.walk(tree)
        if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)
    ]
    return "\n\n".join(filter(None, map(ast.get_docstring, nodes)))


def article(title: str, text: str) -> str:
    """A page of the usual kind around a text."""
    paragraphs = "\n".join(
        f"<p>{html.escape(' '.join(part.split()))}</p>"
        for part in re.split(r"\n\s*\n", text)
        if part.strip()
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta '
        f'charset="utf-8"><title>{html.escape(title)}'
        '</title></head><body><nav><ul><li><a href="/">Home</a></li><li><a '
        'href="/about">About</a>'
        f"</li></ul></nav><main><article><h1>{html.escape(title)}</h1>\n{paragraphs}\n</article>"
        "</main><footer><p>All rights reserved.</p></footer></body></html>"
    )


def words_of(page: bytes) -> list[str]:
    """Words of a page's text, without a parser of the pipeline."""
    return WORD.findall(html.unescape(MAIN.sub(" ", page.decode("utf-8", "replace"))))


def sentences(words: Sequence[str]) -> str:
    """Words as prose of paragraphs."""
    lines = [
        " ".join(words[i : i + 15]).capitalize() + "." for i in range(0, len(words), 15)
    ]
    return "\n\n".join(" ".join(lines[i : i + 5]) for i in range(0, len(lines), 5))


def shingles(words: Sequence[str], size: int = 5) -> set[tuple[str, ...]]:
    """The different word 5-grams, in lower case."""
    lower = [word.lower() for word in words]
    return {tuple(lower[i : i + size]) for i in range(len(lower) - size + 1)}


def edit(words: Sequence[str], jaccard: float, rng: random.Random) -> list[str]:
    """Replace so many words, far from each other, that about `jaccard` is left of the
    5-grams."""
    # Each replaced word ends 5 of N 5-grams and begins 5 new: J = (N - 5k) / (N + 5k).
    number = round((len(words) - 4) * (1 - jaccard) / (5 * (1 + jaccard)))
    edited = list(words)
    stride = len(words) // (number + 1)
    for k in range(1, number + 1):
        edited[k * stride] = f"{rng.choice(words)}{rng.choice('aeiou')}{k}"
    return edited


def iban(rng: random.Random) -> str:
    account = "".join(rng.choices("0123456789", k=18))
    check = (
        98 - int(account + "131400") % 97
    )  # "DE00" with letters as numbers (ISO 13616).
    return f"DE{check:02d}{account}"


def card(rng: random.Random) -> str:
    digits = [4, *rng.choices(range(10), k=14)]
    doubled = [
        sum(divmod(2 * d, 10)) if i % 2 == 0 else d for i, d in enumerate(digits)
    ]
    return "".join(map(str, digits)) + str(-sum(doubled) % 10)  # Luhn.


def personal_data(rng: random.Random) -> list[tuple[str, str]]:
    """One of each type, made up."""
    name = f"{rng.choice(('anna', 'jo', 'lee', 'mika'))}.{rng.choice(('berg', 'cruz', 'diaz'))}"
    return [
        ("email", f"{name}{rng.randrange(99)}@mail{rng.randrange(9)}.example.com"),
        ("phone", f"+1 202-{rng.randrange(200, 999)}-{rng.randrange(10000):04d}"),
        ("ipv4", ".".join(str(rng.randrange(11, 223)) for _ in range(4))),
        ("iban", iban(rng)),
        ("credit_card", card(rng)),
        (
            "us_ssn",
            f"{rng.randrange(1, 665):03d}-{rng.randrange(1, 99):02d}-{rng.randrange(1, 9999):04d}",
        ),
    ]


def planted(pages: Sequence[Capture], rng: random.Random) -> Iterator[Capture]:
    """What is planted, in shares of the number of pages; copies come after what they
    copy."""
    share = max(1, len(pages) // 25)
    for number, page in enumerate(rng.sample(list(pages), min(share, len(pages)))):
        url = f"https://mirror{number % 7}.example.net/{number}.html"
        yield Capture(
            url,
            page.body,
            {"kind": "exact_copy", "of": page},
            page.status,
            page.headers,
        )
    page_words = [words_of(page.body) for page in pages]
    sources = [words for words in page_words if len(words) > 300]
    for number, jaccard in enumerate(
        [0.5, 0.6, 0.7, 0.78, 0.82, 0.9, 0.95] * (share // 7 + 1)
    ):
        words = rng.choice(sources)[:1200]
        # Words of its own, or it would be a near-duplicate of its source.
        words = [
            w if rng.random() < 0.5 else f"{w}{rng.choice('klmnrst')}o" for w in words
        ]
        original = made(number, "article", sentences(words))
        copy = edit(words, jaccard, rng)
        a, b = shingles(words), shingles(copy)
        yield original
        truth = {"of": original, "jaccard": len(a & b) / len(a | b)}
        yield made(number, "edited_copy", sentences(copy), **truth)
    for number in range(share):
        text = sentences(rng.sample(rng.choice(sources), 200))
        yield made(number, "boilerplate", f"{text}\n\n{COOKIES}", text=COOKIES)
        spans = personal_data(rng)
        pii_text = "\n\n".join(
            f"{text} Reach us at {value} today." for _, value in spans
        )
        yield made(number, "pii", pii_text, spans=spans)
        reason, text = junk(number, rng, rng.choice(sources))
        yield made(number, "junk", text, reason=reason)
    yield from edges(rng.choice(sources))
    yield from no_documents(share)


def made(number: int, kind: str, content: str, /, **truth) -> Capture:
    url = f"https://{host(kind)}.example.com/{number}.html"
    if truth.get("reason") == "nsfw_url":
        url = f"https://example.com/free-porn/{number}.html"
    title = f"{kind.replace('_', ' ')} {number}"
    return Capture(url, article(title, content).encode(), {"kind": kind, **truth})


def junk(number: int, rng: random.Random, words: Sequence[str]) -> tuple[str, str]:
    """(sort, text) of a page that no filter should let through."""
    match number % 6:
        case 0:
            return "symbols", "".join(rng.choices("#*{}|~^<>=+_ ", k=2000))
        case 1:
            return "repetition", "\n\n".join(
                ["Buy it now at the lowest price of the year."] * 80
            )
        case 2:
            return "lorem_ipsum", LOREM * 12
        case 3:
            return "short", " ".join(rng.choices(words, k=8))
        case 4:
            return "word_list", ", ".join(rng.choices(words, k=400))
        case _:
            return "nsfw_url", sentences(rng.choices(words, k=200))


def edges(words: Sequence[str]) -> Iterator[Capture]:
    """Pages that are hard to read but are documents, or must at least not stop a
    run."""
    text = sentences(words[:300]) + "\n\nÀ la carte: naïve façade, “quoted” – déjà vu."
    page = article("edge", text)
    plain = [("Content-Type", "text/html")]
    declared = [("Content-Type", "text/html; charset=iso-8859-1")]
    packed = [*plain, ("Content-Encoding", "gzip")]
    body = page.encode()
    chunks = b"".join(
        b"%x\r\n%b\r\n" % (len(c), c) for c in (body[:999], body[999:], b"")
    )
    cases = {
        "gzip": (gzip.compress(body, mtime=0), packed),
        "chunked": (chunks, [*plain, ("Transfer-Encoding", "chunked")]),
        "windows_1252": (
            page.replace("utf-8", "iso-8859-1").encode("cp1252", "ignore"),
            declared,
        ),
        "utf8_called_latin1": (body, declared),
        "utf16": (page.encode("utf-16"), plain),
        "nul": (body.replace(b"<p>", b"<p>\0"), plain),
        "deep": (b"<div>" * 100_000 + body, plain),
        "bomb": (gzip.compress(b"<p>" + b" " * (64 << 20), mtime=0), packed),
    }
    for name, (data, headers) in cases.items():
        url = f"https://edge.example.com/{name}.html"
        yield Capture(url, data, {"kind": "edge", "reason": name}, headers=headers)


def no_documents(share: int) -> Iterator[Capture]:
    for number in range(share):
        url = f"https://none.example.com/{number}"
        for status in ("404 Not Found", "301 Moved Permanently"):
            truth = {"kind": "none", "reason": "status"}
            yield Capture(f"{url}/{status[:3]}", b"<p>Not here.</p>", truth, status)
        truth = {"kind": "none", "reason": "not_html"}
        headers = [("Content-Type", "image/png")]
        yield Capture(
            f"{url}.png", b"\x89PNG\r\n\x1a\n" + bytes(100), truth, headers=headers
        )
        yield Capture(f"{url}/again", b"", {"kind": "none", "reason": "revisit"})


def make_crawl(
    out: Path, folders: Sequence[Path], pages: int = 3000, files: int = 8, seed: int = 0
) -> Path:
    """Write a crawl of about `pages` real pages and what is planted; returns the
    truth's path."""
    rng = random.Random(seed)
    real = read_pages(folders, pages, rng)
    if not real:
        raise SystemExit(f"no pages in {', '.join(map(str, folders))}")
    write(out, [*real, *planted(real, rng)], rng, files)
    return out / "truth.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path, help="the crawl's folder")
    parser.add_argument(
        "--folders", type=Path, nargs="+", help="with HTML or text files"
    )
    parser.add_argument("--fetch", type=Path, help="where to put Debian packages")
    parser.add_argument("--pages", type=int, default=3000)
    parser.add_argument("--files", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folders = arguments.folders
    if folders is None:
        folders = (
            fetch_packages(arguments.fetch) if arguments.fetch else local_folders()
        )
    truth = make_crawl(
        arguments.out, folders, arguments.pages, arguments.files, arguments.seed
    )
    kinds = [json.loads(line)["kind"] for line in truth.read_text().splitlines()]
    print(", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)))


if __name__ == "__main__":
    main()
