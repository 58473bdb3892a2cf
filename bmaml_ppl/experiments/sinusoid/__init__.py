"""The papers' sinusoid experiment, told honestly: `bmaml-ppl experiment sinusoid`; `run` is its door."""
