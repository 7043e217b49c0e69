"""Models and their layers. Shape letters: B batch, S sequence, T keys, D model, N query
heads, K kv heads, H head dim, F ffn, V vocabulary, E experts, L layers."""
