"""Promise: rollouts take the run's prompts in their order, however long each takes and
however far ahead others are begun; and go on in another process as in this one."""

import time
from collections.abc import Sequence

import jax
import numpy as np
import pytest
from scipy.stats import ks_2samp

from maxlm.rl.advantages import find_groups_without_variance
from maxlm.rl.environments import Reply
from maxlm.rl.rewards.forms import EnvironmentReward
from maxlm.rl.rewards.runner import RewardRunner
from maxlm.rl.rollouts.groups import CollectedGroups, GroupCollector, GroupQueue
from maxlm.rl.rollouts.prompts import PromptOrder
from maxlm.rl.rollouts.records import episodes_from_arrays, episodes_to_arrays
from maxlm.rl.samples import Sample
from tests.rl.rollouts.conftest import EchoEnvironment, assert_same

pytestmark = pytest.mark.heavy
NUM_SAMPLES = 3
NUM_GROUPS = 2


def find_without_variance(scores, lengths, is_complete) -> np.ndarray:
    return find_groups_without_variance(scores, [1.0], np.zeros(lengths.shape))


@pytest.fixture
def make_collector(make_sampler, chat_tokenizer):
    """Makes collectors of groups, each with an engine that has nothing to do."""
    runners = []

    def make(
        environment=None,
        *,
        num_ahead: int = 0,
        num_samples: int = NUM_SAMPLES,
        seed: int = 3,
    ) -> GroupCollector:
        environment = environment or EchoEnvironment()
        sampler = make_sampler(environment, seed=seed)
        order = PromptOrder(
            environment, chat_tokenizer, seed=0, max_prompt_length=99, shuffle=False
        )
        runner = RewardRunner([EnvironmentReward()], workers=1)
        runners.append(runner)
        return GroupCollector(
            sampler,
            runner,
            order,
            sampler.config,
            num_samples,
            num_ahead,
            find_without_variance,
            on_work=lambda: None,
        )

    yield make
    for runner in runners:
        runner.close()


def list_samples(rollouts: Sequence[CollectedGroups]) -> list[Sample]:
    return [
        sample
        for collected in rollouts
        for group in collected.groups
        for sample in group.samples
    ]


def collect_with_updates(
    collector: GroupCollector, versions: Sequence[int], params_by_version
) -> list[CollectedGroups]:
    """Collects a rollout for each version of the parameters."""
    rollouts = []
    for version in versions:
        collector.sampler.engine.set_params(params_by_version[version])
        collector.sampler.set_version(version)
        rollouts.append(collector.collect(NUM_GROUPS))
        collector.sampler.pause()
        collector.sampler.engine.release_caches()
    return rollouts


@pytest.fixture(scope="module")
def params_by_version(policy):
    """Parameters that move a little with each update."""
    return [
        jax.tree.map(lambda leaf, scale=1 + 0.02 * step: leaf * scale, policy.params)
        for step in range(6)
    ]


def test_prompts_come_in_their_order(make_collector, prompts):
    collector = make_collector()
    straight = [collector.collect(NUM_GROUPS) for _ in range(2)]
    numbers = [g.prompt.number for c in straight for g in c.groups]
    assert numbers == [0, 1, 2, 3]
    expected = list(make_collector().sampler.sample(prompts[:4], NUM_SAMPLES))
    assert_same(list_samples(straight), expected)
    for collected in straight:
        for group in collected.groups:
            assert [s.number for s in group.samples] == [*range(NUM_SAMPLES)]
            lengths = [[len(s.last_answer)] for s in group.samples]
            np.testing.assert_array_equal(group.scores, lengths)
    # With parameters that stay, what is begun ahead changes nothing.
    ahead = make_collector(num_ahead=4)
    again = [ahead.collect(NUM_GROUPS) for _ in range(2)]
    assert_same(list_samples(again), expected)
    queue = ahead.get_queue()
    assert (queue.next_prompt, queue.num_begun) == (4, 8)
    assert len(queue.episodes) == 4 * NUM_SAMPLES


