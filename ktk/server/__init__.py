"""An OpenAI-compatible server for one model: FastAPI routes over transformers' continuous
batching.
"""
