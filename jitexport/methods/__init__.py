"""Spatial acceleration methods: which tokens the transformer sees at a step, and how its velocity moves the rest."""
