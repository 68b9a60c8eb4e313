"""``experts.E.{w1,w3,w2}`` right under the layer: Mistral Large 3 and its like."""

from ktk.models.families import PerExpert

MISTRAL = PerExpert("mistral", "experts", "w1", "w3", "w2")
