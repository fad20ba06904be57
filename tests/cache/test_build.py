"""What the C kernels were compiled for is asked of them, and is part of the name of what is kept."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from prerope.cache.attention.dispatch import paged_attention
from prerope.cache.attention.reference import reference_attention
from prerope.cache.attention.types import AttentionOptions
from prerope.cache.kernels import build
from prerope.server.models.cpu.build import SOURCES, prepare

from tests.cache.layouts import method, one_group, paged, rotary

CONVERSIONS = {"__F16C__": "-mno-f16c", "__FLT16_MAX__": "-U__FLT16_MAX__"}
"""What a compiler may have for fp16, and how it is taken from it."""


@pytest.mark.slow  # the whole library is compiled
@pytest.mark.usefixtures("decode_kernel")
@pytest.mark.parametrize("without", [("__FLT16_MAX__",), ("__F16C__",), tuple(CONVERSIONS)], ids=str)
def test_a_compiler_without_fp16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without: tuple[str, ...]) -> None:
    """As GCC 11 is: keys in fp16 are read by the processor's own conversions, or else by the specification."""
    folders = build.SOURCES, SOURCES
    kept = build._fingerprint("cc", folders)
    macros = subprocess.run(["cc", "-march=native", "-dM", "-E", "-"], input="", capture_output=True, text=True).stdout
    positions = one_group(method("rerope", rotary(64, 64)))
    step = paged([(90, 1), (0, 40)], [positions] * 2, head_dim=64, dtype=torch.float16)
    arguments = (step.query, step.keys, step.values, step.metadata, AttentionOptions(0.125, ""))
    expected = reference_attention(*arguments)
    assert build.reads(torch.float16) == any(name in macros for name in CONVERSIONS)
    torch.testing.assert_close(paged_attention(*arguments), expected, rtol=0, atol=2e-3)
    taken = [CONVERSIONS[name] for name in without if name in macros]
    monkeypatch.setattr(build, "FLAGS", [*build.FLAGS, *taken, "-O1"])  # an optimiser has no part in it
    for name, kernel in [*vars(build.kernels).items()]:
        monkeypatch.setattr(build.kernels, name, kernel)  # put back at the end
    monkeypatch.setattr(build, "_library", None)
    prepare(tmp_path)
    left = any(name in macros for name in CONVERSIONS if name not in without)
    assert [build.reads(dtype) for dtype in build.DTYPES] == [True, True, left]
    step.metadata.plans.clear()
    torch.testing.assert_close(paged_attention(*arguments), expected, rtol=0, atol=2e-3)
    assert build._fingerprint("cc", folders) != kept
