"""Backends: ways of turning a fixed-shape module into an engine and of running it. One file a backend."""
