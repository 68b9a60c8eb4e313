"""Float weights to codes: packing, blocks, error feedback;
each Numba twin beside its definition.
"""
