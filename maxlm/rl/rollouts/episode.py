"""A sample that is under way."""

from dataclasses import dataclass

from maxlm.rl.samples import Prompt, Sample


@dataclass(eq=False)
class Episode:
    """A sample that is under way, with all that says how it goes on."""

    sample: Sample
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
    def has_begun(self) -> bool:
        """Whether anything follows its prompt."""
        return len(self.sample.tokens) > self.sample.num_prompt_tokens

    @property
    def num_policy_turns(self) -> int:
        """Turns that the policy has ended."""
        return sum(role == "assistant" for role, _ in self.sample.turns)


def begin_episode(prompt: Prompt, number: int) -> Episode:
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
    return Episode(sample, turn_start=num_tokens)


def end_episode(sample: Sample) -> Episode:
    """Returns the episode of a sample that is drawn, of which only the environment's
    score is still to come."""
    return Episode(sample, turn_start=len(sample.tokens), is_over=True)


def get_episode_order(episode: Episode) -> int:
    """Returns what episodes are sorted by, for ``key=``: the oldest first."""
    return episode.order
