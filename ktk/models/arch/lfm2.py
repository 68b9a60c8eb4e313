"""``feed_forward.experts.E.{w1,w3,w2}``: LFM2-MoE, whose config names no activation: SiLU."""

from ktk.models.families import PerExpert

LFM2 = PerExpert("lfm2", r"feed_forward\.experts", "w1", "w3", "w2")
