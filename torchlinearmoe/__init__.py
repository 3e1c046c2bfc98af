"""A pure PyTorch trainer for Linear-MoE language models."""
