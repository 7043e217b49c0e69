"""Quantization: number formats, the leaf that holds a matrix in one, and algorithms that
choose the codes."""
