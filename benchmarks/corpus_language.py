"""Language identification: accuracy by language on real manuals, and speed, beside its
peers.

    python benchmarks/corpus_language.py en=FOLDER fr=FOLDER ... [--documents 400]
    [--plot PNG]

Each argument names a language and a folder of its pages (HTML, man pages, text), such
as those of Debian's packages libreoffice-help-*, debian-handbook, manpages-* (`apt-get
download`, `dpkg -x`); several folders may have one language. What is not translated yet
stands in English in every edition, so a line that stands in an English folder too is
English: a page is in English if at most 0.1 of its characters do not, in its folder's
language if at most 0.2 of those in lines of 40 do, else mixed. Counted are pages with
at least 200 characters in such lines of that language. `pip install pycld2 resiliparse`
for the peer and to read HTML. Speeds are of CPU time on the first 3,000 bytes of a
sample of all pages, and of those that have as many.
"""

import argparse
import gzip
import random
import re
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from maxlm.corpus.stages.language import LanguageStage, find_shipped_model

LEAST = 200  # characters
LONG = 40  # Shorter lines, mostly names, are the same in many languages.
ROUNDS, TIMED, BYTES = 5, 2000, 3000

Predict = Callable[[list[str]], list[str]]


@dataclass(frozen=True)
class Page:
    text: str
    language: str | None
    """What it is in; None: mixed."""


def read(path: Path) -> str:
    """The text of an HTML, man or plain page."""
    data = (
        gzip.decompress(path.read_bytes())
        if path.suffix == ".gz"
        else path.read_bytes()
    )
    text = data.decode("utf-8", "replace")
    if path.suffix in (".html", ".htm"):
        from resiliparse.extract.html2text import extract_plain_text  # pyright: ignore

        return extract_plain_text(text, main_content=True)
    if path.suffix == ".gz":  # man: requests at line starts, escapes
        text = re.sub(r"^[.'](?:\\\"|TH|so).*$|^\.\w+", "", text, flags=re.M)
        return re.sub(r"\\f.|\\[-&|]|\\\(..", "", text)
    return text


def find_pages(folder: Path, limit: int) -> list[str]:
    paths = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and path.suffix in (".html", ".htm", ".gz", ".txt")
    )
    random.Random(0).shuffle(paths)
    texts = [read(path) for path in paths[:limit]]
    return [text for text in texts if len(text) >= LEAST]


def judge(texts: dict[str, list[str]]) -> list[Page]:
    """What each page is in, by its lines."""
    english = {line for text in texts.get("en", []) for line in text.split("\n")}
    pages = []
    for language, language_texts in texts.items():
        for text in language_texts:
            sizes = Counter()
            for line in text.split("\n"):
                is_english = line in english or language == "en"
                sizes[is_english, len(line) >= LONG] += len(line)
            share = sizes[True, True] / max(sizes[True, True] + sizes[False, True], 1)
            foreign = (sizes[False, True] + sizes[False, False]) / len(text)
            known = "en" if foreign <= 0.1 else language if share <= 0.2 else None
            if sizes[known == "en", True] < LEAST:
                continue
            pages.append(Page(text, known))
    return pages


def predictors() -> dict[str, Predict]:
    """Functions from texts to codes."""
    import fasttext

    label = LanguageStage().make_batch_label_fn()
    model = fasttext.load_model(str(find_shipped_model()))

    def ours(texts: list[str]) -> list[str]:
        batch = pa.record_batch({"text": pa.array(texts, pa.large_string())})
        return label(batch).column("name").to_pylist()

    def library(texts: list[str]) -> list[str]:
        labels = (list(model.predict(text.replace("\n", " "))[0]) for text in texts)
        return [text_labels[0].removeprefix("__label__") for text_labels in labels]

    calls = {"maxlm": ours, "fasttext": library}
    try:
        import pycld2  # pyright: ignore[reportMissingImports]
    except ImportError:
        return calls

    def cld2(texts: list[str]) -> list[str]:
        codes = []
        for text in texts:
            clean = "".join(c for c in text if c.isprintable() or c in "\n\t")
            codes.append(pycld2.detect(clean)[2][0][1].split("-")[0])
        return codes

    return {**calls, "pycld2": cld2}


