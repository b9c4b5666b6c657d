"""ListOps of the Long Range Arena: nested lists of digits under MIN, MAX, MED and SM."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import random

import numpy as np

from attnx.data.dataset import Dataset, Description, Example, at_least
from attnx.data.pipeline import Fitted, Padded

TOKENS = ("<pad>", "[MIN", "[MAX", "[MED", "[SM", "]", *map(str, range(10)))
IDS = {token: i for i, token in enumerate(TOKENS)}
OPERATORS: dict[str, Callable[[list[int]], int]] = {
  "[MIN": min,
  "[MAX": max,
  "[MED": lambda values: median(values),
  "[SM": lambda values: sum(values) % 10,
}
OPERATOR_PROBABILITY = 0.25
TRIES = 100_000  # at an expression; the benchmark's needs a hundred or so


def median(values: list[int]) -> int:
  """The middle one, or the mean of the middle two without its fraction."""
  ordered, half = sorted(values), len(values) // 2
  return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) // 2


def draw(rng: random.Random, depth: int, arguments: int) -> tuple[list[str], int]:
  """A random expression, as tokens and value: a digit, or an operator of 2 .. `arguments` more."""
  if depth == 1 or rng.random() > OPERATOR_PROBABILITY:
    digit = rng.randrange(10)
    return [str(digit)], digit
  inner = [draw(rng, depth - 1, arguments) for _ in range(rng.randint(2, arguments))]
  operator = rng.choice(list(OPERATORS))
  tokens = [operator, *(token for part, _ in inner for token in part), "]"]
  return tokens, OPERATORS[operator]([value for _, value in inner])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Listops(Dataset):
  """One expression a row; at its last token the target is its value, a digit.

  The grammar of arXiv:2011.04006: an expression is an operator with probability 0.25, else a digit;
  an operator has 2 .. `arguments` expressions; at `depth` there are digits only; an expression is
  kept if shortest < tokens < longest. MED truncates the mean of the middle two, SM is the sum
  modulo 10. The last token sees all others in causal models too, so that no class token is wanted.
  The defaults are the benchmark's (its expressions are distinct, here two are the same only by
  chance).

  Args:
    depth: of nesting, digits included.
    arguments: of an operator, at most.
    shortest, longest: bounds of the number of tokens, both exclusive.
    pack: several expressions a row.
    train_examples, eval_examples, test_examples: sizes of the splits.
  """

  depth: int = 10
  arguments: int = 10
  shortest: int = 500
  longest: int = 2000
  pack: bool = False
  train_examples: int = 96_000
  eval_examples: int = 2_000
  test_examples: int = 2_000

  def __post_init__(self):
    at_least("depth", self.depth, 2)
    at_least("arguments", self.arguments, 2)
    at_least("longest", self.longest, self.shortest + 2, f" to leave room above {self.shortest}")
    nested = self.depth - 2
    most = self.arguments ** (nested + 1) + 2 * sum(self.arguments**i for i in range(nested + 1))
    if most <= self.shortest:
      raise ValueError(
        f"depth={self.depth} and arguments={self.arguments} give at most {most} tokens, and "
        f"shortest={self.shortest} wants more"
      )

  @property
  def rows(self) -> Padded | Fitted:
    return (Fitted if self.pack else Padded)(self.longest)

  def describe(self) -> Description:
    return Description(
      kind="tokens",
      splits=("train", "eval", "test"),
      vocab=len(TOKENS),
      length=self.longest,
      encode=lambda text: np.array([IDS[token] for token in text.split()], np.int32),
      decode=lambda ids: " ".join(TOKENS[i] for i in ids),
    )

  def sample(self, rng: np.random.Generator, split: str) -> Example:
    python = random.Random(int(rng.integers(2**63)))  # ten times faster, one number at a time
    for _ in range(TRIES):
      tokens, value = draw(python, self.depth, self.arguments)
      if self.shortest < len(tokens) < self.longest:
        break
    else:
      raise ValueError(
        f"of {TRIES} expressions of depth={self.depth} and arguments={self.arguments} none has "
        f"more than shortest={self.shortest} and fewer than longest={self.longest} tokens"
      )
    last = np.arange(len(tokens)) == len(tokens) - 1
    return dict(
      inputs=np.array([IDS[token] for token in tokens], np.int32),
      targets=np.where(last, IDS[str(value)], 0).astype(np.int32),
      weights=last.astype(np.float32),
    )


DATASET = Listops
