"""Attention in JAX: mechanisms, kernels and distribution. Import the subpackages; this file is empty."""

__version__ = "0.1.0"
