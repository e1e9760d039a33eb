"""Pipelines: cutting a model into stages, planning every stage, connecting what was planned."""
