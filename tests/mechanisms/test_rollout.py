"""Attention rollout."""

import jax
import numpy as np
import pytest

from attnx.core import registry

B, N, T, L = 2, 3, 6, 4
RNG = np.random.default_rng(0)


def rollout(maps, **options) -> np.ndarray:
  seen = {f"blocks/{i}/mixer/weights": np.asarray(w) for i, w in enumerate(maps)}
  return np.asarray(registry.build("analyses", dict(name="rollout", **options))(seen))


def random(causal: bool = True) -> np.ndarray:
  w = np.exp(RNG.normal(size=(L, B, N, T, T))) * (np.tri(T) if causal else 1.0)
  return w / w.sum(-1, keepdims=True)


@pytest.mark.parametrize("causal", [True, False])
def test_it_sums_the_weights_of_all_paths(causal):
  with jax.enable_x64(True):
    maps = random(causal)
    flow = 0.5 * maps.mean(2) + 0.5 * np.eye(T)  # (L, B, T, T)
    expected = np.zeros((B, T, T))
    for path in np.ndindex(*[T] * (L + 1)):  # input first
      steps = [flow[i, :, path[i + 1], path[i]] for i in range(L)]
      expected[:, path[-1], path[0]] += np.prod(steps, axis=0)
    np.testing.assert_allclose(rollout(maps), expected, rtol=1e-9, atol=1e-12)
    assert causal == (not np.triu(expected[0], 1).any())


def test_rows_sum_to_one_also_where_maps_do_not():
  maps = np.float32(random() * RNG.uniform(0, 9, size=(L, B, N, T, 1)))
  maps[1, :, :, 2] = 0.0
  for residual in (0.0, 0.5):
    np.testing.assert_allclose(rollout(maps, residual=residual).sum(-1), 1.0, rtol=1e-5)


def test_uniform_attention_keeps_half_a_layer():
  maps = np.full((L, B, N, T, T), 1 / T, np.float32)
  expected = 2.0**-L * np.eye(T) + (1 - 2.0**-L) / T
  np.testing.assert_allclose(rollout(maps)[0], expected, rtol=1e-5)


def test_queries_that_look_at_themselves_or_at_nothing_keep_what_they_had():
  itself = np.broadcast_to(np.eye(T, dtype=np.float32), (L, B, N, T, T))
  for maps in (itself, 0 * itself):
    for residual in (0.0, 0.5):
      np.testing.assert_array_equal(rollout(maps, residual=residual)[0], np.eye(T))


def test_upper_layers_stand_on_the_left():
  first, second = np.zeros((2, 1, 1, 3, 3))
  first[..., [0, 1, 2], [0, 0, 2]] = 1.0  # 1 reads 0
  second[..., [0, 1, 2], [0, 1, 1]] = 1.0  # then 2 reads 1
  found = rollout([first, second], residual=0.0)[0]
  np.testing.assert_array_equal(found, [[1, 0, 0], [1, 0, 0], [1, 0, 0]])
  found = rollout([second, first], residual=0.0)[0]
  np.testing.assert_array_equal(found, [[1, 0, 0], [1, 0, 0], [0, 1, 0]])


def test_permuting_tokens_permutes_both_sides():
  maps, order = random(causal=False), RNG.permutation(T)
  moved = maps[..., order, :][..., order]
  np.testing.assert_allclose(
    rollout(moved), rollout(maps)[:, order][:, :, order], rtol=1e-5, atol=1e-7
  )


def test_negative_weights_count_as_zero_before_heads_are_averaged():
  maps = RNG.normal(size=(L, B, N, T, T)).astype(np.float32)
  np.testing.assert_allclose(rollout(maps), rollout(np.maximum(maps, 0)), rtol=1e-6)


def test_maps_that_do_not_follow_on_one_another_are_refused():
  with pytest.raises(ValueError, match=r"expected one \(B, T, T\)"):
    rollout([np.ones((B, N, T, T + 1))])
  with pytest.raises(ValueError, match=r"expected one \(B, T, T\)"):
    rollout([np.ones((B, N, T, T)), np.ones((B, N, 3, 3))])
  with pytest.raises(ValueError, match="residual=2 must be in"):
    rollout(random(), residual=2)
