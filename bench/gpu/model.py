"""A folder with a model of a known shape, its weights drawn, and a tokenizer: what is served where no checkpoint is.

    python -m bench.gpu.model FOLDER --shape llama-3-8b        # 16 GB; drawn on a card where there is one
    python -m bench.gpu.model FOLDER --like OTHER              # of a folder whose weights were left behind

A folder that is there is left as it is: a drawn model is as good as another. The tokenizer of a shape is learnt from
the text that every Python carries; ids of the model beyond its words stand for themselves, <n>.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.shared import options
from bench.shared.shapes import MODELS, ModelShape
from bench.shared.text import reference_text

WORDS = 4096


def make_folder(folder: Path, config: Any, save_tokenizer: Callable[[Path], object]) -> None:
    from transformers import AutoModelForCausalLM

    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(unfinished)
    save_tokenizer(unfinished)
    unfinished.rename(folder)


def make_shape(folder: Path, shape: ModelShape) -> None:
    make_folder(folder, shape.config(), lambda target: tokenizer(shape.vocabulary).save_pretrained(target))


def make_like(folder: Path, other: Path) -> None:
    from transformers import AutoConfig

    def save_tokenizer(target: Path) -> None:
        for file in (*other.glob("token*"), *other.glob("chat_template*"), *other.glob("generation_config*")):
            shutil.copy(file, target)

    make_folder(folder, AutoConfig.from_pretrained(other, trust_remote_code=False), save_tokenizer)


def tokenizer(size: int) -> Any:
    """Byte-level BPE with `size` ids, the last two of which begin and end a text, as in the configs of `ModelShape`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    learning = Tokenizer(models.BPE())
    learning.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learning.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(WORDS, size - 2), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    learning.train_from_iterator(reference_text().split("\n\n"), trainer)
    learnt = json.loads(learning.to_str())
    words = learnt["model"]["vocab"]
    words |= {f"<{number}>": number for number in range(len(words), size - 2)}
    found = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(learnt)), bos_token="<begin>", eos_token="<end>"
    )
    assert len(found) == size, f"{len(found)} ids for a model that has {size}"
    return found


def main(arguments: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser("python -m bench.gpu.model", description=__doc__)
    parser.add_argument("folder", type=Path)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--shape", choices=list(MODELS))
    what.add_argument("--like", type=Path, help="a folder of config.json and a tokenizer")
    asked = parser.parse_args(arguments)
    if asked.folder.is_dir():
        print(f"{asked.folder.name} is there")
        return 0
    asked.folder.parent.mkdir(parents=True, exist_ok=True)
    if asked.like:
        make_like(asked.folder, asked.like)
    else:
        make_shape(asked.folder, MODELS[asked.shape])
    print(f"{asked.folder.name}: {sum(file.stat().st_size for file in asked.folder.iterdir()) / 1e9:.2f} GB")
    return 0


if __name__ == "__main__":
    options.run("gpu.model", main)
