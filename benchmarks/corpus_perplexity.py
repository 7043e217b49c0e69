"""The n-gram model beside KenLM's lmplz, and what its perplexities tell apart.

    pip install 'maxlm[corpus]' matplotlib
    python benchmarks/corpus_perplexity.py --prose PROSE... [--good GOOD...] [--other FOREIGN...]
        [--order 5] [--plot roc.png]

All are files or folders of documents (text, JSONL with "text", Parquet). PROSE trains the model but
for each twentieth document. Good prose (of GOOD, else the held-out documents) is set against the
same documents with their words shuffled, junk of random letters at the prose's word lengths, and
FOREIGN. `lmplz` (github.com/kpu/kenlm: cmake, make lmplz) is measured on the same lines if found on
PATH. Training is in CPU seconds, lmplz's threads included.
"""

import argparse
import random
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from maxlm.corpus.kneser_ney import KneserNeyConfig, estimate_kneser_ney
from maxlm.corpus.stages.perplexity import PerplexityConfig, open_model, train_perplexity
from maxlm.corpus.text import LineSplitterConfig, make_line_splitter
from maxlm.data.documents import SourceConfig, read_documents

Result = TypeVar("Result")


def seconds(call: Callable[[], Result], whose: int) -> tuple[float, Result]:
    """CPU seconds of a call, by this process or its children, and what it returned."""
    before = resource.getrusage(whose)
    result = call()
    after = resource.getrusage(whose)
    return (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime), result


def read(paths: Sequence[str]) -> list[str]:
    """Texts, in pieces of at least 3,000 bytes where a file is longer."""
    config = SourceConfig(documents=tuple(paths), piece_bytes=3000, on_bad_bytes="replace")
    return [document.text.decode() for document in read_documents(config)]


def compare_training(texts: Sequence[str], held: Sequence[str], order: int, folder: Path) -> None:
    """Time and perplexity of ours and lmplz's on the same lines."""
    import kenlm

    quiet = kenlm.Config()
    quiet.show_progress, quiet.arpa_complain = False, kenlm.ARPALoadComplain.NONE
    lines = make_line_splitter(LineSplitterConfig())
    corpus, test = folder / "lines.txt", [line for text in held for line in lines(text)]
    corpus.write_text("".join(f"{line}\n" for text in texts for line in lines(text)))
    size = corpus.stat().st_size / 1e6
    config = KneserNeyConfig(order=order)

    def ours() -> None:
        with corpus.open(encoding="utf-8", newline="\n") as sentences:
            estimate_kneser_ney(sentences, folder / "ours.arpa", config)

    def theirs() -> None:
        command = [lmplz, "-o", order, "-S", "2G", "-T", folder, "--text", corpus]
        command += ["--arpa", folder / "lmplz.arpa"]
        subprocess.run([str(part) for part in command], check=True, stderr=subprocess.DEVNULL)

    calls = {"ours": (ours, resource.RUSAGE_SELF)}
    if lmplz := shutil.which("lmplz"):
        calls["lmplz"] = (theirs, resource.RUSAGE_CHILDREN)
    else:
        print("(no lmplz on PATH)")
    print(f"{size:.1f} MB of lines, order {order}")
    print(f"{'':12}{'CPU s':>8}{'MB/CPU s':>10}{'wall s':>8}{'held-out perplexity':>22}")
    words = sum(line.count(" ") + 2 for line in test)
    for name, (call, whose) in calls.items():
        start = time.perf_counter()
        cpu = min(seconds(call, whose)[0] for _ in range(3))
        wall = (time.perf_counter() - start) / 3
        path = folder / f"{name}.arpa"
        model = kenlm.Model(str(path), quiet)
        perplexity = 10 ** (-sum(map(model.log10_prob, test)) / words)
        print(f"{name:12}{cpu:8.2f}{size / cpu:10.2f}{wall:8.2f}{perplexity:22.5f}")


def shuffled(text: str, chance: random.Random) -> str:
    words = text.split()
    chance.shuffle(words)
    return " ".join(words)


