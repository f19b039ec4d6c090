"""Programs: the command line, and sources and sinks of frames."""
