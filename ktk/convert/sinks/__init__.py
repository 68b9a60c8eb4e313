"""Where a conversion writes: one file here for each kind of output, all of the interface ``base.Sink``."""
