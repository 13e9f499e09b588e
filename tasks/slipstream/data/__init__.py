"""Data sets: their splits, token ids of texts, and the user's functions that return them."""

from slipstream.data.splits import Data, Split

__all__ = ["Data", "Split"]
