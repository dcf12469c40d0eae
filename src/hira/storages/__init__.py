"""Weights of quantisers that need no layer class of their own: one file for each, and a row in `hira.dispatch`.

A target can only be such a layer if its library was imported already, so no file here imports one for a check.
"""
