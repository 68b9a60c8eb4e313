"""``mixer.experts.E.{up,down}_proj``: Nemotron-H, without a gate projection; hidden_size may be a latent one."""

from ktk.models.families import PerExpert

NEMOTRON_H = PerExpert("nemotron_h", r"mixer\.experts", None, "up_proj", "down_proj", "relu2")
