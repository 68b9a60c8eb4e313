"""Models in GGUF files: their metadata, what their architecture implies,
their experts as views of the file.
"""
