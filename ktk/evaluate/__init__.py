"""How far a model with quantised experts is from itself unquantised: perplexity, KL, top-1."""
