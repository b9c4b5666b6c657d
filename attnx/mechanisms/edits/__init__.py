"""Elementwise changes of weights: `attnx.attention.transforms.Transform` in `AttentionSpec.edits`.

Facts: `unbiased`, an edited weight is the weight itself on average over the random key.
"""
