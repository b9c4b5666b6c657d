r"""Handwritten digits, 8 x 8, by a vision transformer of patches of 2 x 2.

python -m attnx.train --config configs/digits_vit.py --workdir runs/digits_vit

1000 steps recognise 97.2 % of the 355 held-out digits (held-out loss 0.101 nats), in 40 seconds on
two CPU cores.
"""

import ml_collections

MIXERS = {
  "attention": dict(name="attention", num_heads=4, mask="everything"),
  "linear": dict(name="linear_attention", num_heads=4, causal=False),
  "fftnet": dict(name="fftnet", num_heads=4, length=16),
}


def get_config(pattern: str = "attention") -> ml_collections.ConfigDict:
  """A variant is a pattern of mixers, e.g. "linear" or "fftnet,attention"."""
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.steps = 1000
  config.data = dict(name="digits", batch=64, shift=0.5, turn=10.0)
  config.model = dict(
    name="vit",
    classes=10,
    image=(8, 8, 1),
    patch=2,
    dim=64,
    depth=4,
    mixers=tuple(MIXERS[mixer] for mixer in pattern.split(",")),
  )
  config.optimizer = dict(peak=2e-3, warmup=100)
  config.eval = dict(every=250)
  return config
