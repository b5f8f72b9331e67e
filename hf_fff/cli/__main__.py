"""``python -m hf_fff.cli``, which is ``hf-fff``."""

from . import main

if __name__ == "__main__":
    main()
