"""A folder for sys.path: in it ``import kt_kernel`` finds ktk. See ``..install``."""
