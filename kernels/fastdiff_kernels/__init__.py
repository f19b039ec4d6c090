"""Triton kernels, each beside its plain-torch reference; tensors only."""
