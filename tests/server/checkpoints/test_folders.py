"""Folders as people have them: whole ones are served, and anything else is one true sentence with the remedy."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from prerope.server.api.chat.template import render_chat
from prerope.server.engine.loading import in_words
from prerope.server.errors import ConfigurationError
from prerope.server.models.checkpoint import Checkpoint, resolve_checkpoint
from prerope.server.models.checks.probe import probe
from prerope.server.models.config.text import wrong_in_text_file
from prerope.server.models.config.values import Stored, wrong_in
from prerope.server.models.end_tokens import describe
from prerope.server.models.model import Model, load_model
from prerope.server.sampling_defaults import SamplingDefaults, sampling_defaults
from prerope.server.tokenizer import Tokenizer
from safetensors.torch import load_file, save_file

from tests.byte_level import byte_level
from tests.engine.models.model_types import tiny_of_type
from tests.logged import logged

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
Damage = Callable[[Path], None]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small enough to be loaded a hundred times."""
    folder = tmp_path_factory.mktemp("whole") / "model"
    return byte_level(folder, chat_template=None, special=("<|im_end|>",), max_position_embeddings=64)


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of `whole` to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


def load(folder: Path, cache: Path | None = None) -> Model:
    """All of a start that reads the folder."""
    checkpoint = resolve_checkpoint(str(folder), None, lambda _: None, cache_dir=cache or folder.parent / "cache")
    with in_words(checkpoint.name):
        Tokenizer.load(checkpoint)
        sampling_defaults(checkpoint)
        model = load_model(checkpoint, "auto", "cpu", lambda _: None)
        probe(model)
    return model


def refusal(folder: Path) -> str:
    with pytest.raises(ConfigurationError) as caught:
        load(folder)
    said = str(caught.value)
    assert "\n" not in said
    return said


def change_json(name: str, **values: Any) -> Damage:
    """values: None removes the key."""

    def damage(folder: Path) -> None:
        content = json.loads((folder / name).read_text()) | values
        (folder / name).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return damage


def change_weights(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Damage:
    def damage(folder: Path) -> None:
        file = folder / "model.safetensors"
        tensors = {name: tensor.contiguous().clone() for name, tensor in change(load_file(file)).items()}
        save_file(tensors, file, metadata={"format": "pt"})

    return damage


def without(*parts: str) -> Damage:
    return change_weights(lambda w: {name: t for name, t in w.items() if not any(part in name for part in parts)})


def with_tensor(name: str, tensor: torch.Tensor) -> Damage:
    return change_weights(lambda w: w | {name: tensor})


def replaced(name: str, tensor: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    return change_weights(lambda w: w | {name: tensor(w[name])})


def piped(name: str) -> Damage:
    """A named pipe in the place of a file, which nobody writes to."""
    return lambda folder: ((folder / name).unlink(missing_ok=True), os.mkfifo(folder / name))[1]


def removed(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def written(name: str, content: str | bytes) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return damage


def renamed(name: str, other: str) -> Damage:
    return lambda folder: (folder / name).rename(folder / other) and None


def cut(name: str, share: float) -> Damage:
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * share)])

    return damage


def in_parts(*kept: int) -> Damage:
    """Weights in three parts with an index, of which only some are there."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        parts = {name: f"model-{1 + i % 3:05}-of-00003.safetensors" for i, name in enumerate(sorted(tensors))}
        for number in kept:
            part = f"model-{number:05}-of-00003.safetensors"
            save_file({name: tensors[name] for name in tensors if parts[name] == part}, folder / part, {"format": "pt"})
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": parts}))

    return damage


def in_index(entries: dict[str, str]) -> Damage:
    """After `in_parts`: where the index says that some tensors are."""

    def damage(folder: Path) -> None:
        file = folder / "model.safetensors.index.json"
        index = json.loads(file.read_text())
        index["weight_map"] |= entries
        file.write_text(json.dumps(index))

    return damage


def both(*damages: Damage) -> Damage:
    def damage(folder: Path) -> None:
        for one in damages:
            one(folder)

    return damage


def quantised(**config: Any) -> Damage:
    return change_json("config.json", quantization_config=config)


def in_header(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """Of the weights' file: what its header says, changed."""

    def damage(folder: Path) -> None:
        file = folder / "model.safetensors"
        content = file.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        text = json.dumps(change(header) or header).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])

    return damage


def entry(**said: Any) -> Damage:
    return in_header(lambda header: header[Q_PROJ].update(said))


def in_tokenizer(change: Callable[[dict[str, Any]], Any]) -> Damage:
    def damage(folder: Path) -> None:
        content = json.loads((folder / "tokenizer.json").read_text())
        change(content)
        (folder / "tokenizer.json").write_text(json.dumps(content))

    return damage


