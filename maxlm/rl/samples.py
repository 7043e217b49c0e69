"""What rollouts are made of: prompts, and what the policy answers to them."""

from dataclasses import dataclass, field

import numpy as np

from maxlm.runtime.json_types import JsonMapping


@dataclass(frozen=True)
class Prompt:
    """A task for the policy."""

    row_number: int
    """Number of its row among the rows of the files, or of what an environment
    makes."""
    tokens: tuple[int, ...]
    """What the policy reads first."""
    row: JsonMapping
    """All columns of the row: an environment and rewards read them."""
    number: int = 0
    """Its place in the run's order, in which a row may come again; the random streams
    of its samples follow from it."""


@dataclass
class Sample:
    """A prompt with what the policy answered, and between its turns an environment.

    Token in, token out: the policy is trained on the tokens that it drew, which no one
    decodes and encodes again. The lists have an entry for each token.
    """

    prompt: Prompt
    number: int
    """0, 1, ... of the samples of its prompt."""
    tokens: list[int]
    """The prompt's, and all that follow."""
    is_sampled: list[bool]
    """Whether the policy drew the token."""
    log_probs: list[float]
    """Natural log-probability of a drawn token over the model's whole vocabulary, at
    the temperature that it was drawn at, before filters; 0 for others."""
    versions: list[int]
    """Step whose parameters drew the token; -1 for others."""
    is_complete: bool
    """Whether the policy ended its last turn itself; false: it ran out of room."""
    turns: list[tuple[str, str]] = field(default_factory=list)
    """What was said behind the prompt, as rewards read it: ("assistant", text) of the
    policy, ("tool" or "user", text) of the environment."""
    environment_reward: float | None = None
    """Score of the environment; None: it gives none."""
    routes: list[np.ndarray] = field(default_factory=list, compare=False)
    """Where the engine records them, int8 or int16 [E, k] of each of the first tokens:
    the experts that it met there; see :mod:`maxlm.rl.routes`. The engine has not read
    those behind them."""

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt.tokens)

    @property
    def num_sampled(self) -> int:
        return sum(self.is_sampled)

    @property
    def completion(self) -> str:
        """Text of all the policy's turns, one behind the other."""
        return "".join(text for role, text in self.turns if role == "assistant")

    @property
    def last_answer(self) -> str:
        """Text of the policy's last turn."""
        texts = [text for role, text in self.turns if role == "assistant"]
        return texts[-1] if texts else ""
