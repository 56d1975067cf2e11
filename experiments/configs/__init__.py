"""Configs of experiments, named ones, and overrides from the command line."""
