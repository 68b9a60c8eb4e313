"""What an architecture's name implies for the experts of a GGUF file,
where its metadata does not say it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GgufArchitecture:
    """What ``general.architecture`` implies; the activation stands with the ``Architecture`` that
    this belongs to.

    gating, is_normalised : the router's, where the file is silent; None = unknown.
    weighs_input : routing weights multiply the experts' input. is_gateless : there is no gate
        projection.
    clamps_swiglu : {arch}.swiglu_clamp_exp bounds gate from above and up on both sides, before the
        SiLU.
    refused : why ktk does not run it.
    Source: the graphs that llama.cpp builds, gguf.constants.MODEL_TENSORS for which have experts at
    all.
    """

    name: str
    gating: str | None = "softmax"
    is_normalised: bool | None = True
    weighs_input: bool = False
    is_gateless: bool = False
    clamps_swiglu: bool = False
    refused: str = ""
