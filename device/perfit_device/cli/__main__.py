"""`python -m perfit_device.cli` is `perfit`."""

from perfit_device.cli.main import run

if __name__ == "__main__":
    run()
