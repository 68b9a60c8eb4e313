"""What a user may ask of ``--quantization ktk``, and where it is said.

Of a model's config.json (``quantization_config``, which ``--hf-overrides`` can add) and of vLLM's
``--additional-config '{"ktk": {...}}'`` the second wins.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ktk import backends
from ktk.experts.rotation import Rotation
from ktk.experts.spec import MoESpec

# Read from config.json beside the options; the second says that experts lie packed.
_SAID_BESIDE = ("quant_method", "layout_version")
_DEFAULT_FORMAT = "int8"


@dataclass(frozen=True)
class Options:
    """How experts are packed and run.

    weight_format, group_size, activation_group, rotation : as in ``ktk.MoESpec``; weight_format
        None is the method's, else int8. They do not count where experts lie packed.
    method : as in ``ktk.MoE``. num_threads : None takes KTK_NUM_THREADS, else as many as torch has.
    is_packed : a directory that ``ktk convert`` or ``save_pretrained`` wrote.
    """

    weight_format: str | None = None
    group_size: int | None = None
    activation_group: int | None = None
    rotation: Rotation | None = None
    method: str = "auto"
    num_threads: int | None = None
    is_packed: bool = False

    @classmethod
    def of(cls, said: Mapping[str, Any], over: Mapping[str, Any] | None = None) -> Options:
        """Of config.json's quantization_config and, over it, of additional_config's "ktk".

        Raises ValueError for what is unknown or cannot be.
        """
        over = {} if over is None else over
        if not isinstance(over, Mapping):
            raise ValueError(f"additional_config['ktk'] is {over!r}: must be an object of options")
        is_packed = "layout_version" in said
        known = {field.name for field in dataclasses.fields(cls)} - {"is_packed"}
        given = {name: said[name] for name in said if name not in _SAID_BESIDE}
        if is_packed:  # what else it says is the packed files' own
            given = {name: value for name, value in given.items() if name == "method"}
        given |= over
        if unknown := sorted(set(given) - known):
            raise ValueError(
                f"quantization ktk has no option {', '.join(unknown)}: it takes "
                f"{', '.join(sorted(known))}"
            )
        rotation = given.get("rotation")
        threads = given.get("num_threads")
        if threads is not None and (type(threads) is not int or threads < 1):
            raise ValueError(f"num_threads={threads!r}: must be an int of at least 1")
        method = backends.check_method(given.get("method", "auto"), given.get("weight_format"))
        asked = given | {"method": method}
        asked["rotation"] = None if rotation is None else Rotation.of(rotation)
        options = cls(**asked, is_packed=is_packed)
        if not is_packed:
            options.spec(1, 128, 128)  # for its checks; 128 is a multiple of every group
        return options

    def spec(
        self, num_experts: int, hidden_size: int, intermediate_size: int, **fields: Any
    ) -> MoESpec:
        """A layer's; ``fields`` are the rest of MoESpec's. Raises ValueError."""
        return MoESpec(
            num_experts,
            hidden_size,
            intermediate_size,
            self.weight_format or backends.method_format(self.method) or _DEFAULT_FORMAT,
            self.group_size,
            self.activation_group,
            rotation=self.rotation,
            **fields,
        )
