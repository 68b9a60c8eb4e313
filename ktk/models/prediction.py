"""Layers of multi-token prediction: checkpoints hold them after the model's own, or under ``mtp``;
no model here loads them.

Source: what transformers' classes name in ``_keys_to_ignore_on_load_unexpected``, and the
nextn_predict_layers of GGUF files.
"""

from __future__ import annotations

import re

from ktk.models.families import LAYER_PREFIX

_LAYER = re.compile(rf"{LAYER_PREFIX}\.(?P<layer>\d{{1,9}})\.")
_BLOCK = re.compile(r"blk\.(?P<layer>\d{1,9})\.")
_MTP = re.compile(r"(?:^|\.)mtp(?:_\w+)?\.")


def predicts(name: str, num_layers: int | None) -> bool:
    """Whether a Hugging Face checkpoint's tensor belongs to one.

    num_layers : the config's, None if it does not say.
    """
    return _MTP.search(name) is not None or _is_behind(_LAYER, name, num_layers)


def gguf_predicts(name: str, num_layers: int | None) -> bool:
    """Whether a GGUF file's tensor belongs to one.

    num_layers : block_count without nextn_predict_layers.
    """
    return _is_behind(_BLOCK, name, num_layers)


def _is_behind(pattern: re.Pattern[str], name: str, num_layers: int | None) -> bool:
    found = pattern.match(name)
    return found is not None and num_layers is not None and int(found["layer"]) >= num_layers
