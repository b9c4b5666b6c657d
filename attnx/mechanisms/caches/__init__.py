"""Recipes for what a decoder remembers: `empty(batch, length, heads, key_dim, value_dim)` makes it.

Facts: `exact`, stepping gives what one call over the whole sequence gives; `constant_state`, the
size does not grow with `length`; `masked:<mask>`, it gives what one call under that mask gives.
"""
