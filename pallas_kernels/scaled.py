"""Factors of a function of tiles, gathered: a number multiplies a tile once, or only its sides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any

import jax
from jax import lax
from jax.extend import core
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Scaled:
  """x -> after * fn(before * x), with as few products of whole tiles as its sums and factors allow.

  after * cap * tanh(before * x / cap) is (after cap) tanh((before / cap) x), and
  after * (before * x - |m i - m j|) is (after before) x - |(after m) i - (after m) j|, where i and
  j are a column and a row. Factors are numbers, or arrays of one. The order of products, and with
  it the last bit, may differ.

  Args:
    fn: a function of a floating tile, to one of the same shape; it may close over traced arrays.
    before, after: factors, the latter positive.
  """

  fn: Callable[[jax.Array], jax.Array]
  before: float
  after: float

  def __call__(self, x: jax.Array, given: float = 1.0) -> jax.Array:
    """The value at x / given: 1, or what `leading` says, which is then no product of a tile."""
    return self._folded(x, given)[0]

  def leading(self, x: jax.ShapeDtypeStruct) -> float:
    """The one number that multiplies x wherever it is read, 1 if there is none."""
    asked: list[Any] = []
    jax.eval_shape(lambda x: asked.extend(self._folded(x, 1.0)[1]), x)
    known = all(isinstance(factor, float | np.generic) for factor in asked)
    return float(asked[0]) if known and len(set(map(float, asked))) == 1 else 1.0

  def _folded(self, x: jax.Array, given: float) -> tuple[jax.Array, list[Any]]:
    """The value, and the factors of x."""
    traced = jax.make_jaxpr(lambda x: self.fn(x * self.before))(x)
    leaf = _Node(value=x)
    (out,) = _nodes(traced.jaxpr, [_Node(value=c) for c in traced.consts], [leaf])
    fold = _Fold(out, leaf, given)
    return fold.times(out, self.after), fold.asked


@dataclasses.dataclass(frozen=True, eq=False)
class _Node:
  """A value, or output `which` of an equation of a program and the nodes that it reads."""

  value: Any = None
  jaxpr: Any = None
  eqn: Any = None
  inputs: tuple[_Node, ...] = ()
  which: int = 0

  @property
  def name(self) -> str:
    return "" if self.eqn is None else self.eqn.primitive.name

  @property
  def aval(self) -> Any:
    return jax.typeof(self.value) if self.eqn is None else self.eqn.outvars[self.which].aval


def _nodes(jaxpr: Any, consts: list[_Node], args: list[_Node]) -> list[_Node]:
  """The outputs of a program as nodes, its inner calls of `jax.jit` dissolved."""
  env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
  read = lambda atom: _Node(value=atom.val) if isinstance(atom, core.Literal) else env[atom]
  for eqn in jaxpr.eqns:
    inputs = [read(atom) for atom in eqn.invars]
    if eqn.primitive.name in ("jit", "pjit"):
      inner = eqn.params["jaxpr"]
      outs = _nodes(inner.jaxpr, [_Node(value=c) for c in inner.consts], inputs)
    else:
      outs = [_Node(None, jaxpr, eqn, tuple(inputs), n) for n in range(len(eqn.outvars))]
    env.update(zip(eqn.outvars, outs, strict=True))
  return [read(atom) for atom in jaxpr.outvars]


def evaluated(jaxpr: Any, eqn: Any, inputs: Sequence[Any]) -> list:
  """The results of one equation of a program, of the values of its inputs."""
  given = [x for x in zip(eqn.invars, inputs, strict=True) if not isinstance(x[0], core.Literal)]
  variables, values = zip(*given) if given else ((), ())
  one = jaxpr.replace(constvars=[], invars=list(variables), outvars=eqn.outvars, eqns=[eqn])
  return jax.core.eval_jaxpr(one, (), *values)


class _Fold:
  """Evaluates nodes, each times a factor that sinks to where it costs the least."""

  def __init__(self, out: _Node, leaf: _Node, given: float):
    self.leaf, self.given, self.asked = leaf, given, []  # type: _Node, float, list[Any]
    self.known: dict[tuple[int, ...], list] = {}
    self.readers: Counter[int] = Counter()
    seen, stack = {id(out)}, [out]
    while stack:
      for node in stack.pop().inputs:
        self.readers[id(node)] += 1
        if id(node) not in seen:
          seen.add(id(node))
          stack.append(node)

  def value(self, node: _Node) -> Any:
    if node is self.leaf:
      return self.of_leaf(1.0)
    if node.eqn is None:
      return node.value
    key = (id(node.eqn), *map(id, node.inputs))
    if key not in self.known:
      if node.name in ("mul", "div") and (split := self.factor(node)):
        self.known[key] = [self.times(*split)]
      else:
        self.known[key] = evaluated(node.jaxpr, node.eqn, list(map(self.value, node.inputs)))
    return self.known[key][node.which]

  def factor(self, node: _Node) -> tuple[_Node, Any] | None:
    """The tile and the one number of a product or quotient, None if it is none of these."""
    a, b = node.inputs
    if (number := self.number(b)) is not None:
      return a, (1 / number if node.name == "div" else number)
    if node.name == "mul" and (number := self.number(a)) is not None:
      return b, number
    return None

  def number(self, node: _Node) -> Any:
    """The one number that a node is in all places, without axes; None where there may be more."""
    if not jnp.issubdtype(node.aval.dtype, jnp.floating):
      return None
    if node.aval.size == 1:
      value = self.value(node)
      return value if not jnp.ndim(value) else value.reshape(())
    return self.number(node.inputs[0]) if node.name == "broadcast_in_dim" else None

  def times(self, node: _Node, factor: Any) -> jax.Array:
    """factor * node."""
    if isinstance(factor, float) and factor == 1:
      return self.value(node)
    sink = functools.partial(self.times, factor=factor)
    if node.eqn is not None and (self.readers[id(node)] < 2 or node.name == "broadcast_in_dim"):
      match node.name:
        case "mul" | "div" if split := self.factor(node):
          return self.times(split[0], factor * split[1])
        case "add":
          return lax.add(*map(sink, node.inputs))
        case "sub":
          return lax.sub(*map(sink, node.inputs))
        case "neg":
          return self.times(node.inputs[0], -factor)
        case "abs" if isinstance(factor, float) and factor > 0:
          return lax.abs(sink(node.inputs[0]))
        case "broadcast_in_dim":
          return node.eqn.primitive.bind(sink(node.inputs[0]), **node.eqn.params)
    if node is self.leaf:
      return self.of_leaf(factor)
    return self.value(node) * jnp.asarray(factor, node.aval.dtype)

  def of_leaf(self, factor: Any) -> jax.Array:
    """factor * x, where x has been multiplied by `given`."""
    self.asked.append(factor)
    x = self.leaf.value
    if self.given != 1:
      assert float(factor) == self.given, (factor, self.given)
      return x
    return x if isinstance(factor, float) and factor == 1 else x * jnp.asarray(factor, x.dtype)
