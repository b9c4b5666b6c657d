r"""ListOps of the Long Range Arena (arXiv:2011.04006): nested lists of up to 2000 tokens.

python -m attnx.train --config configs/listops.py --workdir runs/listops
python -m attnx.train --config configs/listops.py:small --workdir runs/listops_small

The default is the benchmark's task and wants an accelerator. `small` is the same grammar with
expressions of up to 100 tokens.

`small` answers 51.8 % of the 2000 test expressions after 1500 steps (the commonest answer is right
for 11.8 %), in 9 minutes on two CPU cores that did other work beside. The full task has not been
run to its end.
"""

import ml_collections

SIZES = {
  "full": dict(steps=5000, batch=32, depth=10, arguments=10, shortest=500, longest=2000),
  "small": dict(steps=1500, batch=32, depth=5, arguments=5, shortest=5, longest=100),
}


def get_config(size: str = "full") -> ml_collections.ConfigDict:
  """A variant is a size: "full" or "small"."""
  chosen = dict(SIZES[size])
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.steps = chosen.pop("steps")
  config.data = dict(name="listops", **chosen)
  config.model = dict(
    name="decoder_lm",
    vocab=16,
    dim=128,
    depth=4,
    mixers=(dict(name="attention", num_heads=4, position="rope"),),
  )
  config.optimizer = dict(peak=1e-3, warmup=100)
  config.eval = dict(every=500, batches=8)
  return config
