"""Captioned pictures -> tar shards -> CLIP -> embeddings."""
