"""Checkpoints: layout-free, asynchronous, atomic, in up to three places."""

from maxlm.train.checkpoint.checkpointer import Checkpointer, FoundCheckpoint, SkippedCheckpoint
from maxlm.train.checkpoint.folder import FolderTier
from maxlm.train.checkpoint.reading import (
    UnreadableCheckpoint,
    check_same_settings,
    layer_group_shapes,
    named_leaves,
)

__all__ = [
    "Checkpointer",
    "FolderTier",
    "FoundCheckpoint",
    "SkippedCheckpoint",
    "UnreadableCheckpoint",
    "check_same_settings",
    "layer_group_shapes",
    "named_leaves",
]
