"""The metadata of a GGUF model by what a value means; every value is checked when asked for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ktk.checkpoint.gguf import GgufCheckpoint
from ktk.errors import CheckpointError
from ktk.models.metadata import MAX_LIST, MAX_SIZE

MAX_COUNT = 1 << 31


class GgufConfig:
    """Key-values of one file's model; keys are given without the architecture before them.

    All raise CheckpointError.
    """

    def __init__(self, checkpoint: GgufCheckpoint, architecture: str) -> None:
        self.checkpoint, self.architecture = checkpoint, architecture

    def key(self, name: str) -> str:
        """As the file has it: with the architecture before it, unless it is the tokenizer's."""
        return name if name.startswith("tokenizer.") else f"{self.architecture}.{name}"

    def entry(self, name: str, layer: int = 0) -> Any:
        """A value, or the layer's entry of a list; None if there is no such key."""
        key, metadata = self.key(name), self.checkpoint.metadata
        if key not in metadata:
            return None
        length = metadata.size(key)
        if length is None:
            return metadata[key]
        if length > MAX_LIST or layer >= length:
            raise self.error(
                f"{key} lists {length} layers: must be more than {layer}, at most {MAX_LIST}"
            )
        return metadata[key][layer]

    def number(self, name: str, layer: int = 0) -> float | None:
        """A finite number; None if there is no such key."""
        value = self.entry(name, layer)
        if value is None:
            return None
        if type(value) not in (int, float) or not abs(value) < 1e30:  # NaN is not either
            raise self.error(f"{self.key(name)} is {value!r:.80}: must be a number")
        return float(value)

    def size(self, name: str, layer: int = 0) -> int | None:
        """A positive int, or the layer's entry of a list of them;
        None if there is no such key or it is 0.
        """
        value = self.entry(name, layer)
        if value is not None and (type(value) is not int or not 0 <= value <= MAX_SIZE):
            raise self.error(
                f"{self.key(name)} is {value!r:.80}: must be an int of 0 to {MAX_SIZE}"
            )
        return value or None

    @property
    def num_predicting(self) -> int:
        """Layers of multi-token prediction, which come last."""
        return self.size("nextn_predict_layers") or 0

    def get(self, name: str, kind: type = int) -> Any:
        """An int, float, bool or text, or None. A list has to say the same of every layer."""
        full, metadata = self.key(name), self.checkpoint.metadata
        if full not in metadata:
            return None
        length = metadata.size(full)
        if length is None:
            value = metadata[full]
        elif 0 < length <= MAX_LIST:
            values = metadata[full]
            value = values[0]
            if any(other != value for other in values):
                raise self.error(f"{full} differs between layers: ktk cannot run that")
        else:
            raise self.error(f"{full} lists {length} layers: must be 1 to {MAX_LIST}")
        if kind is bool and type(value) is bool:
            return value
        if kind is str and isinstance(value, str):
            return value
        if kind is float and type(value) in (int, float) and abs(value) < 1e30:
            return float(value)
        if kind is int and type(value) is int and 0 <= value < MAX_COUNT:
            return value
        raise self.error(f"{full} is {value!r:.80}: must be of type {kind.__name__}")

    def required(self, name: str, kind: type = int) -> Any:
        """The same, of a key that must be there; an int must not be 0."""
        value = self.get(name, kind)
        if value is None or (kind is int and value == 0):
            raise self.error(f"{self.architecture}.{name} is {value}: the model's config needs it")
        return value

    def agree(self, where: str, names: Iterable[str], layer: int, what: str, have: int) -> None:
        """CheckpointError unless the first of ``names`` that is there says what the tensors
        have.
        """
        for name in names:
            said = self.size(name, layer)
            if said is not None:
                if said != have:
                    raise CheckpointError(
                        f"{where}: the tensors have {what} {have}, the metadata's "
                        f"{self.key(name)} is {said}: "
                        "the file contradicts itself; convert it again"
                    )
                return

    def error(self, text: str) -> CheckpointError:
        """An error about this file."""
        return CheckpointError(f"{self.checkpoint.path}: {text}")
