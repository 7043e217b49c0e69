"""What importing and using tokenizers does to a process."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_importing_changes_no_environment_and_loads_no_heavy_library():
    code = """
import os, sys
before = dict(os.environ)
import maxlm.data.tokenizer
assert dict(os.environ) == before
print([m for m in ("jax", "grain", "tokenizers", "sentencepiece", "jinja2") if m in sys.modules])
"""
    assert run(code) == "[]"


def test_the_verb_loads_without_pydantic():
    code = """
import sys
import maxlm.cli.tokenizer
print([m for m in ("jax", "pydantic", "tokenizers", "numpy") if m in sys.modules])
"""
    assert run(code) == "[]"


def test_one_thread_in_workers_gives_the_same_ids():
    code = """
import os, threading
from maxlm.data.tokenizer import TokenizerConfig, train_tokenizer
from maxlm.runtime.pool import use_one_thread
texts = [f"some words {i} of text" for i in range(200)]
for kind in ("bpe", "sentencepiece_bpe"):
    t = train_tokenizer(TokenizerConfig(kind=kind, vocab_size=290), texts)
    os.environ.pop("TOKENIZERS_PARALLELISM", None)
    many = t.encode_batch(texts)
    use_one_thread()
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
    assert t.encode_batch(texts) == many
print("ok")
"""
    assert run(code) == "ok"
