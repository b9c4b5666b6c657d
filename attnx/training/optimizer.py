"""AdamW with warm-up, a schedule and clipping, from plain values."""

from __future__ import annotations

import jax
import optax

from attnx.training.config import Mistake


def make(
  *,
  steps: int,
  peak: float,
  warmup: int = 0,
  schedule: str = "cosine",
  final: float = 0.0,
  b1: float = 0.9,
  b2: float = 0.95,
  weight_decay: float = 0.1,
  clip: float | None = 1.0,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """Clipping by the global norm, then AdamW; also the schedule, to be shown.

  Args:
    steps: updates in all.
    peak: learning rate after the warm-up.
    warmup: updates from 0 to the peak.
    schedule: "cosine", "linear" or "constant" from the peak on.
    final: share of the peak that is left at the end.
    b1, b2: decay of the first and second moment.
    weight_decay: of arrays with two axes or more, in units of the learning rate.
    clip: largest norm of a gradient; None for any.
  """
  if schedule not in (known := ("cosine", "linear", "constant")):
    raise Mistake(f"optimizer.schedule={schedule!r} must be one of {', '.join(known)}")
  if not 0 <= warmup <= steps:
    raise Mistake(f"optimizer.warmup={warmup} must be in 0 .. steps={steps}")
  rest = max(steps - warmup, 1)
  after = {
    "cosine": optax.cosine_decay_schedule(peak, rest, final),
    "linear": optax.linear_schedule(peak, final * peak, rest),
    "constant": optax.constant_schedule(peak),
  }[schedule]
  rate = optax.join_schedules([optax.linear_schedule(0.0, peak, max(warmup, 1)), after], [warmup])
  adamw = optax.adamw(rate, b1=b1, b2=b2, weight_decay=weight_decay, mask=matrices)
  return optax.chain(*([optax.clip_by_global_norm(clip)] if clip else []), adamw), rate


def matrices(params):
  """Which parameters decay: no biases, no scales of norms."""
  return jax.tree.map(lambda x: x.ndim > 1, params)
