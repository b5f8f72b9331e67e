"""``python -m hf_fff``, which is ``hf-fff``."""

from .cli import main

if __name__ == "__main__":
    main()
