"""Hot loops, compiled by Numba, which is slow to import: `compiled.compiled` is their door."""
