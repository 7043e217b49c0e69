"""A tiny policy that writes a chat, and environments that answer it."""

import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from maxlm.config.sampling import SamplingConfig
from maxlm.data.tokenizer.codec import Tokenizer
from maxlm.data.tokenizer.config import TokenizerConfig
from maxlm.data.tokenizer.train import train_tokenizer
from maxlm.inference.engine import Engine, EngineConfig
from maxlm.rl.environments import Environment, GeneratedRows, Reply
from maxlm.rl.rollouts.config import RolloutConfig
from maxlm.rl.rollouts.prompts import PromptOrder
from maxlm.rl.rollouts.sampler import RolloutSampler
from maxlm.rl.samples import Sample
from tests.inference.conftest import Tiny, build

NUM_TURNS = 3
# Prompts of unlike lengths, of which two begin alike.
QUESTIONS = ("a", "the sun rises", "the sun sets over a sea", "grey?", "12 + 7 =")
# Ends of turns are likely, and come at unlike places.
STOP_BIAS = 3.0
TEMPERATURE = 1.3


class EchoEnvironment(Environment):
    """Answers each turn with its length, and ends after ``NUM_TURNS``."""

    replies_at_once = True
    kind: str = "echo"
    chat: bool = True
    reply_role: str = "user"
    fails_at: tuple[int, ...] = ()
    seconds: float = 0.0

    @property
    def max_turns(self) -> int:
        return NUM_TURNS

    def open_prompts(self, seed: int) -> GeneratedRows:
        return GeneratedRows(
            lambda number: {"prompt": QUESTIONS[number]}, "echo", len(QUESTIONS)
        )

    def respond(self, sample: Sample) -> Reply | None:
        if sample.prompt.row_number in self.fails_at:
            raise KeyError("no\nanswer")
        # Longer for longer ones: they come back last.
        time.sleep(self.seconds * len(sample.last_answer))
        num_turns = sum(role == "assistant" for role, _ in sample.turns)
        if num_turns == NUM_TURNS:
            return None
        return Reply(f"{len(sample.last_answer)} <|im_end|> chars", "user")

    def score(self, sample: Sample) -> float:
        return float(len(sample.last_answer))


class SlowEchoEnvironment(EchoEnvironment):
    """The same, asked in threads."""

    replies_at_once = False
    seconds: float = 0.01


@pytest.fixture(scope="session")
def chat_tokenizer() -> Tokenizer:
    config = TokenizerConfig(
        vocab_size=280,
        chat="chatml",
        extra_special_tokens=("<|im_start|>", "<|im_end|>"),
    )
    return train_tokenizer(config, ["the sun rises over a quiet sea, the sea\n" * 4])


@pytest.fixture(scope="session")
def policy(one_device_mesh, chat_tokenizer) -> Tiny:
    config = {
        "vocab_size": chat_tokenizer.vocab_size,
        "num_layers": 1,
        "d_model": 20,
        "max_seq_len": 160,
        "attention": {"num_heads": 3, "num_kv_heads": 1, "head_dim": 6},
        "mlp": {"d_ff": 28},
        "init_std": 0.3,
    }
    return build(config, one_device_mesh)


@pytest.fixture(scope="session")
def shared_engine(policy, chat_tokenizer) -> Engine:
    """Compiles once; each test leaves it without requests."""
    config = EngineConfig(
        max_sequences=3,
        max_length=160,
        page_size=4,
        num_pages=36,
        prefill_tokens=32,
        max_chunks=2,
        decode_steps=4,
    )
    with jax.set_mesh(jax.tree.leaves(policy.params)[0].sharding.mesh):
        return Engine(policy.model, policy.params, config, chat_tokenizer)


@pytest.fixture
def engine(shared_engine, policy, one_device_mesh) -> Iterator[Engine]:
    with jax.set_mesh(one_device_mesh):
        shared_engine.set_params(policy.params)
        yield shared_engine
        for sequence in shared_engine.scheduler.running:
            shared_engine.abort(sequence.request.request_id)
        shared_engine.step()


def make_config(tokenizer: Tokenizer, settings: dict[str, Any]) -> RolloutConfig:
    sampling = SamplingConfig(
        temperature=TEMPERATURE,
        top_p=0.9,
        max_new_tokens=40,
        logit_bias=dict.fromkeys(tokenizer.stop_ids, STOP_BIAS),
    )
    return RolloutConfig(**{"sampling": sampling, **settings})


@pytest.fixture
def make_sampler(engine, chat_tokenizer):
    def make(
        environment: Environment | None = None,
        *,
        seed: int = 3,
        max_length: int | None = None,
        **settings,
    ) -> RolloutSampler:
        config = make_config(chat_tokenizer, settings)
        return RolloutSampler(
            engine,
            chat_tokenizer,
            environment or EchoEnvironment(),
            config,
            seed=seed,
            max_length=max_length,
        )

    return make


@pytest.fixture(scope="session")
def prompts(chat_tokenizer):
    order = PromptOrder(
        EchoEnvironment(), chat_tokenizer, seed=0, max_prompt_length=99, shuffle=False
    )
    return order.take(0, len(QUESTIONS))


def by_name(samples: list[Sample]) -> dict[tuple[int, int], Sample]:
    """Samples by row and number; there are no two of a name."""
    named = {(s.prompt.row_number, s.number): s for s in samples}
    assert len(named) == len(samples)
    return named


def assert_same(samples: list[Sample], expected: list[Sample]) -> None:
    """The same samples in any order: tokens, turns and rewards to the last bit,
    log-probabilities but for rounding."""
    actual = by_name(samples)
    wanted_by_name = by_name(expected)
    assert actual.keys() == wanted_by_name.keys()
    for name, sample in actual.items():
        other = wanted_by_name[name]
        assert sample.tokens == other.tokens
        assert sample.is_sampled == other.is_sampled
        assert sample.turns == other.turns
        assert sample.is_complete == other.is_complete
        assert sample.environment_reward == other.environment_reward
        np.testing.assert_allclose(sample.log_probs, other.log_probs, rtol=0, atol=2e-5)
