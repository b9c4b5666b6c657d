"""Attention in JAX: mechanisms, kernels and distribution. Import the subpackages."""

__version__ = "0.1.0"
