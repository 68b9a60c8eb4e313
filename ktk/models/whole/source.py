"""A GGUF model as the rows of whole models read it."""

from __future__ import annotations

from ktk.models.gguf.config import GgufConfig
from ktk.models.gguf.experts import GgufExperts


class Source(GgufConfig):
    """The metadata's values, checked, which tensors there are, and the experts."""

    def __init__(self, experts: GgufExperts) -> None:
        super().__init__(experts.checkpoint, experts.architecture)
        self.experts = experts

    @property
    def num_layers(self) -> int:
        """Layers of the model; those of multi-token prediction, which come last,
        are not counted.
        """
        count = self.required("block_count") - (self.get("nextn_predict_layers") or 0)
        if not 0 < count <= len(self.checkpoint.tensors):  # none has less than a tensor
            raise self.error(
                f"{self.architecture}.block_count says {count} layers, "
                f"{len(self.checkpoint.tensors)} tensors are there"
            )
        return int(count)

    @property
    def dense_layers(self) -> list[int]:
        """Layers without experts."""
        return [n for n in range(self.num_layers) if n not in self.experts.layers]

    @property
    def leading_dense_layers(self) -> int:
        """How many layers come before the first with experts;
        CheckpointError if others have none.
        """
        dense = self.dense_layers
        if dense != list(range(len(dense))):
            raise self.error(
                f"layers {dense} have no experts: ktk can run that of the first ones only"
            )
        return len(dense)

    def check_all_have_experts(self, model: str) -> None:
        """CheckpointError for a layer without experts, of which ``model`` has none."""
        if dense := self.dense_layers:
            raise self.error(f"layers {dense} have no experts: {model} has them in every layer")

    @property
    def num_experts(self) -> int:
        """Of the first layer with experts."""
        return self.experts.spec(self.experts.layers[0]).num_experts

    @property
    def expert_width(self) -> int:
        """intermediate_size of the experts, the same in every layer. Raises CheckpointError."""
        widths = {self.experts.spec(layer).intermediate_size for layer in self.experts.layers}
        if len(widths) > 1:
            raise self.error(
                f"experts have widths {sorted(widths)} in different layers: must be one"
            )
        return widths.pop()

    @property
    def head_dim(self) -> int:
        """What the metadata says, or as models without the key have it."""
        heads, hidden = self.required("attention.head_count"), self.required("embedding_length")
        return int(self.get("attention.key_length") or hidden // heads)

    def check_rotary(self, rotated: int) -> None:
        """CheckpointError unless all of a head is rotated,
        by a model class that can only do that.
        """
        said = self.get("rope.dimension_count")
        if said is not None and said != rotated:
            raise self.error(
                f"{self.architecture}.rope.dimension_count is {said}: must be the head's size, "
                f"{rotated}"
            )

    def has(self, name: str) -> bool:
        """Whether a tensor is there; of the first layer that has it, if the name has an ``{n}``."""
        return any(name.format(n=n) in self.checkpoint.tensors for n in range(self.num_layers))

    def rows(self, name: str) -> int | None:
        """Rows of the first layer's tensor of that name, or None."""
        for n in range(self.num_layers):
            if tensor := self.checkpoint.tensors.get(name.format(n=n)):
                return tensor.shape[0]
        return None
