"""config.json and the index of shards, wrong on purpose."""

from __future__ import annotations

import json
from typing import Any

from tests.support.hostile.common import Bad

_FLAVORS: dict[str, Any] = {
    "backbone_flavor": "tiny-backbone",
    "decoder_flavor": "tiny-decoder",
    "text_vocab_size": 512,
    "audio_vocab_size": 35,
    "audio_num_codebooks": 32,
}

_STACK: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 160,
}

_SIZES: dict[str, Any] = {"text_vocab_size": 512, "vocab_size": 35, "num_codebooks": 32}


def config(**changes: Any) -> bytes:
    """Return a config.json of the first edition, with changes."""
    return json.dumps(_FLAVORS | changes).encode()


def config_of_layers(**changes: Any) -> bytes:
    """Return a config.json in transformers' layout, with changes to both stacks."""
    stack = _STACK | changes
    return json.dumps(stack | _SIZES | {"depth_decoder_config": stack}).encode()


BAD_CONFIGS: Bad = {
    "empty": (b"", "JSON"),
    "not_json": (b"Access to model sesame/csm-1b is restricted.", "JSON"),
    "not_utf8": (b'{"\xff": 1}', "JSON"),
    "a_list": (b"[]", "a JSON object"),
    "nested_deep": (b"[" * 500_000, "RecursionError"),
    "number_of_5_000_digits": (b'{"a": ' + b"9" * 5_000 + b"}", "JSON"),
    "keys_missing": (b"{}", "no such key"),
    "flavor_unknown": (config(backbone_flavor="llama-\x1b[2J"), "known are"),
    "flavor_is_a_list": (config(backbone_flavor=[]), "dimensions of a CSM network"),
    "vocabulary_of_2_to_the_63": (config(text_vocab_size=1 << 63), "not an integer from 1"),
    "vocabulary_negative": (config(text_vocab_size=-1), "not an integer from 1"),
    "vocabulary_of_a_bool": (config(text_vocab_size=True), "not an integer from 1"),
    "vocabulary_is_infinite": (config(text_vocab_size=float("inf")), "not an integer from 1"),
    "codebooks_none": (config(audio_num_codebooks=1), "fewer than 2 codebooks"),
    "heads_none": (config_of_layers(num_attention_heads=0), "not an integer from 1"),
    "heads_do_not_divide": (config_of_layers(num_attention_heads=3), "3 heads"),
    "layers_by_the_million": (config_of_layers(num_hidden_layers=1 << 24), "not an integer from 1"),
    "decoder_is_text": (
        json.dumps(_STACK | _SIZES | {"depth_decoder_config": "x"}).encode(),
        "dimensions of a CSM network",
    ),
}

BAD_INDEXES: Bad = {
    "empty": (b"", "a weight_map"),
    "a_list": (b"[]", "a weight_map"),
    "nested_deep": (b"[" * 500_000, "a weight_map"),
    "map_is_a_list": (b'{"weight_map": []}', "a weight_map"),
    "map_of_lists": (b'{"weight_map": {"a": []}}', "a weight_map"),
    "map_of_numbers": (b'{"weight_map": {"a": 1}}', "a weight_map"),
    "no_shards": (b'{"weight_map": {}}', "1 to 200 shards"),
    "shard_climbs_out": (
        b'{"weight_map": {"a": "../model-00001-of-00001.safetensors"}}',
        "a weight_map",
    ),
    "shard_absolute": (
        b'{"weight_map": {"a": "/etc/model-00001-of-00001.safetensors"}}',
        "a weight_map",
    ),
    "shard_of_another_kind": (b'{"weight_map": {"a": "pytorch_model.bin"}}', "a weight_map"),
    "shards_by_the_thousand": (
        json.dumps(
            {"weight_map": {f"{i}": f"m-{i:05}-of-09999.safetensors" for i in range(9_999)}}
        ).encode(),
        "1 to 200 shards",
    ),
}
