"""vLLM's experts by ktk's operator, through vLLM's own plug-in points: ``--quantization ktk``."""
