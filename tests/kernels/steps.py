"""One step through the kernels, on the device under test, beside the reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from prerope.cache.attention.reference import reference_attention
from prerope.cache.attention.types import AttentionOptions
from prerope.cache.cuda.attention import cuda_attention

from tests.cache import layouts
from tests.cache.layouts import Paged
from tests.device import DEVICE

TOLERANCE = 1e-5 if DEVICE == "cpu" else 5e-5
"""Of fp32: a card makes a product of three in tf32."""


def paged(*arguments: Any, **options: Any) -> Paged:
    """`layouts.paged`, on the device under test; block tables stay on the host, as they are served."""
    step = layouts.paged(*arguments, **options)
    query, keys, values = (tensor.to(DEVICE) for tensor in (step.query, step.keys, step.values))
    return replace(step, query=query, keys=keys, values=values)


def difference(step: Paged, options: AttentionOptions) -> float:
    """Largest, between the GPU path and the reference."""
    arguments = (step.query, step.keys, step.values, step.metadata, options)
    actual = cuda_attention(*arguments)
    assert actual.dtype == step.query.dtype
    expected = reference_attention(*arguments)
    return float((actual.float() - expected.float()).abs().max())  # NaN fails every comparison
