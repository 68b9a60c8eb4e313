"""The compiled part: ``native`` wraps the C kernels; absent where there was no compiler."""
