"""Checkpoints: layout-free, asynchronous, atomic, in up to three places."""

from maxlm.train.checkpoint.keeper import Checkpointer
from maxlm.train.checkpoint.reading import Unreadable, check_same, group_sizes, named_leaves

__all__ = ["Checkpointer", "Unreadable", "check_same", "group_sizes", "named_leaves"]
