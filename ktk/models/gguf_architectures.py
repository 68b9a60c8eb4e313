"""What the architectures of GGUF files imply for their experts; one row each.

Source: the graphs that llama.cpp builds for them, gguf.constants.MODEL_TENSORS for which have experts at all.
"""

from __future__ import annotations

from dataclasses import dataclass

from ktk.experts.activation import Activation

_SILU = Activation.silu()


@dataclass(frozen=True)
class Architecture:
    """What ``general.architecture`` implies and the metadata does not say.

    gating, is_normalised : the router's, where the file is silent; None = unknown.
    weighs_input : routing weights multiply the experts' input. is_gateless : there is no gate projection.
    clamps_swiglu : {arch}.swiglu_clamp_exp bounds gate from above and up on both sides, before the SiLU.
    refused : why ktk does not run it.
    """

    name: str
    activation: Activation = _SILU
    gating: str | None = "softmax"
    is_normalised: bool | None = True
    weighs_input: bool = False
    is_gateless: bool = False
    clamps_swiglu: bool = False
    refused: str = ""


# Commonest first. Kimi-K2 files say deepseek2, Mixtral's llama, Grok-1 and -2's grok.
ARCHITECTURES: dict[str, Architecture] = {
    row.name: row
    for row in (
        Architecture("qwen3moe"),
        Architecture("deepseek2", is_normalised=False),
        Architecture("llama"),
        Architecture("gpt-oss", Activation.swigluoai(), "softmax_of_top_k", is_normalised=False),
        Architecture("glm4moe", gating="sigmoid", is_normalised=None),
        Architecture("qwen3next"),
        Architecture("qwen2moe", is_normalised=False),
        Architecture("minimax-m2", gating="sigmoid"),
        Architecture("llama4", gating="sigmoid", is_normalised=False, weighs_input=True),
        Architecture("olmoe", is_normalised=False),
        Architecture("granitemoe"),
        Architecture("granitehybrid"),
        Architecture("qwen3vlmoe"),
        Architecture("qwen35moe"),
        Architecture("gemma4", Activation.gelu_tanh()),
        Architecture("grok", Activation.gelu_tanh()),
        Architecture("nemotron_h_moe", Activation.relu2(), None, None, is_gateless=True),
        Architecture(
            "nomic-bert-moe", Activation.gelu_tanh(), is_normalised=False, is_gateless=True
        ),
        Architecture("minimax-m3", Activation.swigluoai(), None, None),
        Architecture("deepseek4", gating=None, is_normalised=None, clamps_swiglu=True),
        Architecture("deepseek32", gating=None, is_normalised=None),
        Architecture("deepseek", is_normalised=False),
        Architecture("deepseek2-ocr", is_normalised=None),
        Architecture("glm-dsa", gating=None, is_normalised=None),
        Architecture("kimi-linear", gating=None, is_normalised=None),
        Architecture("dots1", gating=None, is_normalised=None),
        Architecture("bailingmoe", is_normalised=None),
        Architecture("bailingmoe2", gating=None, is_normalised=None),
        Architecture("ernie4_5-moe"),
        Architecture("hunyuan-moe"),
        Architecture("lfm2moe", gating=None, is_normalised=None),
        Architecture("exaone-moe", gating=None, is_normalised=None),
        Architecture("afmoe", gating=None, is_normalised=None),
        Architecture("mimo2", gating="sigmoid"),
        Architecture("mistral3", gating=None, is_normalised=None),
        Architecture("mistral4", gating=None, is_normalised=None),
        Architecture("cohere2moe", gating=None, is_normalised=None),
        Architecture("phimoe"),
        Architecture("dbrx"),
        Architecture("arctic"),
        Architecture("jamba", is_normalised=False),
        Architecture("llada-moe", is_normalised=False),
        Architecture("rnd1"),
        Architecture("minicpm", is_normalised=None),
        Architecture("smallthinker", refused="its experts use ReLU, which ktk has no kernel for"),
        Architecture("grovemoe", refused="its chunk experts add to each expert's output"),
        Architecture("step35", refused="its clamp differs by layer and follows the SiLU"),
    )
}
