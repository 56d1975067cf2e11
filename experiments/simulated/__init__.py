"""Simulated traffic on deployments: what is run, its files, tables and pictures.

`served` runs a deployment and says what became of its requests, `over_time` what they
met as time went on, `files` writes a run, `report` the text and the pictures.
"""
