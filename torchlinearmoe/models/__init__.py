"""Decoders: embedding, blocks of mixer and feed-forward, head; families are data in `families/`."""
