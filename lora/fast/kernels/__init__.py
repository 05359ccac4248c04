"""The Triton kernels: one file a subject, each with the launchers the autograd functions call."""
