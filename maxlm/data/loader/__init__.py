"""Token stores to batches: the batch at step s is a pure function of (stores, mixture,
seed, s)."""
