"""One step through the kernels, beside the reference."""

from __future__ import annotations

from cache.attention import AttentionOptions
from cache.cuda import cuda_attention
from cache.reference import reference_attention
from tests.cache.layouts import Paged

TOLERANCE = 1e-5


def difference(step: Paged, options: AttentionOptions) -> float:
    """Largest, between the GPU path and the reference."""
    arguments = (step.query, step.keys, step.values, step.metadata, options)
    actual = cuda_attention(*arguments)
    assert actual.dtype == step.query.dtype
    expected = reference_attention(*arguments)
    return float((actual.float() - expected.float()).abs().max())  # NaN fails every comparison
