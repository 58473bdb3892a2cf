"""Ready task sets: published toy families (`sinusoid`) and real data frames (`frames`)."""

from bmaml_ppl.datasets import frames, sinusoid

__all__ = ["frames", "sinusoid"]
