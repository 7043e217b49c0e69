"""Checkpoints: layout-free, asynchronous, atomic, in up to three places."""

from maxlm.train.checkpoint.checkpointer import (
    Checkpointer,
    CheckpointTier,
    FoundCheckpoint,
    SkippedCheckpoint,
)
from maxlm.train.checkpoint.folder import FolderTier
from maxlm.train.checkpoint.reading import Unreadable, check_same, group_sizes, named_leaves

__all__ = [
    "CheckpointTier",
    "Checkpointer",
    "FolderTier",
    "FoundCheckpoint",
    "SkippedCheckpoint",
    "Unreadable",
    "check_same",
    "group_sizes",
    "named_leaves",
]
