"""`python -m bmaml_ppl` is `bmaml-ppl`."""

from bmaml_ppl.cli import main

if __name__ == "__main__":
    main()
