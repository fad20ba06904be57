"""One step through the kernels, beside the reference."""

from __future__ import annotations

from prerope.cache.attention.reference import reference_attention
from prerope.cache.attention.types import AttentionOptions
from prerope.cache.cuda.attention import cuda_attention

from tests.cache.layouts import Paged

TOLERANCE = 1e-5


def difference(step: Paged, options: AttentionOptions) -> float:
    """Largest, between the GPU path and the reference."""
    arguments = (step.query, step.keys, step.values, step.metadata, options)
    actual = cuda_attention(*arguments)
    assert actual.dtype == step.query.dtype
    expected = reference_attention(*arguments)
    return float((actual.float() - expected.float()).abs().max())  # NaN fails every comparison
