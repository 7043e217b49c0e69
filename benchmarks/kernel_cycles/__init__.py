"""Cycles of kernels, counted without a TPU: beside other libraries' (``bench``), and to
choose block sizes (``tune``)."""
