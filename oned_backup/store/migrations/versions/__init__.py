"""Modules that make one version of the schema from the one before."""
