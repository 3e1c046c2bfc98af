"""Slot attention by its slots."""

KINDS = ("slots", "few_slots")
"""At least 16 slots, which a matrix product of the hardware sums over, and fewer."""
FEWEST = 16


def slot_kind(slots: int) -> str:
    """The kind of a call with so many slots."""
    return "slots" if slots >= FEWEST else "few_slots"
