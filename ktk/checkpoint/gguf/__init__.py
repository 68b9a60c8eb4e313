"""GGUF files, single or split, read as hostile bytes; tensors are views of the mapped file."""

from ktk.checkpoint.gguf.checkpoint import GgufCheckpoint
from ktk.checkpoint.gguf.header import GgufTensor, Metadata

__all__ = ["GgufCheckpoint", "GgufTensor", "Metadata"]
