"""What ``names`` says of transformers' insides holds in the release installed; `make test-versions`
runs this with the oldest and the newest.

Release lines: 5.20 to 5.23 (``past_key_values``; attention functions update a batch's cache), from
5.24 on (``cache``; attention modules do).
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
import torch
from transformers import DynamicCache, PreTrainedModel

import ktk
from ktk.integration.transformers import names as hf
from make import transformers_cases as cases

PACKAGE, NAMES = Path(ktk.__file__).parent, Path(hf.__file__)
# Words that mean something elsewhere too: in a config.json, in the documentation of models, in ktk
# itself.
COMMON = {
    "cache",
    "error",
    "generated_tokens",
    "head_dim",
    "input_ids",
    "is_finished",
    "kwargs",
    "logits_to_keep",
    "num_blocks",
    "num_key_value_heads",
    "request_id",
    "state",
    "update",
    "use_cache",
}

IDS = torch.tensor([[5, 6, 7]])


@torch.no_grad()
def layer_arguments(model: PreTrainedModel, **named: Any) -> dict[str, Any]:
    """The keyword arguments that a model's forward hands to its first decoder layer."""
    seen: list[dict[str, Any]] = []
    layer = model.get_decoder().layers[0]
    hook = layer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    model(IDS, use_cache=True, **named)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("family", cases.FAMILIES)
def test_layers_get_the_cache_and_positions_by_the_names_given(family: str) -> None:
    model, cache = cases.make_model(family), DynamicCache()
    named = layer_arguments(model, **{hf.CACHE: cache})
    assert hf.cache_in(named) is cache
    cosines, sines = named[hf.POSITIONS]
    assert cosines.shape == sines.shape
    assert cosines.shape[:2] == IDS.shape


@pytest.mark.filterwarnings("error")
def test_generate_takes_the_cache_by_its_name_without_a_warning() -> None:
    model, cache = cases.make_model("qwen3_moe"), DynamicCache()
    model.generate(IDS, **{hf.CACHE: cache}, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert cache.get_seq_length() == IDS.shape[1] + 2


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_is_found_under_either_name(name: str) -> None:
    cache = DynamicCache()  # empty, and so false
    assert hf.cache_in({name: cache}) is cache
    assert hf.cache_in({"cache": None, "past_key_values": None, name: cache}) is cache
    assert hf.cache_in({"cache": None}) is hf.cache_in({}) is None


def test_a_forward_pass_can_compute_the_last_logits_only() -> None:
    model = cases.make_model("qwen3_moe")
    with torch.no_grad():
        assert model(IDS, **hf.last_logits(model)).logits.shape[1] == 1
    assert hf.last_logits(model.model) == {}


# --- no other module names what is named there ----------------------------------------------------


def words(path: Path) -> set[str]:
    """Keywords, attributes and strings of one word in a file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.keyword | ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
    return {word for word in found if word and word.isidentifier()}


def of_transformers() -> set[str]:
    """Strings that names.py gives transformers, and attributes it reads there, except its own,
    Python's and torch's.
    """
    own = set(hf.__all__) | {name for name in vars(hf) if not name.startswith("__")}
    tree = ast.parse(NAMES.read_text())
    own |= {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in ("self", "torch", "inspect")
    }
    local = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    python = {
        name
        for kind in (dict, list, set, str, tuple, torch.Tensor, torch.nn.Module)
        for name in dir(kind)
    }
    return words(NAMES) - own - python - local - COMMON


def taken_from(path: Path, packages: tuple[str, ...]) -> set[str]:
    """Modules of some packages that a file imports from."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    found = {n.module for n in nodes if isinstance(n, ast.ImportFrom) and not n.level and n.module}
    found |= {alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names}
    return {name for name in found if name.split(".")[0] in packages}


def attributes(path: Path) -> set[str]:
    """Attributes read or called, and keywords given, that are no names of the file's own."""
    tree = ast.parse(path.read_text())
    nodes = list(ast.walk(tree))
    used = {n.attr for n in nodes if isinstance(n, ast.Attribute)}
    used |= {n.arg for n in nodes if isinstance(n, ast.keyword) and n.arg}
    own = {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    own |= {n.arg for n in nodes if isinstance(n, ast.arg)}
    own |= {
        n.target.id
        for n in nodes
        if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
    }
    return {name for name in used - own if not name.startswith("__")}


def submodules(path: Path) -> set[str]:
    """Modules inside transformers that a file imports from."""
    return {name for name in taken_from(path, ("transformers",)) if "." in name}


def test_the_names_are_found() -> None:
    expected = {"past_key_values", "position_embeddings", "cu_seq_lens_q", "logits_indices"}
    expected |= {
        "_attn_implementation",
        "_is_hf_initialized",
        "cache_allocators",
        "logit_processor",
    }
    assert expected <= of_transformers()
    assert "transformers.cache_utils" in submodules(NAMES)


def test_no_other_module_knows_transformers_inside() -> None:
    """What fails here is to be given a name in names.py, or imported from there."""
    files = [path for path in PACKAGE.rglob("*.py") if path != NAMES]
    known = of_transformers()
    found = {str(p.relative_to(PACKAGE)): submodules(p) | (words(p) & known) for p in files}
    assert {file: sorted(names) for file, names in found.items() if names} == {}


# Of the models, tokenizers, caches and managers of transformers: what the adapters of generate/
# read, call and give there.
ADAPTERS = ("batches", "cache", "paged_attention", "paged_cache", "sequence", "tokens")
OF_TRANSFORMERS = {
    "add_request",
    "add_special_tokens",
    "added_tokens_decoder",
    "apply_chat_template",
    "attention_mask",
    "backend_tokenizer",
    "cancel_request",
    "config",
    "convert_ids_to_tokens",
    "crop",
    "do_sample",
    "eos_token_id",
    "from_pretrained",
    "generate",
    "get_input_embeddings",
    "get_seq_length",
    "get_text_config",
    "init_continuous_batching",
    "is_running",
    "logits_processor",
    "max_new_tokens",
    "max_position_embeddings",
    "pad_token_id",
    "skip_special_tokens",
    "streamer",
}
# generate() is also ktk's own, of sessions and engines.
OWN = {"generate"}


def above_the_adapters() -> list[Path]:
    return [
        *PACKAGE.glob("generate/**/*.py"),
        *PACKAGE.glob("kv/**/*.py"),
        PACKAGE / "ops" / "decoder.py",
    ]


def test_the_adapters_are_where_transformers_is_read() -> None:
    folder = NAMES.parent
    read = set().union(
        *(attributes(folder / f"{name}.py") | words(folder / f"{name}.py") for name in ADAPTERS)
    )
    assert OF_TRANSFORMERS - read == set(), "no adapter reads it any more: take it out"


def test_generating_and_caching_know_nothing_of_transformers() -> None:
    """They ask the adapters in integration/transformers,
    and so need no change for a release or another library.
    """
    files = above_the_adapters()
    assert len(files) > 10
    known = (of_transformers() | OF_TRANSFORMERS) - OWN
    found = {
        str(p.relative_to(PACKAGE)): taken_from(p, ("transformers", "tokenizers"))
        | (attributes(p) & known)
        for p in files
    }
    assert {file: sorted(names) for file, names in found.items() if names} == {}
