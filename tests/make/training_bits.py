"""A training step through KTMoEWrapper and one through transformers, in a process of its own, whose
number of threads its environment says.
"""

from __future__ import annotations

from pathlib import Path

import torch

import ktk
import ktk.train
from ktk.integration.transformers import use_ktk
from ktk.integration.transformers.experts import find_experts, handle_of
from make.sft_rank import call, layer
from make.transformers_cases import make_model, prompt


def run(path: str) -> None:
    """Write what the two steps give: outputs and all gradients, and the threads that ran."""
    wrapper, buffers = layer()
    hidden, ids, weights, grad = (torch.cat([part] * 12) for part in call(0))
    out = wrapper.forward(hidden, ids, weights)
    found = {"out": out, "threads": torch.tensor(wrapper.moe.num_threads)}
    found["hidden"], found["weights"] = wrapper.backward(grad)
    found |= {f"buffer {at}": buffer for at, buffer in enumerate(buffers)}
    model = make_model("qwen3_moe")
    use_ktk(model, "int4")
    parameters = ktk.train.add_expert_lora(model, 4, 8, dropout=0.1)
    with torch.no_grad():
        for matrix in parameters:
            matrix.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    model.train()
    loss = model(prompt(), labels=prompt()).loss
    loss.backward()
    found["loss"] = loss.detach()
    trained = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(trained) > len(parameters)  # routers and attention, too
    assert all(handle_of(module) is not None for _, module in find_experts(model))
    torch.save(found | trained, Path(path))
