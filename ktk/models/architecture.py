"""What ktk knows of one architecture: everything, in one value.

``ktk.models.arch`` is the table.
"""

from __future__ import annotations

from dataclasses import dataclass

from ktk.experts.activation import Activation
from ktk.models.families import Family
from ktk.models.gguf.architecture import GgufArchitecture
from ktk.models.whole.rows import WholeModel
from ktk.models.whole.tokenizer import PreTokenizer


@dataclass(frozen=True)
class Architecture:
    """One architecture; what is not given is unknown, or as most have it.

    model_types : config.json's names for it, the first of them for a model that a GGUF file holds.
    families : styles that its experts' tensors are named in.
    activation : the experts', where a file does not say; that of gpt-oss also where config.json
        says silu.
    refused : why its experts, in a Hugging Face directory, are not what their names say.
    stacks_biases : biases of stacked experts lie as the rows of their matrices do.
    gguf : in GGUF files, the experts. whole : and all the rest of the model.
    pre_tokenizers : ways to cut text that its own models alone have.
    """

    model_types: tuple[str, ...] = ()
    families: tuple[Family, ...] = ()
    activation: Activation = Activation.silu()  # noqa: RUF009 (frozen)
    refused: str = ""
    stacks_biases: bool = False
    gguf: GgufArchitecture | None = None
    whole: WholeModel | None = None
    pre_tokenizers: tuple[PreTokenizer, ...] = ()
