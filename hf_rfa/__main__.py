"""`python -m hf_rfa`: the same as the console script `hf-rfa`."""

from hf_rfa.cli import main

if __name__ == "__main__":
    main()
