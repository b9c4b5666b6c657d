r"""Associative recall of many queries, the task of Zoology (arXiv:2312.04927).

python -m attnx.train --config configs/mqar.py --workdir runs/mqar
python -m attnx.train --config configs/mqar.py:retention --workdir runs/mqar_retention

Attention recalls 99.7 % of the 12,000 held-out values after 1200 steps (0.017 nats a value; 12.6 %
after 300 steps, 96.3 % after 600), in 6 minutes on two CPU cores.
"""

import ml_collections

CONV = dict(name="dynamic_conv", num_heads=8, width=3)  # brings a key and its value together
MIXERS = {
  "attention": dict(name="attention", num_heads=1, position="rope"),
  "linear": dict(name="linear_attention", num_heads=1),
  "retention": dict(name="retention", num_heads=2),
  "gla": dict(name="gated_linear_attention", num_heads=2, expand_key=1.0),
  "delta": dict(name="gated_delta_net", num_heads=2, head_dim=32, value_dim=32),
  "mamba2": dict(name="mamba2", head_dim=32, state_dim=64),
}


def get_config(mixer: str = "attention") -> ml_collections.ConfigDict:
  """A variant is the mixer that has to recall, e.g. "delta"."""
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.steps = 1200
  config.data = dict(
    name="mqar", batch=64, length=64, pairs=4, vocab=8192, power=0.1, train_examples=100_000
  )
  config.model = dict(
    name="decoder_lm", vocab=8192, dim=64, depth=2, mixers=(CONV, MIXERS[mixer])
  )
  config.optimizer = dict(peak=1e-2, warmup=100)
  config.eval = dict(every=300, batches=8)
  return config
