"""The operators: experts, linear layers, the router, a decoder layer."""
