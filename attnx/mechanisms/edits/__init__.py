"""Elementwise changes of weights: `attnx.attention.transforms.Transform` in `AttentionSpec.edits`.

Facts: `mean_one`, an edited weight is the weight itself on average over keys of the edit.
"""
