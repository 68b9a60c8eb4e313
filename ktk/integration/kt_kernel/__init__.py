"""The face of KT-Kernel: KTMoEWrapper and what its arguments may be."""
