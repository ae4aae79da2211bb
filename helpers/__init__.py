"""Anomaly detection in artworks: the code behind the notebooks.

Data flows one way, images -> features and scores -> results -> figures, and imports follow it. Importing this
package touches no GPU, no network and no file; modules that need torch import it on use.
"""
