"""Modules that mixers, experts and blocks are made of: norms, rotary tables, the dense feed-forward, convolutions."""
