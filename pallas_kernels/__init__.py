"""Stand-alone kernels, each beside its reference. Imports nothing from maxlm."""
