"""Promise: what generation alone needs is freed before a training step, whoever
generated last; and a validation tells the watchdog of each dispatch."""

from types import SimpleNamespace

import pytest

from maxlm.rl.rollouts.generation import PolicyEngine
from maxlm.rl.rollouts.validator import PolicyValidator
from maxlm.rl.samples import Prompt, Sample


class NotingEngine:
    """Notes what is freed."""

    def __init__(self, *, has_unfinished_requests: bool):
        self.has_unfinished_requests = has_unfinished_requests
        self.freed: list[str] = []

    def release_params(self) -> None:
        self.freed.append("params")

    def release_caches(self) -> None:
        self.freed.append("caches")


def make_policy_engine(update_in_flight: str, engine: NotingEngine) -> PolicyEngine:
    policy_engine = PolicyEngine.__new__(PolicyEngine)
    rollouts = SimpleNamespace(update_in_flight=update_in_flight)
    state = {"_engine": engine, "_task": SimpleNamespace(rollouts=rollouts)}
    vars(policy_engine).update(state, _sampler=None)
    return policy_engine


@pytest.mark.parametrize("update_in_flight", ["recompute", "keep_caches"])
def test_what_a_validation_before_the_first_rollout_holds_is_freed(update_in_flight):
    engine = NotingEngine(has_unfinished_requests=False)
    make_policy_engine(update_in_flight, engine).release()
    assert engine.freed == ["params", "caches"]


def test_caches_are_freed_unless_samples_run_in_them():
    """A validation pauses samples: they are under way, and have no caches."""
    pauses: list[int] = []
    sampler = SimpleNamespace(num_unfinished=3, pause=lambda: pauses.append(1))
    for has_unfinished_requests in (False, True):
        engine = NotingEngine(has_unfinished_requests=has_unfinished_requests)
        policy_engine = make_policy_engine("keep_caches", engine)
        vars(policy_engine)["_sampler"] = sampler
        policy_engine.release()
        assert ("caches" in engine.freed) == (not has_unfinished_requests)
    assert len(pauses) == 1


class SlowSampler:
    """Needs several dispatches for each sample, and finishes the last ones first."""

    def add(self, prompts, num_samples: int) -> None:
        self.samples = [
            Sample(prompt, number, [], [], [], [], is_complete=True)
            for prompt in prompts
            for number in range(num_samples)
        ]
        self.num_dispatches = 0

    def advance(self, max_dispatches: int) -> list[Sample]:
        self.num_dispatches += max_dispatches
        return [] if self.num_dispatches % 4 else [self.samples.pop()]


def test_a_validation_tells_the_watchdog_of_each_dispatch():
    """Samples of a prompt lie side by side."""
    sampler = SlowSampler()
    resets: list[int] = []
    config = SimpleNamespace(sampling=SimpleNamespace(model_copy=lambda update: None))
    config.model_copy = lambda update: None
    validator = PolicyValidator.__new__(PolicyValidator)
    state = {
        "_task": SimpleNamespace(rollouts=config),
        "_validation": SimpleNamespace(temperature=0, num_samples=2, environment=None),
        "_engine": SimpleNamespace(open_other_sampler=lambda *arguments: sampler),
        "_prompts": [Prompt(7, (1,), {}, 0), Prompt(5, (1,), {}, 1)],
        "_runner": None,
        "_context": SimpleNamespace(on_work=lambda: resets.append(1)),
    }
    vars(validator).update(state)
    samples = validator._draw(SimpleNamespace(params=None), 3)
    names = [(sample.prompt.row_number, sample.number) for sample in samples]
    assert names == [(7, 0), (7, 1), (5, 0), (5, 1)]
    assert len(resets) == sampler.num_dispatches == 16
