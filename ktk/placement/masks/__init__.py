"""Which experts of each layer a GPU holds: masks, strategies that make them, their worth."""
