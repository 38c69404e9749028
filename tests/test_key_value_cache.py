"""KeyValueCache: generation token by token equals attention over all tokens, in place and without copies."""

import pytest
import torch

import pynn
from pynn.nn import KeyValueCache
from pynn.ops import scaled_dot_product_attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pieces", [(5, 1, 1, 3), (1,) * 10, (10,)])
def test_pieces_are_the_whole(dtype, pieces):
    query, key, value = (torch.randn(2, h, 10, d).to(dtype) for h, d in ((4, 8), (2, 8), (2, 6)))
    options = {"window": (-1, 0), "alignment": "lower_right", "enable_gqa": True}
    whole = scaled_dot_product_attention(query, key, value, **options)
    cache, begin, parts = KeyValueCache(12), 0, []
    for length in pieces:
        new = slice(begin, begin + length)
        keys, values = cache.append(key[:, :, new], value[:, :, new])
        assert torch.equal(keys, key[:, :, : begin + length])
        parts.append(scaled_dot_product_attention(query[:, :, new], keys, values, **options))
        begin += length
    assert cache.used == 10
    torch.testing.assert_close(torch.cat(parts, 2), whole)


def test_memory_is_taken_once():
    cache = KeyValueCache(100)
    first, _ = cache.append(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4))
    memory = first.untyped_storage().nbytes()
    assert memory == 2 * 100 * 4 * 4
    for _ in range(97):
        keys, values = cache.append(torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 4))
    assert keys.data_ptr() == first.data_ptr()
    assert keys.shape == values.shape == (1, 2, 100, 4)
    assert (first == 1).all()
    assert not keys.requires_grad


def test_truncate_and_select():
    cache = KeyValueCache(6)
    tokens = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 2, 4, 5)
    cache.append(tokens, tokens + 10)
    cache.truncate(2)
    cache.append(tokens[:, :, :1] + 100, tokens[:, :, :1])
    keys, values = cache.stored()
    assert keys[1, 0, :, 0].tolist() == [1, 1, 101]
    assert values[1, 0, :, 0].tolist() == [11, 11, 1]
    cache.select(torch.tensor([2, 2, 0, 1]))
    keys, _ = cache.stored()
    assert keys[:, 0, :, 0].tolist() == [[2, 2, 102], [2, 2, 102], [0, 0, 100], [1, 1, 101]]
    cache.append(torch.zeros(4, 2, 3, 5), torch.zeros(4, 2, 3, 5))
    assert cache.used == 6
    assert keys[0, 0, 2, 0] == 102
    cache.truncate(0)
    assert cache.stored()[0].shape == (4, 2, 0, 5)


def test_models_share_it():
    model = pynn.models.GPT(11, 16, width=8, layers=2, heads=2).eval()
    caches = model.caches()
    assert all(isinstance(cache, KeyValueCache) for cache in caches)
    ids = torch.randint(11, (2, 9))
    with torch.no_grad():
        steps = [model(ids[:, i : i + 1], caches) for i in range(9)]
        torch.testing.assert_close(torch.cat(steps, 1), model(ids))


def test_errors():
    with pytest.raises(ValueError, match="length >= 0, got -1"):
        KeyValueCache(-1)
    cache, good = KeyValueCache(3), torch.zeros(1, 2, 2, 4)
    with pytest.raises(ValueError, match="nothing was stored yet"):
        cache.stored()
    with pytest.raises(ValueError, match="nothing was stored yet"):
        cache.select(torch.tensor([0]))
    for key, value in ((good[0], good[0]), (good, good[:, :1]), (good, good[:, :, :1])):
        with pytest.raises(ValueError, match="expected key \\(N, H, L, D\\)"):
            cache.append(key, value)
    cache.append(good, good)
    with pytest.raises(ValueError, match="at most 3 tokens, got 4"):
        cache.append(good, good)
    one = good[:, :, :1]
    for wrong in (one.double(), one[..., :3], one.expand(2, 2, 1, 4), one.to("meta")):
        with pytest.raises(ValueError, match="as before"):
            cache.append(one, wrong) if wrong.shape[:3] == one.shape[:3] else cache.append(wrong, wrong)
    assert cache.used == 2
    with pytest.raises(ValueError, match="0 <= used <= 2, got 3"):
        cache.truncate(3)
