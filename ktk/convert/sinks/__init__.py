"""Where a conversion writes: a file for each kind of output, all of ``base.Sink``'s interface."""
