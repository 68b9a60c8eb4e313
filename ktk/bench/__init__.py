"""Speed of one MoE layer, beside the ceilings of the machine measured in the same run."""
