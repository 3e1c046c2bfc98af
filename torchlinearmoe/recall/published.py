"""Figures of others for the setting `published`, read off the tradeoff figure of zoology's repository, to about .01.

Numbers of the state, in all layers, and mean accuracy over the tests. For DeltaNet, Gated DeltaNet and GLA the numbers
are those of one head of full width, twice those of the two heads that the configurations there have.
"""

from __future__ import annotations

PUBLISHED: dict[str, tuple[tuple[float, float], ...]] = {
    "gated_delta_net": ((1.7e4, 0.891), (6.7e4, 0.989), (2.6e5, 0.994), (1e6, 1.0)),
    "delta_net": ((8.9e3, 0.794), (3.4e4, 0.964), (1.33e5, 0.996)),
    "based": ((9.3e3, 0.667), (8e4, 0.986), (5.8e5, 1.0)),
    "gla": ((4.8e3, 0.532), (1.78e4, 0.772), (6.8e4, 0.951)),
    "rwkv7": ((1.7e4, 0.817), (1.3e5, 0.915), (1.04e6, 0.981)),
    "mamba2": ((8.1e3, 0.521), (1.63e4, 0.690), (2.44e4, 0.728), (3.26e4, 0.785), (6.5e4, 0.832), (9.8e4, 0.844)),
}
BYTES = 4
"""Of a number in the picture."""


def published(mixer: str) -> list[tuple[float, float]]:
    """(bytes of state, accuracy) of a mixer; none where nobody published any."""
    return [(BYTES * numbers, accuracy) for numbers, accuracy in PUBLISHED.get(mixer, ())]
