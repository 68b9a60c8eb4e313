"""What can be compared: a format, who quantised it, and how."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from ktk import backends
from ktk.checkpoint import is_gguf
from ktk.convert.recipe import Recipe
from ktk.experts.formats import BLOCKS, PANELS
from ktk.experts.formats.decode import IK_TYPES
from ktk.paths import user_path

OWN_TYPES = tuple(row.name for row in BLOCKS.values() if row.grid is not None)


@dataclass(frozen=True)
class Variant:
    """One way to code the experts.

    format : a name of PANELS or of a GGUF type. group_size : of packed formats, None: the default.
    by : "ktk", "ggml" (llama.cpp's quantiser, GGUF types only), or a path, of a converted directory
        or a GGUF file.
    recipe : of each layer and projection; format is then its file's path.
    is_calibrated : with error feedback (ktk) or an importance matrix (ggml), from a calibration
        text.
    """

    format: str
    group_size: int | None = None
    by: str = "ktk"
    is_calibrated: bool = False
    recipe: Recipe | None = None

    @property
    def is_packed(self) -> bool:
        """Whether the experts lie in panels."""
        return self.format in PANELS if self.recipe is None else self.recipe.is_packed

    @property
    def label(self) -> str:
        if self.by not in ("ktk", "ggml"):
            return self.by
        group = (
            ""
            if self.group_size is None
            else f" g{self.group_size}"
            if self.group_size
            else " channel"
        )
        theirs = ", ik_llama.cpp" if self.format in IK_TYPES else ", llama.cpp"
        who = {"ktk": "", "ggml": theirs}[self.by]
        how = {"ktk": ", calibrated", "ggml": ", imatrix"}[self.by] if self.is_calibrated else ""
        return f"{self.format}{group}{who}{how}"

    @classmethod
    def parse(cls, text: str) -> Variant:
        """``int4:64``, ``int8``, ``Q4_K``, ``Q4_K:ggml``, or the path of a converted directory, a
        GGUF file or a recipe.

        Raises ValueError that lists what there is.
        """
        if text.startswith("~"):
            text = str(user_path(text))
        path = Path(text)
        if path.is_file() and not is_gguf(path):
            return cls(text, recipe=Recipe.read(path))
        if path.exists():
            return cls(text, by=text)
        method = backends.parse_method(text)
        fmt = method.format
        if fmt is None or method.is_repacked:
            raise ValueError(f"format {text!r}: must name a format, or be a path")
        if fmt.is_packed:
            group = method.group_size
            if group is None and fmt.is_integer:
                group = fmt.default_group
            return cls(fmt.name, group)
        if method.by == "ktk" and fmt.grid is None:
            raise ValueError(
                f"format {text!r}: ktk quantises to {', '.join(OWN_TYPES)}; llama.cpp to the "
                f"rest, as {fmt.name}:ggml"
            )
        return cls(fmt.name, by=method.by)

    def calibrated(self) -> Variant | None:
        """The same calibrated, if it can be."""
        is_exact = self.format in PANELS and not PANELS[self.format].is_integer
        if self.by == "ktk" and not is_exact:
            return dataclasses.replace(self, is_calibrated=True)
        is_rounded = self.by == "ggml" and self.format not in ("F32", "F16", "BF16")
        return dataclasses.replace(self, is_calibrated=True) if is_rounded else None


def all_variants(has_ggml: bool) -> list[Variant]:
    """Every packed integer format and group, every GGUF type ktk writes,
    and with llama.cpp's library every type it writes.
    """
    packed = [Variant(f.name, g) for f in PANELS.values() if f.is_integer for g in f.group_sizes]
    own = [Variant(name) for name in OWN_TYPES]
    others = {"F32", "F16", "BF16", *IK_TYPES}
    theirs = [Variant(name, by="ggml") for name in BLOCKS if name not in others]
    return packed + own + (theirs if has_ggml else [])
