"""Methods to cut work where axis rules alone do not say."""

from typing import Literal

from pydantic import Field

from maxlm.config import Config
from maxlm.parallel.context import ContextMethod

Schedule = Literal["gpipe", "circular", "1f1b"]


class ParallelConfig(Config):
    """Methods of the axes `stage` and `context`; without effect where these have one
    device."""

    context: ContextMethod = "all_gather"
    """Method by which attention sees a sequence split over `context`. all_gather: every
    device gathers all keys and values. ring: keys and values go round, a block at a
    time, while the device computes with the block it has; the least memory. ulysses:
    heads are exchanged for the sequence and back; the least traffic, but query heads
    must divide over `context` too."""
    balance_sequence: bool = True
    """Give each device an early and a late part of the sequence, so that causal masks
    leave all equal work; the sequence must divide into two parts a device."""
    schedule: Schedule = "1f1b"
    """Order in which pipeline stages take micro-batches (train.micro_batches, a
    multiple of the stages). gpipe: all forward, then all backward; keeps every
    micro-batch's stage inputs. circular: as gpipe, but each stage holds `layer_groups`
    groups of layers and micro-batches go round that often: the bubble shrinks as often.
    1f1b: backward as soon as possible; keeps the inputs of at most 2·stages − 1
    micro-batches."""
    batch_invariant: bool = False
    """true: linear maps, attention and log-probabilities add up in one order whatever
    the batch, so that a token's log-probability has the same bits here and in an engine
    with its own `batch_invariant`; slow, and for decoders of attention and dense
    feed-forwards alone (docs/inference.md). false: as fast as the compiler can."""
    layer_groups: int = Field(default=1, ge=1)
    """circular: groups of layers a stage."""
