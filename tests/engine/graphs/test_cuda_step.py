"""A forward on CUDA neither waits for the device nor mixes devices: run on fake tensors of a GPU that may not be there.

Fake tensors have a shape and a device and no members. To ask one of them for a number raises, as does an operation on
tensors of two devices. What Triton would launch is held to what its kernels take, and so is attention.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from prerope.server.models.model import BACKENDS, Batch, Model
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from tests.engine.tiny_models import VOCABULARY, two_layers
from tests.tiers import every

pytest.importorskip("triton")
from prerope.server.models.cuda import elementwise

ROWS = 5


class OnTheGPU(TorchDispatchMode):
    """Inside, every tensor that was made outside, such as a weight, is a fake one on the GPU."""

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self._fake = fake
        self._moved: dict[int, tuple[Tensor, FakeTensor]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        moved = tree_map_only(Tensor, self._move, (args, kwargs or {}))
        return function(*moved[0], **moved[1])

    def _move(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        if id(tensor) not in self._moved:
            with self._fake:
                fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")
            self._moved[id(tensor)] = tensor, fake
        return self._moved[id(tensor)][1]


class WithIndexing(TorchFunctionMode):
    """Inside, tensors are indexed operation by operation: a torch without CUDA has no indexing of a GPU's tensors."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        return taken(*args) if function is Tensor.__getitem__ else function(*args, **(kwargs or {}))


def taken(x: Tensor, places: Any) -> Tensor:
    """x[places]; by a mask it raises, since how much that gives is known on the device alone."""
    places, dim = places if isinstance(places, tuple) else (places,), 0
    for number, place in enumerate(places):
        if place is Ellipsis:
            dim = x.dim() - sum(later is not None for later in places[number + 1 :])
        elif place is None:
            x, dim = x.unsqueeze(dim), dim + 1
        elif isinstance(place, slice):
            x, dim = torch.ops.aten.slice(x, dim, place.start, place.stop, place.step or 1), dim + 1
        elif isinstance(place, Tensor):
            x, dim = torch.ops.aten.index(x, [None] * dim + [place]), dim + 1
        else:
            x = x.select(dim, place)
    return x


def on_one_device(*tensors: Tensor) -> None:
    assert {tensor.device.type for tensor in tensors} == {"cuda"}


def norm(x: Tensor, residual: Tensor, _weight: Tensor, total: Tensor, out: Tensor, *_options: Any) -> None:
    """A weight is a real tensor here."""
    on_one_device(x, residual, total, out)
    assert x.shape == residual.shape == total.shape == out.shape
    assert x.stride(-1) == residual.stride(-1) == 1
    assert out.is_contiguous()


def gate(gate_up: Tensor, out: Tensor) -> None:
    on_one_device(gate_up, out)
    assert gate_up.shape == (out.shape[0], 2 * out.shape[1])
    assert gate_up.stride(1) == 1
    assert out.is_contiguous()


def attention(query: Tensor, keys: Tensor, values: Tensor, metadata: Any, options: Any) -> Tensor:
    """The shape that the kernels give."""
    del metadata, options
    on_one_device(query, keys, values)
    return query.new_empty(len(query), query.shape[1], values.shape[-1])


class Storage:
    """Keys and values of any layer."""

    bounds = None

    def __init__(self, head_dim: int, device: str) -> None:
        self.keys = self.values = _Same(torch.empty(4, 16, 2, head_dim, device=device))

    def store(self, layer: int, key: Tensor, value: Tensor, slots: Tensor) -> None:
        del layer
        on_one_device(key, value, slots)


class _Same:
    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def __getitem__(self, _place: int) -> Tensor:
        return self._tensor


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Callable[[Model], list[str]]:
    """Launches of a model, by name, which write nothing from now on."""
    names: list[str] = []

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            names.append(function.__name__)
            return function(*arguments, **options)

        return call

    monkeypatch.setattr(elementwise, "_launch_norm", counted(norm))
    monkeypatch.setattr(elementwise, "_launch_gate", counted(gate))

    def of(model: Model) -> list[str]:
        monkeypatch.setattr(model, "attention", counted(attention))
        return names

    return of


def step(model: Model, logit_rows: int, device: str = "cuda", before: Callable[[], Any] = lambda: None) -> Tensor:
    """One forward on the fake GPU."""
    fake = FakeTensorMode()
    with ExitStack() as modes:
        modes.enter_context(torch.inference_mode())
        modes.enter_context(fake)
        modes.enter_context(OnTheGPU(fake))
        modes.enter_context(WithIndexing())
        ids, positions, slots = (torch.zeros(ROWS, dtype=torch.int64, device=device) for _ in range(3))
        rows = torch.zeros(logit_rows, dtype=torch.int64, device=device)
        batch: Any = Batch(ids, positions, rows, SimpleNamespace(slot_mapping=slots))  # type: ignore[arg-type]
        storage: Any = Storage(16, device)
        before()
        return model.forward(batch, storage)


def built(family: str) -> Model:
    return Model(two_layers(family), BACKENDS["cuda"])


@pytest.mark.parametrize("family", every(1, ["llama", "qwen3", "qwen2", "smollm3"], quick=2))
def test_a_step_of_the_stack(family: str, request: pytest.FixtureRequest) -> None:
    model = built(family)
    launched = request.getfixturevalue("launched")(model)
    logits = step(model, 3)
    assert logits.shape == (3, VOCABULARY)
    assert (logits.device.type, logits.dtype) == ("cuda", torch.float32)
    heads = ["norm"] * 2 if family == "qwen3" else []
    layer = [*heads, "attention", "norm", "gate", "norm"]
    assert launched == ["norm", *layer, *layer]


@pytest.mark.parametrize(
    "family",
    every(2, ["llama", "gemma2", "gemma3_text", "mistral", "phi3", "olmo2", "gpt_neox", "glm", "cohere"], quick=2),
)
def test_a_step_layer_by_layer(family: str, request: pytest.FixtureRequest) -> None:
    model = built(family)
    launched = request.getfixturevalue("launched")(model)
    with model.layer_by_layer():
        logits = step(model, ROWS)
    assert logits.shape == (ROWS, VOCABULARY)
    assert logits.device.type == "cuda"
    norms = {"gemma2": 4, "gemma3_text": 6, "olmo2": 4, "glm": 2}
    assert launched.count("attention") == 2
    if family not in ("gpt_neox", "cohere"):  # their norms are others
        assert launched.count("norm") == norms.get(family, 2) * 2 + 1


def test_to_ask_for_a_number_or_to_mix_devices_would_raise(request: pytest.FixtureRequest) -> None:
    """What the tests above rely on."""
    model = built("llama")
    request.getfixturevalue("launched")(model)
    weight = model.raw.model.get_input_embeddings().weight
    with pytest.raises(DataDependentOutputException):
        step(model, 3, before=lambda: weight.sum().item())
    with pytest.raises(DynamicOutputShapeException):
        step(model, 3, before=lambda: torch.ops.aten.nonzero(weight))
    with pytest.raises(RuntimeError):
        step(model, 3, before=lambda: weight[weight > 0])
    with pytest.raises(RuntimeError, match="cuda"):
        step(model, 3, before=lambda: weight + torch.zeros(weight.shape))
    with pytest.raises((RuntimeError, AssertionError)):
        step(model, 3, device="cpu")
