"""Whole models between GGUF files and Hugging Face directories, both ways: what an architecture's
rows are made of.

The rows themselves stand with the architectures (``ktk.models.arch``).
"""
