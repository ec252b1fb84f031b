"""``python -m lightning_zipit`` is ``lightning-zipit``."""

from lightning_zipit._lightning.cli import main

if __name__ == "__main__":
    main()