def linked(name: str, target: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return damage


def tensor_in_two_parts(folder: Path) -> None:
    in_parts(1, 2, 3)(folder)
    first, second = (folder / f"model-0000{number}-of-00003.safetensors" for number in (1, 2))
    name, tensor = next(iter(load_file(first).items()))
    save_file(load_file(second) | {name: 3 * tensor}, second, {"format": "pt"})


class Malicious:
    """What a pickle may run when it is read."""

    def __reduce__(self) -> Any:
        return pytest.fail, ("a pickle was read",)


def pickled(name: str) -> Damage:
    return lambda folder: torch.save({"weight": Malicious()}, folder / name)


def rope(**said: Any) -> Damage:
    whole = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
    return change_json("config.json", rope_parameters=whole | said)


def empty_vocabulary(folder: Path) -> None:
    """But for the special tokens, which are added."""
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"] = {}
    (folder / "tokenizer.json").write_text(json.dumps(content))


def every_weight(change: Callable[[torch.Tensor], torch.Tensor], of: str = "") -> Damage:
    return change_weights(lambda w: {name: change(t) if of in name else t for name, t in w.items()})


def rewritten(name: str, change: Callable[[bytes], bytes]) -> Damage:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes())) and None


def made_a_folder(name: str) -> Damage:
    return lambda folder: ((folder / name).unlink(missing_ok=True), (folder / name).mkdir())[1]


def without_metadata(folder: Path) -> None:
    change_json("model.safetensors.index.json", metadata=None)(folder)


