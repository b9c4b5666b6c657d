r"""Copying 16 symbols, with retention and attention by turns.

python -m attnx.train --config configs/copying.py --workdir runs/copying
python -m attnx.train --config configs/copying.py:retention --workdir runs/copying_retention

150 steps reach a held-out loss of 0.0014 nats and copy every symbol, in 28 seconds of CPU time on
two CPU cores.
"""

import ml_collections

MIXERS = {
  "retention": dict(name="retention", num_heads=4),
  "attention": dict(name="attention", num_heads=4, position="rope"),
  "relu": dict(
    name="attention", num_heads=4, position="rope", normaliser=dict(name="relu", power=2)
  ),
}


def get_config(pattern: str = "retention,retention,attention") -> ml_collections.ConfigDict:
  """A variant is a pattern of mixers, e.g. "attention" or "relu,retention"."""
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.steps = 150
  config.data = dict(name="copying", batch=32, length=16, vocab=16)
  config.model = dict(
    name="decoder_lm",
    vocab=16,
    dim=64,
    depth=3,
    mixers=tuple(MIXERS[mixer] for mixer in pattern.split(",")),
  )
  config.optimizer = dict(peak=3e-3, warmup=30)
  config.eval = dict(every=50, batches=4)
  return config
