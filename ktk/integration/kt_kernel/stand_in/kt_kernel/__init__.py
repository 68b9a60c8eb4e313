"""The names that SGLang imports from kt_kernel, as ktk has them.

Without ``kt_kernel_ext`` and ``sft``: what asks for them finds an ImportError, and takes its other
way or says so.
"""

from __future__ import annotations

from ktk import __version__
from ktk.integration.kt_kernel.wrapper import KTMoEWrapper
from ktk.placement.masks.strategies import generate_gpu_experts_masks

__all__ = ["KTMoEWrapper", "__version__", "generate_gpu_experts_masks"]
