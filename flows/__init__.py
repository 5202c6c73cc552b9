"""What runs, in which order: flows, their configuration and the command line."""
