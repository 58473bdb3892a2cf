"""Studies on real data that the command line repeats: `bmaml-ppl experiment NAME`."""
