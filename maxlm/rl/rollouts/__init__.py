"""Rollouts: what the policy answers to prompts, drawn by the engine, packed into rows
and recorded."""
