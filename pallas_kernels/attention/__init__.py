"""Attention of a batch of equally long query runs over a dense cache."""
