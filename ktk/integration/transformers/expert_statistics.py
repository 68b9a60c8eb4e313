"""How often a model's experts are used while it runs, for ``ktk.placement.masks``.

While it records, listeners hang on the experts modules; of a new token that passes a decoder layer
in one native call, that call leaves its experts' numbers in the recorder's row of the layer. The
module that holds the layers tells when a pass begins and ends. While it does not, nothing hangs
anywhere.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ktk.integration.transformers.decoder_layers import FusedForward, decoder_layers
from ktk.integration.transformers.experts import find_experts, handle_of, listen
from ktk.integration.transformers.model_grid import holder_of_layers, model_grid, said
from ktk.integration.transformers.sources import layer_of
from ktk.models.config import TOP_K_KEYS
from ktk.placement.masks.files import recorder_directory
from ktk.placement.masks.recorder import ExpertRecorder


class ExpertStatistics:
    """Records a model's experts, in a mode of ``ktk.placement.masks.recorder.MODES``.

    model : its experts run on ktk, or it is ValueError. To be made once decoder layers are fused.
    recorder : what was recorded.
    """

    def __init__(self, model: torch.nn.Module, mode: str = "stat") -> None:
        modules = dict(find_experts(model))
        handles = [handle_of(module) for module in modules.values()]
        packed = [handle.moe.spec for handle in handles if handle is not None]
        if not packed or len(packed) < len(handles):
            raise ValueError(
                f"{type(model).__name__}: {len(packed)} of {len(handles)} experts modules run on "
                "ktk: all must, and one at least"
            )
        self._modules = {layer_of(name): module for name, module in modules.items()}
        self._fused = {
            layer_of(name): module.forward
            for name, module in decoder_layers(model)
            if isinstance(module.forward, FusedForward) and module.forward.top_k
        }
        self._owner = holder_of_layers(model, next(iter(modules)))
        grid = model_grid(model, self._modules, max(spec.num_experts for spec in packed))
        config = getattr(model, "config", None)
        widest = [said(config, TOP_K_KEYS), *(fused.top_k for fused in self._fused.values())]
        self.recorder = ExpertRecorder(grid, min(max(1, *widest), grid.num_experts), mode)
        self._hooks: list[Any] = []

    def start(self) -> None:
        """Record from the next forward pass on; what was recorded before is dropped."""
        self.recorder.start()
        if self._hooks:
            return
        for row, layer in enumerate(self.recorder.grid.moe_layers):
            listen(self._modules[layer], self._note(row))
            if layer in self._fused:
                note = functools.partial(self.recorder.note, row)
                self._fused[layer].leave_chosen(self.recorder.chosen[row], note)
        self._hooks = [
            self._owner.register_forward_pre_hook(lambda *_: self.recorder.begin_pass()),
            self._owner.register_forward_hook(lambda *_: self.recorder.end_pass()),
        ]

    def stop(self) -> None:
        """Record no more; what was recorded stays for ``dump``."""
        self.recorder.stop()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for module in self._modules.values():
            listen(module, None)
        for fused in self._fused.values():
            fused.leave_chosen(None)

    def dump(self, directory: Path | None = None) -> Path:
        """Write what was recorded to a new file in ``directory``, by default that of
        SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR or /tmp, and start from nothing. ValueError if there
        was no pass.
        """
        return self.recorder.dump(recorder_directory() if directory is None else directory)

    def _note(self, row: int) -> Callable[[torch.Tensor, torch.Tensor], None]:
        def take(ids: torch.Tensor, _weights: torch.Tensor) -> None:
            self.recorder.note(row, ids.detach().cpu().numpy())

        return take
