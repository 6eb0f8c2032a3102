"""`python -m nfnet_keras` is `nfnet`."""

from nfnet_keras.cli.main import run

if __name__ == "__main__":
    run()
