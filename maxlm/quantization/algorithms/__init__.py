"""Algorithms that choose a matrix's codes: pure functions of matrices and of statistics of
their inputs. What runs a model and collects its inputs is elsewhere.

- ``hessian``: statistics of a matrix's inputs
- ``rounding``: rounding to nearest with scales that a search chooses
- ``gptq``: rounding a column at a time, with the error made up for by later columns
- ``awq``, ``smoothquant``: scales of input channels, folded into the layer before
- ``hadamard``, ``quip``: random rotations and rounding to a lattice
- ``sensitivity``, ``bit_budget``: which matrix gets which format
"""
