"""A sample that is under way."""

from dataclasses import dataclass

from maxlm.rl.samples import Prompt, Sample


@dataclass(eq=False)
class Episode:
    """A sample that is under way, with all that says how it goes on."""

    sample: Sample
    rollout_number: int
    occurrence: int
    """0; 1, 2, ... where its rollout has the prompt's row again."""
    turn_start: int
    """Index of the first token of its last turn."""
    has_ended_turn: bool = False
    """Whether the policy has ended its last turn, and the environment has yet to
    answer."""
    is_over: bool = False
    """Whether nothing follows but the environment's score."""
    num_drawn_before: int = 0
    """Tokens of its turn that earlier requests drew."""
    num_reported_routes: int = 0
    """Tokens of its request to the engine that have come back with their routes."""
    num_requests: int = 0
    """Requests to the engine so far."""
    order: int = 0
    """Its place by arrival: smaller ones go first."""

    @property
    def group(self) -> tuple[int, int, int]:
        """The same for all samples of a prompt, and no others."""
        row_number = self.sample.prompt.row_number
        return self.rollout_number, row_number, self.occurrence

    @property
    def has_begun(self) -> bool:
        """Whether anything follows its prompt."""
        return len(self.sample.tokens) > self.sample.num_prompt_tokens

    @property
    def request_id(self) -> str:
        sample = self.sample
        return (
            f"rollout {self.rollout_number}, row {sample.prompt.row_number}."
            f"{self.occurrence}, sample {sample.number}, part {self.num_requests}"
        )

    @property
    def num_policy_turns(self) -> int:
        """Turns that the policy has ended."""
        return sum(role == "assistant" for role, _ in self.sample.turns)


def begin_episode(
    prompt: Prompt, number: int, rollout_number: int, occurrence: int
) -> Episode:
    """Returns an episode of which nothing is drawn yet; ``number``: the sample's."""
    num_tokens = len(prompt.tokens)
    sample = Sample(
        prompt,
        number,
        tokens=list(prompt.tokens),
        is_sampled=[False] * num_tokens,
        log_probs=[0.0] * num_tokens,
        versions=[-1] * num_tokens,
        is_complete=False,
    )
    return Episode(sample, rollout_number, occurrence, turn_start=num_tokens)


def get_episode_order(episode: Episode) -> int:
    """Returns what episodes are sorted by, for ``key=``: the oldest first."""
    return episode.order