FILES = ("model.safetensors", "tokenizer.json", "generation_config.json", "chat_template.jinja")
NORM = "model.norm.weight"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
ADAPTER = written("adapter_config.json", json.dumps({"peft_type": "LORA", "base_model_name_or_path": "owner/base"}))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        # what transformers would draw at random
        (without(Q_PROJ), f"lacks 1 weights that its config asks for: {Q_PROJ}"),
        (without("layers.1."), "lacks 9 weights"),
        (without("lm_head"), "lacks 1 weights that its config asks for: lm_head.weight"),
        (change_weights(lambda w: {f"wrong.{name}": t for name, t in w.items()}), "lacks 21 weights"),
        (change_json("config.json", num_hidden_layers=3), "lacks 9 weights"),
        # what transformers would drop
        (change_json("config.json", num_hidden_layers=1), "9 weights that its config has no place for: model.layers.1"),
        (with_tensor("model.layers.0.self_attn.q_proj.bias", torch.ones(32)), "has no place for"),
        (with_tensor("model.layers.0.self_attn.q_proj.weight_scale", torch.ones(1)), "would be ignored"),
        (with_tensor("base_model.model.q_proj.lora_A.weight", torch.ones(2, 2)), "adapted by a scheme"),
        # damaged weights
        (replaced(Q_PROJ, lambda t: t[:16]), f"{Q_PROJ} is [16, 32], not [32, 32]"),
        (replaced(Q_PROJ, lambda t: t * float("nan")), f"numbers beyond 1e+12: {Q_PROJ}"),
        (replaced(Q_PROJ, lambda t: t.to(torch.int8)), "as I8, but config.json names no quantization_config"),
        (replaced(Q_PROJ, lambda t: t.to(torch.float8_e4m3fn)), "as F8_E4M3, but"),
        (replaced(NORM, lambda t: t.to(torch.int32)), f"{NORM} as I32, and such weights are floating-point numbers"),
        (replaced(NORM, lambda t: t.to(torch.complex64)), f"{NORM} as C64, and such weights"),
        (both(replaced(NORM, lambda t: t.to(torch.int8)), quantised(quant_method="fp8")), f"{NORM} as I8, and such"),
        # values that no model has
        *(
            (change_json("config.json", max_position_embeddings=value), f"'max_position_embeddings' is {shown}, and a")
            for value, shown in ((-5, "-5"), (0, "0"), ("64", "the text '64'"), (1e30, "1e+30"), ([64], "a list"))
        ),
        (
            written("config.json", '{"model_type":"llama","rope_theta":1,"max_position_embeddings":null}'),
            "is null, and",
        ),
        (change_json("config.json", rope_parameters={"rope_theta": 0}), "'rope_parameters.rope_theta' is 0, and"),
        (change_json("config.json", rope_theta=10**400), "'rope_theta' is beyond 20 digits, and"),
        (change_json("config.json", rope_scaling={"factor": -4, "rope_type": "yarn"}), "'rope_scaling.factor' is -4"),
        (change_json("config.json", num_hidden_layers=10**7), "'num_hidden_layers' is 10000000, and 21 weights are"),
        (change_json("config.json", vocab_size=10**9), "'vocab_size' is 1000000000 and 'hidden_size' 32, more numbers"),
        (change_json("config.json", num_key_value_heads=0), "'num_key_value_heads' is 0, and it is a whole number"),
        (empty_vocabulary, "tokenizer has 2 tokens, none of which stands for text"),
        (change_json("config.json", rms_norm_eps=0.0), "'rms_norm_eps' is 0.0, and what keeps a norm from dividing by"),
        (written("config.json", '{"model_type":"llama","initializer_range":NaN}'), "is nan, and it is a finite number"),
        (change_json("config.json", head_dim=-1), "'head_dim' is -1, and it is a whole number"),
        (change_json("config.json", head_dim=2**30), "more numbers than the"),
        (
            change_json("config.json", sliding_window=1e30),
            "'sliding_window' is 1e+30, and a window is a number of tokens",
        ),
        (change_json("config.json", dual_chunk_attention_config="x"), "'dual_chunk_attention_config' is the text 'x'"),
        (
            change_json("config.json", dual_chunk_attention_config={"chunk_size": 32}),
            "'dual_chunk_attention_config' has no 'local_size', a number of tokens",
        ),
        (
            change_json("config.json", dual_chunk_attention_config={"chunk_size": 8, "local_size": 16}),
            "'dual_chunk_attention_config.local_size' is 16, and its 'chunk_size' 8, of which it is a part",
        ),
        (change_json("config.json", num_key_value_heads=8), "'num_key_value_heads' is 8, more than the 4 of num_atten"),
        (change_json("config.json", auto_map=5), "'auto_map' is 5, and it is an object"),
        # values that transformers fails on in code of its own: found by leaving them out
        (
            change_json("config.json", num_attention_heads=7),
            "'num_attention_heads' is 7, which transformers cannot use; it would be 32 where it is not said (The",
        ),
        (
            change_json("config.json", hidden_act="x"),
            "'hidden_act' is the text 'x', which transformers cannot use; it would be the text 'silu' where it is not",
        ),
        (rope(rope_type="x"), "'rope_parameters.rope_type' is the text 'x', which transformers cannot use"),
        (change_json("config.json", pad_token_id=2**31), "'pad_token_id' is 2147483648, which transformers cannot use"),
        (change_json("config.json", id2label={"a": 1}), "'id2label' is an object, which transformers cannot use"),
        (change_json("config.json", sub_configs=1), "'sub_configs' is 1, which transformers cannot use"),
        (
            rope(rope_type="longrope", short_factor=[1, 2], long_factor=[1] * 4),
            "'rope_parameters' is an object, which transformers cannot use",
        ),
        (change_json("config.json", num_hidden_layers=40), "lacks 342 weights"),
        (change_json("config.json", is_encoder_decoder=True), "has an encoder, which its decoder reads"),
        (rope(attention_factor=-1), "'rope_parameters.attention_factor' is -1, and it is a number above 0"),
        (rope(rope_theta=1.0), "'rope_parameters.rope_theta' is 1.0, and the base of a rotation lies above 1"),
        (rope(rope_type="llama3", factor=None), "'rope_parameters.factor' is null, and this rope_type needs it"),
        (rope(factor={}), "'rope_parameters.factor' is an object, and it is a number above 0"),
        (
            change_json("config.json", rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}),
            "which transformers cannot use (a rotation of type 'yarn' needs 'factor' too)",
        ),
        (change_json("config.json", num_experts_per_tok=9, num_experts=8), "'num_experts_per_tok' is 9, and 'num_exp"),
        (rope(rope_type=5), "'rope_parameters.rope_type' is 5, and it is a name"),
        (rope(mrope_section=1e9), "'rope_parameters.mrope_section' is 1000000000.0, and it is a list of whole numbers"),
        (change_json("config.json", text_config={"model_type": 1}), "'text_config.model_type' is 1, and it is a name"),
        (change_json("config.json", text_config=5), "'text_config' is 5, and it is an object"),
        (change_json("config.json", layer_types=5), "'layer_types' is 5, and it is a list"),
        (rope(partial_rotary_factor="x"), "'rope_parameters.partial_rotary_factor' is the text 'x', and it is a share"),
        (
            rope(rope_type="longrope", short_factor=[1, None]),
            "'rope_parameters.short_factor' is a list, and it is a list",
        ),
        # sizes that no model has, beside what is stored
        (
            change_json("config.json", vocab_size=10**15),
            f"'vocab_size' is {10**15}, and no model has more than {2**31 - 1} (the stored table of tokens has 258",
        ),
        (
            change_json("config.json", num_attention_heads=10**15),
            f"is {10**15}, and no model has more than {2**31 - 1}",
        ),
        (change_json("config.json", max_position_embeddings=10**15), f"number of tokens from 1 to {2**31 - 1}"),
        (change_json("config.json", pad_token_id=1000), "(Padding_idx must be within num_embeddings)"),
        (change_json("config.json", model_type="mistral", sliding_window=0), "reads a sliding window of 0 tokens, and"),
        # weights that no training leaves
        (every_weight(torch.zeros_like), "16 of its 16 tables of weights hold one number"),
        (every_weight(lambda t: torch.full_like(t, 0.5)), "16 of its 16 tables of weights hold one number"),
        (
            every_weight(lambda t: torch.full_like(t, 1e-40)),
            "16 of its 16 tables of weights hold one number",
        ),
        (
            replaced("lm_head.weight", torch.zeros_like),
            "tables of weights hold one number throughout: lm_head",
        ),
        (every_weight(lambda t: 1e30 * t), "hold NaN, infinity or numbers beyond 1e+12"),
        (every_weight(torch.zeros_like, "norm"), "all its keys are zeros on a short prompt, so that its weights are"),
        (replaced(NORM, torch.zeros_like), "its logits are the same for all tokens: its weights are damaged"),
        (
            both(change_json("config.json", dtype="float16"), every_weight(lambda t: (3e3 * t).half(), "proj")),
            "meets NaN or infinity on a short prompt. Where DTYPE=float16 is narrower",
        ),
        # text that other programs write
        *(
            (rewritten(name, change), f"{name} {said}")
            for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
            for change, said in (
                (lambda text: b"\xef\xbb\xbf" + text, "begins with a byte order mark"),
                (lambda text: text.decode().encode("utf-16"), "is text in UTF-16"),
                (lambda _: b"", "is no JSON (line 1, column 1; 0 bytes), or is cut short"),
                (lambda _: b"null", "is no JSON object"),
                (lambda text: text[:-2] + b',"x":"\xe4"}', "is no text in UTF-8 (byte "),
            )
        ),
        (
            both(in_parts(1, 2, 3), rewritten("model.safetensors.index.json", lambda text: b"\xef\xbb\xbf" + text)),
            "model.safetensors.index.json begins with a byte order mark",
        ),
        (rewritten("config.json", lambda text: text.rstrip()[:-1] + b",}"), "config.json is no JSON (line 3"),
        (change_json("config.json", x=json.loads("[" * 150 + "]" * 150)), "config.json nests deeper than 100 levels"),
        # names
        *(
            (change_json("config.json", model_type=value), f"'model_type' is {shown}, and it is a name")
            for value, shown in (
                (5, "5"),
                (["llama"], "a list"),
                ({}, "an object"),
                (True, "true"),
                ("", "the text ''"),
            )
        ),
        (
            change_json("config.json", model_type="llama\nERROR x"),
            "is the text 'llama\\nERROR x', and",
        ),
        (change_json("config.json", model_type="\x1b[31m" + "x" * 5000), "is the text '\\x1b[31mxxx"),
        (
            with_tensor("model.layers.0.\nx\u2028" + "y" * 5000, torch.ones(2)),
            "model.layers.0.\\nx\\u2028yyy",
        ),
        (change_json("config.json", model_type="x", auto_map={"AutoConfig": "x.X"}), "whose code comes with its files"),
        (
            change_json("config.json", model_type="qwen3", layer_types=[1, 2]),
            "'layer_types' has 1 at its place 0",
        ),
        # files under other names, and folders
        (
            written("model.safetensors", b"GGUF\3\0\0\0" + bytes(500)),
            "model.safetensors is a GGUF file: give it",
        ),
        (
            written("model.safetensors", b"PK\3\4" + bytes(500)),
            "model.safetensors is a zip archive, such",
        ),
        (
            renamed("model.safetensors", "model.gguf"),
            "no GGUF file (130248 bytes), but looks like safetensors",
        ),
        *((made_a_folder(name), f"{name} is a folder, and it should be a file") for name in ("config.json", *FILES)),
        (
            both(removed("model.safetensors"), made_a_folder("x.gguf")),
            "no safetensors are found there, only config.json",
        ),
        (both(in_parts(1, 2, 3), without_metadata), "has no metadata, which transformers reads"),
        (
            both(removed("tokenizer.json"), written("tokenizer.model", b"\n\0")),
            "there is no tokenizer.json, and",
        ),
        (
            change_json("tokenizer_config.json", tokenizer_class="X", auto_map={"AutoTokenizer": ["x.X", None]}),
            "its code comes with its files (auto_map in tokenizer_config.json)",
        ),
        *(
            (written("generation_config.json", json.dumps({"eos_token_id": value})), "'eos_token_id' is ")
            for value in ("0", 1.5, [[0]], {})
        ),
        # headers that lie
        *(
            (entry(**said), "is no safetensors file, or is damaged")
            for said in (
                {"dtype": "Q9"},
                {"dtype": "F64"},
                {"shape": [2**40, 2**40]},
                {"shape": [-32, 32]},
                {"shape": [32.0, 32]},
                {"data_offsets": [4096, 0]},
                {"data_offsets": [0, 4096]},
                {"data_offsets": [0]},
            )
        ),
        (in_header(lambda header: header.update(__metadata__={"format": {}})), "is damaged"),
        (written("model.safetensors", (200_000).to_bytes(8, "little") + b"[" * 200_000), "is damaged"),
        (tensor_in_two_parts, "is in two of the parts: parts of two models lie there"),
        # tokenizers and what lies beside them
        (
            in_tokenizer(lambda said: said["model"]["vocab"].update(word=999)),
            "another model's; take both from one source",
        ),
        (
            in_tokenizer(lambda said: said["added_tokens"][0].pop("id")),
            "its tokenizer cannot be read: a value in its files is of another kind than it should be. Download",
        ),
        (in_tokenizer(lambda said: said["model"].update(merges=[["a"]])), "its tokenizer cannot be read: data did not"),
        (
            in_tokenizer(lambda said: said.update(version="9.9")),
            "its tokenizer cannot be read: Unknown tokenizer version",
        ),
        (written("tokenizer.json", "[" * 200_000), "tokenizer.json is no JSON"),
        (
            change_json("tokenizer_config.json", eos_token=7),
            "tokenizer_config.json says 'eos_token' is 7, and it is a to",
        ),
        (change_json("tokenizer_config.json", tokenizer_class=5), "'tokenizer_class' is 5, and it is a name"),
        (change_json("tokenizer_config.json", chat_template=5), "'chat_template' is 5, and it is a text"),
        (written("added_tokens.json", '{"<x>": "7"}'), "'<x>' is the text '7', and it is the number of a token"),
        (written("special_tokens_map.json", "[]"), "special_tokens_map.json is no JSON object"),
        (written("chat_template.jinja", b"\xff\xfe\x00"), "chat_template.jinja is no text in UTF-8"),
        (
            written("additional_chat_templates/a.jinja", b"\xff\xfe"),
            "additional_chat_templates/a.jinja is no text in UTF-8",
        ),
        # links
        (linked("model.safetensors", "../../blobs/4d7a"), "model.safetensors is a link to what is not there: copy the"),
        (linked("model.safetensors", "model.safetensors"), "is a link to what is not there"),
        (linked("config.json", "config.json"), "config.json is a link to what is not there"),
        (linked("tokenizer.json", "/nowhere"), "tokenizer.json is a link to what is not there"),
        (linked("model.safetensors", "/dev/zero"), "model.safetensors is no regular file, but a pipe, socket or"),
        # code that a pickle would run
        (both(removed("model.safetensors"), pickled("pytorch_model.bin")), "can run code when they are read"),
        (both(removed("model.safetensors"), pickled("model.pt")), "can run code when they are read"),
        (both(ADAPTER, pickled("adapter_model.bin")), "an adapter (adapter_config.json) lies beside the base model"),
        # schemes under their other names
        (quantised(quant_method="gptqmodel", bits=4), "GPTQ (the package gptqmodel)"),
        (quantised(bits=4, group_size=128, desc_act=False), "GPTQ (the package gptqmodel)"),
        (quantised(quant_method="intel/auto-round", bits=4), "AutoRound (the package auto-round)"),
        (quantised(quant_method="hqq"), "HQQ (the package hqq)"),
        (
            quantised(),
            "quantization_config is an object, and it names a quant_method; leave it out where there",
        ),
        (quantised(quant_method=["fp8"]), "quantization_config.quant_method is a list, which is no name"),
        (
            quantised(quant_method="fp8", weight_block_size=[0, 0]),
            "its weights could not be dequantised as FP8 in blocks (weight_block_size must be",
        ),
        (
            change_json("config.json", text_config={"vocab_size": 9}),
            "has a 'text_config', and a model of type 'llama' has",
        ),
        (quantised(group_size=128), "are quantised by a scheme that its quantization_config does not name, which is"),
        (change_json("config.json", quantization_config="gptq"), "quantization_config is the text 'gptq'"),
        (cut("model.safetensors", 0.5), "model.safetensors is cut short"),
        (cut("model.safetensors", 0.0), "model.safetensors is cut short (0 bytes"),
        (written("model.safetensors", b"<html>not found</html>" * 99), "is no safetensors file, or is damaged"),
        (written("model.safetensors", POINTER), "git lfs pull"),
        (written("config.json", POINTER), "git lfs pull"),
        (written("tokenizer.json", POINTER), "git lfs pull"),
        # incomplete downloads
        (in_parts(1, 3), "2 of 3 parts of the weights are there and model-00002-of-00003.safetensors is missing"),
        (both(in_parts(1, 2, 3), removed("model.safetensors.index.json")), "without model.safetensors.index.json"),
        (both(in_parts(1, 2, 3), written("model.safetensors.index.json", "{}")), "has no weight_map"),
        (
            both(in_parts(1, 2, 3), cut("model-00003-of-00003.safetensors", 0.9)),
            "model-00003-of-00003.safetensors is cut",
        ),
        (both(removed("model.safetensors"), written("model.safetensors.part", "x")), "interrupted download"),
        (
            both(removed("model.safetensors"), written(".cache/huggingface/download/aBc=.4d7.incomplete", "x")),
            "interrupted download",
        ),
        (both(in_parts(1, 2, 3), in_index({Q_PROJ: "/etc/hostname"})), "names /etc/hostname, which is no file of"),
        (both(in_parts(1, 2, 3), in_index({Q_PROJ: "x" * 5000})), "which is no file of this folder"),
        (both(in_parts(1, 2, 3), in_index({Q_PROJ: "a\0b"})), "which is no file of this folder"),
        (both(in_parts(1, 2, 3), in_index({Q_PROJ: ""})), "which is no file of this folder"),
        (both(in_parts(1, 2, 3), in_index({Q_PROJ: "../model.safetensors"})), "names ../model.safetensors, which"),
        (
            both(in_parts(1, 2, 3), in_index(dict.fromkeys(("model.norm.weight", Q_PROJ), "model-00009-of-00003"))),
            "model-00009-of-00003 is missing",
        ),
        (removed("model.safetensors"), "no safetensors are found there"),
        (removed("config.json"), "there are weights but no config.json"),
        (
            both(removed("model.safetensors"), written("model.onnx", "x")),
            "its weights are model.onnx, for another program",
        ),
        (
            both(written("weights/x", ""), renamed("model.safetensors", "weights/model.safetensors")),
            "(weights/model.safetensors lies too deep: move it up)",
        ),
        (renamed("model.safetensors", "weights.safetensors"), "rename the file"),
        (both(removed("model.safetensors"), written("pytorch_model.bin", "x")), "can run code when they are read"),
        # configs
        (cut("config.json", 0.5), "config.json is no JSON"),
        (written("config.json", "[]"), "is no JSON object"),
        (change_json("config.json", model_type=None), "names no model_type"),
        (
            change_json("config.json", model_type="strangeformer"),
            "'model_type' is the text 'strangeformer', and transformers .* knows no such model",
        ),
        (change_json("config.json", model_type="t5"), "t5"),
        (
            change_json("config.json", rms_norm_eps="1"),
            "its config.json cannot be read: 'rms_norm_eps' is the text '1', and it is a number with a decimal",
        ),
        (change_json("config.json", hidden_size="32"), "'hidden_size' is the text '32', and it is a whole number"),
        (change_json("config.json", num_attention_heads=0), "'num_attention_heads' is 0, and it is a whole number"),
        (change_json("config.json", dtype="float3"), "'dtype' is the text 'float3', and weights are of bfloat16"),
        # other programs' formats
        (both(removed("config.json"), removed("model.safetensors"), ADAPTER), "merge it into its base owner/base once"),
        (ADAPTER, "an adapter (adapter_config.json) lies beside the base model"),
        (
            written("adapter_model.safetensors", "x"),
            "an adapter (adapter_model.safetensors) lies beside the base model",
        ),
        (both(removed("config.json"), renamed("model.safetensors", "consolidated.safetensors")), "model maker's own"),
        (renamed("model.safetensors", "consolidated.safetensors"), "model maker's own format"),
        (both(removed("tokenizer.json"), written("tekken.json", "{}")), "tekken.json"),
        (removed("tokenizer.json"), "no tokenizer is there"),
        *((piped(name), f"{name} is no regular file") for name in ("tokenizer.json", "generation_config.json")),
        (cut("tokenizer.json", 0.7), "tokenizer.json is no JSON"),
        (written("tokenizer.json", "{}"), "its tokenizer cannot be read"),
    ],
)
def test_a_damaged_folder_is_refused_in_one_true_sentence(folder: Path, damage: Damage, said: str) -> None:
    damage(folder)
    assert re.search(said if ".*" in said else re.escape(said), refusal(folder))


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        (
            ".experts.2.up_proj.weight",
            "weights that are made of several stored ones, such as those of all experts, cannot",
        ),
        (
            ".experts.3.",
            "the checkpoint lacks weights of experts: it has model.layers.0.mlp.experts.down_proj of 3 of 4",
        ),
    ],
)
@pytest.mark.parametrize("level", [logging.WARNING, logging.ERROR])
def test_an_expert_that_is_missing_is_told(tmp_path: Path, lost: str, said: str, level: int) -> None:
    """With LOG_LEVEL=error, too, where transformers' own report is not logged."""
    tiny_of_type("qwen3_moe").save_pretrained(tmp_path)
    without(f"layers.0.mlp{lost}")(tmp_path)
    with logged("transformers", level), pytest.raises(ConfigurationError, match=re.escape(said)) as caught:
        load_model(Checkpoint(str(tmp_path), "m"), "auto", "cpu", lambda _: None)
    assert "\n" not in str(caught.value)


