"""Elementwise changes of scores: `attnx.attention.transforms.Transform`.

Facts: `relative`, moving every position of both sides by the same amount changes nothing.
"""
