"""Scripts behind the figures in docs/: see README.md."""
