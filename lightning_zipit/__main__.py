"""Run the command ``lightning-zipit`` as ``python -m lightning_zipit``."""

from lightning_zipit._lightning.cli import main

if __name__ == "__main__":
    main()
