"""Weights of published models: safetensors files to our checkpoints and back, tensor by
tensor."""
