"""Programs: flags, then a main short enough to read at a glance."""
