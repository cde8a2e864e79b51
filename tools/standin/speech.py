"""The tokenizer and the audio codec of csm-tiny: a token a byte, and a Mimi of random weights.

`python -m tools.standin.speech` writes both as chunk files and the manifest mimi-tiny.toml.
The numbers depend on torch's random generator; those in the repository are torch 2.13.0's.
What csm-tiny says by them is noise, of the right length.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from csm_weights.commands.split import split_file, write_chunk_list
from csm_weights.manifest.types import Artifact, Manifest
from csm_weights.model.tokenizer import BOS, EOS
from csm_weights.store.manifest_file import write_manifest

NAME, CHUNKS = "mimi-tiny", "chunks/mimi-tiny"

#: A Mimi that costs next to nothing, with the 1,920 samples a frame of the real one.
CONFIG = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "num_filters": 4,
    "codebook_size": 64,
    "codebook_dim": 4,
    "vector_quantization_hidden_dimension": 4,
    "upsample_groups": 8,
    "num_quantizers": 32,
}

#: The codes that csm-tiny has; no sound gets another one.
CODES = 35


def byte_tokenizer() -> Tokenizer:
    """Return a tokenizer with a token for each byte, and Llama's BOS and EOS after them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: number for number, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.add_special_tokens([BOS, EOS])  # after the bytes: 256 and 257
    return tokenizer


def write_codec(folder: Path) -> None:
    """Write config.json and model.safetensors of a Mimi with random weights."""
    from transformers import MimiConfig, MimiModel

    torch.manual_seed(1)
    mimi = MimiModel(MimiConfig(**CONFIG)).eval()
    for name, values in mimi.named_buffers():
        if name.endswith("embed_sum"):
            # In a new model all are zeros, and any code would sound alike.
            values.normal_(std=0.003)
            values[CODES:] = 1000
    mimi.save_pretrained(folder)


def make_speech(root: Path) -> None:
    """Write the chunk files and the manifest below `root`."""
    (root / CHUNKS).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        write_codec(Path(folder))
        byte_tokenizer().save(f"{folder}/tokenizer.json")
        artifacts = [
            _artifact(root, Path(folder) / name, group)
            for name, group in (
                ("config.json", "config"),
                ("model.safetensors", "safetensors"),
                ("tokenizer.json", "tokenizer"),
            )
        ]
    manifest = Manifest(
        name=NAME,
        description="A tokenizer and a codec like Mimi for csm-tiny, with random weights.",
        staging=f"output/{NAME}",
        destination=f"models/{NAME}",
        artifacts=tuple(artifacts),
        default=("all",),
    )
    write_manifest(root / "manifests" / f"{NAME}.toml", manifest)


def _artifact(root: Path, file: Path, group: str) -> Artifact:
    chunks = f"{CHUNKS}/{group}"
    shutil.rmtree(root / chunks, ignore_errors=True)
    made = replace(split_file(file, root, chunks, 1 << 20, lambda _: None), group=group)
    made = replace(made, format=made.format if made.is_weights else "opaque")
    write_chunk_list(root, made)
    return made


if __name__ == "__main__":
    make_speech(Path.cwd())