def test_no_family_s_own_defaults_are_refused() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        if family in CONFIG_MAPPING:
            try:
                config = CONFIG_MAPPING[family]()
            except Exception:  # some cannot be made without values
                continue
            assert (family, wrong_in(config.to_dict())) == (family, None)


def test_a_whole_folder_is_read_without_a_warning(folder: Path) -> None:
    with logged() as records, logged("transformers") as of_transformers:
        load(folder)
    assert [record.getMessage() for record in (*records, *of_transformers)] == []


def test_a_whole_folder_is_served_in_one_file_or_in_parts(folder: Path) -> None:
    first = load(folder).raw.model.lm_head.weight
    in_parts(1, 2, 3)(folder)
    assert torch.equal(load(folder).raw.model.lm_head.weight, first)


def test_what_is_not_the_decoder_s_is_left_out(folder: Path) -> None:
    with_tensor("v_head.weight", torch.ones(1, 32))(folder)
    with_tensor("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(4))(folder)
    load(folder)


@pytest.mark.parametrize(
    "damage",
    [
        change_json("config.json", max_position_embeddings=64.0, vocab_size=258.0),
        change_json("tokenizer_config.json", chat_template="{{ raise_exception('no') }}"),
        written(
            "generation_config.json", '{"eos_token_id": [1000000000000, -1], "temperature": NaN, "num_beams": "x"}'
        ),
        written("generation_config.json", '{"cache_implementation": "none of them"}'),
        change_json("config.json", dtype="float64"),
        change_json("config.json", dtype=None, torch_dtype="torch.bfloat16"),
        replaced(Q_PROJ, torch.zeros_like),
        both(pickled("pytorch_model.bin"), pickled("training_args.bin")),
        change_json("config.json", return_dict=False, output_attentions=True),
        change_json("config.json", auto_map={"AutoModelForCausalLM": "code.Model"}),
        in_header(lambda header: header.update(__metadata__={"format": "mlx"})),
    ],
)
def test_what_does_no_harm_is_served(folder: Path, damage: Damage) -> None:
    """Lengths written as 64.0, values that nothing needs, and pickles or code beside the weights, which none reads."""
    damage(folder)
    load(folder)


def test_what_a_generation_config_has_wrong_is_told(folder: Path) -> None:
    said = {"temperature": "hot", "top_p": 7, "top_k": -1, "repetition_penalty": 1.5, "eos_token_id": [1, 99_999]}
    (folder / "generation_config.json").write_text(json.dumps(said))
    lines: list[str] = []
    checkpoint = resolve_checkpoint(str(folder), None, lambda _: None)
    assert sampling_defaults(checkpoint, lines.append) == SamplingDefaults(repetition_penalty=1.5)
    assert [re.findall(r"says (\w+) is (.*?), and .*: (\S+) is used", line)[0] for line in lines] == [
        ("temperature", "the text 'hot'", "1.0"),
        ("top_p", "7", "1.0"),
        ("top_k", "-1", "0"),
    ]
    tokenizer = Tokenizer.load(checkpoint)
    assert describe(tokenizer.end_tokens, tokenizer.hf).endswith(
        "; warning: its tokenizer has no token 99999 (generation config)"
    )


def test_a_mark_at_the_start_of_a_template_is_no_part_of_a_prompt(folder: Path) -> None:
    written("chat_template.jinja", b"\xef\xbb\xbf{{ messages[0].content }}")(folder)
    tokenizer = Tokenizer.load(resolve_checkpoint(str(folder), None, lambda _: None))
    assert render_chat(tokenizer, [{"role": "user", "content": "Hello"}]) == "Hello"


@pytest.mark.skipif(os.name != "posix", reason="a system of permissions")
@pytest.mark.parametrize("name", ["", "config.json", "model.safetensors", "tokenizer.json", "x.gguf"])
def test_what_may_not_be_read_is_said_so(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As root may read everything, opening is refused by hand."""
    if name == "x.gguf":
        (folder / "model.safetensors").rename(folder / name)

    def guarded(of: str) -> Any:
        function = getattr(Path, of)

        def refuse(self: Path, *arguments: Any, **options: Any) -> Any:
            if self == folder / name:
                raise PermissionError(13, "Permission denied", str(self))
            return function(self, *arguments, **options)

        return refuse

    for of in ("open", "iterdir", "read_bytes"):
        monkeypatch.setattr(Path, of, guarded(of))
    assert "cannot be read: permission denied; let the user that the server runs as read it" in refusal(folder)


def test_weights_that_memory_does_not_hold(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: Any, **_options: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1024 bytes")

    change_json("config.json", intermediate_size=2**16)(folder)
    monkeypatch.setattr(transformers.LlamaForCausalLM, "from_pretrained", fail)
    assert "by its config.json its weights take 0.1 GB, more memory than there is: take a smaller" in refusal(folder)


def test_layers_may_share_their_weights() -> None:
    """More layers than weights are no reason to refuse, up to a number that none has."""
    config = {"model_type": "llama", "num_hidden_layers": 48}
    assert wrong_in(config, Stored(20, 10**6)) is None
    assert "20 weights are stored" in str(wrong_in(config | {"num_hidden_layers": 4800}, Stored(20, 10**6)))


def test_ollama_s_store_is_told_by_its_blobs(tmp_path: Path) -> None:
    manifest = {"layers": [{"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:abc"}]}
    written("manifests/registry/library/qwen/0.5b", json.dumps(manifest))(tmp_path)
    written("blobs/sha256-abc", b"GGUF")(tmp_path)
    assert "blobs/sha256-abc is qwen:0.5b" in refusal(tmp_path)


def test_a_folder_above_the_model_names_it(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "hub" / "snapshots" / "1234")
    assert "snapshots/1234" in refusal(tmp_path / "hub")
    assert "1234 inside it has" in refusal(tmp_path / "hub" / "snapshots")


@pytest.mark.parametrize("seed", range(40))
def test_no_folder_ends_in_a_traceback(folder: Path, seed: int) -> None:
    """Random damage: what is loaded passed the check, and what is refused is refused in one line."""
    draw = random.Random(seed)
    for _ in range(draw.choice((1, 1, 2))):
        _damage_at_random(folder, draw)
    refused = None
    try:
        load(folder)
    except ConfigurationError as error:
        refused = str(error)
    assert "\n" not in (refused or "")


STRANGE = (None, 0, -1, 3, 7, 0.5, 1e9, 1e30, 2**40, 10**30, "x", "", [], {}, [1, 2], {"a": 1}, True)


def _damage_at_random(folder: Path, draw: random.Random) -> None:
    name = draw.choice(sorted(file.name for file in folder.iterdir() if file.is_file()))
    content = (folder / name).read_bytes()
    kind = draw.choice(("cut", "flip", "json", "json", "inside", "inside", "header", "rename", "empty", "folder"))
    if kind == "cut":
        cut(name, draw.random())(folder)
    elif kind == "flip" and content:
        flipped = bytearray(content)
        for _ in range(draw.randint(1, 20)):
            flipped[draw.randrange(min(len(flipped), 2000))] = draw.randrange(256)
        (folder / name).write_bytes(flipped)
    elif kind == "inside":
        _change_inside(folder, draw)
    elif kind == "header" and (folder / "model.safetensors").is_file():
        with contextlib.suppress(ValueError):  # damaged already
            in_header(lambda header: _set_inside(header, draw))(folder)
    elif kind == "json":
        with contextlib.suppress(ValueError, OSError):  # damaged already
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(
                json.dumps(config | {draw.choice(sorted(config)): draw.choice(STRANGE)})
            )
    elif kind == "rename":
        (folder / name).rename(folder / f"{name}.old")
    elif kind == "empty":
        (folder / name).write_bytes(b"")
    else:
        (folder / name).unlink()
        (folder / name).mkdir()


def _change_inside(folder: Path, draw: random.Random) -> None:
    """A value anywhere in one of the JSON files, another."""
    file = draw.choice(sorted(file for file in folder.glob("*.json") if file.is_file()) or [folder / "none"])
    with contextlib.suppress(ValueError, OSError):
        content = json.loads(file.read_text())
        _set_inside(content, draw)
        file.write_text(json.dumps(content))


def _set_inside(content: Any, draw: random.Random) -> None:
    place = content
    while isinstance(place, dict | list) and place:
        key = draw.choice(sorted(place)) if isinstance(place, dict) else draw.randrange(len(place))
        if not isinstance(place[key], dict | list) or not place[key] or draw.random() < 0.2:
            place[key] = draw.choice(STRANGE)
            return
        place = place[key]


def test_values_of_a_tokenizer_that_nobody_reads_are_none_of_ours() -> None:
    said = {"add_bos_token": False, "keep_pad_token": True, "bos_token": None, "eos_token": {"content": "</s>"}}
    assert wrong_in_text_file("tokenizer_config.json", said) is None
    assert wrong_in_text_file("tokenizer_config.json", said | {"eos_token": 2}) == (
        "'eos_token' is 2, and it is a token, as text or as an object"
    )
