"""Contraction of activations with a stored weight of int8."""
