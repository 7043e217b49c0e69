"""A whole recipe on one and on two processes, and its memory at 1, 4 and 16 times the
text.

    python benchmarks/corpus_recipe.py RECIPE [KEY=VALUE]...   # time, on a recipe of yours
    python benchmarks/corpus_recipe.py --memory                # memory, on generated documents

Each run is a process of its own with a folder of its own. Memory is the largest
resident set of any of its processes. The generated documents, 3 kB each, are sentences
of this Python's documentation strings, drawn anew for each document, at a fixed shard
size; stages that compare documents get 32 MB for a job.
"""

import ast
import json
import random
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

RUN = """
import resource, sys
from maxlm.config.load import load_config
from maxlm.corpus.recipe import RecipeConfig
from maxlm.corpus.run import run_recipe
if __name__ == "__main__":
    run_recipe(load_config(RecipeConfig, sys.argv[1], sys.argv[2:]).value)
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    print(max(resource.getrusage(kind).ru_maxrss for kind in kinds) / 1e3)
"""
STAGES = ["language", "heuristics", "pii", "toxicity"]
WHOLE = ["exact", "near", "substring"]


def run(recipe: str, *settings: str) -> tuple[float, float]:
    """Seconds and the largest process's MB."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "run.py")
        script.write_text(RUN)
        command = [sys.executable, script, recipe, f"out={folder}/corpus", *settings]
        began = time.perf_counter()
        ended = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        return time.perf_counter() - began, float(ended.stdout.split()[-1])


def sentences() -> list[str]:
    docstring_sentences = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        tree = ast.parse(path.read_text("utf-8", "replace"))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                docstring_sentences += (ast.get_docstring(node) or "").split(". ")
    return [
        " ".join(sentence.split())
        for sentence in docstring_sentences
        if len(sentence) > 20
    ]


def memory() -> None:
    known = sentences()
    print("documents    text MB    seconds    MB of the largest process")
    with tempfile.TemporaryDirectory() as folder:
        for times in (1, 4, 16):
            chance = random.Random(times)
            path = Path(folder, f"{times}.jsonl")
            with path.open("w") as file:
                for _ in range(2000 * times):
                    text = ". ".join(chance.choices(known, k=40))
                    file.write(json.dumps({"text": text}) + "\n")
            recipe = Path(folder, f"{times}.yaml")
            content = {
                "out": "unused",
                "shard_bytes": 2_000_000,
                "sources": [{"name": "web", "documents": [str(path)]}],
                "stages": [{"stage": stage} for stage in STAGES]
                + [{"stage": stage, "memory": 1 << 25} for stage in WHOLE],
            }
            recipe.write_text(json.dumps(content))
            seconds, megabytes = run(str(recipe), "workers=2")
            size = path.stat().st_size / 1e6
            print(
                f"{2000 * times:9,} {size:10.1f} {seconds:10.1f} {megabytes:10.0f}",
                flush=True,
            )


def main() -> None:
    if sys.argv[1:] == ["--memory"]:
        memory()
        return
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    pairs = []
    for _ in range(2):
        one, _ = run(sys.argv[1], *sys.argv[2:], "workers=1")
        two, _ = run(sys.argv[1], *sys.argv[2:], "workers=2")
        pairs.append((one, two))
        print(
            f"one process {one:.1f} s, two {two:.1f} s: {one / two:.2f} times",
            flush=True,
        )


if __name__ == "__main__":
    main()