def junk(text: str, chance: random.Random) -> str:
    letters = "etaoinshrdlucmfwygpbvk"
    return " ".join("".join(chance.choices(letters, k=len(word))) for word in text.split())


def draw(path: Path, scores: dict[str, np.ndarray], cutoffs: tuple[float, float]) -> None:
    """ROC of good prose against each other kind, and the kinds' perplexities."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from sklearn.metrics import roc_curve

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 5))
    good = scores["good prose"]
    for name, bad in scores.items():
        logarithms = np.log10(bad)
        right.hist(logarithms, 40, histtype="step", density=True, label=name)
        if name != "good prose":
            labels = np.r_[np.ones(len(good)), np.zeros(len(bad))].astype(bool)
            left.plot(
                *roc_curve(labels, -np.r_[good, bad])[:2], label=f"{name}: {area(good, bad):.4f}"
            )
    left.set(xlabel="bad documents taken", ylabel="good documents taken", title="ROC and its area")
    right.set(xlabel="log10 perplexity", ylabel="density", title="cutoffs of head and middle")
    for cutoff in cutoffs:
        right.axvline(np.log10(cutoff), color="0.7", linestyle="--")
    left.legend()
    right.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def area(good: np.ndarray, bad: np.ndarray) -> float:
    """The probability that a good document is less surprising than a bad one."""
    places = np.searchsorted(np.sort(bad), good, side="right")
    return float(np.mean(1 - places / len(bad)))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--prose", nargs="+", required=True)
    parser.add_argument("--good", nargs="+")
    parser.add_argument("--other", nargs="+")
    parser.add_argument("--order", type=int, default=5)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    texts, chance = read(arguments.prose), random.Random(0)
    held = texts[19::20]
    kinds = {"good prose": read(arguments.good) if arguments.good else held}
    kinds["words shuffled"] = [shuffled(text, chance) for text in kinds["good prose"]]
    kinds["random letters"] = [junk(text, chance) for text in kinds["good prose"]]
    if arguments.other:
        kinds["other language"] = read(arguments.other)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trained = [text for i, text in enumerate(texts, 1) if i % 20]
        compare_training(trained, held, arguments.order, folder)
        config = PerplexityConfig(ngrams=KneserNeyConfig(order=arguments.order))
        whole, report = seconds(
            lambda: train_perplexity(texts, folder / "model", config), resource.RUSAGE_SELF
        )
        size = sum(len(text.encode()) for text in texts) / 1e6
        print(f"\ntext to model and cutoffs: {whole:.2f} CPU s, {size / whole:.2f} MB/CPU s")
        loading, model = seconds(lambda: open_model(folder / "model"), resource.RUSAGE_SELF)
        good = kinds["good prose"]
        cpu, _ = seconds(lambda: [model.perplexity(text) for text in good], resource.RUSAGE_SELF)
        speed = sum(len(text.encode()) for text in good) / cpu / 1e6
        print(f"opening the model: {loading:.2f} CPU s")
        print(f"scoring: {len(good) / cpu:.0f} docs/CPU s, {speed:.1f} MB/CPU s")

        found = {kind: [model.perplexity(text) for text in each] for kind, each in kinds.items()}
    scores = {kind: np.array([x for x in each if x is not None]) for kind, each in found.items()}
    low, high = report.cutoffs
    print(f"\ncutoffs {low:.0f} and {high:.0f}")
    print(f"{'':16}{'docs':>6}{'median':>10}{'head':>7}{'middle':>8}{'tail':>7}{'ROC area':>10}")
    for kind, each in scores.items():
        head, tail = np.mean(each <= low), np.mean(each > high)
        shares = f"{head:7.2f}{1 - head - tail:8.2f}{tail:7.2f}"
        roc = "" if kind == "good prose" else f"{area(scores['good prose'], each):10.4f}"
        print(f"{kind:16}{len(each):6}{np.median(each):10.0f}{shares}{roc}")
    if arguments.plot:
        draw(arguments.plot, scores, report.cutoffs)


if __name__ == "__main__":
    main()
