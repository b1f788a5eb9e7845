"""Builds a family's bundle from a recipe: trunk, exits, codecs, calibration, certificate, graphs.

`recipe`, `data` and `calibrate` need no torch; the rest comes with `pip install 'kinflow[builder]'`.
"""
