"""Rows of activations, sorted by group, with the weight of their group: a layer of experts."""
