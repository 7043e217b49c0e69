"""One small tokenizer of each kind, trained once."""

import inspect
import shlex
import textwrap

import pytest

from maxlm.data.tokenizer.codec import Tokenizer
from maxlm.data.tokenizer.config import TokenizerConfig
from maxlm.data.tokenizer.train import train_tokenizer

KINDS = ("bpe", "sentencepiece_bpe", "sentencepiece_unigram")


def sample_texts() -> list[str]:
    """Real code and prose, and two other scripts: enough for some thousand pieces."""
    source = inspect.getsource(textwrap) + inspect.getsource(shlex)
    paragraphs = [f"{part}\n\n" for part in source.split("\n\n")]
    return [
        *paragraphs,
        *["größer über Straße, où été\n", "猫が好きです。犬も好きです。\n"] * 8,
    ]


def config(kind: str, **changes) -> TokenizerConfig:
    settings = {"kind": kind, "vocab_size": 600, "pad": "<|pad|>"}
    settings["extra_special_tokens"] = ("<|user|>", "the", "[x]")
    return TokenizerConfig(**{**settings, **changes})


@pytest.fixture(scope="session", params=KINDS)
def tokenizer(request) -> Tokenizer:
    return train_tokenizer(config(request.param), sample_texts())


@pytest.fixture(scope="session")
def make_config():
    return config


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return sample_texts()
