"""Checkpoints to packed directories and GGUF files: ``convert`` chooses by the output's name."""

from ktk.convert.run import Progress, Summary, convert

__all__ = ["Progress", "Summary", "convert"]
