"""What experts are: their spec, activation, formats, layout, and how they are stored."""
