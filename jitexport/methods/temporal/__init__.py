"""Temporal methods: steps whose velocity needs no transformer, or less of it. They combine with all spatial ones."""
