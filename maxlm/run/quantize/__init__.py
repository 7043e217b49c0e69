"""Quantizes a model: `maxlm quantize`."""
