"""Which pairs may meet: `attnx.attention.masks.Mask`.

Facts: `causal`, no query sees a position after its own.
"""
