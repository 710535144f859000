"""The bench `cache` serves every request, and its figures are those of the issue."""

import pytest

from scripts.benchmarks import cache


def test_pages_waste_little_where_reserved_limits_waste_most():
    sizes = cache.parse(["requests=60", "memory=16384"])
    rows = list(cache.measure(sizes, None))
    contiguous, paged, samples = rows
    assert contiguous["waste"] > 0.5
    assert paged["waste"] < 0.04
    assert samples["pages_shared"] == 11
    assert samples["pages_copied_by_first_tokens"] == sizes.samples - 1
    assert "73" in cache.table([{**contiguous, "waste": 0.73}, paged, samples])


def test_every_request_reaches_its_end_also_after_preemption():
    sizes = cache.parse(["requests=40", "memory=4096", "limit=1024"])
    requests = cache.mix(sizes)
    tokens = sum(request.total for request in requests)
    paged = cache.serve_paged(requests, sizes)
    assert paged.preempted > 0
    assert paged.finished == tokens
    assert cache.serve_contiguous(requests, sizes).finished == tokens


def test_a_memory_too_small_for_one_request_is_refused():
    with pytest.raises(ValueError, match="memory=100 tokens hold no request of limit=2048"):
        cache.parse(["memory=100"])
