"""Scripts behind every figure in docs/."""
