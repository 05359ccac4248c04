"""Quantising a model for the fast backend: the reference's, as it is; the formats are the same bits."""

from lora.reference.quantize import quantize

__all__ = ["quantize"]
