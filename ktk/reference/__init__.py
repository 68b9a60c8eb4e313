"""NumPy reference: a float64 oracle and the exact integer model of the kernels."""
