"""Activation checkpointing for the fast backend: see `lora.reference.checkpoint` for how it works."""

from lora.reference.checkpoint import checkpoint

__all__ = ["checkpoint"]