@pytest.mark.parametrize("num_ahead", [0, NUM_GROUPS, 2 * NUM_GROUPS])
def test_no_token_is_older_than_is_stated(make_collector, params_by_version, num_ahead):
    collector = make_collector(num_ahead=num_ahead)
    rollouts = collect_with_updates(collector, range(6), params_by_version)
    ages = []
    for version, collected in enumerate(rollouts):
        versions = np.concatenate([s.versions for s in list_samples([collected])])
        ages.append(version - versions[versions >= 0])
    all_ages = np.concatenate(ages)
    assert all_ages.min() == 0
    assert all_ages.max() <= num_ahead // NUM_GROUPS
    assert (all_ages.max() > 0) == (num_ahead > 0)


def restart(collector: GroupCollector, other: GroupCollector) -> None:
    """Lets another process's collector go on."""
    queue = collector.get_queue()
    arrays = episodes_to_arrays(queue.episodes)
    prompts = other._order
    episodes = episodes_from_arrays(arrays, prompts)
    other.restore(GroupQueue(queue.next_prompt, queue.num_begun, episodes))


def test_another_process_goes_on_to_the_last_bit(make_collector, params_by_version):
    straight = make_collector(num_ahead=4)
    expected = collect_with_updates(straight, range(5), params_by_version)
    first = make_collector(num_ahead=4)
    actual = collect_with_updates(first, range(2), params_by_version)
    assert first.num_under_way
    second = make_collector(num_ahead=4)
    restart(first, second)
    actual += collect_with_updates(second, range(2, 5), params_by_version)
    for sample, other in zip(list_samples(actual), list_samples(expected), strict=True):
        assert sample.prompt.number == other.prompt.number
        assert sample.tokens == other.tokens
        assert sample.versions == other.versions
        assert sample.log_probs == other.log_probs
        assert sample.turns == other.turns
    for collected, other in zip(actual, expected, strict=True):
        for group, other_group in zip(collected.groups, other.groups, strict=True):
            np.testing.assert_array_equal(group.scores, other_group.scores)


class StragglingEnvironment(EchoEnvironment):
    """Takes ten times as long to answer a long first turn."""

    replies_at_once = False
    seconds: float = 0.01

    def respond(self, sample: Sample) -> Reply | None:
        is_long = len(sample.last_answer) > 12
        time.sleep(self.seconds * (10 if is_long else 1))
        if sum(role == "assistant" for role, _ in sample.turns) > 1:
            return None
        return Reply("more", "user")


@pytest.mark.more
def test_lengths_that_are_trained_on_are_those_that_are_sampled(make_collector):
    """Of an environment that takes ten times as long for long turns."""
    num_rollouts = 20
    straggling = make_collector(
        StragglingEnvironment(), num_ahead=3 * NUM_GROUPS, num_samples=8
    )
    rollouts = [straggling.collect(NUM_GROUPS) for _ in range(num_rollouts)]
    trained = [s.num_sampled for s in list_samples(rollouts)]
    other = make_collector(StragglingEnvironment(seconds=0.0), num_samples=8, seed=9)
    sampled = [
        s.num_sampled
        for s in list_samples([other.collect(NUM_GROUPS) for _ in range(num_rollouts)])
    ]
    assert ks_2samp(trained, sampled).pvalue > 0.05
    # Training on the quarter that is done first would tell: the measure sees it.
    eager = make_collector(StragglingEnvironment(), num_samples=8)
    first_done = []
    for number in range(num_rollouts):
        prompts = eager._order.take(NUM_GROUPS * number, NUM_GROUPS)
        arrivals = [s.num_sampled for s in eager.sampler.sample(prompts, 8)]
        first_done += arrivals[: len(arrivals) // 4]
    assert ks_2samp(first_done, sampled).pvalue < 1e-4
