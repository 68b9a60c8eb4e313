"""ktk inside other projects: one module or package each, imported by the user who wants it."""
