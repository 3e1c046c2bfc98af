"""Text out of a model: `sampling.py` chooses a token from logits, `decode.py` runs prompts through prefill and steps.

Nothing here knows about tokenizers, files or terminals; the command `torchlinearmoe/generate.py` does.
"""

from torchlinearmoe.generation.decode import Generation, cast_weights, generate, state_bytes
from torchlinearmoe.generation.sampling import GREEDY, Sampling

__all__ = ["GREEDY", "Generation", "Sampling", "cast_weights", "generate", "state_bytes"]
