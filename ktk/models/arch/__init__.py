"""Which architectures ktk knows."""

from ktk.models.arch.deepseek import DEEPSEEK
from ktk.models.arch.ffn import FFN
from ktk.models.arch.fused import FUSED
from ktk.models.arch.gpt_oss import GPT_OSS
from ktk.models.arch.granite import GRANITE
from ktk.models.arch.jamba import JAMBA
from ktk.models.arch.lfm2 import LFM2
from ktk.models.arch.mistral import MISTRAL
from ktk.models.arch.mixtral import MIXTRAL
from ktk.models.arch.nemotron_h import NEMOTRON_H
from ktk.models.families import Family

# Tried in this order, commonest first; a checkpoint must match exactly one.
FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        DEEPSEEK,
        MIXTRAL,
        FUSED,
        GPT_OSS,
        MISTRAL,
        FFN,
        JAMBA,
        LFM2,
        NEMOTRON_H,
        GRANITE,
    )
}
