"""Checkpoints: layout-free, asynchronous, atomic, in up to three places."""