def print_accuracy(
    pages: list[Page], answers: dict[str, list[str]]
) -> dict[str, list[float]]:
    """A row a language; returns each predictor's accuracies in the rows' order."""
    rows: dict[str, list[int]] = defaultdict(list)
    for number, page in enumerate(pages):
        if page.language:
            rows[page.language].append(number)
    print(
        f"{'':4}{'pages':>7}"
        + "".join(f"{name:>10}" for name in answers)
        + "   ours took it for"
    )
    table: dict[str, list[float]] = {name: [] for name in answers}
    for language, numbers in rows.items():
        line = f"{language:4}{len(numbers):7}"
        for name, answer in answers.items():
            right = sum(answer[i] == language for i in numbers) / len(numbers)
            table[name].append(right)
            line += f"{right:10.4f}"
        wrong = Counter(
            answers["maxlm"][i] for i in numbers if answers["maxlm"][i] != language
        )
        print(
            line + "   " + ", ".join(f"{code} {n}" for code, n in wrong.most_common(4))
        )
    known = [i for numbers in rows.values() for i in numbers]
    line = f"{'all':4}{len(known):7}"
    for answer in answers.values():
        line += (
            f"{sum(answer[i] == pages[i].language for i in known) / len(known):10.4f}"
        )
    print(line)
    return {"": list(rows), **table}  # pyright: ignore[reportReturnType]


def plot(table: dict[str, list], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    languages = table.pop("")
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    axes = figure.subplots()
    for shift, (name, values) in enumerate(table.items()):
        places = np.arange(len(languages)) + (shift - 1) * 0.25
        axes.plot(
            places,
            [1 - value for value in values],
            "os^"[shift],
            label=name,
            markersize=5,
        )
    axes.axhline(0.02, linestyle=":", color="black")
    axes.set_xticks(range(len(languages)), languages)
    axes.set_ylabel("wrong (of 1)")
    axes.set_title(
        "Language identification on pages of manuals; dotted: what to stay below"
    )
    axes.legend()
    FigureCanvasAgg(figure).print_png(str(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folders", nargs="+", metavar="LANGUAGE=FOLDER")
    parser.add_argument(
        "--documents", type=int, default=400, help="a folder, at most; not English"
    )
    parser.add_argument(
        "--show", type=int, default=0, help="print so many pages taken for others"
    )
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()

    texts: dict[str, list[str]] = defaultdict(list)
    for argument in arguments.folders:
        language, _, folder = argument.partition("=")
        # All English pages are needed to know English lines.
        limit = 10**9 if language == "en" else arguments.documents
        texts[language] += find_pages(Path(folder), limit)
    pages = judge(texts)
    contents = [page.text for page in pages]
    calls = predictors()
    answers = {name: call(contents) for name, call in calls.items()}
    table = print_accuracy(pages, answers)
    wrong = [
        (page, answer)
        for page, answer in zip(pages, answers["maxlm"], strict=True)
        if answer != page.language
    ]
    known = [(page, answer) for page, answer in wrong if page.language]
    for page, answer in known[: arguments.show]:
        print(page.language, "taken for", answer, repr(page.text[:150]))

    if arguments.plot:
        plot(table, arguments.plot)

    print_speed("pages", contents, calls)
    print_speed("long pages", [text for text in contents if len(text) >= BYTES], calls)


def print_speed(label: str, texts: Sequence[str], calls: Mapping[str, Predict]) -> None:
    texts = random.Random(0).sample(texts, min(len(texts), TIMED))
    cut = [text.encode()[:BYTES].decode("utf-8", "ignore") for text in texts]
    if not cut:
        return
    size = sum(len(text.encode()) for text in cut)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(ROUNDS):
        for name in list(calls) if i % 2 == 0 else reversed(calls):
            start = time.process_time()
            calls[name](cut)
            times[name].append(time.process_time() - start)
    print(
        f"{len(cut)} {label} of {size / len(cut):.0f} bytes, medians of {ROUNDS} "
        f"rounds, one core"
    )
    for name, seconds in times.items():
        median_seconds = statistics.median(seconds)
        ratio = statistics.median(
            f / t for f, t in zip(times["fasttext"], seconds, strict=True)
        )
        print(
            f"{name:10}{len(cut) / median_seconds:8.0f} docs/s{size / median_seconds / 1e6:8.1f} "
            f"MB/s{ratio:7.2f}x"
        )


if __name__ == "__main__":
    main()
