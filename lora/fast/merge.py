"""Merging for the fast backend: done once, in float32, and not worth a kernel; the reference's, as it is."""

from lora.reference.merge import merge, merge_and_eject, merge_weight, unmerge

__all__ = ["merge", "merge_and_eject", "merge_weight", "unmerge"]
