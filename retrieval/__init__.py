"""Embeddings -> index -> hits."""
