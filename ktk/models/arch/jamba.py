"""``feed_forward.experts.E.{gate,up,down}_proj``: Jamba; layers without an expert index are dense."""

from ktk.models.families import PerExpert

JAMBA = PerExpert("jamba", r"feed_forward\.experts", "gate_proj", "up_proj", "down_proj")
