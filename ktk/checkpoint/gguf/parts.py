"""The files of one GGUF model: a file, the parts of a split one, or what lies in a directory."""

from __future__ import annotations

import os
from pathlib import Path

from ktk.checkpoint.gguf.header import PART, Header
from ktk.checkpoint.mapping import MappedFile
from ktk.errors import CheckpointError
from ktk.log import logger


def file_parts(path: Path) -> list[Header]:
    """The headers of the model that ``path`` is, or is a part of."""
    header = Header(MappedFile(path))
    _, count = header.part()
    if count == 1:
        return [header]
    named = PART.fullmatch(path.name)
    if named is None or int(named["parts"]) != count:
        raise CheckpointError(
            f"{path}: is one of {count} parts, but its name does not tell the others': must end in "
            f"-00001-of-{count:05d}.gguf; rename it, or give its directory"
        )
    siblings = [
        path.with_name(f"{named['stem']}-{i + 1:05d}-of-{count:05d}.gguf") for i in range(count)
    ]
    present = _names(path.parent)
    absent = [sibling.name for sibling in siblings if sibling.name not in present]
    if absent:
        raise CheckpointError(_missing(path, count, absent))
    return _ordered(
        path,
        [header if sibling == path else Header(MappedFile(sibling)) for sibling in siblings],
        count,
    )


def directory_parts(path: Path) -> list[Header]:
    """The headers of the one model in a directory."""
    names = sorted(n for n in _names(path) if n.lower().endswith(".gguf") and n[0] != ".")
    if not names:
        raise CheckpointError(f"{path}: holds no .gguf file")
    models: dict[str, list[Header]] = {}
    beside: list[str] = []
    for name in names:
        header = Header(MappedFile(path / name))
        named = PART.fullmatch(name)
        _, count = header.part()
        model = named["stem"] if named else name if count == 1 else f"{count} parts"
        if len(names) > 1 and not header.is_model:
            beside.append(name)
        else:
            models.setdefault(model, []).append(header)
    if len(models) != 1:
        raise CheckpointError(
            (
                f"{path}: holds {len(models)} models ({', '.join(list(models)[:8])}): must be "
                "one; name the file"
            )
            if models
            else f"{path}: holds no model, only {', '.join(beside[:8])}"
        )
    if beside:
        logger.info("%s: %s left out: no language model", path, ", ".join(beside[:8]))
    ((model, headers),) = models.items()
    count = max(header.part()[1] for header in headers)
    if count > 1:
        numbers = {header.part()[0] for header in headers}
        stem = model if PART.fullmatch(headers[0].path.name) else "part"
        absent = [
            f"{stem}-{i + 1:05d}-of-{count:05d}.gguf" for i in range(count) if i not in numbers
        ]
        if absent:
            raise CheckpointError(_missing(path, count, absent))
    return _ordered(path, headers, count)


def _missing(path: Path, count: int, absent: list[str]) -> str:
    listed = ", ".join(absent[:8]) + (", ..." if len(absent) > 8 else "")
    return f"{path}: {len(absent)} of {count} parts are missing: {listed}; finish the download"


def _ordered(path: Path, headers: list[Header], count: int) -> list[Header]:
    """Parts in their order; CheckpointError if they are not 0 to count - 1, each once."""
    seen: dict[int, Header] = {}
    for header in headers:
        number, parts = header.part()
        if parts != count:
            raise CheckpointError(
                f"{header.path}: is part {number + 1} of {parts}, another file beside it is of "
                f"{count} parts: "
                "parts of different splits"
            )
        if number in seen:
            raise CheckpointError(
                f"{path}: {seen[number].path.name} and {header.path.name} are both part "
                f"{number + 1} of {count}"
            )
        seen[number] = header
    return [seen[number] for number in sorted(seen)]


def _names(path: Path) -> set[str]:
    try:
        return set(os.listdir(path))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be listed: {error.strerror}") from None
