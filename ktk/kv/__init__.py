"""Keys and values: how they lie, how they grow, and what memory they take."""
