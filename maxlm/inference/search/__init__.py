"""Searches for good continuations: functions over the engine, each with a budget in
tokens."""
