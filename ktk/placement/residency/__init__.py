"""Which experts are in memory where not all fit: policies, traces to judge them by, slots."""
