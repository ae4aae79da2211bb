"""Anomaly detection in artworks: the code behind the notebooks.

Importing this package touches no GPU, no network and no file; modules that need torch import it on use.
"""
