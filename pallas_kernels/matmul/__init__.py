"""Contraction of activations with a stored weight."""
