"""Ready task sets: published toy families (`sinusoid`, `sine_line`) and real data frames (`frames`)."""

from bmaml_ppl.datasets import frames, sine_line, sinusoid

__all__ = ["frames", "sine_line", "sinusoid"]
